"""From a dataset's index to patches: load, transform, sample, in one thread, under one seed.

Owns what TorchIO must be asked about a subject: its name, the size of its images, the cost of its
transforms. It holds nothing of the dataset between two subjects.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import dropwhile, islice
from math import prod
from typing import Any, Protocol, cast, runtime_checkable

import torchio as tio

from tio_openneuro.dataset import subject_bytes
from tio_openneuro.errors import RamBudgetError
from tio_openneuro.prepared import DamagedVolumeError
from tio_openneuro.queue.draw import (
    LARGEST_WINDOW,
    Turn,
    choose_window,
    chosen_twice,
    derive_seed,
)
from tio_openneuro.queue.order import Planner
from tio_openneuro.ram import BASE_BYTES, THREAD_BYTES, Need, bound_subject, refuse_subject
from tio_openneuro.recording import Activity, counted_by, doing
from tio_openneuro.torchio_seams import (
    CancelledWorkError,
    KeptMaps,
    SamplerMap,
    draw_patches,
    drawing_from,
    get_subject,
    has_map,
    identify_items,
    is_loaded,
    knows_cost,
    map_bytes,
    measure_subject,
    reads_boxes,
    trace_transform,
    transform_of,
)
from tio_openneuro.volumes import FLOAT_BYTES, SubjectSize, listening, sum_sizes

_FALLBACK_VOXELS = 256**3
# Subjects of two images: 0.1 s.
_HEADERS_AT_ONCE = 256
# Of the RAM budget for the maps of prepared volumes: at 4 GB those of 100 tumours at 192**3.
_MAPS_SHARE = 64
_WINDOWS = [1 << n for n in range(LARGEST_WINDOW.bit_length())]


@runtime_checkable
class ContentDataset(Protocol):
    """What the queue asks of a dataset that fetches its subjects' content."""

    def opened(self, index: int, /) -> AbstractContextManager[tio.Subject | None]:
        """Hold a subject open of which no more is read than patches need; None where none is."""

    def prepared_size(self, index: int) -> SubjectSize | None:
        """Return the size of what :meth:`opened` would hold, or None."""

    def prefetch_indices(self, indices: Sequence[int], *, likely_later: Sequence[int]) -> None:
        """Hear which subjects come next, and which may come after them."""

    def release_index(self, index: int, *, drop: bool) -> None:
        """Hear that a subject's content has been used."""

    def close(self) -> None:
        """End the loads under way."""


class NoContent:
    """The answers for a dataset that has nothing to fetch, to release or to close."""

    def opened(self, _index: int, /) -> AbstractContextManager[tio.Subject | None]:
        """Hold nothing."""
        return nullcontext()

    def prepared_size(self, index: int) -> SubjectSize | None:
        """Know none."""

    def prefetch_indices(self, indices: Sequence[int], *, likely_later: Sequence[int]) -> None:
        """Fetch nothing."""

    def release_index(self, index: int, *, drop: bool) -> None:
        """Release nothing."""

    def close(self) -> None:
        """Close nothing."""


@dataclass(frozen=True, slots=True)
class RamBounds:
    """Upper bounds of what one subject holds.

    Attributes:
        work_bytes: Held while it is loaded, transformed and sampled, beside its patches.
        patch_bytes: Held by each of its patches.
        known: Whether its size is known.
        guessed: Whether no other subject's size is known either, from which to take the bounds.
    """

    work_bytes: int
    patch_bytes: int
    known: bool
    guessed: bool


@dataclass(frozen=True, slots=True)
class Production:
    """What became of one subject.

    Attributes:
        patches: Its patches by their numbers, in the order of sampling; empty where it failed.
        patch_bytes: Bytes of the largest patch.
        error: What stopped it, with its traceback, or None.
        count: Patches that there were at first.
    """

    patches: dict[int, tio.Subject] = field(default_factory=dict)
    patch_bytes: int = 0
    error: BaseException | None = None
    count: int = 0


class _UnderchargedError(RamBudgetError):
    """A header says that a subject is larger than what was charged for it."""


