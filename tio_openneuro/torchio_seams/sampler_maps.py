"""Probability maps of TorchIO's patch samplers: computed in less time, kept in little room.

Owns what ``tio.LabelSampler`` and ``tio.WeightedSampler`` know of a volume. The patches are those
that they draw themselves, bit for bit, from the same state of torch's generator: the probabilities
are TorchIO's, and so is each rounding of their running sum. Any other sampler draws as it is.

TorchIO computes the map of 192**3 voxels anew each time, in three float64 copies. Here the running
sum is kept where the probability changes, and followed in between when a patch is drawn.

Source: ``torchio.data.sampler.weighted`` and ``label``, 1.2.1.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import numpy as np
import torch
import torchio as tio
from torchio.constants import MIN_FLOAT_32

from tio_openneuro.torchio_seams.box_crop import with_box_crop

# Held per voxel while a map is computed: peak RSS at 192**3 with patches of 8 and 64, rounded up:
# 10 and 21 bytes, of TorchIO's own 34 and 47 (2026-11-21). Others may be subclasses of TorchIO's,
# whose peak was 74 bytes with the images beside it.
_MAP_BYTES = {tio.UniformSampler: 0, tio.WeightedSampler: 16, tio.LabelSampler: 32}
_UNKNOWN_MAP_BYTES = 82
_STRIDE = 1024
# Runs are cut, so that a drawn voxel is found in 64 strides at most.
_LONGEST = 1 << 16
# A run takes 20 bytes, and as much again while it is found; a voxel's running sum takes 8.
_LEAST_RUN = 16
_MOST_VOXELS = 2**32


@dataclass(frozen=True, slots=True)
class SamplerMap:
    """Where the patches of one volume may have their centres, and how likely.

    A run is what follows one another in C order with the same probability; voxels without one
    belong to none.

    Attributes:
        shape: Spatial shape of the volume, ``(I, J, K)``.
        starts: Flat index of each run's first voxel, uint32; none where every voxel of the volume
            counts as a run, since the probabilities change too often for anything shorter.
        steps: Probability of a voxel of each run, float64; one alone where all are equal, none
            where there are no starts.
        ends: Running sum of the probabilities at each run's last voxel, float64.
    """

    shape: tuple[int, int, int]
    starts: np.ndarray[Any, np.dtype[np.uint32]]
    steps: np.ndarray[Any, np.dtype[np.float64]]
    ends: np.ndarray[Any, np.dtype[np.float64]]

    @classmethod
    def of(cls, probabilities: np.ndarray[Any, np.dtype[np.float64]]) -> Self:
        """Return the map of probabilities that sum to about one.

        Args:
            probabilities: Of each voxel, shape ``(I, J, K)``; overwritten.
        """
        flat = probabilities.reshape(-1)
        flat /= flat.sum()
        rows, columns, slices = probabilities.shape
        shape = rows, columns, slices
        change = flat[1:] != flat[:-1]
        change[_LONGEST - 1 :: _LONGEST] = True
        if np.count_nonzero(change) * _LEAST_RUN > len(flat):
            none = np.empty(0)
            return cls(shape, none.astype(np.uint32), none, np.cumsum(flat, out=flat))
        changes = np.flatnonzero(change)
        starts = np.concatenate([[0], changes + 1])
        steps = flat[starts]
        np.cumsum(flat, out=flat)
        ends = flat[np.concatenate([changes, [len(flat) - 1]])]
        likely = steps > 0
        steps = steps[likely]
        if (steps == steps[0]).all():
            steps = steps[:1].copy()
        return cls(shape, starts[likely].astype(np.uint32), steps, ends[likely])

    @property
    def size_bytes(self) -> int:
        """Bytes that it holds."""
        return self.starts.nbytes + self.steps.nbytes + self.ends.nbytes

    def draw(self) -> tuple[int, int, int]:
        """Return the centre of a patch, by one number from torch's generator."""
        # TorchIO's line, its guard against zero included.
        wanted = max(MIN_FLOAT_32, torch.rand(1).item()) * self.ends[-1]
        run = int(np.searchsorted(self.ends, wanted))
        index = int(self.starts[run]) + self._find_within(run, wanted) if len(self.starts) else run
        i, j, k = np.unravel_index(index, self.shape)
        return int(i), int(j), int(k)

    def _find_within(self, run: int, wanted: float) -> int:
        """Return how far into a run the running sum reaches a number.

        It is followed voxel by voxel, as TorchIO's is rounded.
        """
        sums = np.full(_STRIDE + 1, self.steps[run if len(self.steps) > 1 else 0])
        sums[0] = self.ends[run - 1] if run else 0
        for passed in range(0, _LONGEST, _STRIDE):
            running = np.cumsum(sums)
            offset = int(np.searchsorted(running[1:], wanted))
            if offset < _STRIDE:
                return passed + offset
            sums[0] = running[-1]
        raise ValueError(
            f"A sampler's map is damaged: run {run} of {len(self.ends)} never reaches its end."
        )


