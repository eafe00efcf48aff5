"""What the tests stand on.

Real: git, git-annex, DataLad, SQLite, HTTP, and an OpenNeuro of our own on 127.0.0.1 (git over
smart HTTP, an S3 special remote with public URLs, rates, latency and faults). Fake: only
``fakes.FakeRepo``, a clone without git-annex for schedules that the real one is too slow for;
one contract suite runs on both. Nothing is mocked. Every test has a home and a git configuration
of its own, without an identity, as on a new machine; at its end no child process is left and
every ledger agrees with its disk.
"""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from faulty import LoopbackOpenNeuro

from tio_openneuro.disk.engine import Engine
from tio_openneuro.loopback import Volume

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def _new_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    """Fail the test that leaves a child process, or a ledger that disagrees with its disk."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    for ledger in tmp_path.rglob("ledger"):
        if ledger.is_dir() and any(ledger.iterdir()):
            engine = Engine(ledger.parent, disk_budget="1 TB")
            assert engine.check() == []
            engine.close()
    # A loader whose worker failed hangs in a cycle with the error, and its workers with it.
    gc.collect()
    children = psutil.Process().children(recursive=True)
    left = [child for child in children if child.pid not in before and not _is_tracker(child)]
    _, alive = psutil.wait_procs(left, timeout=10)
    assert not alive, f"left behind: {[child.cmdline() for child in alive]}"


def _is_tracker(process: psutil.Process) -> bool:
    """Tell Python's own helper of ``multiprocessing``, which stays until the interpreter ends."""
    try:
        return "resource_tracker" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return True


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
