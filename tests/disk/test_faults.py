"""What goes wrong from outside: a faulty remote, a disk that others fill, Ctrl-C.

All on a real clone and remote, by both ways of fetching, at the level of the engine or above,
with the bytes on disk watched from another process. Whatever is delivered is compared with its
SHA-256 before it was published; whatever is not must be the right error before its deadline.
"""

import contextlib
import hashlib
import logging
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import psutil
import pytest
from faulty import Fault, FaultKind, LoopbackOpenNeuro

from tio_openneuro.annex.repo import AnnexRepo
from tio_openneuro.annex.tree import index_tree
from tio_openneuro.content import ContentFile, ContentUnit
from tio_openneuro.demo.watch import DiskWatch
from tio_openneuro.disk.engine import Engine
from tio_openneuro.errors import (
    ContentMismatchError,
    FetchError,
    RemoteUnavailableError,
    TioOpenNeuroError,
)
from tio_openneuro.sources.install import install

pytestmark = pytest.mark.usefixtures("way")
ACCESSION = "ds900021"
SIZE_BYTES = 200_000
STALL_S = 2.0
TOTAL_S = 60.0
DEADLINE_S = 100.0
"""Of one unit of one fetch; a hang would last until pytest's own timeout."""


def note(figures: str) -> None:
    """Tell figures of a campaign: ``pytest -m slow --log-cli-level=INFO`` shows them."""
    logging.getLogger(__name__).info("%s", figures)


def paths() -> list[str]:
    return [
        f"sub-{number:02}/anat/sub-{number:02}_{suffix}.nii.gz"
        for number in range(1, 7)
        for suffix in ("T1w", "FLAIR")
    ]


def content_of(path: str) -> bytes:
    """Return the published bytes, which no compression shortens."""
    return random.Random(path).randbytes(SIZE_BYTES)


@pytest.fixture(scope="session")
def _faulty(_published: LoopbackOpenNeuro) -> None:
    _published.publish(ACCESSION, {path: content_of(path) for path in paths()})


@pytest.fixture
def faulty(_faulty: None, openneuro: LoopbackOpenNeuro) -> Iterator[LoopbackOpenNeuro]:
    """Return a loopback OpenNeuro with ``ds900021``: six subjects of two files of 200 kB."""
    yield openneuro
    openneuro.clear_faults()
    openneuro.set_connection_rate(None)


def open_units(
    root: Path, *, stall_s: float = STALL_S, total_s: float = TOTAL_S
) -> list[ContentUnit]:
    """Return the six subjects, in a clone that is less patient than by default."""
    dataset = install(ACCESSION, root)
    repo = AnnexRepo(
        dataset.path, remotes=dataset.remotes, stall_timeout_s=stall_s, total_timeout_s=total_s
    )
    subjects: dict[str, list[ContentFile]] = {}
    for file in index_tree(dataset.path, dataset.commit):
        if file.key is not None:
            subject = file.path.partition("/")[0]
            subjects.setdefault(subject, []).append(ContentFile(repo, file.key, file.path))
    return [ContentUnit(name, tuple(files)) for name, files in sorted(subjects.items())]


def read(engine: Engine, unit: ContentUnit) -> None:
    """Lease a unit, and compare it with what was published."""
    with engine.lease(unit, timeout_s=TOTAL_S) as found:
        for file in unit.files:
            digest = hashlib.sha256(found[file.key].read_bytes()).hexdigest()
            assert digest == hashlib.sha256(content_of(file.path)).hexdigest()


def read_all(
    engine: Engine, units: list[ContentUnit], *, deadline_s: float = DEADLINE_S, ahead: bool = True
) -> dict[str, tuple[BaseException, float]]:
    """Read units in two threads; return what failed, and after how many seconds."""
    if ahead:
        engine.prefetch(units)

    def attempt(unit: ContentUnit) -> tuple[BaseException, float] | None:
        begun_s = time.monotonic()
        try:
            read(engine, unit)
        except TioOpenNeuroError as error:
            return error, time.monotonic() - begun_s
        return None

    failed = {}
    with ThreadPoolExecutor(2) as pool:
        asked = {unit.name: pool.submit(attempt, unit) for unit in units}
        for name, result in asked.items():
            found = result.result(timeout=deadline_s)
            if found is not None:
                failed[name] = found
    return failed


