"""The command line: the script itself, as a user runs it, in a process of its own.

What needs no new interpreter is forked from one that has imported everything, since an import
takes longer than what the command does.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import platformdirs
import psutil
import pytest
from ends import still_there
from faulty import Fault, FaultKind, LoopbackOpenNeuro
from workers import Nursery

from tio_openneuro.cli import main
from tio_openneuro.dataset import DataladSubjectsDataset
from tio_openneuro.disk.engine import Engine
from tio_openneuro.errors import TioOpenNeuroError
from tio_openneuro.select import Label, Scalar
from tio_openneuro.sizes import format_size

SCRIPT = Path(sys.executable).parent / "tio-openneuro"
IMAGES = ["--image", "t1=sub-*/anat/*_T1w.nii.gz"]

Ended = subprocess.CompletedProcess[str]


def run(*arguments: str, path: str | None = None) -> Ended:
    """Run the script; with ``path`` as the whole PATH."""
    environment = dict(os.environ) if path is None else {**os.environ, "PATH": path}
    return subprocess.run(
        [SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )


def _enter(folder: Path, arguments: tuple[str, ...]) -> int:
    """Run what the script runs, with its output in files; return its exit status."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [str(SCRIPT), *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


@pytest.fixture
def enter(nursery: Nursery, tmp_path: Path) -> Callable[..., Ended]:
    """Return ``run`` without the start of an interpreter."""

    def enter(*arguments: str) -> Ended:
        status = nursery.start(_enter, tmp_path, arguments).result()
        said = [(tmp_path / name).read_text() for name in ("out", "err")]
        return subprocess.CompletedProcess(arguments, status, *said)

    return enter


@pytest.mark.usefixtures("openneuro")
def test_fetch_status_evict_and_doctor_tell_one_story(
    root: Path, enter: Callable[..., Ended]
) -> None:
    """What is fetched is held, what is evicted is gone, and the doctor finds nothing."""
    fetched = run("fetch", "ds900001", *IMAGES, "--disk-budget", "1 MB", "--json")
    assert fetched.returncode == 0, fetched.stderr
    record = json.loads(fetched.stdout)
    assert record["fetched_bytes"] == record["selected_bytes"] == record["used_bytes"] > 6000
    assert record["stopped"] == "done"
    held = json.loads(enter("status", "--json").stdout)
    assert held["used_bytes"] == record["used_bytes"]
    assert 0 < held["ledger_bytes"] < 500_000
    assert format_size(record["used_bytes"]) in enter("status").stdout
    evicted = json.loads(enter("evict", "ds900001", *IMAGES, "--json").stdout)
    assert evicted == {"evicted_bytes": record["used_bytes"], "used_bytes": 0}
    assert not list(root.rglob("*.nii.gz"))
    doctor = enter("doctor")
    assert (doctor.returncode, "no inconsistencies" in doctor.stdout) == (0, True)


@pytest.mark.usefixtures("openneuro")
def test_a_plan_takes_the_budget_that_training_takes(
    root: Path, enter: Callable[..., Ended]
) -> None:
    """Beside a process that states no budget, the plan is made for that one's."""
    with Engine(root) as engine:
        ended = enter("plan", "ds900001", *IMAGES, "--json")
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout)["budget_bytes"] == engine.budget_bytes


def test_info_counts_from_metadata_alone(
    openneuro: LoopbackOpenNeuro, enter: Callable[..., Ended]
) -> None:
    """Subjects, images, bytes and what is selected; nothing is fetched."""
    table = enter("info", "ds900001", *IMAGES)
    assert "images: T1w" in table.stdout
    label = ["--label", "lesion=sub-0[1-4]/anat/*_mask.nii.gz"]
    record = json.loads(enter("info", "ds900001", *IMAGES, *label, "--json").stdout)
    assert record["subjects"] == record["images"]["T1w"] == record["images"]["mask"] == 6
    assert (record["units"], record["skipped"]) == (4, 2)
    assert record["skipped_reasons"] == {"no file for 'lesion'": 2}
    assert record["total_bytes"] > record["units_bytes"] > 4 * 10_000
    assert (record["present_bytes"], record["unavailable_files"]) == (0, 0)
    assert openneuro.total("ds900001").requests == 0


