"""What a queue refuses when it is made, and how it names what went wrong later."""

from __future__ import annotations

import operator
import warnings
from inspect import currentframe
from traceback import walk_stack
from typing import Any

import torch
import torchio as tio
from torch.utils.data.dataloader import _BaseDataLoaderIter
from torch.utils.data.distributed import DistributedSampler
from torchio.constants import NUM_SAMPLES

from tio_openneuro.errors import DiskBudgetError, RamBudgetError, TioOpenNeuroError
from tio_openneuro.queue.draw import LARGEST_WINDOW
from tio_openneuro.queue.order import Planner, Ranks, knows_ranks
from tio_openneuro.queue.source import SubjectSource, name_subject
from tio_openneuro.torchio_seams import find_other_generator, transform_of

NEVER_SKIPPED = (RamBudgetError, DiskBudgetError, NotImplementedError, MemoryError)
OTHER_PROCESS = (
    "A queue gives its patches in the process that made it: the number of workers of the loader "
    "that pops them must be 0. Give that loader num_workers=0, and the queue as many num_workers "
    "as you like; they load, transform and sample in the background."
)

# What leads a loader astray, by what the class of a sampler in it is called.
_ASTRAY = {
    "RandomSampler": "Its loader shuffles: give that shuffle=False and no sampler.",
    "DistributedSampler": "Its loader has a DistributedSampler, as trainers put there: take it out "
    "(Lightning: use_distributed_sampler=False). The queue deals subjects out to ranks by itself.",
    "BatchSamplerShard": "Accelerate deals its loader's batches out: keep that out of prepare(). "
    "The queue deals subjects out to ranks by itself.",
    "SkipBatchSampler": "skip_first_batches() was called on its loader: leave that out; "
    "load_state_dict() alone goes on where a queue was.",
}
_IN_TURNS = (
    "It is read by two iterators in turns, as zip(loader, loader) does, or a second iter() while "
    "the first is in use: end one before the next begins, or make a queue for each."
)
_OTHERWISE = (
    "To go on within an epoch use load_state_dict(); for some of the subjects make a queue over "
    "dataset[indices]; for an order of theirs give subject_sampler."
)
_IN_ORDER = {"BatchSampler", "SequentialSampler"}
_DEEPEST = 9


