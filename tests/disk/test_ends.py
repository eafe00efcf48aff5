"""A process ends in the middle of its work: no process, no lock and no uncounted byte is left."""

import os
import sqlite3
import sys
import threading
from pathlib import Path

import filelock
import psutil
import pytest
from conftest import heads
from ends import ENDS, end, still_there
from faulty import Fault, FaultKind, LoopbackOpenNeuro
from workers import Nursery

from tio_openneuro.annex.repo import AnnexRepo
from tio_openneuro.annex.tree import index_tree
from tio_openneuro.content import ContentFile, ContentUnit
from tio_openneuro.disk.engine import Engine
from tio_openneuro.ledger.owners import holding_pids
from tio_openneuro.sources.install import InstalledDataset, install

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the next process ends")
ACCESSION = "ds900077"
WORK = ("http", "git-annex", "clone")


@pytest.fixture(scope="session")
def _large(_published: LoopbackOpenNeuro) -> None:
    """Publish a head of which a half is on disk, and not in a buffer, when the server hangs."""
    _published.publish(ACCESSION, heads(1, shape=(96, 80, 64)))


def unit_of(dataset: InstalledDataset) -> ContentUnit:
    """Return the first subject of a dataset."""
    repo = AnnexRepo(dataset.path, remotes=dataset.remotes)
    files = [
        ContentFile(repo, file.key, file.path)
        for file in index_tree(dataset.path, dataset.commit)
        if file.key is not None and file.path.startswith("sub-01/")
    ]
    return ContentUnit("sub-01", tuple(files))


def hang(root: Path, work: str) -> None:
    """Clone, or fetch from a clone, what never comes whole."""
    if work == "clone":
        install(ACCESSION, root)
    dataset = install(ACCESSION, root)
    with Engine(root, disk_budget="10 MB") as engine, engine.lease(unit_of(dataset)):
        pass


def fork_and_end(root: Path, work: str, way: str) -> None:
    """Work in a thread, fork a process that lives on once that is asked for, and end."""
    threading.Thread(target=hang, args=(root, work), daemon=True).start()
    while not (root / "fork").exists():
        threading.Event().wait(0.01)
    pid = os.fork()
    if pid == 0:
        threading.Event().wait()
    (root / "forked.new").write_text(str(pid))
    (root / "forked.new").rename(root / "forked")
    while not (root / "end").exists():
        threading.Event().wait(0.01)
    end(way)


def wait_for(openneuro: LoopbackOpenNeuro, worker: psutil.Process, root: Path, work: str) -> None:
    """Wait until the server hangs, and what came before that is on disk."""
    while not openneuro.faults_struck()[0] or (work != "clone" and not held_bytes(root)):
        assert worker.is_running()
        threading.Event().wait(0.01)


def held_bytes(root: Path) -> int:
    """Return the bytes of content, whole and partial, in the clones under a root."""
    files = [
        *root.glob("clones/*/.git/annex/tmp/*"),
        *root.glob("clones/*/.git/annex/objects/*/*/*/*"),
    ]
    return sum(file.stat().st_size for file in files)


def counted_bytes(root: Path) -> int:
    """Return what the ledger has charged, as it stands: nobody who opens it cleans up."""
    db = sqlite3.connect(f"file:{root}/ledger/ledger.sqlite?mode=ro", uri=True)
    try:
        return int(db.execute("SELECT sum(size_bytes) FROM content").fetchone()[0] or 0)
    finally:
        db.close()


@pytest.mark.usefixtures("_large")
@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("way", ENDS)
def test_nothing_is_left_however_a_process_ends(
    work: str,
    way: str,
    openneuro: LoopbackOpenNeuro,
    root: Path,
    nursery: Nursery,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its children end, its locks are free and its bytes counted, while a fork of it lives on."""
    monkeypatch.setenv("TIO_OPENNEURO_FETCH", work)
    root.mkdir()
    if work != "clone":
        install(ACCESSION, root)
    pattern = "git/*" if work == "clone" else "*"
    openneuro.set_faults(Fault(FaultKind.HANG, pattern, seconds=600.0, at=0.5))
    with nursery.start(fork_and_end, root, work, way) as worker:
        wait_for(openneuro, worker.process, root, work)
        (root / "fork").touch()
        while not (root / "forked").exists():
            assert worker.process.is_running()
            threading.Event().wait(0.01)
        forked = psutil.Process(int((root / "forked").read_text()))
        children = set(worker.process.children(recursive=True)) - {forked}
        assert bool(children) == (work != "http")
        (root / "end").touch()
        assert worker.wait(30)
        try:
            assert still_there(children) == []
            assert forked.is_running()
            clones = ("clones/*/.git", "clones/*/.git/annex/tmp/*")
            files = [
                root,
                *(file for name in ("ledger/owners/*", *clones) for file in root.glob(name)),
            ]
            assert holding_pids(files, {"FLOCK"}) == holding_pids(files, {"OFDLCK"}) == []
            lock = filelock.FileLock(root / "clones" / f".{ACCESSION}.lock")
            lock.acquire(timeout=0)
            lock.release()
            if work != "clone":
                assert counted_bytes(root) >= held_bytes(root) > 0
                with Engine(root, disk_budget="10 MB") as engine:
                    assert engine.check() == []
            openneuro.clear_faults()
            unit = unit_of(install(ACCESSION, root))
            with Engine(root, disk_budget="10 MB") as engine, engine.lease(unit, timeout_s=60):
                assert engine.statistics().used_bytes == held_bytes(root) == unit.size_bytes
        finally:
            forked.kill()
