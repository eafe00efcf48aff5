"""Forks beside a queue that fills: no child waits for a lock that one of our threads held.

Each training, and each fork that may hang, is in a process of its own with a deadline. All calls
against all calls, and sixty trainings, are ``python tests/benchmarks forks``.
"""

import os
import subprocess
import sys
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
FORKS = pytest.mark.xfail(strict=True, reason="issue 11, item 1: forks")


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


@FORKS
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


@FORKS
@pytest.mark.parametrize("how", ["file", "transform", "dataset"])
def test_a_fork_waits_until_no_thread_is_inside_itk(
    nursery: Nursery, folder: Path, how: str
) -> None:
    """Voxels or header, read by us, by a transform or by the user's dataset."""
    with nursery.start(forking.fork_into_reading, folder, how) as worker:
        assert worker.result() == [0, 0]


@FORKS
def test_children_of_every_kind_read_beside_a_queue(nursery: Nursery, folder: Path) -> None:
    """Pools that fork, spawn or ask a server, and a child whose ``preexec_fn`` reads."""
    wanted = {"fork": 72, "spawn": 12, "forkserver": 12, "preexec_fn": 72}
    for how, count in wanted.items():
        with nursery.start(forking.start_processes, folder, how) as worker:
            assert worker.result(TRAINING_S) == count, how


_EXIT = """
import os, sys
from pathlib import Path
import torchio as tio, tio_openneuro as tno
import forking
dataset, _ = forking.make_datasets(Path(sys.argv[1]), "local", forking.make_transform("light"))
queue = tno.BudgetedQueue(dataset, 8, 4, tio.UniformSampler(8), num_workers=4, ram_budget="4 GB")
children = []
for _ in range(3):
    for patch in queue:
        pid = os.fork()
        if pid == 0:
            sys.exit(0)
        children.append(pid)
print(*forking.await_children(children))
"""


@FORKS
def test_a_child_that_ends_as_python_does_closes_nothing_of_its_parents(folder: Path) -> None:
    """Its finalizers and exit handlers find the parent's queue, whose locks may be held."""
    done = subprocess.run(
        [sys.executable, "-c", _EXIT, str(folder)],
        capture_output=True,
        text=True,
        timeout=TRAINING_S,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert (done.returncode, done.stdout.strip()) == (0, "0 0"), done.stderr