def watched(root: Path, budget_bytes: int, work: Callable[[Engine], None]) -> int:
    """Do something with an engine, and see from outside that the budget held; return the peak."""
    with DiskWatch(root) as watch, Engine(root, disk_budget=budget_bytes, jobs=4) as engine:
        work(engine)
        assert engine.check() == []
    peak_bytes = max(sample.held_bytes for sample in watch.samples())
    assert peak_bytes <= budget_bytes
    return peak_bytes


PASSING = [
    Fault(FaultKind.UNAVAILABLE, probability=0.3),
    Fault(FaultKind.NOT_FOUND, count=1),
    Fault(FaultKind.BAD_RANGE, count=2),
    Fault(FaultKind.TRUNCATE, probability=0.5),
    Fault(FaultKind.RESET, probability=0.5),
    Fault(FaultKind.RESET_REUSED, count=3),
    Fault(FaultKind.FLIP, count=2),
    Fault(FaultKind.HANG, count=2, seconds=60),
    Fault(FaultKind.SLOW, count=2, seconds=0.05),
]


def kind_of(value: object) -> str:
    return value.kind.name.lower() if isinstance(value, Fault) else ""


@pytest.mark.parametrize("fault", PASSING, ids=kind_of)
def test_passing_faults_are_recovered_from(
    faulty: LoopbackOpenNeuro, root: Path, fault: Fault
) -> None:
    """Every subject arrives with the right bytes, within a budget of two subjects."""
    units = open_units(root)[:4]
    faulty.set_faults(fault)

    def work(engine: Engine) -> None:
        begun_s = time.monotonic()
        assert read_all(engine, units) == {}
        note(f"passing {fault.kind.name}: all arrived after {time.monotonic() - begun_s:.1f} s")

    watched(root, 2 * units[0].size_bytes, work)
    assert sum(faulty.faults_struck()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("budget_units", [1, 2, 4])
@pytest.mark.parametrize("seed", range(2))
def test_all_faults_at_once_are_recovered_from_or_named(
    faulty: LoopbackOpenNeuro, root: Path, budget_units: int, seed: int
) -> None:
    """Two passes under every fault: right bytes, or an error that says what the remote did."""
    units = open_units(root)
    faulty.set_faults(
        *(
            Fault(kind, probability=0.06, seed=seed, seconds=60 if kind == "hang" else 0.05)
            for kind in FaultKind
        )
    )
    delivered = []

    def work(engine: Engine) -> None:
        for _ in range(2):
            failed = read_all(engine, units, deadline_s=300)
            assert all(isinstance(error, FetchError) for error, _ in failed.values())
            delivered.append(len(units) - len(failed))

    peak_bytes = watched(root, budget_units * units[0].size_bytes, work)
    struck = sum(faulty.faults_struck())
    note(f"all at once: {budget_units=} {seed=} {struck=} {delivered=} {peak_bytes=}")
    assert sum(delivered) >= 10


LASTING = [
    (Fault(FaultKind.NOT_FOUND), RemoteUnavailableError, "404", 20),
    (Fault(FaultKind.FORBIDDEN), RemoteUnavailableError, "403", 20),
    (Fault(FaultKind.BAD_RANGE), RemoteUnavailableError, "416", 30),
    (Fault(FaultKind.FLIP), ContentMismatchError, "checksum", 30),
    (Fault(FaultKind.HANG, at=0.0, seconds=60), RemoteUnavailableError, "nothing more", 60),
]
LONG = [
    (Fault(FaultKind.UNAVAILABLE), RemoteUnavailableError, "overloaded", TOTAL_S + 30),
    (Fault(FaultKind.TRUNCATE, at=0.0), RemoteUnavailableError, "connection failed", 60),
    (Fault(FaultKind.RESET, at=0.0), RemoteUnavailableError, "connection failed", 60),
    (Fault(FaultKind.SLOW, at=0.0, seconds=0.05), RemoteUnavailableError, "nothing more", 60),
]


@pytest.mark.parametrize(
    ("fault", "error", "words", "deadline_s"),
    [*LASTING, *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG)],
    ids=kind_of,
)
def test_lasting_faults_of_one_file_fail_its_subject_alone(
    faulty: LoopbackOpenNeuro,
    root: Path,
    fault: Fault,
    error: type[FetchError],
    words: str,
    deadline_s: float,
) -> None:
    """The error is of its class, names subject and file, comes in time, and leaves no bytes."""
    units = open_units(root)[:3]
    bad = units[1].files[0].path
    faulty.set_faults(Fault(fault.kind, f"*/{bad}", at=fault.at, seconds=fault.seconds))

    def work(engine: Engine) -> None:
        failed = read_all(engine, units, deadline_s=deadline_s)
        assert list(failed) == ["sub-02"]
        raised, took_s = failed["sub-02"]
        note(f"lasting {fault.kind.name}: {type(raised).__name__} after {took_s:.1f} s: {raised}")
        assert type(raised) is error
        assert words in str(raised)
        assert bad in str(raised)
        engine.evict(units)
        assert engine.statistics().used_bytes == 0
        faulty.clear_faults()
        read(engine, units[1])

    watched(root, 2 * units[0].size_bytes, work)