def test_plan_foretells_from_metadata_alone(
    openneuro: LoopbackOpenNeuro, enter: Callable[..., Ended], tmp_path: Path
) -> None:
    """Bytes and seconds for people and programs, and a picture; nothing is fetched."""
    asked = [
        "plan",
        "ds900001",
        *IMAGES,
        "--disk-budget",
        "50 kB",
        "--rate",
        "10 kB",
        "--latency",
        "0",
    ]
    record = json.loads(enter(*asked, "--json", "--png", str(tmp_path / "a.png")).stdout)
    assert record["units"] == 6
    assert record["largest_bytes"] <= 50_000 < record["epoch_bytes"] <= record["first_epoch_bytes"]
    assert 0 < record["later_epoch_bytes"] < record["epoch_bytes"]
    fetched_bytes = record["first_epoch_bytes"] + 9 * record["later_epoch_bytes"]
    assert fetched_bytes / 10_000 <= record["link_busy_s"] <= record["seconds"] + 1e-6
    assert record["later_epoch_held_up_by"] == "link"
    assert record["curve"][-1]["fetched_bytes"] == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    shown = enter(*asked).stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert "training waits for the link" in shown
    assert openneuro.total("ds900001").requests == 0


def test_plan_reads_a_few_headers_where_it_is_asked_to(
    openneuro: LoopbackOpenNeuro, enter: Callable[..., Ended], root: Path
) -> None:
    """By one request each, of which nothing is kept; they tell the voxels, and so the time."""
    asked = ["plan", "ds900001", *IMAGES, "--json", "--workers", "1"]
    guessed, probed = (
        json.loads(enter(*asked, "--probe", count).stdout)["voxels_per_byte"] for count in "03"
    )
    found = openneuro.counters("ds900001")
    counts = {name: count for name, count in found.items() if count.requests}
    assert (len(counts), sum(count.requests for count in counts.values())) == (3, 3)
    assert not list(root.rglob("*.nii.gz"))
    size_bytes = max(count.bytes for count in counts.values())
    assert guessed == 1
    assert probed == pytest.approx(24 * 20 * 16 / size_bytes, 0.05)


@pytest.mark.usefixtures("openneuro")
def test_plan_tells_of_nodes_and_of_the_remote(enter: Callable[..., Ended]) -> None:
    """Bytes of each node, what the remote gives, and how many nodes use up its rate."""
    asked = ["plan", "ds900001", *IMAGES, "--ranks", "4", "--nodes", "2", "--rate", "10 kB"]
    record = json.loads(enter(*asked, "--remote-rate", "30 kB", "--json").stdout)
    assert len(record["first_epoch_node_bytes"]) == 2
    assert sum(record["first_epoch_node_bytes"]) == record["first_epoch_bytes"]
    assert record["saturating_nodes"] == 3
    assert record["first_epoch_remote_bytes_per_s"] <= 20_000
    assert "busiest node" in enter(*asked).stdout
    ended = enter("plan", "ds900001", *IMAGES, "--ranks", "3", "--nodes", "2")
    assert (ended.returncode, "3 ranks" in ended.stderr) == (2, True)


def test_plan_says_what_it_leaves_out_and_why(
    openneuro: LoopbackOpenNeuro, enter: Callable[..., Ended]
) -> None:
    """As ``info`` does, for people and programs, and every unit under some reason."""
    label = ["--label", "lesion=sub-0[1-4]/anat/*_mask.nii.gz"]
    record = json.loads(enter("plan", "ds900001", *IMAGES, *label, "--json").stdout)
    assert (record["units"], record["skipped"]) == (4, 2)
    assert record["skipped_reasons"] == {"no file for 'lesion'": 2}
    assert "Left out: 2 of 6: no file" in enter("plan", "ds900001", *IMAGES, *label).stdout
    damaged = {f"sub-{n:02}/anat/sub-{n:02}_T1w.nii.gz": b"x" * n for n in range(1, 15)}
    openneuro.publish("ds900013", {**damaged, "sub-20/anat/sub-20_T1w.nii.gz": b"image" * 99})
    for command in ("plan", "info"):
        record = json.loads(enter(command, "ds900013", *IMAGES, "--json").stdout)
        assert (record["units"], record["skipped"]) == (1, 14)
        assert sum(record["skipped_reasons"].values()) == 14
        assert record["skipped_reasons"]["4 other reasons"] == 4


