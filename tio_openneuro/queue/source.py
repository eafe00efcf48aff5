"""From a dataset's index to patches: load, transform, sample, in one thread, under one seed.

Owns what TorchIO must be asked about a subject: its name, its number of patches, the size of its
images, the cost of its transforms. It holds nothing of the dataset between two subjects.
"""

from __future__ import annotations

import traceback
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torchio as tio
from torchio.constants import NUM_SAMPLES

from tio_openneuro.errors import RamBudgetError
from tio_openneuro.prepared import DamagedVolumeError
from tio_openneuro.queue.draw import derive_seed
from tio_openneuro.ram import BASE_BYTES, FLOAT_BYTES, THREAD_BYTES, bound_subject
from tio_openneuro.torchio_seams import (
    KeptMaps,
    SamplerMap,
    draw_patches,
    drawing_from,
    get_subject,
    has_map,
    is_loaded,
    map_bytes,
    measure_cost,
    reads_boxes,
    transform_of,
)
from tio_openneuro.volumes import ImageSize, SubjectSize, VolumeFile, listening, sum_sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

INTRA_OP_THREADS = 1
_FALLBACK_VOXELS = 256**3
# Subjects of two images: 0.1 s.
_HEADERS_AT_ONCE = 256
# Of the RAM budget for the maps of prepared volumes: at 4 GB those of 100 tumours at 192**3.
_MAPS_SHARE = 64


@dataclass(frozen=True, slots=True)
class Need:
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
    guessed: bool = False


@dataclass(frozen=True, slots=True)
class Production:
    """What became of one subject.

    Attributes:
        patches: Its patches in the order of sampling; empty where it failed.
        patch_bytes: Bytes of the largest patch.
        error: What stopped it, with its traceback, or None.
        larger: Whether it was stopped at its header, since it is larger than what was charged;
            its size is known now.
    """

    patches: Sequence[tio.Subject]
    patch_bytes: int = 0
    error: BaseException | None = None
    larger: bool = False


class _LargerSubjectError(RamBudgetError):
    """A header says that a subject is larger than what was charged for it."""


