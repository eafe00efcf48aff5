"""The queue's ends, as users meet them: notebooks, Ctrl-C in a fetch, processes that stop.

Real: a Jupyter kernel, signals, a loopback OpenNeuro whose answers hang.
"""

import signal
import subprocess
import sys
import time

import psutil
import pytest
from faulty import Fault, FaultKind
from jupyter_client.manager import start_new_kernel

TIMEOUT_S = 120

_MAKE = """
import threading, time, psutil, torch, torchio as tio
import tio_openneuro as tno
dataset = tno.DataladSubjectsDataset(
    "ds900001", {"t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz")}, disk_budget="1 GB", jobs=2
)
def count_threads(wanted=3):
    # Those of a queue that nobody closed end soon, and not at once.
    deadline_s = time.monotonic() + 20
    while True:
        count = sum(t.name.startswith("tio-openneuro-queue") for t in threading.enumerate())
        if count == wanted or time.monotonic() > deadline_s:
            return count
        time.sleep(0.01)
"""
_CELL = """
queue = tno.BudgetedQueue(dataset, 8, 2, tio.UniformSampler(8), num_workers=3, seed=0)
loader = tio.SubjectsLoader(queue, batch_size=2)
for batch in loader:
    break
print(count_threads())
"""
_STANDING = """
for batch in loader:
    print("standing", flush=True)
    threading.Event().wait(60)
"""
_WHOLE = "print(sum(len(batch['t1'][tio.DATA]) for batch in loader), count_threads())"


class Kernel:
    """A Jupyter kernel; context manager."""

    def __enter__(self):
        """Start it."""
        self.manager, self.client = start_new_kernel(kernel_name="python3")
        self.process = psutil.Process(self.manager.provisioner.pid)
        return self

    def start(self, code):
        """Begin to run a cell, and return its number."""
        return self.client.execute(code)

    def wait_for(self, text):
        """Wait until the running cell prints something."""
        while text not in self.client.get_iopub_msg(timeout=TIMEOUT_S)["content"].get("text", ""):
            pass

    def finish(self, number):
        """Wait for a cell's end; return what it printed, or the name of its error."""
        # Answers to the questions with which the kernel was started may still come.
        reply = self.client.get_shell_msg(timeout=TIMEOUT_S)
        while reply["parent_header"].get("msg_id") != number:
            reply = self.client.get_shell_msg(timeout=TIMEOUT_S)
        printed = []
        while True:
            message = self.client.get_iopub_msg(timeout=TIMEOUT_S)
            if message["parent_header"].get("msg_id") != number:
                continue
            if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
                printed.append(message["content"]["text"])
            if message["content"].get("execution_state") == "idle":
                break
        content = reply["content"]
        return "".join(printed).strip() if content["status"] == "ok" else content["ename"]

    def run(self, code):
        """Run a cell to its end."""
        return self.finish(self.start(code))

    def __exit__(self, *_exception):
        """End it as its user would."""
        self.client.stop_channels()
        self.manager.shutdown_kernel()


def test_a_cell_that_is_run_twice_leaves_one_queue(openneuro):
    """In a real kernel: the old queue's threads end, an interrupt leaves the next pass whole."""
    with Kernel() as kernel:
        assert kernel.run(_MAKE) == ""
        assert kernel.run(_CELL) == "3"
        assert kernel.run(_CELL) == "3"
        assert kernel.run(_WHOLE) == "12 3"
        number = kernel.start(_STANDING)
        kernel.wait_for("standing")
        kernel.manager.interrupt_kernel()
        assert kernel.finish(number) == "KeyboardInterrupt"
        assert kernel.run(_WHOLE) == "12 3"
        assert kernel.run("queue.close()\nprint(count_threads(0))") == "0"
        assert kernel.run("dataset.close()\nprint(psutil.Process().children())") == "[]"
        children = kernel.process.children(recursive=True)
        assert children == []
    assert not kernel.process.is_running()


_SHOWN = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    dataset = tno.DataladSubjectsDataset(
        "ds900001", {"t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz")}, disk_budget=BUDGET
    )
