"""Queues and datasets that nobody closes, or that are closed in any order.

A collection can run in any line of any thread, also of ours while it holds a lock. Each case is in
a process of its own with a deadline.
"""

import os
import subprocess
import sys
from pathlib import Path

import collecting
import numpy as np
import pytest
from workers import Nursery

from tio_openneuro.loopback import LoopbackOpenNeuro, Volume

ACCESSION = "ds900093"
MOST = 300
FOLDS = 25
DEADLINE_S = 120.0


@pytest.fixture(scope="session")
def _subjects(_published: LoopbackOpenNeuro) -> None:
    files = {}
    for number in range(MOST):
        image = np.full((6, 6, 6), number, np.int16)
        files[f"sub-{number:04}/anat/sub-{number:04}_T1w.nii.gz"] = Volume(image, np.eye(4))
    _published.publish(ACCESSION, files)


@pytest.mark.usefixtures("_subjects", "openneuro")
@pytest.mark.parametrize("subjects", [60, MOST])
def test_queues_in_cycles_are_closed_wherever_they_are_collected(
    nursery: Nursery, root: Path, subjects: int
) -> None:
    """A fold's queue is left in a trainer that knows itself: no hang, no ignored error."""
    with nursery.start(collecting.train_folds, root, ACCESSION, subjects, FOLDS) as worker:
        found = worker.result(DEADLINE_S)
    assert found == {"patches": 3 * FOLDS, "heard": [], "left": []}


_ENDS = """
import logging, sys
import torchio as tio, tio_openneuro as tno
logging.basicConfig(level=logging.WARNING)
images = {"t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz")}
dataset = tno.DataladSubjectsDataset("ds900001", images, disk_budget="1 MB", jobs=2)
queue = tno.BudgetedQueue(
    dataset, 8, 2, tio.UniformSampler(8), num_workers=int(sys.argv[2]), ram_budget="4 GB"
)
loader = tio.SubjectsLoader(queue, batch_size=2)
class Trainer:
    def fit(self):
        self.me = self
        for batch in loader:
            raise KeyboardInterrupt
print(len(next(iter(loader))["t1"][tio.DATA]))
how = sys.argv[1]
if how == "dataset first":
    dataset.close()
    queue.close()
    dataset.close()
    queue.close()
elif how == "interrupted":
    try:
        Trainer().fit()
    except KeyboardInterrupt:
        dataset.close()
        del queue, loader
elif how == "cycle":
    dataset.me, queue.me = dataset, queue
    del dataset, queue, loader
elif how == "inside":
    with dataset, queue:
        dataset.close()
print("end")
"""


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "how",
    [
        "dataset first",
        "interrupted",
        "inside",
        "cycle",
        "alive",
    ],
)
def test_closing_never_raises_and_needs_no_order(
    openneuro: LoopbackOpenNeuro, root: Path, how: str, num_workers: int
) -> None:
    """By hand, at the interpreter's end, after an interrupt: nothing is said, nobody is left."""
    done = subprocess.run(
        [sys.executable, "-c", _ENDS, how, str(num_workers)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env=dict(os.environ),
    )
    assert (done.stdout, done.stderr, done.returncode) == ("2\nend\n", "", 0)
    assert list((root / "ledger" / "owners").iterdir()) == []