class SubjectSource:
    """Makes patches of a dataset's subjects. Safe to share by threads."""

    def __init__(
        self,
        dataset: tio.SubjectsDataset,
        sampler: Callable[[tio.Subject], Any],
        *,
        samples_per_volume: int,
        patch_transform: Callable[[tio.Subject], tio.Subject] | None,
        seed: int,
        drop: bool,
        again: Sequence[int] = (),
        ram_budget_bytes: int = 0,
    ) -> None:
        """Keep the parts; load nothing.

        Args:
            dataset: The subjects.
            sampler: The patch sampler.
            samples_per_volume: Patches of a subject that has no ``num_samples``.
            patch_transform: Applied to each patch, under the subject's generator.
            seed: The queue's seed.
            drop: Whether a subject's content is dropped once its patches are made.
            again: Subjects of epochs whose order is not known yet, the likeliest first.
            ram_budget_bytes: The queue's, of which a part is set aside for sampler maps.
        """
        self.dataset = dataset
        self.sampler = sampler
        self.samples_per_volume = samples_per_volume
        self.patch_transform = patch_transform
        transform = transform_of(dataset)
        self._cost_prepared = measure_cost(transform)
        self._boxes_alone = transform is None and not map_bytes(sampler)
        preparing = measure_cost(getattr(dataset, "preprocess", None))
        self.cost = preparing.followed_by(self._cost_prepared)
        self._patch_cost = measure_cost(patch_transform)
        self.cost = replace(self.cost, known=self.cost.known and self._patch_cost.known)
        self._seed = seed
        self._drop = drop
        self._again = again
        keeps_maps = has_map(sampler) and transform is None
        keeps_maps = keeps_maps and getattr(dataset, "preprocess", None) is not None
        self._maps = KeptMaps(ram_budget_bytes // _MAPS_SHARE if keeps_maps else 0)
        self._sizes: dict[int, SubjectSize] = {}
        self._largest_patch_bytes = 0
        self._growth = 1.0

    @property
    def base_bytes(self) -> int:
        """Bytes that are set aside for as long as the queue lives."""
        return BASE_BYTES + self._maps.most_bytes

    @property
    def knows_sizes(self) -> bool:
        """Whether the size of any subject is known."""
        return bool(self._sizes)

    def __len__(self) -> int:
        """Return the number of subjects."""
        return len(self.dataset)

    def count(self, index: int) -> int:
        """Return how many patches a subject gives, without loading it."""
        subject = self.dataset.dry_iter()[index]
        return int(getattr(subject, NUM_SAMPLES, self.samples_per_volume))

    def images(self, index: int) -> int:
        """Return how many images a subject has, without loading it."""
        return len(self.dataset.dry_iter()[index].get_images(intensity_only=False))

    def sized(self) -> list[int]:
        """Return the indices of subjects whose size is known now.

        Those in RAM are, and those in local files, of which a few hundred headers are read.
        """
        return [
            index
            for index, subject in enumerate(self.dataset.dry_iter())
            if (index < _HEADERS_AT_ONCE or _in_ram(subject)) and self.size(index) is not None
        ]

    def name(self, index: int) -> str:
        """Return what a subject is called, for messages."""
        subject = self.dataset.dry_iter()[index]
        for attribute in ("name", "subject_id"):
            value = subject.get(attribute)
            if isinstance(value, str) and value:
                session = subject.get("session_id")
                return f"{value} {session}" if isinstance(session, str) and session else value
        return f"subject {index}"

    def size(self, index: int) -> SubjectSize | None:
        """Return the size of a subject's images, or None where it is not known yet.

        Reads headers of local files at most.
        """
        if index not in self._sizes:
            size = measure_subject(self.dataset.dry_iter()[index])
            if size is None:
                return None
            self._sizes[index] = size
        return self._sizes[index]

    def need(self, index: int) -> Need:
        """Return upper bounds of what a subject holds.

        Where its size is not known yet, that of the largest subject so far, or a volume of
        256**3 for each image, is taken. Patches of all subjects are taken for equal once some
        were made.
        """
        prepared = self._prepared_size(index)
        if prepared is not None:
            patch_bytes = self._largest_patch_bytes or self.patch_bytes(prepared.channels)
            return Need(self._bound_prepared(index, prepared), patch_bytes, known=True)
        size = self.size(index)
        known = size is not None
        if size is None:
            image = (1, _FALLBACK_VOXELS, FLOAT_BYTES)
            guess = sum_sizes([image] * max(self.images(index), 1))
            size = max(self._sizes.values(), key=lambda s: s.stored_bytes, default=guess)
        patch_bytes = self._largest_patch_bytes or self.patch_bytes(size.channels)
        return Need(self._bound(size), patch_bytes, known, guessed=not known and not self._sizes)

    def _bound(self, size: SubjectSize) -> int:
        grown = size.scaled(self._growth)
        subject_bytes = bound_subject(grown, self.cost, map_bytes(self.sampler))
        return max(subject_bytes, self._bound_patch(size))

    def _bound_patch(self, size: SubjectSize) -> int:
        # The subject is gone by the time its patches are transformed, one after another.
        return bound_subject(self._patch_size(size), self._patch_cost, 0)

    def _patch_size(self, size: SubjectSize) -> SubjectSize:
        """Return the size of one patch of a subject, or of the largest that came out so far."""
        voxels = self.patch_bytes(1) // FLOAT_BYTES
        total = max(voxels * size.channels, self._largest_patch_bytes // FLOAT_BYTES)
        return SubjectSize(total, total, total * FLOAT_BYTES, size.channels)

    def _prepared_size(self, index: int) -> SubjectSize | None:
        """Return the size of a subject whose prepared volume is there, where the dataset knows."""
        tell = getattr(self.dataset, "prepared_size", None)
        return tell(index) if callable(tell) else None

    def _bound_prepared(self, index: int, size: SubjectSize) -> int:
        subject_bytes = THREAD_BYTES
        if not self._boxes_alone and index not in self._maps:
            subject_bytes = bound_subject(size, self._cost_prepared, map_bytes(self.sampler))
        return max(subject_bytes, self._bound_patch(size))

    def patch_bytes(self, channels: int) -> int:
        """Return the bytes of one patch, with float voxels."""
        voxels = prod(int(n) for n in cast("Any", self.sampler).patch_size)
        return voxels * channels * FLOAT_BYTES

    def prefetch(self, indices: Sequence[int]) -> None:
        """Tell the dataset which subjects come next, where it wants to know."""
        tell = getattr(self.dataset, "prefetch_indices", None)
        if callable(tell):
            tell(indices, again=self._again if indices else ())

    def close_dataset(self) -> None:
        """End the loads under way, where the dataset can be closed."""
        close = getattr(self.dataset, "close", None)
        if callable(close):
            close()

    def produce(
        self,
        index: int,
        seed_parts: tuple[int, int],
        granted_bytes: int,
        cancelled: Callable[[], bool],
        announced: Callable[[], None] = lambda: None,
    ) -> Production:
        """Load a subject and make its patches; what goes wrong is part of the result.

        Args:
            index: Index in the dataset.
            seed_parts: Number of the epoch, and how often it had the subject before.
            granted_bytes: What was charged for the work, beside the patches.
            cancelled: Whether the patches are no longer wanted.
            announced: Called once the subject's size is known, where it was not.

        Raises:
            CancelledWorkError: They are not.
        """

        def admit(size: SubjectSize) -> None:
            self._sizes[index] = size
            announced()
            if self._bound(size) > granted_bytes:
                message = f"{self.name(index)} is larger than what was charged for it."
                raise _LargerSubjectError(message)

        count = self.count(index)
        try:
            seed = derive_seed(self._seed, "subject", index, *seed_parts)
            with drawing_from(seed, cancelled), listening(admit):
                patches = self._make_patches(index, count)
        except (_LargerSubjectError, DamagedVolumeError) as error:
            forget_locals(error)
            return Production((), error=error, larger=True)
        except Exception as error:  # noqa: BLE001 - raised in the training loop, whole
            forget_locals(error)
            return Production((), error=error)
        patch_bytes = max(map(subject_bytes, patches), default=0)
        self._largest_patch_bytes = max(self._largest_patch_bytes, patch_bytes)
        return Production(patches, patch_bytes)

    def _make_patches(self, index: int, count: int) -> list[tio.Subject]:
        try:
            with self._opened(index) as (subject, kept):
                patches = list(islice(draw_patches(self.sampler, subject, kept), count))
                del subject
        finally:
            release = getattr(self.dataset, "release_index", None)
            if callable(release):
                release(index, drop=self._drop)
        if len(patches) < count:
            message = f"The patch sampler gave {len(patches)} of {count} patches."
            raise RuntimeError(message)
        if self.patch_transform is not None:
            for place, patch in enumerate(patches):
                patches[place] = self.patch_transform(patch)
        return patches

    @contextmanager
    def _opened(self, index: int) -> Iterator[tuple[tio.Subject, SamplerMap | None]]:
        """Yield a subject, of which a prepared one reads no more than is asked for, and its map."""
        opened = getattr(self.dataset, "opened", None)
        if callable(opened) and reads_boxes(self.sampler):
            with opened(index) as subject:
                if subject is not None:
                    yield subject, self._maps.of(index, self.sampler, subject)
                    return
        subject = get_subject(self.dataset, index)
        self._calibrate(index, subject)
        yield subject, None

    def _calibrate(self, index: int, subject: tio.Subject) -> None:
        """Learn from a transformed subject how sizes grow, and its size where it was unknown."""
        size = measure_subject(subject)
        if size is not None:
            before = self._sizes.setdefault(index, size)
            self._growth = max(self._growth, size.total_voxels / before.total_voxels)


def forget_locals(error: BaseException) -> None:
    """Clear the variables of an error's frames, which would pin volumes; its lines stay."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


def measure_subject(subject: tio.Subject) -> SubjectSize | None:
    """Return the size of a subject's images from memory or local headers, or None.

    Args:
        subject: Loaded or not; it is not loaded.
    """
    sizes = []
    for image in subject.get_images(intensity_only=False):
        size = _measure_image(image)
        if size is None:
            return None
        sizes.append(size)
    return sum_sizes(sizes) if sizes else None


def _in_ram(subject: tio.Subject) -> bool:
    return all(map(is_loaded, subject.get_images(intensity_only=False)))


def _measure_image(image: tio.Image) -> ImageSize | None:
    if is_loaded(image):
        data = image.data
        return len(data), prod(data.shape[1:]), data.element_size()
    return VolumeFile(image.path).size if isinstance(image.path, Path) else None


def subject_bytes(subject: tio.Subject) -> int:
    """Return the bytes of a loaded subject's voxels."""
    images = subject.get_images(intensity_only=False)
    return sum(image.data.numel() * image.data.element_size() for image in images)


def fix_intra_op_threads() -> int:
    """Fix torch's intra-op threads in this thread, and return how many it had.

    Results such as the mean of a volume depend on the number (TorchIO 1.2.1, torch 2.13).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(INTRA_OP_THREADS)
    return before