def name_jump(number: int, expected: int, *, in_turns: bool) -> str:
    """Return a message that names what asked for another patch than the next one.

    The samplers of the loader that asks are the evidence, where there is one: it stands in this
    thread's stack. Numbers alone would not tell a shuffled loader from one that begins elsewhere.

    Args:
        number: What was asked for.
        expected: What comes next.
        in_turns: Whether the numbers are those of two iterators.
    """
    owners = (frame.f_locals.get("self") for frame, _ in walk_stack(currentframe()))
    loader = next((owner for owner in owners if isinstance(owner, _BaseDataLoaderIter)), None)
    link = getattr(loader, "_index_sampler", None)
    links: list[str] = []
    while link is not None and len(links) < _DEEPEST:
        links.append(" ".join(kind.__name__ for kind in type(link).__mro__))
        link = getattr(link, "batch_sampler", getattr(link, "sampler", None))
    causes = [text for name, text in _ASTRAY.items() if name in " ".join(links)]
    if not causes:
        names = [link.split()[0] for link in links]
        own = [f"Its loader asks by {name}." for name in names if name not in _IN_ORDER]
        other = [] if links else ["A loader not of torch's needs shuffle=False and num_workers=0."]
        causes = [_IN_TURNS] if in_turns else [*own, *other, _OTHERWISE]
    return (
        f"Cannot give patch {number}: patch {expected} comes next. A queue is read in order, 0, 1, "
        f"2, ..., and shuffles by itself. {' '.join(causes)}"
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


def refuse_others(parameter: str, value: str, *allowed: str) -> None:
    """Refuse a parameter that is none of some words.

    Args:
        parameter: Its name.
        value: What was given.
        allowed: The words.

    Raises:
        ValueError: It is another word.
    """
    if value not in allowed:
        choice = " or ".join(map(repr, allowed))
        raise ValueError(f"Cannot use {parameter}={value!r}: choose {choice}.")


def refuse_two_orders(subject_sampler: object, *, shuffled: bool) -> None:
    """Refuse to shuffle what a subject sampler orders, as TorchIO's queue does.

    Raises:
        ValueError: Both were given.
    """
    if shuffled and subject_sampler is not None:
        raise ValueError(
            "The flag shuffle_subjects cannot be set when a subject sampler is passed: give "
            "shuffle_subjects=False, or leave subject_sampler out."
        )


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


def read_ranks(asked: object, subject_sampler: object, before: Ranks | None = None) -> Ranks:
    """Return which rank this is: as asked, else as the sampler or torch.distributed says now.

    Args:
        asked: ``"auto"``, None (the ranks do not share the subjects) or rank and world size.
        subject_sampler: The user's, or None.
        before: What this returned when the queue was made.

    Raises:
        ValueError: No rank was asked for, or one beside a subject sampler.
        RuntimeError: The ranks share the subjects, and are others than before.
    """
    rank, world = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if isinstance(subject_sampler, DistributedSampler):
        dealt = subject_sampler.num_replicas, subject_sampler.rank
        world, rank = max(dealt, (world, rank))
    match asked:
        case None | "auto":
            now = Ranks(rank, world, share=asked is not None or knows_ranks(subject_sampler))
        case (int(rank), int(world)) if 0 <= rank < world and subject_sampler is None:
            now = Ranks(rank, world, share=True)
        case _:
            raise ValueError(
                f"Cannot use ranks={asked!r}: give 'auto', None, or (rank, world_size) with a rank "
                f"from zero, and no subject_sampler beside it."
            )
    if before is not None and before != now and now.share:
        raise RuntimeError(
            f"Cannot begin a pass: this is rank {rank} of {world}, and was {before.rank} of "
            f"{before.world}. Make the queue after init_process_group."
        )
    return now


def check_ranks(asked: object, ranks: Ranks, subject_sampler: object, planner: Planner) -> None:
    """Refuse ranks whose epochs would differ in length, and tell how the subjects are shared.

    Args:
        asked: As in :func:`read_ranks`.
        ranks: What that returned.
        subject_sampler: The user's, or None.
        planner: Knows the numbers of patches.

    Raises:
        ValueError: Subjects differ in their numbers of patches.
    """
    if ranks.world == 1 or not ranks.share:
        return
    if not planner.uniform:
        raise ValueError(
            "Cannot give ranks equal numbers of patches: subjects differ in num_samples. Give "
            "every subject the same."
        )
    if asked == "auto" and not knows_ranks(subject_sampler):
        name = f"{type(subject_sampler).__name__} knows no ranks, each draws for itself"
        how = "the queue deals the subjects out" if subject_sampler is None else name
        warnings.warn(
            f"There are {ranks.world} ranks: {how}. Say ranks=None where each has subjects of its "
            f"own already, or all want the same.",
            stacklevel=3,
        )


def refuse_window(window: int, source: SubjectSource) -> None:
    """Refuse a window that another queue chose where this one's RAM budget cannot hold it.

    Args:
        window: In patches. Those that an epoch does not have take nothing, unless there are more
            than any queue chooses.
        source: Knows the bytes of a patch, the patches of an epoch, and the RAM budget.

    Raises:
        RamBudgetError: It cannot hold the window, or a subject beside it.
    """
    held = min(window, source.planner.largest_total) if window <= LARGEST_WINDOW else window
    need_bytes = held * source.patch_bytes(source.channels(0)) + source.base_bytes
    if need_bytes > source.ram_budget_bytes:
        raise RamBudgetError(
            f"Cannot resume from this state: its window of {window} patches needs {need_bytes} "
            f"bytes, and the RAM budget is {source.ram_budget_bytes} bytes: raise ram_budget."
        )
    source.require_room(window)


def name_error(name: str, error: BaseException) -> BaseException:
    """Return an error of the same class that names the subject; of RuntimeError if it must be.

    Args:
        name: The subject.
        error: What stopped it; to be chained as the cause.
    """
    text = str(error.args[0] if len(error.args) == 1 else error)
    message = text if name in text else f"{name}: {text}"
    if isinstance(error, TioOpenNeuroError):
        return type(error)(message, key=error.key, unit=error.unit or name)
    try:
        named = type(error)(message)
    except Exception:  # noqa: BLE001 - a class with other parameters; the cause is chained whole
        return RuntimeError(f"{name}: {type(error).__name__}: {text}")
    return named if name in str(named) else RuntimeError(message)