@pytest.mark.parametrize(
    ("python", "line", "words", "typed"),
    [
        (
            {"images": {"t1": Scalar(suffix="t1w")}},
            ["--image", "t1:suffix=t1w"],
            ["'t1' = Scalar(suffix='t1w')", "Did you mean suffix='T1w'?"],
            ["'t1' = suffix=t1w among", "Did you mean suffix=T1w?"],
        ),
        (
            {"images": {"t1": Scalar("sub-*/anat/*")}},
            ["--image", "t1=sub-*/anat/*"],
            ["narrow the pattern; or pass on_multiple='first', 'all'"],
            [
                "'t1' = 'sub-*/anat/*', where one is wanted",
                "narrow the pattern; or --on-multiple first, all",
            ],
        ),
        (
            {"images": {"t1": Scalar("sub-*/*/*")}},
            ["--label", "t1=sub-*/*/*"],
            ["or pass on_multiple='first', 'all'"],
            ["or pass combine=union to merge them; or --on-multiple first"],
        ),
        (
            {"version": "2.0.0", "images": {"t1": Scalar(suffix="T1w")}},
            ["--version", "2.0.0", "--image", "t1:suffix=T1w"],
            ["'ds900001@1.0.0' with version='2.0.0'"],
            ["'ds900001@1.0.0' with --version 2.0.0"],
        ),
        (
            {
                "images": {
                    "l": Label("sub-0[12]/anat/*mask*", required=False),
                    "t": Scalar("**/*T1w*"),
                }
            },
            ["--label", "l:glob=sub-0[12]/anat/*mask*,required=false", "--image", "t=**/*T1w*"],
            ["or on_incomplete='allow' and a collate function"],
            ["with required=True to skip those that lack it", "or --on-incomplete allow."],
        ),
    ],
    ids=["entity", "several", "label", "version", "incomplete"],
)
@pytest.mark.usefixtures("openneuro")
def test_each_caller_is_told_what_they_can_type(
    root: Path,
    enter: Callable[..., Ended],
    python: dict[str, Any],
    line: list[str],
    words: list[str],
    typed: list[str],
) -> None:
    """One failure, parameters in Python, options on the command line."""
    source = "ds900001@1.0.0" if "version" in python else "ds900001"
    with pytest.raises(TioOpenNeuroError) as caught:
        DataladSubjectsDataset(source, root=root, **python)
    failed = enter("info", source, *line)
    assert failed.returncode == 1
    for texts, said in ((words, str(caught.value)), (typed, failed.stderr)):
        for text in texts:
            assert text in said
    for parameter in ("Scalar(", "Label(", "on_multiple=", "on_incomplete", "version=", "='"):
        assert parameter not in failed.stderr


@pytest.mark.usefixtures("openneuro")
def test_fetch_stops_at_the_budget(root: Path, enter: Callable[..., Ended]) -> None:
    """A budget below the dataset is filled, not passed, and all of it can be evicted at once."""
    record = json.loads(
        enter("fetch", "ds900001", *IMAGES, "--disk-budget", "30 kB", "--json").stdout
    )
    assert record["used_bytes"] <= 30_000 < record["selected_bytes"]
    assert record["fetched_bytes"] > 20_000
    assert record["stopped"] == "the disk budget is full"
    assert json.loads(enter("evict", "--json").stdout)["evicted_bytes"] == record["used_bytes"]
    assert not list(root.rglob("*.nii.gz"))