def test_a_remote_that_refuses_everything_fails_every_subject(
    faulty: LoopbackOpenNeuro, root: Path
) -> None:
    """403 for all: each subject fails in time, nothing is held, and later all is well."""
    units = open_units(root)[:3]
    faulty.set_faults(Fault(FaultKind.FORBIDDEN))

    def work(engine: Engine) -> None:
        failed = read_all(engine, units, deadline_s=30)
        assert [type(error) for error, _ in failed.values()] == [RemoteUnavailableError] * 3
        assert engine.statistics().used_bytes == 0
        faulty.clear_faults()
        assert read_all(engine, units) == {}

    watched(root, units[0].size_bytes, work)


@pytest.mark.slow
def test_a_hang_of_a_minute_is_cut_short(faulty: LoopbackOpenNeuro, root: Path) -> None:
    """With the patience that users get, a hang of 60 s costs half of it."""
    units = open_units(root, stall_s=30, total_s=600)[:2]
    faulty.set_faults(Fault(FaultKind.HANG, count=1, seconds=60))

    def work(engine: Engine) -> None:
        begun_s = time.monotonic()
        assert read_all(engine, units, deadline_s=55) == {}
        note(f"hang of 60 s: recovered after {time.monotonic() - begun_s:.1f} s")

    watched(root, units[0].size_bytes, work)


# A disk that another program fills


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Mount a small file system; skip where this machine does not let us."""
    folder.mkdir()
    options = f"size={size_bytes}"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.name == "nt" or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class OtherProgram:
    """Takes every byte that comes free on a disk, until it is told to end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._end = threading.Event()
        self.full = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with (self._folder / "others").open("wb", buffering=0) as file:
            while not self._end.is_set():
                try:
                    file.write(bytes(4096))
                except OSError:
                    self.full.set()
                    self._end.wait(0.005)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self.full.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        (self._folder / "others").unlink()


def wait_until_held(watch: DiskWatch, size_bytes: int) -> None:
    """Read the observer's lines until one tells of so many bytes."""
    deadline_s = time.monotonic() + 60
    while watch.samples()[-1].held_bytes < size_bytes:
        assert watch._process is not None
        assert time.monotonic() < deadline_s
        watch._take(watch._process, timeout_s=30)


