"""What a queue refuses when it is made, and how it names what went wrong later."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torchio as tio
from torch.utils.data.distributed import DistributedSampler
from torchio.constants import NUM_SAMPLES

from tio_openneuro.errors import DiskBudgetError, RamBudgetError, TioOpenNeuroError
from tio_openneuro.queue.order import Planner
from tio_openneuro.queue.source import name_subject
from tio_openneuro.torchio_seams import find_other_generator, transform_of

NEVER_SKIPPED = (RamBudgetError, DiskBudgetError, NotImplementedError, MemoryError)
OTHER_PROCESS = (
    "A queue gives its patches in the process that made it: the number of workers of the loader "
    "that pops them must be 0. Give that loader num_workers=0, and the queue as many num_workers "
    "as you like; they load, transform and sample in the background."
)


def refuse_wrapped(dataset: object) -> None:
    """Refuse what is no dataset of subjects, such as torch's wrappers of one.

    Raises:
        TypeError: It is; the message tells what to write instead.
    """
    if not hasattr(dataset, "dry_iter"):
        raise TypeError(
            f"Cannot make patches of {type(dataset).__name__}: a queue needs a tio.SubjectsDataset."
            f" Instead of Subset or random_split use dataset[indices] or dataset.split, instead of "
            f"ConcatDataset tno.concat, instead of a list tio.SubjectsDataset(subjects)."
        )


def count_patches(dataset: tio.SubjectsDataset, samples_per_volume: int) -> list[int]:
    """Return each subject's ``num_samples``: any integer from zero, which gives none of it.

    Args:
        dataset: The subjects.
        samples_per_volume: What holds for one that has none.

    Raises:
        ValueError: One has something else.
    """
    counts = [getattr(each, NUM_SAMPLES, samples_per_volume) for each in dataset.dry_iter()]
    for index, count in enumerate(counts):
        if not _is_integer(count, 0):
            raise ValueError(
                f"Cannot take {count!r} patches of {name_subject(dataset, index)}: its num_samples "
                f"must be an integer from 0. Correct it, or delete it to use samples_per_volume."
            )
    return [int(count) for count in counts]


def _is_integer(value: Any, least: int) -> bool:  # noqa: ANN401 - whatever somebody gives
    try:
        return not isinstance(value, bool) and operator.index(value) >= least
    except TypeError:
        return False


def refuse_below(least: int, **given: int | None) -> None:
    """Refuse a parameter that is no integer, or too small.

    Args:
        least: The smallest value that is allowed.
        given: Value of each parameter by its name, or None where it was not given.

    Raises:
        ValueError: One is; the message names it.
    """
    for parameter, value in given.items():
        if value is not None and not _is_integer(value, least):
            raise ValueError(f"Cannot use {parameter}={value!r}: give an integer from {least}.")


def refuse_others(allowed: tuple[str, str], **given: str) -> None:
    """Refuse a parameter that is none of two words.

    Args:
        allowed: The words.
        given: Value of each parameter by its name.

    Raises:
        ValueError: One is another word; the message names it.
    """
    for parameter, value in given.items():
        if value not in allowed:
            first, second = allowed
            raise ValueError(f"Cannot use {parameter}={value!r}: choose {first!r} or {second!r}.")


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
            raise ValueError(
                f"Cannot give the same patches each time: {type(target).__name__} draws from "
                f"{source}, which all threads share. Draw from torch instead, or use seed=None."
            )


def has_ranks(subject_sampler: object, planner: Planner) -> bool:
    """Return whether the training runs in several processes, which need equal numbers of patches.

    Raises:
        ValueError: It does, and subjects differ in their numbers of patches.
    """
    ranks = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
    if isinstance(subject_sampler, DistributedSampler):
        ranks = max(ranks, subject_sampler.num_replicas)
    if ranks > 1 and not planner.uniform:
        raise ValueError(
            "Cannot give ranks equal numbers of patches: subjects differ in num_samples. Give "
            "every subject the same."
        )
    return ranks > 1


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