def map_bytes(sampler: object) -> int:
    """Return the bytes that a patch sampler's map takes at most, per voxel of an image.

    None at all where the sampler needs no voxel of a subject to choose where.

    Args:
        sampler: A patch sampler of any kind.
    """
    return _MAP_BYTES.get(type(sampler), _UNKNOWN_MAP_BYTES)


def has_map(sampler: object) -> bool:
    """Return whether a patch sampler draws from a map that is computed here."""
    return _MAP_BYTES.get(type(sampler), 0) > 0


class KeptMaps:
    """The maps of volumes that are read again and again, as many as fit. Threads may share it."""

    def __init__(self, most_bytes: int) -> None:
        """Keep none yet.

        Args:
            most_bytes: Bytes that all maps together may take; the caller has set them aside.
        """
        self.most_bytes = most_bytes
        self._left_bytes = most_bytes
        self._maps: dict[int, SamplerMap] = {}
        self._lock = threading.Lock()

    def __contains__(self, index: int) -> bool:
        """Return whether the map of a volume is kept."""
        return index in self._maps

    def of(self, index: int, sampler: Any, subject: tio.Subject) -> SamplerMap | None:  # noqa: ANN401 - any patch sampler
        """Return the map of a volume, computed where it is not kept; None where there is none.

        Args:
            index: Names the volume, which is the same each time.
            sampler: The same patch sampler each time.
            subject: The volume.
        """
        if index in self._maps or not has_map(sampler):
            return self._maps.get(index)
        found = compute_map(sampler, subject)
        if found is not None:
            with self._lock:
                if index not in self._maps and found.size_bytes <= self._left_bytes:
                    self._left_bytes -= found.size_bytes
                    self._maps[index] = found
        return found


def compute_map(sampler: tio.WeightedSampler, subject: tio.Subject) -> SamplerMap | None:
    """Compute a sampler's map of a subject, or return None where only TorchIO can.

    Args:
        sampler: A ``tio.LabelSampler`` or ``tio.WeightedSampler``.
        subject: Loaded.

    Raises:
        RuntimeError: No voxel can be the centre of a patch; TorchIO's own error.
    """
    tensor = sampler.get_probability_map(subject)
    if prod(tensor.shape[1:]) >= _MOST_VOXELS:
        return None
    data = tensor[0].numpy().astype(np.float64)
    sampler.clear_probability_borders(data, sampler.patch_size)
    total = data.sum()
    if total == 0:
        sampler.process_probability_map(tensor, subject)
    if not np.isfinite(total):
        return None
    del tensor
    data /= total
    return SamplerMap.of(data)


def draw_patches(
    sampler: Any,  # noqa: ANN401 - any callable; TorchIO's samplers have no common type
    subject: tio.Subject,
    kept: SamplerMap | None = None,
) -> Iterator[tio.Subject]:
    """Yield the patches that a sampler draws of a subject, without end.

    Args:
        sampler: A patch sampler of any kind.
        subject: Loaded, and as it was when ``kept`` was computed.
        kept: What :func:`compute_map` gave for this sampler and subject before, or None.
    """
    sampler = with_box_crop(sampler)
    # Checks shape and grid at once, and does no more before the first patch is asked for.
    patches = sampler(subject)
    found = (kept or compute_map(sampler, subject)) if has_map(sampler) else None
    if found is None:
        yield from patches
        return
    half = sampler.patch_size // 2
    while True:
        center = found.draw()
        yield sampler.extract_patch(subject, tuple(np.array(center) - half))
