"""Progress as a person sees it: in a terminal of 80 columns, in a file, and in a notebook.

Real: a pseudo terminal, a Jupyter kernel, a queue over a loopback OpenNeuro.
"""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
import torch
import torchio as tio
from test_lifecycle import TIMEOUT_S, Kernel

import tio_openneuro as tno

_TRAINING = """
import tio_openneuro as tno, torchio as tio
dataset = tno.DataladSubjectsDataset(
    "ds900001", {"t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz")}, disk_budget="1 GB", jobs=2
)
queue = tno.BudgetedQueue(dataset, 8, 2, tio.UniformSampler(8), num_workers=2, seed=0)
with tno.progress(queue):
    for epoch in range(2):
        for batch in tio.SubjectsLoader(queue, batch_size=2):
            pass
        print(f"validated {epoch}")
queue.close()
statistics = dataset.statistics()
dataset.close()
"""
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def lines_of(shown: str) -> list[str]:
    """Return lines without colours and moves of the cursor."""
    return [line.rstrip() for line in re.split(r"[\r\n]+", _ESCAPES.sub("", shown))]


def run_in_terminal(code: str, columns: int) -> tuple[int, str]:
    """Run a program whose output is a terminal; return its status and all that came."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    came = bytearray()
    try:
        while block := os.read(ours, 65_536):
            came += block
    except OSError:
        pass  # So Linux tells that nobody has the other end any more.
    finally:
        os.close(ours)
    return process.wait(TIMEOUT_S), came.decode()


@pytest.mark.usefixtures("openneuro")
def test_a_terminal_of_80_columns_shows_the_run() -> None:
    """One board, changed in place, ends at the last epoch's end; the loop's own lines stay."""
    code = _TRAINING + "print('fetched', statistics.fetched_bytes)"
    status, shown = run_in_terminal(code, 80)
    lines = lines_of(shown)
    assert status == 0, shown
    assert max(map(len, lines)) <= 80
    assert "\x1b[1A" in shown  # It moved up, to write over what it had shown.
    assert {"validated 0", "validated 1"} <= set(lines)
    last = lines[len(lines) - 1 - lines[::-1].index(next(x for x in lines[::-1] if "epoch" in x)) :]
    names = [line[:11].strip() for line in last[:8]]
    assert names == [
        *("epoch 1", "patches", "disk held", "RAM held", "link", "in flight"),
        *("skipped", "held up by"),
    ]
    assert last[0].endswith("12 of 12 patches")
    assert re.search(r"\d+\.\d per second +\d+% of the time waiting$", last[1])
    assert last[2].endswith("of 1.0 GB")
    fetched = int(lines[-2].removeprefix("fetched "))
    assert last[4].endswith(f"{fetched / 1000:.1f} kB fetched")
    assert re.search(r"held up by +(consumer|link|decoding) ", last[7])


@pytest.mark.usefixtures("openneuro")
def test_a_file_gets_the_last_state_once() -> None:
    """Without anybody who looks, there are no moves of the cursor, and one board."""
    done = subprocess.run(
        [sys.executable, "-c", _TRAINING], capture_output=True, text=True, timeout=TIMEOUT_S,
        check=True,
    )  # fmt: skip
    assert "\x1b" not in done.stdout
    assert done.stdout.count("held up by") == 1
    assert "12 of 12 patches" in done.stdout
    assert done.stdout.startswith("validated 0\nvalidated 1\nepoch 1")


@pytest.mark.usefixtures("openneuro")
def test_a_notebook_changes_one_output_in_place() -> None:
    """A real kernel sends one display, then changes of it alone; no widget is needed."""
    with Kernel() as kernel:
        number = kernel.start(_TRAINING)
        shown, changed, errors = [], [], []
        while True:
            message = kernel.client.get_iopub_msg(timeout=TIMEOUT_S)
            if message["parent_header"].get("msg_id") != number:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "display_data":
                shown.append(content)
            elif kind == "update_display_data":
                changed.append(content)
            elif kind == "error" or content.get("name") == "stderr":
                errors += [content] * ("TqdmWarning" not in str(content))  # TorchIO's own import.
            elif content.get("execution_state") == "idle":
                break
        assert errors == []
        # The first is the bar of opening, gone at its end; the second is the board.
        assert len(shown) == 2
        board = shown[1]["transient"]["display_id"]
        assert {one["transient"]["display_id"] for one in changed[-1:]} == {board}
        last = changed[-1]["data"]
        assert "12 of 12 patches" in last["text/plain"]
        assert "epoch 1" in last["text/html"]
        assert "<script" not in last["text/html"]
        opening = shown[0]["transient"]["display_id"]
        bars = [one["data"] for one in changed if one["transient"]["display_id"] == opening]
        assert bars[-1]["text/plain"].strip() == ""


@pytest.mark.usefixtures("openneuro")
def test_fetching_shows_bytes_and_why_it_stopped() -> None:
    """All of it is there, or the budget is full: said at the end, in 80 columns."""
    code = """
import tio_openneuro as tno
for budget in ("1 GB", "40 kB"):
    images = {"t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz")}
    with tno.DataladSubjectsDataset("ds900001", images, disk_budget=budget) as dataset:
        dataset.evict()
        print("came", dataset.fetch(progress=True))
"""
    status, shown = run_in_terminal(code, 80)
    assert status == 0, shown
    lines = lines_of(shown)
    assert max(map(len, lines)) <= 80
    whole = [line for line in lines if "ds900001: done" in line]
    part = [line for line in lines if "ds900001: the disk budget is full" in line]
    assert whole
    assert part
    came = [int(line.split()[1]) / 1000 for line in lines if line.startswith("came ")]
    assert 0 < came[1] <= 40 < came[0]
    assert f"{came[0]:.1f}/{came[0]:.1f} kB" in whole[-1]
    assert f"{came[1]:.1f}/{came[0]:.1f} kB" in part[-1]


def test_a_loader_is_refused_by_name() -> None:
    """What users have at hand is the loader: the message says what to give instead."""
    subject = tio.Subject(t1=tio.ScalarImage(tensor=torch.zeros(1, 8, 8, 8)))
    dataset = tio.SubjectsDataset([subject])
    loader = tio.SubjectsLoader(dataset)
    with pytest.raises(TypeError, match=r"SubjectsLoader.*Give the queue itself"):
        tno.progress(loader).__enter__()
    with pytest.raises(TypeError, match=r"SubjectsDataset.*Give the queue itself"):
        tno.report(dataset, "nowhere.html")
