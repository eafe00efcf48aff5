"""What a queue refuses when it is made, and how it names what went wrong later."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.data.distributed import DistributedSampler

from tio_openneuro.errors import DiskBudgetError, RamBudgetError, TioOpenNeuroError
from tio_openneuro.ram import refuse_subject
from tio_openneuro.torchio_seams import find_other_generator, transform_of

if TYPE_CHECKING:
    import torchio as tio

    from tio_openneuro.queue.order import Planner
    from tio_openneuro.queue.source import SubjectSource

NEVER_SKIPPED = (RamBudgetError, DiskBudgetError, NotImplementedError, MemoryError)
OTHER_PROCESS = (
    "A queue gives its patches in the process that made it: the number of workers of the loader "
    "that pops them must be 0. Give that loader num_workers=0, and the queue as many num_workers "
    "as you like; they load, transform and sample in the background."
)


def check_choices(
    *,
    max_length: int | None,
    samples_per_volume: int,
    num_workers: int,
    on_error: str,
    on_release: str,
    shuffles_sampled: bool,
) -> None:
    """Refuse parameters out of range, and those that exclude each other.

    Raises:
        ValueError: One is; the message names it.
    """
    if shuffles_sampled:
        message = (
            "The flag shuffle_subjects cannot be set when a subject sampler is passed: give "
            "shuffle_subjects=False, or leave subject_sampler out."
        )
        raise ValueError(message)
    least = {"samples_per_volume": (samples_per_volume, 1), "num_workers": (num_workers, 0)}
    if max_length is not None:
        least["max_length"] = (max_length, 1)
    for parameter, (value, minimum) in least.items():
        if value < minimum:
            message = f"Cannot use {parameter}={value}: it must be at least {minimum}."
            raise ValueError(message)
    choices = {
        "on_error": (on_error, ("raise", "skip")),
        "on_release": (on_release, ("keep", "drop")),
    }
    for parameter, (given, allowed) in choices.items():
        if given not in allowed:
            message = f"Cannot use {parameter}={given!r}: choose {allowed[0]!r} or {allowed[1]!r}."
            raise ValueError(message)


def refuse_other_generators(dataset: tio.SubjectsDataset, *targets: object) -> None:
    """Refuse code that is seen to draw from generators that all threads share.

    Args:
        dataset: Its preprocess and transform are looked at.
        targets: Further callables.

    Raises:
        ValueError: One draws from NumPy's or Python's generator.
    """
    own = [getattr(dataset, "preprocess", None), transform_of(dataset)]
    for target in (*own, *targets):
        source = find_other_generator(target)
        if source:
            message = (
                f"Cannot give the same patches each time: {type(target).__name__} draws from "
                f"{source}, which all threads share. Draw from torch instead, or use seed=None."
            )
            raise ValueError(message)


def count_ranks(subject_sampler: object) -> int:
    """Return in how many processes the training runs that must have equal numbers of patches."""
    ranks = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
    if isinstance(subject_sampler, DistributedSampler):
        ranks = max(ranks, subject_sampler.num_replicas)
    return ranks


def refuse_unequal_ranks(planner: Planner) -> None:
    """Refuse what would give ranks different numbers of patches.

    Raises:
        ValueError: Subjects differ in their numbers of patches.
    """
    if planner.uniform is None:
        message = (
            "Cannot give ranks equal numbers of patches: subjects differ in num_samples. Give "
            "every subject the same."
        )
        raise ValueError(message)


def refuse_large_subjects(
    source: SubjectSource,
    planner: Planner,
    *,
    window: int,
    budget_bytes: int,
) -> None:
    """Refuse a budget that cannot hold a window and the largest subject whose size is known.

    Raises:
        RamBudgetError: It cannot; the message names the subject and the bytes.
    """
    largest = max(
        ((source.need(index), index) for index in source.sized()),
        key=lambda pair: pair[0].work_bytes + pair[0].patch_bytes,
        default=None,
    )
    if largest is None:
        return
    need, index = largest
    own_bytes = need.work_bytes + need.patch_bytes * source.count(index)
    held_bytes = need.patch_bytes * min(window, planner.largest_total)
    if own_bytes + held_bytes + source.base_bytes > budget_bytes:
        advice = (
            f"Its own work and patches need {own_bytes} bytes, {window} patches of "
            f"{need.patch_bytes} bytes each wait for delivery, libraries and maps need "
            f"{source.base_bytes} bytes. Raise ram_budget, or lower max_length, the patch size or "
            f"samples_per_volume."
        )
        name = source.name(index)
        need_bytes = own_bytes + held_bytes + source.base_bytes
        raise refuse_subject(name, need_bytes, budget_bytes, advice)


def name_error(name: str, error: BaseException) -> BaseException:
    """Return an error of the same class that names the subject; of RuntimeError if it must be.

    Args:
        name: The subject.
        error: What stopped it; to be chained as the cause.
    """
    text = str(error.args[0]) if error.args else str(error)
    message = text if name in text else f"{name}: {text}"
    if isinstance(error, TioOpenNeuroError):
        return type(error)(message, key=error.key, unit=error.unit or name)
    try:
        named = type(error)(message)
    except Exception:  # noqa: BLE001 - a class with other parameters; the cause is chained whole
        return RuntimeError(f"{name}: {type(error).__name__}: {text}")
    return named if name in str(named) else RuntimeError(message)
