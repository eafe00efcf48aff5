"""Lists of whole subjects, for networks that take volumes rather than patches.

Owns the count of bytes that a list holds. The next list is fetched while one is used, by the
dataset's engine; it is loaded when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torchio as tio

from tio_openneuro.errors import RamBudgetError
from tio_openneuro.sizes import ask_unit, format_size

if TYPE_CHECKING:
    from tio_openneuro.dataset.dataset import DataladSubjectsDataset


def batches(
    dataset: DataladSubjectsDataset,
    count: int | None,
    ram_budget_bytes: int,
    *,
    shuffle: bool,
    seed: int,
) -> Iterator[list[tio.Subject]]:
    """Yield lists of loaded subjects; see ``DataladSubjectsDataset.batches``.

    Raises:
        ValueError: ``count`` is below one.
        RamBudgetError: A subject alone exceeds half of the budget.
    """
    if count is not None and count < 1:
        raise ValueError(f"Cannot make lists of {count} subjects: give at least 1, or None.")
    generator = torch.Generator().manual_seed(seed)
    order = range(len(dataset))
    indices = torch.randperm(len(dataset), generator=generator).tolist() if shuffle else list(order)
    return _lists(dataset, indices, count, ram_budget_bytes // 2)


def _lists(
    dataset: DataladSubjectsDataset, indices: list[int], count: int | None, most_bytes: int
) -> Iterator[list[tio.Subject]]:
    with dataset.fetching_ahead(indices):
        held: list[tio.Subject] = []
        held_bytes = 0
        for index in indices:
            if len(held) == count:
                yield held
                held, held_bytes = [], 0
            subject = dataset[index]
            size_bytes = subject_bytes(subject)
            if size_bytes > most_bytes:
                name = subject.get("subject_id", f"subject {index}")
                raise RamBudgetError(
                    f"Cannot hold {name} in RAM: its images take {format_size(size_bytes)}, and "
                    f"half of the RAM budget is {format_size(most_bytes)}, since two lists are "
                    f"held at a time. Raise ram_budget to at least {2 * size_bytes} bytes, or "
                    f"crop or resample in preprocess.{ask_unit(2 * most_bytes)}",
                    unit=str(name),
                )
            if count is None and held_bytes + size_bytes > most_bytes:
                yield held
                held, held_bytes = [], 0
            held.append(subject)
            held_bytes += size_bytes
        if held:
            yield held


def subject_bytes(subject: tio.Subject) -> int:
    """Return the bytes of a loaded subject's voxels."""
    images = subject.get_images(intensity_only=False)
    return sum(image.data.nelement() * image.data.element_size() for image in images)
