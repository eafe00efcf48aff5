"""What the tests stand on.

Real: git, git-annex, DataLad, SQLite, HTTP, and an OpenNeuro of our own on 127.0.0.1 (git over
smart HTTP, an S3 special remote with public URLs, rates, latency and faults). Fake: only
``fakes.FakeRepo``, a clone without git-annex for schedules that the real one is too slow for;
one contract suite runs on both. Nothing is mocked. Every test has a home and a git configuration
of its own, without an identity, as on a new machine; at its end no child process and no thread is
left, and every ledger agrees with its disk.

With ``-n 2`` two processes share the tests. One that is marked ``alone``, since it measures memory
or processor time, or needs all processors itself, waits until the other's test has ended, and the
other waits for it.
"""

import fcntl
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from faulty import LoopbackOpenNeuro
from gallery import publish_stand_ins
from workers import Nursery

from tio_openneuro.annex.repo import AnnexRepo
from tio_openneuro.disk.engine import Engine
from tio_openneuro.loopback import Volume
from tio_openneuro.sources.install import install

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def _turn(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Let a test that is marked ``alone`` run while no other process of the suite runs one."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    folder = tmp_path_factory.getbasetemp().parent
    with (folder / "door").open("w") as door, (folder / "room").open("w") as room:
        # Who waits for the whole room holds the door, so that nobody goes in before.
        fcntl.flock(door, fcntl.LOCK_EX)
        alone = request.node.get_closest_marker("alone") is not None
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield
        # A child that the test forked may hold the descriptor still.
        fcntl.flock(room, fcntl.LOCK_UN)


@pytest.fixture(autouse=True)
def _new_machine(_turn: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the test an empty home, no git identity, and a root of its own."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("TIO_OPENNEURO_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for name in [name for name in os.environ if name.startswith(("GIT_AUTHOR", "GIT_COMMITTER"))]:
        monkeypatch.delenv(name)


@pytest.fixture(params=["http", "git-annex"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return one of the ways by which public content comes, each in turn."""
    name: str = request.param
    monkeypatch.setenv("TIO_OPENNEURO_FETCH", name)
    return name


@pytest.fixture
def repo(openneuro: LoopbackOpenNeuro, root: Path) -> AnnexRepo:
    """Return a clone of ours of ``ds900001``."""
    del openneuro  # It serves what is installed.
    dataset = install("ds900001", root)
    return AnnexRepo(dataset.path, remotes=dataset.remotes)


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    """Fail the test that leaves a child, a thread, or a ledger that disagrees with its disk."""
    before = {*_children(), *threading.enumerate()}
    yield
    for ledger in _ledgers(tmp_path):
        engine = Engine(ledger.parent, disk_budget="1 TB")
        assert engine.check() == []
        engine.close()
    if not before.issuperset({*_children(), *threading.enumerate()}):
        # A loader whose worker failed hangs in a cycle with the error, and its workers with it.
        gc.collect()
        for thread in set(threading.enumerate()) - before:
            # One that begins just now cannot be joined yet.
            assert thread._started.wait(timeout=10)
            thread.join(timeout=10)
            assert not thread.is_alive(), f"left behind: {thread}"
        left = [child for child in _children() - before if not _is_tracker(child)]
        _, alive = psutil.wait_procs(left, timeout=10)
        assert not alive, f"left behind: {[child.cmdline() for child in alive]}"


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _ledgers(folder: Path) -> Iterator[Path]:
    """Find the ledgers that were used, without a look at what lies in clones."""
    for path, folders, _ in os.walk(folder):
        if "ledger" in folders and any(Path(path, "ledger").iterdir()):
            yield Path(path, "ledger")
        folders[:] = set(folders) - {".git", "clones", "ledger"}


def _is_tracker(process: psutil.Process) -> bool:
    """Tell Python's own helper of ``multiprocessing``, which stays until the interpreter ends."""
    try:
        return "resource_tracker" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Return a process that has imported everything once, and forks workers."""
    with Nursery(tmp_path_factory.mktemp("nursery")) as started:
        yield started


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return the folder of clones and ledger that the library uses by default here."""
    return tmp_path / "root"


def heads(count: int, *, shape: tuple[int, int, int] = (24, 20, 16)) -> dict[str, Volume | bytes]:
    """Return the files of a small BIDS dataset: T1w and lesion label of each subject."""
    files: dict[str, Volume | bytes] = {
        "dataset_description.json": b'{"Name": "Heads", "BIDSVersion": "1.10.0"}',
        "participants.tsv": b"participant_id\tage\tsex\n"
        + b"".join(
            f"sub-{number:02}\t{20 + number}\t{'FM'[number % 2]}\n".encode()
            for number in range(1, count + 1)
        ),
    }
    for number in range(1, count + 1):
        rng = np.random.default_rng(number)
        image = rng.integers(0, 1000, shape).astype(np.int16)
        label = np.zeros(shape, np.uint8)
        label[number : number + 6, 6:12, 4:10] = 1
        affine = np.diag([1.0, 1.2, 1.5, 1.0])
        stem = f"sub-{number:02}/anat/sub-{number:02}"
        files[f"{stem}_T1w.nii.gz"] = Volume(image, affine)
        files[f"{stem}_label-lesion_mask.nii.gz"] = Volume(label, affine)
    return files


@pytest.fixture(scope="session")
def _published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackOpenNeuro]:
    folder = tmp_path_factory.mktemp("openneuro")
    with LoopbackOpenNeuro(folder, set_environment=False) as server:
        server.publish("ds900001", heads(6))
        yield server


@pytest.fixture
def openneuro(
    _published: LoopbackOpenNeuro, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LoopbackOpenNeuro]:
    """Return a loopback OpenNeuro with ``ds900001``: six heads, T1w and lesion label each."""
    for name, value in _published.environment.items():
        monkeypatch.setenv(name, value)
    _published.reset_counters()
    yield _published
    _published.clear_faults()


@pytest.fixture(scope="session")
def _gallery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackOpenNeuro]:
    folder = tmp_path_factory.mktemp("gallery")
    with LoopbackOpenNeuro(folder, set_environment=False) as server:
        publish_stand_ins(server)
        yield server


@pytest.fixture
def stand_ins(_gallery: LoopbackOpenNeuro, monkeypatch: pytest.MonkeyPatch) -> LoopbackOpenNeuro:
    """Return a loopback OpenNeuro with small ``ds004199`` and ``ds000001``, for the examples."""
    for name, value in _gallery.environment.items():
        monkeypatch.setenv(name, value)
    return _gallery
