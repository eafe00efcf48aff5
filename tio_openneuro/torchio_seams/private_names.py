"""TorchIO's private names, under names of our own, for whoever else needs what they hold.

Owns the reading and setting of those that datasets and queues need. The other modules of this room
touch some themselves; nobody outside of it does.
"""
# ruff: noqa: SLF001 - that is what this module is for

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature

import torchio as tio
from torchio.constants import LOCATION, NUM_SAMPLES


def reserved_names() -> frozenset[str]:
    """Return the names of a subject that TorchIO or the queue give a meaning of their own.

    Those of every attribute of a subject, what its constructor cannot take, and what samplers,
    queues and transforms read or write. An image called so, or a value, would be taken for that.
    """
    subject = tio.Subject(image=tio.ScalarImage("none", verify_path=False))  # type: ignore[no-untyped-call]
    made = signature(tio.RandomLabelsToImage).parameters["image_key"].default
    taken = {*dir(subject), *signature(tio.Subject.__init__).parameters} - {*subject}
    return frozenset(taken | {LOCATION, NUM_SAMPLES, made, "name"})


def is_loaded(image: tio.Image) -> bool:
    """Return whether an image's voxels are in RAM; its public attributes would load them."""
    return bool(image._loaded)


def transform_of(dataset: tio.SubjectsDataset) -> Callable[[tio.Subject], tio.Subject] | None:
    """Return the transform that a dataset applies to each subject."""
    return getattr(dataset, "_transform", None)


def share_subjects(dataset: tio.SubjectsDataset, subjects: Sequence[tio.Subject]) -> None:
    """Give a copy of a dataset other subjects."""
    dataset._subjects = subjects


def leave_unfilled(queue: tio.Queue) -> None:
    """Set what the constructor of a queue would set, where it is not to begin by itself."""
    queue._subjects_iterable = None