@pytest.mark.usefixtures("openneuro")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fetch", "ds999999", *IMAGES], ["ds999999", "no such dataset"]),
        (["fetch", "ds900001", "--image", "t1=sub-*/anat/*_bold.nii.gz"], ["_bold", "T1w"]),
        (["fetch", "ds900001", *IMAGES, "--disk-budget", "1 kB"], ["sub-0", "1.0 kB", "Raise"]),
        (["fetch", "ds900001", *IMAGES, "--version", "9.9.9"], ["9.9.9"]),
        (["fetch", "nowhere/at/all", *IMAGES], ["nowhere/at/all"]),
        (["status", "--root", "/nonexistent-root"], ["/nonexistent-root"]),
    ],
)
def test_failure_is_one_message_on_stderr_and_exit_code_1(
    enter: Callable[..., Ended], arguments: list[str], words: list[str]
) -> None:
    """What failed, on what, and what to do next; no traceback, nothing on stdout."""
    failed = enter(*arguments)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert failed.stdout == ""
    for word in words:
        assert word in failed.stderr


def test_missing_git_is_named(tmp_path: Path) -> None:
    """Without git on the PATH the message says that git is missing."""
    failed = run("fetch", "ds900001", *IMAGES, path=str(tmp_path))
    assert failed.returncode == 1
    assert "git" in failed.stderr
    assert "install" in failed.stderr.lower()
    assert "Traceback" not in failed.stderr


