"""Programs that train on a queue, are interrupted and go on: what each batch consisted of.

Each makes everything anew from a checkpoint, as a program that was started again does. A run is a
list of passes over the loader, a pass a list of batches, a batch the digests of its patches.
"""

import hashlib
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torchio as tio
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

import tio_openneuro as tno

SUBJECTS, SAMPLES, BATCH, EPOCHS = 6, 3, 4, 3
PATCHES = SUBJECTS * SAMPLES
Run = list[list[list[str]]]


def make_dataset() -> tio.SubjectsDataset:
    """Return subjects in RAM, augmented as in training."""
    subjects = []
    for number in range(SUBJECTS):
        voxels = torch.rand(1, 16, 16, 16, generator=torch.Generator().manual_seed(number))
        subjects.append(tio.Subject(t1=tio.ScalarImage(tensor=voxels), subject_id=f"sub-{number}"))
    return tio.SubjectsDataset(subjects, tio.Compose([tio.RandomFlip(), tio.RandomNoise()]))


def make_queue(num_workers: int = 2) -> tno.BudgetedQueue:
    """Return a queue of eighteen patches an epoch."""
    return tno.BudgetedQueue(
        make_dataset(),
        7,
        SAMPLES,
        tio.UniformSampler(6),
        num_workers=num_workers,
        ram_budget="4 GB",
        seed=1,
    )


class Wrapper(Dataset):
    """A dataset of a user's own around a queue, which looks like no queue."""

    def __init__(self, queue: tno.BudgetedQueue) -> None:
        """Keep it."""
        self.inner = queue

    def __len__(self) -> int:
        """Return its length."""
        return len(self.inner)

    def __getitem__(self, index: int) -> tio.Subject:
        """Return its patch."""
        return self.inner[index]


class StatefulWrapper(Wrapper):
    """One whose state torchdata saves beside its own."""

    def state_dict(self) -> dict[str, Any]:
        """Return the queue's."""
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the queue go on from it."""
        self.inner.load_state_dict(state)


def make_loader(kind: str, queue: tno.BudgetedQueue, *, drop_last: bool) -> DataLoader:
    """Return a loader of four patches at a time."""
    options = {"batch_size": BATCH, "drop_last": drop_last, "num_workers": 0}
    if kind == "subjects":
        return tio.SubjectsLoader(queue, **options)
    if kind == "torch":
        return DataLoader(queue, collate_fn=list, **options)
    wrappers = {"stateful": lambda inner: inner, "wrapped": StatefulWrapper, "plain": Wrapper}
    return StatefulDataLoader(wrappers[kind](queue), collate_fn=list, **options)


def digests(batch: Any) -> list[str]:
    """Return a digest of each patch, whether collated or not."""
    if isinstance(batch, list):
        parts = [(p["subject_id"], p[tio.LOCATION], p["t1"][tio.DATA]) for p in batch]
    else:
        parts = list(
            zip(batch["subject_id"], batch[tio.LOCATION], batch["t1"][tio.DATA], strict=True)
        )
    found = []
    for name, location, voxels in parts:
        text = name.encode() + str(location.tolist()).encode() + voxels.numpy().tobytes()
        found.append(hashlib.sha256(text).hexdigest()[:12])
    return found


def join(first: Run, second: Run, *, whole: int) -> Run:
    """Return two parts of a run as one: a pass that was cut short goes on, empty ones are none."""
    first, second = [p for p in first if p], [p for p in second if p]
    if first and second and len(first[-1]) < whole:
        return [*first[:-1], first[-1] + second[0], *second[1:]]
    return first + second


# A loop of the user's own


def train_plainly(
    kind: str,
    *,
    drop_last: bool,
    batches: int,
    checkpoint: dict[str, Any] | None = None,
    counted: bool = True,
) -> tuple[Run, dict[str, Any]]:
    """Train for some batches in all; return the passes, and the checkpoint after the last one.

    Args:
        kind: Of the loader.
        drop_last: As the loader's.
        batches: After which the program ends.
        checkpoint: From which it goes on.
        counted: Whether the loop takes no more batches of a resumed pass than are whole there.
    """
    run: Run = []
    with make_queue() as queue:
        loader = make_loader(kind, queue, drop_last=drop_last)
        stateful = isinstance(loader, StatefulDataLoader)
        most = None
        if checkpoint is not None:
            if "queue" in checkpoint:
                queue.load_state_dict(checkpoint["queue"])
            if stateful:
                loader.load_state_dict(checkpoint["loader"])
            elif counted and drop_last:
                most = queue.left // BATCH
        seen = 0
        while seen < batches:
            run.append([])
            for batch in islice(loader, most):
                run[-1].append(digests(batch))
                seen += 1
                if seen == batches:
                    break
            most = None
        saved = {"queue": queue.state_dict()}
        if stateful:
            saved["loader"] = loader.state_dict()
            if kind != "plain":
                del saved["queue"]
    return run, saved


# Accelerate


def train_with_accelerate(
    kind: str, folder: Path, *, drop_last: bool, batches: int, resume: bool
) -> Run:
    """Train for some batches in all, with the queue among what Accelerate saves and loads."""
    from accelerate import Accelerator

    run: Run = []
    accelerator = Accelerator(cpu=True)
    with make_queue() as queue:
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(queue)
        loader = make_loader(kind, queue, drop_last=drop_last)
        most = None
        if resume:
            accelerator.load_state(str(folder))
            most = queue.left // BATCH if drop_last else None
        seen = 0
        while seen < batches:
            run.append([])
            for batch in islice(loader, most):
                run[-1].append(digests(batch))
                accelerator.backward(model(torch.ones(1, 1)).sum())
                optimizer.step()
                seen += 1
                if seen == batches:
                    break
            most = None
        accelerator.save_state(str(folder))
    return run
