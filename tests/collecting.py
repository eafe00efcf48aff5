"""Queues that nobody closes: in reference cycles, collected wherever a collection happens.

Everything here runs in a process of its own, which somebody else kills at a deadline.
"""

import gc
import random
import sys
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torchio as tio

import tio_openneuro as tno


class Trainer:
    """A trainer that knows itself, as Lightning's does: only a collection frees it."""

    def __init__(self, queue: tno.BudgetedQueue) -> None:
        """Keep the queue."""
        self.queue = queue
        self.trainer = self


class Witness:
    """Hears of errors that Python ignores, in finalizers and in threads; context manager."""

    def __init__(self) -> None:
        """Have heard of none."""
        self.heard: list[str] = []

    def __enter__(self) -> list[str]:
        """Listen; return what is heard."""
        self._before = sys.unraisablehook, threading.excepthook
        sys.unraisablehook = self._hear
        threading.excepthook = self._hear
        return self.heard

    def _hear(self, event: Any) -> None:
        self.heard.append(f"{event.exc_type.__name__}: {event.exc_value}")

    def __exit__(self, *_: object) -> None:
        """Stop."""
        sys.unraisablehook, threading.excepthook = self._before


def train_folds(root: Path, accession: str, subjects: int, folds: int) -> dict[str, object]:
    """Make a queue over a view for each fold, and leave it in a cycle; return what was seen.

    What there is before is frozen, so that each collection is a whole one and takes no time; and
    thresholds change all the time, so that it comes at any allocation, in any thread.
    """
    torch.set_num_threads(1)
    patches = 0
    images = {"t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz")}
    over = threading.Event()

    def disturb() -> None:
        numbers = random.Random(0)
        while not over.wait(0.001):
            gc.set_threshold(numbers.choice([1, 1, 10, 100]), 1, 1)

    with Witness() as heard:
        dataset = tno.DataladSubjectsDataset(accession, images, root=root, disk_budget="1 MB")
        queue = None
        gc.collect()
        gc.freeze()
        gc.set_threshold(1, 1, 1)
        disturber = threading.Thread(target=disturb)
        disturber.start()
        for fold in range(folds):
            view = dataset[[(fold + index) % len(dataset) for index in range(subjects)]]
            queue = tno.BudgetedQueue(
                view, 4, 1, tio.UniformSampler(4), num_workers=2, ram_budget="4 GB", seed=fold
            )
            trainer = Trainer(queue)
            patches += sum(1 for _ in islice(queue, 3))
            del queue, trainer
        over.set()
        disturber.join()
        gc.set_threshold(700, 10, 10)
        gc.unfreeze()
        gc.collect()
        dataset.close()
    for thread in threading.enumerate():
        if thread.name.startswith("tio-openneuro"):
            thread.join(20)
    left = [t.name for t in threading.enumerate() if t.name.startswith("tio-openneuro")]
    return {"patches": patches, "heard": heard, "left": left}