for subject in dataset:
    pass
del subject
print(*(str(w.message) for w in caught if "budget" in str(w.message)))
dataset
"""
_LEFT = """
deadline_s = time.monotonic() + 60
def left():
    ours = [t.name for t in threading.enumerate() if t.name.startswith(("tio-", "coprocess"))]
    return ours + psutil.Process().children(recursive=True)
while left() and time.monotonic() < deadline_s:
    time.sleep(0.01)
print(left(), dataset)
"""
_CLOSED = """
for shown in Out.values():
    if shown is not dataset:
        shown.close()
print(dataset)
"""


def test_a_dataset_that_an_output_holds_keeps_its_budget_and_nothing_else(openneuro):
    """A larger budget warns, naming the output; threads and children end; closed, it is gone."""
    with Kernel() as kernel:
        assert kernel.run(_MAKE) == ""
        assert kernel.run("dataset.close()") == ""
        assert kernel.run(_SHOWN.replace("BUDGET", "'30 kB'")) == ""
        holds = f"30.0 kB, stated by process {kernel.process.pid} (this one) since"
        warned = kernel.run(_SHOWN.replace("BUDGET", "'1 GB'"))
        assert holds in warned
        assert "Out[" in warned
        left = kernel.run(_LEFT)
        assert left.startswith("[] DataladSubjectsDataset")
        assert f"disk budget {holds}" in left
        assert kernel.run(_CLOSED).endswith("; disk budget 1.0 GB)")
        assert kernel.run("print(len([subject for subject in dataset]))") == "6"


_SCRIPT = """
import os, sys, threading, time, torchio as tio
import tio_openneuro as tno
dataset = tno.DataladSubjectsDataset(
    "ds900001", {"t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz")}, disk_budget="1 GB", jobs=2
)
queue = tno.BudgetedQueue(dataset, 8, 2, tio.UniformSampler(8), num_workers=int(sys.argv[1]))
print("made", flush=True)
def train():
    for patch in queue:
        if sys.argv[2] == "raise":
            raise ValueError("in the step")
        if sys.argv[2] == "break":
            break
if sys.argv[2] == "interrupt":
    try:
        train()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    sys.stdin.readline()
    print(sum(1 for _ in queue), flush=True)
else:
    train()
print("end", flush=True)
"""


def start(num_workers, event):
    """Start a training that prints a line when it has made its queue."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(num_workers), event],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "made\n"
    return process


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Return the folder of a training's temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def leftovers(root, temporary):
    """Return what a training must not leave: temporary files of its own, and owners."""
    return [*temporary.glob("tio-openneuro*"), *(root / "ledger" / "owners").iterdir()]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_interrupt_in_a_fetch_that_hangs_comes_back_and_the_next_pass_is_whole(
    openneuro, root, temporary, way, num_workers
):
    """Ctrl-C is answered while the remote says nothing, and leaves nothing behind."""
    openneuro.set_faults(Fault(FaultKind.HANG, seconds=6, at=0))
    process = start(num_workers, "interrupt")
    deadline_s = time.monotonic() + TIMEOUT_S
    while not any(openneuro.faults_struck()):
        assert process.poll() is None
        assert time.monotonic() < deadline_s
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n"
    openneuro.clear_faults()
    out, errors = process.communicate("go on\n", timeout=TIMEOUT_S)
    assert (out, process.returncode) == ("12\nend\n", 0), errors
    assert bool(children) == (way == "git-annex")
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    assert leftovers(root, temporary) == []


@pytest.mark.parametrize("event", ["break", "raise", "whole"])
def test_a_training_that_ends_in_any_way_leaves_nothing(openneuro, root, temporary, event):
    """After a break, an exception and a whole epoch: no child, file, owner or lease."""
    openneuro.set_faults(Fault(FaultKind.HANG, "ds900001/sub-04/*", seconds=1, at=0))
    process = start(2, event)
    children = psutil.Process(process.pid).children(recursive=True)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == (1 if event == "raise" else 0), errors
    assert ("in the step" in errors) == (event == "raise")
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    assert leftovers(root, temporary) == []