def test_a_disk_that_others_fill_is_named_and_used_again_later(
    faulty: LoopbackOpenNeuro, tmp_path: Path
) -> None:
    """A FetchError names the full disk before its deadline; with space again all is well."""
    with small_disk(tmp_path / "small", 12_000_000) as root:
        units = open_units(root)
        faulty.set_faults(Fault(FaultKind.HANG, seconds=1.0, count=2))
        with (
            DiskWatch(root / "clones") as watch,
            Engine(root, disk_budget=3 * units[0].size_bytes, jobs=2) as engine,
            ThreadPoolExecutor(1) as pool,
        ):
            begun_s = time.monotonic()
            reading = pool.submit(read, engine, units[0])
            wait_until_held(watch, 1)
            with OtherProgram(root):
                with pytest.raises(FetchError, match="disk is full") as caught:
                    reading.result(timeout=60)
                note(f"disk full: after {time.monotonic() - begun_s:.1f} s: {caught.value}")
                with pytest.raises(TioOpenNeuroError, match="full"):
                    pool.submit(read, engine, units[1]).result(timeout=60)
            assert read_all(engine, units) == {}
            assert engine.check() == []
        peak_bytes = max(sample.held_bytes for sample in watch.samples())
        assert peak_bytes <= 3 * units[0].size_bytes


# Ctrl-C


def runs(process: psutil.Process) -> bool:
    """Return whether it runs; its new parent may be slow to collect it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


LAST = "import atexit, os; atexit.register(os.write, 1, b'closed')"
"""Says when all has been closed; what torch takes to be unloaded after that is not ours."""
ENGINE = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_faults import open_units
from tio_openneuro.disk.engine import Engine
root = Path(sys.argv[1])
units = open_units(root, stall_s=60)
engine = Engine(root, disk_budget="10 MB", jobs=4)
engine.prefetch(units)
with engine.lease(units[0]):
    pass
"""
QUEUE = """
import sys
import torchio as tio
import tio_openneuro as tno
dataset = tno.DataladSubjectsDataset(
    "ds900021", {"t1": tno.Scalar(suffix="T1w")}, root=sys.argv[1], disk_budget="10 MB"
)
queue = tno.BudgetedQueue(dataset, 8, 2, tio.UniformSampler(8), num_workers=2)
for patch in tio.SubjectsLoader(queue, batch_size=2):
    pass
"""
ITEM = QUEUE.partition("queue =")[0] + "dataset[0]\n"


@pytest.mark.parametrize(
    "script",
    [ENGINE, QUEUE, pytest.param(ITEM, marks=pytest.mark.slow)],
    ids=["engine", "queue", "item"],
)
def test_ctrl_c_ends_a_fetch_at_once(
    faulty: LoopbackOpenNeuro, root: Path, script: str, way: str
) -> None:
    """SIGINT while all fetches stand: the process ends, and with it its children and locks."""
    install(ACCESSION, root)
    faulty.set_faults(Fault(FaultKind.HANG, seconds=60))
    with DiskWatch(root / "clones") as watch:
        process = subprocess.Popen(
            [sys.executable, "-c", LAST + script, str(root), *sys.path],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            wait_until_held(watch, SIZE_BYTES // 4)
            children = psutil.Process(process.pid).children(recursive=True)
            # A look at the git-annex branch by git is no child that fetches.
            commands = [child.cmdline() for child in filter(runs, children)]
            by_child = any({"annex", "get"} <= set(command) for command in commands)
            assert by_child == (way == "git-annex")
            begun_s = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert select.select([process.stdout], [], [], 4)[0]
            ours_s = time.monotonic() - begun_s
            _, said = process.communicate(timeout=30)
            ended_s = time.monotonic() - begun_s
            note(f"Ctrl-C: all closed after {ours_s:.2f} s, ended after {ended_s:.2f} s")
        finally:
            process.kill()
    assert b"KeyboardInterrupt" in said
    assert [child for child in children if runs(child)] == []
    assert list((root / "ledger" / "owners").iterdir()) == []
    with Engine(root, disk_budget="10 MB") as engine:
        assert engine.check() == []
