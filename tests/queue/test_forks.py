"""Forks beside a queue that fills: no child waits for a lock that one of our threads held.

Each training, and each fork that may hang, is in a process of its own with a deadline. All calls
against all calls, and sixty trainings, are ``python tests/benchmarks forks``.
"""

from pathlib import Path

import forking
import psutil
import pytest
from workers import Nursery, Worker

TRAINING_S = 90.0
CELLS = [
    ("local", 1, "light", "before"),
    ("local", 4, "heavy", "middle"),
    ("remote", 2, "light", "between"),
    ("remote", 4, "light", "middle"),
    ("prepared", 2, "heavy", "before"),
    ("prepared", 1, "light", "middle"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with some local volumes."""
    forking.write_volumes(tmp_path / "local")
    forking.write_volumes(tmp_path)
    return tmp_path


def family(worker: Worker) -> set[psutil.Process]:
    """Return the descendants of a process that are there now."""
    try:
        return set(worker.process.children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def test_trainings_with_a_forked_validation_end_and_leave_nobody(
    nursery: Nursery, folder: Path, openneuro: object
) -> None:
    """Whatever is read, by 1, 2 or 4 threads, before the first batch, in an epoch or between."""
    for cell in CELLS:
        seen: set[psutil.Process] = set()
        with nursery.start(forking.train, folder, *cell) as worker:
            for _ in range(int(TRAINING_S / 0.1)):
                seen |= family(worker)
                if worker.wait(0.1):
                    break
            assert worker.result(0.1) == forking.wanted(cell[3]), cell
        _, alive = psutil.wait_procs(seen, timeout=10)
        assert alive == [], cell


@pytest.mark.parametrize("how", ["file", "transform", "dataset"])
def test_a_fork_waits_until_no_thread_is_inside_itk(
    nursery: Nursery, folder: Path, how: str
) -> None:
    """Voxels or header, read by us, by a transform or by the user's dataset."""
    with nursery.start(forking.fork_into_reading, folder, how) as worker:
        assert worker.result() == [0, 0]


def test_children_of_every_kind_read_beside_a_queue(nursery: Nursery, folder: Path) -> None:
    """Pools that fork, spawn or ask a server, and a child whose ``preexec_fn`` reads."""
    wanted = {"fork": 36, "spawn": 12, "forkserver": 12, "preexec_fn": 36}
    for how, count in wanted.items():
        with nursery.start(forking.start_processes, folder, how) as worker:
            assert worker.result(TRAINING_S) == count, how


def test_a_child_closes_nothing_of_its_parents(nursery: Nursery, folder: Path) -> None:
    """Its collections and exit handlers find the parent's queue, whose locks may be held."""
    with nursery.start(forking.end_children, folder) as worker:
        assert worker.result(TRAINING_S) == [0, 0]