def test_no_network_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path, enter: Callable[..., Ended]
) -> None:
    """A host that cannot be reached is one message, and no clone is left."""
    config = tmp_path / "gitconfig"
    config.write_text(
        '[url "http://127.0.0.1:9/"]\n\tinsteadOf = https://github.com/OpenNeuroDatasets/\n'
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    failed = enter("fetch", "ds900001", *IMAGES)
    assert failed.returncode == 1
    assert "ds900001" in failed.stderr
    assert "network" in failed.stderr
    assert not [path for path in root.rglob("*") if "ds900001" in path.name]


def test_wrong_usage_exits_with_2(enter: Callable[..., Ended]) -> None:
    """Unknown commands, and an image without a name."""
    assert enter("frobnicate").returncode == 2
    assert enter("fetch", "ds900001", "--image", "sub-*").returncode == 2
    assert run("--help").returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_command_with_its_children(
    number: signal.Signals,
    openneuro: LoopbackOpenNeuro,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It says so in one line, exits as a shell would say, and leaves no process and no owner."""
    monkeypatch.setenv("TIO_OPENNEURO_FETCH", "git-annex")
    openneuro.set_faults(Fault(FaultKind.HANG, seconds=600.0, at=0.5))
    command = [SCRIPT, "fetch", "ds900001", *IMAGES, "--disk-budget", "1 MB"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not openneuro.faults_struck()[0]:
            assert process.poll() is None
            threading.Event().wait(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) > 2
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert said == f"tio-openneuro: interrupted ({number.name})\n"
    assert still_there(children) == []
    assert list((root / "ledger" / "owners").iterdir()) == []
    openneuro.clear_faults()
    with Engine(root, disk_budget="1 MB") as engine:
        assert engine.check() == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_command_outlives_a_terminal_where_it_was_told_to(openneuro: LoopbackOpenNeuro) -> None:
    """Under nohup, which has the signal ignored, a closed terminal ends nothing."""
    openneuro.set_faults(Fault(FaultKind.HANG, seconds=600.0, at=0.5))
    command = ["nohup", SCRIPT, "fetch", "ds900001", *IMAGES, "--disk-budget", "1 MB"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not openneuro.faults_struck()[0]:
            assert process.poll() is None
            threading.Event().wait(0.01)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert said.endswith("tio-openneuro: interrupted (SIGTERM)\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "ds900001", *IMAGES, "--disk-budget", "10 apples"],
        ["plan", "ds900001", *IMAGES, "--rate", "auto"],
        ["fetch", "ds900001", "--disk-budget", "0"],
        ["adopt", "ds900001", "--disk-budget", "-1"],
        ["fetch", "ds900001", "--unit", "patient"],
        ["info", "ds900001", *IMAGES, *IMAGES],
        ["fetch", "ds900001", "--image", "t1:suffix"],
        ["frobnicate"],
        ["fetch"],
        ["fetch", "ds900001", "--disk-budget", "10XB"],
        ["plan", "ds900001", *IMAGES, "--rate", "fast"],
        ["info", "ds900001", *IMAGES, "--label", "t1=**/*mask*"],
        ["adopt", "ds900001", "--unit", "patient"],
        ["evict", "ds900001", "--on-multiple", "some"],
        ["info", "ds900001", "--on-incomplete", "skip"],
        ["info", "ds900001", "--image", "t1:suffix=T1w,combine=union"],
        ["info", "ds900001", "--image", "t1:suffix=T1w,required=perhaps"],
    ],
    ids=[
        *("budget", "rate", "zero", "negative", "unit", "twice", "entity", "command", "none"),
        *("letters", "word", "both", "adopted", "multiple", "incomplete", "option", "required"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(
    tmp_path: Path, enter: Callable[..., Ended], arguments: list[str]
) -> None:
    """Before anything is cloned or made; the line says what to try."""
    more = ["--root", str(tmp_path / "new")] if len(arguments) > 1 else []
    ended = enter(*arguments, *more)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.endswith((". Try it with --help.\n", "? Try it with --help.\n"))
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["status"],
        ["doctor"],
        ["doctor", "--repair"],
        ["evict"],
        ["evict", "ds1"],
        ["forget", "ds1"],
    ],
    ids=" ".join,
)
def test_what_only_looks_or_drops_makes_no_root(
    tmp_path: Path, enter: Callable[..., Ended], arguments: list[str]
) -> None:
    """A typing error in ``--root`` is told, and leaves no folder."""
    ended = enter(*arguments, "--root", str(tmp_path / "new"))
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "--root" in ended.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "command", ["status", "doctor", "evict", "info", "fetch", "adopt", "forget"]
)
def test_a_root_that_cannot_be_is_one_line(
    tmp_path: Path, enter: Callable[..., Ended], command: str
) -> None:
    """Whichever command is given it."""
    (tmp_path / "file").touch()
    source = [] if command in {"status", "doctor", "evict"} else ["ds900001"]
    for root in (tmp_path / "file" / "root", tmp_path / "a\nb", tmp_path / ("x" * 600)):
        ended = enter(command, *source, "--root", str(root))
        assert ended.returncode == 1
        assert ended.stderr.count("\n") == 1
        assert "as the root" in ended.stderr
        assert "--root or TIO_OPENNEURO_ROOT" in ended.stderr
    assert not (tmp_path / "a\nb").exists()


def test_looking_at_a_dataset_keeps_nothing(
    openneuro: LoopbackOpenNeuro, root: Path, tmp_path: Path, enter: Callable[..., Ended]
) -> None:
    """A root that is not in use is not begun; one that is keeps the clone for the next command."""
    before = sorted(Path(tempfile.gettempdir()).glob("tio-openneuro-*"))
    looked = enter("info", "ds900001", *IMAGES, "--json")
    assert json.loads(looked.stdout)["units"] == 6
    assert not root.exists()
    assert sorted(Path(tempfile.gettempdir()).glob("tio-openneuro-*")) == before
    (root / "clones").mkdir(parents=True)
    assert enter("info", "ds900001").returncode == 0
    assert (root / "clones" / "ds900001").is_dir()
    assert openneuro.total("ds900001").requests == 0


def test_tables_are_read_without_a_question(
    openneuro: LoopbackOpenNeuro, enter: Callable[..., Ended]
) -> None:
    """No two rows bear one name, a rate has its second, and a stranger's text does nothing."""
    openneuro.publish(
        "ds900014",
        {
            "dataset_description.json": json.dumps({"License": "[/b]\x1b[31mCC0"}).encode(),
            "sub-01/anat/sub-01_T1w.nii.gz": b"image" * 99,
        },
    )
    for command in ("info", "plan"):
        told = enter(command, "ds900014", *IMAGES)
        assert told.returncode == 0, told.stderr
        rows = [line.split("│")[1].strip() for line in told.stdout.splitlines() if "│" in line]
        assert len(rows) == len(set(rows)) > 5
        assert "\x1b" not in told.stdout
        assert ("[/b]?[31mCC0" in told.stdout) == (command == "info")
        assert ("20.0 MB per second" in told.stdout) == (command == "plan")


@pytest.mark.usefixtures("openneuro")
def test_every_command_selects_alike(enter: Callable[..., Ended]) -> None:
    """What is ambiguous for one is ambiguous for all, and has the same ways out."""
    several = ["--image", "any:extension=.nii.gz"]
    ways = ["--on-multiple", "all", "--unit", "run", "--on-incomplete", "allow"]
    for command in ("info", "fetch", "adopt", "evict"):
        refused = enter(command, "ds900001", *several)
        assert refused.returncode == 1
        assert "--on-multiple first, all" in refused.stderr
        done = enter(command, "ds900001", *several, *ways, "--json")
        assert done.returncode == 0, done.stderr
        if command in {"info", "fetch"}:
            assert json.loads(done.stdout)["units"] == 12


def test_help_version_and_completion_answer(
    root: Path, monkeypatch: pytest.MonkeyPatch, enter: Callable[..., Ended]
) -> None:
    """``-h`` is ``--help``, defaults are what holds, and shells are told the commands."""
    assert enter("--version").stdout == f"tio-openneuro {version('tio-openneuro')}\n"
    for command in ((), ("info",), ("status",)):
        asked = [enter(*command, sign) for sign in ("-h", "--help")]
        assert asked[0].stdout == asked[1].stdout
        assert "dynamic" not in asked[0].stdout
        assert asked[0].returncode == 0
    monkeypatch.setenv("COLUMNS", "500")
    shown = run("status", "-h").stdout
    assert f"[default: ({platformdirs.user_cache_dir('tio_openneuro')})]" in shown
    monkeypatch.setenv("_TIO_OPENNEURO_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_CWORD", "1")
    monkeypatch.setenv("COMP_WORDS", "tio-openneuro f")
    assert run().stdout.split() == ["fetch", "forget"]
    assert not root.exists()


@pytest.mark.usefixtures("openneuro")
def test_verbose_logs_ours_alone(tmp_path: Path, nursery: Nursery, root: Path) -> None:
    """Each fetch is told, and no line of another library's."""
    del root
    status = nursery.start(_log_beside, tmp_path).result()
    said = (tmp_path / "err").read_text()
    assert status == 0, said
    assert "sub-01" in said
    assert "of somebody else" not in said


def _log_beside(folder: Path) -> int:
    """Run a verbose command in a process in which another library logs too."""
    status = _enter(folder, ("--verbose", "fetch", "ds900001", *IMAGES))
    logging.getLogger("urllib3").info("of somebody else")
    logging.getLogger("datalad").info("of somebody else")
    sys.stderr.flush()
    return status


@pytest.mark.usefixtures("openneuro")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such terminal")
def test_fetch_shows_a_bar_on_a_terminal() -> None:
    """Bytes, rate and time left on standard error; what is for programs stays as it is."""
    main_end, end = os.openpty()
    command = [SCRIPT, "fetch", "ds900001", *IMAGES, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=end) as process:
        os.close(end)
        said = b""
        with contextlib.suppress(OSError):  # What Linux answers once the other end is closed.
            while block := os.read(main_end, 4096):
                said += block
        os.close(main_end)
        printed, _ = process.communicate(timeout=60)
    assert json.loads(printed)["stopped"] == "done"
    text = said.decode()
    assert "Fetching ds900001" in text
    assert "kB" in text
    assert "0:00:00" in text
