"""An engine over forks, and at the end of the interpreter."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
from fakes import FakeRepo, content_of, make_unit
from test_engine_processes import TEN_TO_ONE, make_units
from workers import Nursery, Observer

from tio_openneuro.content import ContentUnit
from tio_openneuro.disk.engine import Engine


def fork_and_lease(root: Path, units: list[ContentUnit]) -> tuple[int, int]:
    """Use one engine on both sides of a fork; return the child's status and its fetches."""
    engine = Engine(root, disk_budget=units[0].size_bytes, open_repo=FakeRepo.reopen)
    engine.prefetch(units[:1])
    with engine.lease(units[0]):
        pass
    pid = os.fork()
    if pid == 0:
        with engine.lease(units[1], timeout_s=20):
            pass
        fetched = engine.statistics().fetched_files
        engine.close()
        os._exit(fetched)
    _, status = os.waitpid(pid, 0)
    with engine.lease(units[0], timeout_s=20):
        pass
    fetched = engine.statistics().fetched_files
    engine.close()
    return os.waitstatus_to_exitcode(status), fetched


def test_an_engine_survives_a_fork(nursery: Nursery, root: Path) -> None:
    """A forked child is an owner of its own, with its own threads, under the same budget.

    The parent counts what both fetched.
    """
    units = make_units(FakeRepo(root / "clones" / "ds1"), 2, (4000,))
    with nursery.start(fork_and_lease, root, units) as worker:
        assert worker.result() == (2, 6)


def fork_while_busy(root: Path, units: list[ContentUnit], budget_bytes: int) -> list[int]:
    """Fork again and again while threads fetch; return what the children delivered."""
    engine = Engine(root, disk_budget=budget_bytes, jobs=4, open_repo=FakeRepo.reopen)
    over = threading.Event()

    def consume() -> None:
        while not over.is_set():
            for unit in units:
                with engine.lease(unit, timeout_s=20):
                    pass

    threads = [threading.Thread(target=consume) for _ in range(3)]
    for thread in threads:
        thread.start()
    pids = []
    for _ in range(6):
        engine.prefetch(units)
        pid = os.fork()
        if pid == 0:
            delivered = 0
            for unit in reversed(units):
                with engine.lease(unit, timeout_s=20) as paths:
                    delivered += all(p.read_bytes() == content_of(k) for k, p in paths.items())
            engine.close()
            os._exit(delivered)
        pids.append(pid)
    delivered = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    over.set()
    for thread in threads:
        thread.join()
    engine.close()
    return delivered


def test_an_engine_can_be_forked_at_any_instant(nursery: Nursery, root: Path) -> None:
    """Children forked while threads use ledger and disk find no lock that nobody holds."""
    repo = FakeRepo(root / "clones" / "ds1", chunk_pause_s=0.0005)
    units = make_units(repo, 8, TEN_TO_ONE)
    budget_bytes = 2 * max(unit.size_bytes for unit in units)
    with (
        Observer(repo) as observer,
        nursery.start(fork_while_busy, root, units, budget_bytes) as worker,
    ):
        assert worker.result() == [len(units)] * 6
    assert observer.peak_bytes <= budget_bytes
    assert repo.noted("violations") == []


def fork_and_die(root: Path, unit: ContentUnit) -> None:
    """Leave a forked child behind that uses no engine, and die with a lease."""
    engine = Engine(root, disk_budget=unit.size_bytes, open_repo=FakeRepo.reopen)
    with engine.lease(unit):
        pid = os.fork()
        if pid == 0:
            threading.Event().wait()
        unit.files[0].repo.note("children", str(pid))  # type: ignore[attr-defined]
        os._exit(0)


def test_a_forked_child_does_not_keep_a_dead_owner_alive(nursery: Nursery, root: Path) -> None:
    """The lock is not inherited by a fork, whose process is nobody's orphaned download."""
    repo = FakeRepo(root / "clones" / "ds1")
    unit = make_unit(repo, "sub-1", 1000)
    with nursery.start(fork_and_die, root, unit) as worker:
        worker.wait(30)
        child = psutil.Process(int(repo.noted("children")[0]))
        try:
            with Engine(root, disk_budget=1000, open_repo=FakeRepo.reopen) as engine:
                assert engine.statistics().used_bytes == 1000
                assert engine._here().ledger.holdings().lease_pids == ()
                assert child.is_running()
        finally:
            child.kill()


_EXIT = """
import sys, threading
sys.path[:0] = sys.argv[3:]
from pathlib import Path
from fakes import FakeRepo, make_unit
from tio_openneuro.disk.engine import Engine
repo = FakeRepo(Path(sys.argv[2]))
repo.gate = threading.Event()
engine = Engine(Path(sys.argv[1]), disk_budget=1000, open_repo=FakeRepo.reopen)
engine.prefetch([make_unit(repo, "sub-1", 1000)])
assert repo.halfway.wait(30)
"""


def test_the_interpreter_ends_while_a_download_hangs(root: Path) -> None:
    """A script that ends without closing leaves no thread waiting, and nothing charged."""
    repo = FakeRepo(root / "clones" / "ds1")
    arguments = [str(root), str(repo.path), *sys.path]
    ended = subprocess.run(
        [sys.executable, "-c", _EXIT, *arguments], capture_output=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, b"")
    with Engine(root, disk_budget=1000, open_repo=FakeRepo.reopen) as engine:
        assert engine.statistics().used_bytes == repo.held_bytes() == 0