@dataclass(eq=False, kw_only=True)
class SubjectSource:
    """Makes patches of a dataset's subjects; loads nothing before. Safe to share by threads.

    Attributes:
        dataset: The subjects.
        sampler: The patch sampler.
        planner: Knows how many patches each subject gives, and which may come later.
        patch_transform: Applied to each patch, under the subject's generator.
        seed: The queue's seed.
        checked: Whether a subject of each epoch is made twice, and must be the same.
        drop: Whether a subject's content is dropped once its patches are made.
        ram_budget_bytes: The queue's, of which a part is set aside for sampler maps.
        window: Patches that wait for delivery at most; None where the budget chooses.
        available_bytes: What the budget is half of where nobody stated one; else None.
    """

    dataset: tio.SubjectsDataset
    sampler: Callable[[tio.Subject], Any]
    planner: Planner
    patch_transform: Callable[[tio.Subject], tio.Subject] | None
    seed: int
    checked: bool
    drop: bool
    ram_budget_bytes: int
    window: int | None = None
    available_bytes: int | None = None

    def __post_init__(self) -> None:
        """Look at the transforms, of which nothing is run."""
        self.counts = self.planner.counts
        self.content = self.dataset if isinstance(self.dataset, ContentDataset) else NoContent()
        self._likely_later = self.planner.likeliest()
        self._transforms = getattr(self.dataset, "preprocess", None), transform_of(self.dataset)
        preprocess, transform = self._transforms
        # Code of others makes the copies that are spared here.
        made_by = type(self.dataset).__getitem__.__module__
        self._in_place = made_by.startswith(("torchio.", "tio_openneuro."))
        self.costs_known = all(map(knows_cost, (*self._transforms, self.patch_transform)))
        self._boxes_alone = transform is None and not map_bytes(self.sampler)
        keeps_maps = has_map(self.sampler) and transform is None and preprocess is not None
        self._maps = KeptMaps(self.ram_budget_bytes // _MAPS_SHARE if keeps_maps else 0)
        self.base_bytes = BASE_BYTES + self._maps.most_bytes
        self._sizes: dict[int, SubjectSize] = {}
        self._largest_patch_bytes = 0
        self._growth = 1.0
        self.activity = Activity()

    # --- sizes ---

    @property
    def knows_sizes(self) -> bool:
        """Whether the size of any subject is known."""
        return bool(self._sizes)

    def name(self, index: int) -> str:
        """Return what a subject is called, for messages."""
        return name_subject(self.dataset, index)

    def images(self, index: int) -> int:
        """Return how many images a subject has, at least one, without loading it."""
        return max(len(self.dataset.dry_iter()[index].get_images(intensity_only=False)), 1)

    def channels(self, index: int) -> int:
        """Return a subject's channels, one for each image where its size is not known."""
        size = self._size(index)
        return self.images(index) if size is None else size.channels

    def patch_bytes(self, channels: int) -> int:
        """Return the bytes of one patch, with float voxels."""
        voxels = prod(int(n) for n in cast("Any", self.sampler).patch_size)
        return voxels * channels * FLOAT_BYTES

    def bounds(self, index: int) -> RamBounds:
        """Return upper bounds of what a subject holds; read headers of local files at most.

        Where its size is not known yet, that of the largest subject so far, or a volume of
        256**3 for each image, is taken. Patches of all subjects are taken for equal once some
        were made.
        """
        prepared = self.content.prepared_size(index)
        size = prepared or self._size(index)
        known = size is not None
        if size is None:
            guess = sum_sizes([(1, _FALLBACK_VOXELS, FLOAT_BYTES)] * self.images(index))
            size = max(self._sizes.values(), key=lambda s: s.stored_bytes, default=guess)
        work_bytes = self._bound_prepared(index, size) if prepared else self._bound(size)
        patch_bytes = self._largest_patch_bytes or self.patch_bytes(size.channels)
        return RamBounds(work_bytes, patch_bytes, known, guessed=not known and not self._sizes)

    def window_of(self, budget_bytes: int) -> int:
        """Return how many patches wait for delivery at most, under a RAM budget."""
        return self.window or choose_window(budget_bytes, self.patch_bytes(self.images(0)))

    def require_room(self, window: int | None = None) -> None:
        """Refuse a budget that cannot hold the largest subject whose size is known now.

        Known are those in RAM, and those in local files, of which a few hundred headers are read.
        Where none is, what any subject needs must fit.

        Args:
            window: Patches that wait for delivery beside it, where an epoch has so many; by default
                the queue's own.

        Raises:
            RamBudgetError: It cannot; the message names the subject and the bytes.
        """
        sized = [
            (self.bounds(index), index)
            for index, subject in enumerate(self.dataset.dry_iter())
            if (index < _HEADERS_AT_ONCE or _in_ram(subject)) and self._size(index) is not None
        ]
        if not sized:
            if self.base_bytes + THREAD_BYTES > self.ram_budget_bytes:
                raise self.too_large(0, THREAD_BYTES, self.base_bytes)
            return
        bounds, index = max(sized, key=lambda pair: pair[0].work_bytes + pair[0].patch_bytes)
        own_bytes = bounds.work_bytes + bounds.patch_bytes * self.counts[index]
        waiting = min(window or self.window_of(self.ram_budget_bytes), self.planner.largest_total)
        held_bytes = bounds.patch_bytes * waiting + self.base_bytes
        if own_bytes + held_bytes > self.ram_budget_bytes:
            raise self.too_large(index, own_bytes, held_bytes, window)

    def too_large(
        self, index: int, own_bytes: int, held_bytes: int, window: int | None = None
    ) -> RamBudgetError:
        """Return the error for a subject that the budget cannot hold.

        Args:
            index: Its index in the dataset.
            own_bytes: Bound of its own work and patches.
            held_bytes: What is held beside it.
            window: As in :meth:`require_room`.
        """
        advice = (
            f"Its own work and patches need {own_bytes} bytes; patches that wait for delivery, "
            f"libraries and maps need {held_bytes} bytes. "
        )
        size = self._size(index)
        if size is not None:
            work = self._work(size)
            advice += f"Of its work, {work.name} takes most ({work.size_bytes} bytes). "
            result, needs = self._trace(size, prepared=False)
            drawn = list(dropwhile(lambda need: not need.name.startswith("Random"), needs))
            rest = bound_subject(result, result, drawn, map_bytes(self.sampler))
            if hasattr(self.dataset, "preprocess") and rest.size_bytes < work.size_bytes:
                done = f"Where what is not random was done before, as preprocess=, {rest.name} does"
                advice += f"{done} ({rest.size_bytes} bytes). "
        if self.available_bytes is not None:
            advice += f"'auto' took half of the {self.available_bytes} bytes that were available. "
        smallest_bytes = self._smallest(index, own_bytes, window)
        advice += (
            f"The smallest ram_budget that works for it is {smallest_bytes} bytes: give that or "
            f"more, or lower max_length, the patch size or samples_per_volume."
        )
        need_bytes = own_bytes + held_bytes
        return refuse_subject(self.name(index), need_bytes, self.ram_budget_bytes, advice)

    def _smallest(self, index: int, own_bytes: int, window: int | None) -> int:
        """Return the smallest budget that holds a subject and the window that it would choose."""
        patch_bytes, window = self.bounds(index).patch_bytes, window or self.window
        for each in [window] if window else _WINDOWS:
            waiting = min(each, self.planner.largest_total)
            found = BASE_BYTES + own_bytes + patch_bytes * waiting
            if self._maps.most_bytes:
                found += found // (_MAPS_SHARE - 1) + 1
            if window or self.window_of(found) <= each:
                break
        return found

    def _size(self, index: int) -> SubjectSize | None:
        size = self._sizes.get(index) or measure_subject(self.dataset.dry_iter()[index])
        if size is not None:
            self._sizes[index] = size
        return size

    def _bound(self, size: SubjectSize) -> int:
        return max(self._work(size).size_bytes, self._bound_patch(size))

    def _work(self, size: SubjectSize, *, prepared: bool = False) -> Need:
        """Return the hungriest step of a subject's work, from its files or its prepared volume."""
        size = size if prepared else size.scaled(self._growth)
        result, needs = self._trace(size, prepared=prepared)
        return bound_subject(size, result, needs, map_bytes(self.sampler))

    def _trace(self, size: SubjectSize, *, prepared: bool) -> tuple[SubjectSize, list[Need]]:
        """Return a subject's size once it is transformed, and what each part of that holds."""
        needs: list[Need] = []
        for transform in self._transforms[prepared:]:
            size, found = trace_transform(transform, size, in_place=self._in_place)
            needs += found
        return size, needs

    def _bound_prepared(self, index: int, size: SubjectSize) -> int:
        work_bytes = THREAD_BYTES
        if not self._boxes_alone and index not in self._maps:
            work_bytes = self._work(size, prepared=True).size_bytes
        return max(work_bytes, self._bound_patch(size))

    def _bound_patch(self, size: SubjectSize) -> int:
        # The subject is gone by the time its patches are transformed, one after another.
        patch_bytes = max(self.patch_bytes(size.channels), self._largest_patch_bytes)
        patch = sum_sizes([(1, patch_bytes // FLOAT_BYTES, FLOAT_BYTES)])
        result, needs = trace_transform(self.patch_transform, patch, in_place=False)
        return bound_subject(patch, result, needs, 0).size_bytes

    def prefetch(self, indices: Sequence[int]) -> None:
        """Tell the dataset which subjects come next; none where nothing will."""
        self.content.prefetch_indices(indices, likely_later=self._likely_later if indices else ())

    # --- patches ---

    def is_made_twice(self, turn: Turn) -> bool:
        """Tell whether a subject is made a second time, to find whether its patches repeat.

        It is one of each epoch, which depends on the seed and the epoch alone.
        """
        if not self.checked:
            return False
        return turn.position == chosen_twice(len(self.planner), self.seed, turn.epoch)

    def produce(
        self,
        turn: Turn,
        granted_bytes: int,
        cancelled: Callable[[], bool],
        announced: Callable[[], None] = lambda: None,
    ) -> Production | None:
        """Load a subject and make its patches; what goes wrong is part of the result.

        Where it is made twice, the first patches are gone before the second ones are made: the
        same charge holds both.

        Args:
            turn: The subject's, on which its draws depend.
            granted_bytes: What was charged for the work, beside the patches.
            cancelled: Whether the patches are no longer wanted.
            announced: Called once the subject's size is known, where it was not.

        Returns:
            None where it was cancelled, or has to be made anew: with a larger charge, since its
            header told its true size, or from its files, since its prepared volume was damaged.
        """

        def admit(size: SubjectSize) -> None:
            size = size.of_images(self.images(turn.index))
            self._sizes[turn.index] = size
            announced()
            if self._bound(size) > granted_bytes:
                raise _UnderchargedError(f"{self.name(turn.index)} was charged too little.")

        try:
            with listening(admit), counted_by(self.activity), doing("sample"):
                told: dict[str, list[str]] = {}
                if self.is_made_twice(turn):
                    told = identify_items(self._make(turn, cancelled, drop=False))
                patches = self._make(turn, cancelled, drop=self.drop)
                if told:
                    self._require_same(turn, told, identify_items(patches))
            patch_bytes = max(map(subject_bytes, patches), default=0)
        except CancelledWorkError:
            return None
        except Exception as error:  # noqa: BLE001 - raised in the training loop, whole
            forget_locals(error)
            anew = isinstance(error, _UnderchargedError | DamagedVolumeError)
            return None if anew else Production(error=error)
        self._largest_patch_bytes = max(self._largest_patch_bytes, patch_bytes)
        return Production(dict(enumerate(patches)), patch_bytes)

    def _make(self, turn: Turn, cancelled: Callable[[], bool], *, drop: bool) -> list[tio.Subject]:
        index, count = turn.index, self.counts[turn.index]
        seed = derive_seed(self.seed, "subject", index, turn.epoch, turn.occurrence)
        with drawing_from(seed, cancelled):
            try:
                with self._opened(index) as (subject, kept):
                    patches = list(islice(draw_patches(self.sampler, subject, kept), count))
                    del subject
            finally:
                self.content.release_index(index, drop=drop)
            if len(patches) < count:
                raise RuntimeError(f"The patch sampler gave {len(patches)} of {count} patches.")
            if self.patch_transform is not None:
                for number, patch in enumerate(patches):
                    patches[number] = self.patch_transform(patch)
        return patches

    def _require_same(
        self, turn: Turn, told: dict[str, list[str]], found: dict[str, list[str]]
    ) -> None:
        """Refuse what a seed does not decide.

        Args:
            turn: The subject's.
            told: What its patches consisted of when they were made before.
            found: The same of those made now.

        Raises:
            NotImplementedError: They differ in what the message names, images first.
        """
        differing = [name for name in told | found if told.get(name) != found.get(name)]
        if differing:
            raise NotImplementedError(
                f"Cannot repeat the patches of {self.name(turn.index)}: made twice from one seed "
                f"in epoch {turn.epoch}, they differ in {', '.join(differing)}. A transform, the "
                f"sampler or the dataset draws from NumPy, random, C++ or the clock, or keeps "
                f"something from one call to the next. Draw from torch instead, or give seed=None."
            )

    @contextmanager
    def _opened(self, index: int) -> Iterator[tuple[tio.Subject, SamplerMap | None]]:
        """Yield a subject, of which a prepared one reads no more than is asked for, and its map."""
        if reads_boxes(self.sampler):
            with self.content.opened(index) as subject:
                if subject is not None:
                    yield subject, self._maps.of(index, self.sampler, subject)
                    return
        with doing("decode"):
            subject = get_subject(self.dataset, index)
        self._calibrate(index, subject)
        yield subject, None

    def _calibrate(self, index: int, subject: tio.Subject) -> None:
        """Learn from a transformed subject how sizes grow, and its size where it was unknown.

        A first subject only ever raises what is told of the others.
        """
        size = measure_subject(subject)
        if size is not None:
            result, _ = self._trace(self._sizes.setdefault(index, size), prepared=False)
            self._growth = max(self._growth, size.stored_bytes / max(result.stored_bytes, 1))


def name_subject(dataset: tio.SubjectsDataset, index: int) -> str:
    """Return what a subject is called, for messages, by its index where it bears no name."""
    subject = dataset.dry_iter()[index]
    for attribute in ("name", "subject_id"):
        value = subject.get(attribute)
        if isinstance(value, str) and value:
            session = subject.get("session_id")
            return f"{value} {session}" if isinstance(session, str) and session else value
    return f"subject {index}"


def forget_locals(error: BaseException) -> None:
    """Clear the variables of an error's frames, which would pin volumes; its lines stay."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


def _in_ram(subject: tio.Subject) -> bool:
    return all(map(is_loaded, subject.get_images(intensity_only=False)))
