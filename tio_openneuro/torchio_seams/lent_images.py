"""Images whose voxels lie in an open array, and are read box by box when they are wanted.

Owns how :class:`torchio.Image` meets an array that somebody else holds open; knows no format.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
import torchio as tio
from torchio.constants import AFFINE

from tio_openneuro.torchio_seams.images import FetchedImage, FetchedLabelMap, FetchedScalarImage

Box = Sequence[tuple[int, int]]


class OpenArray(Protocol):
    """An array of shape ``(C, I, J, K)`` that gives copies of its boxes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    def read(self, box: Box | None = None) -> np.ndarray[Any, Any]:
        """Return a copy of a box, or of all."""


class PreparedImage(FetchedImage):
    """An image whose voxels lie in an open prepared volume, and are read when they are wanted."""

    _array: OpenArray | None = None

    def lend(self, array: OpenArray, affine: np.ndarray[Any, Any]) -> None:
        """Take the voxels from an array that the caller holds open."""
        self._array = array
        self[AFFINE] = affine

    def take_back(self) -> None:
        """Let go of the array; what was not read is gone."""
        self._array = None

    def read_box(self, box: Box) -> torch.Tensor:
        """Return a copy of a box of the voxels, reading no more than it needs."""
        if self._loaded or self._array is None:
            return self.data[tuple(slice(*edge) for edge in box)].clone()
        return torch.from_numpy(self._array.read(box))

    def load(self) -> None:
        """Read all voxels."""
        if self._loaded:
            return
        if self._array is None:
            super().load()
            return
        self.set_data(torch.from_numpy(self._array.read()))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Tensor shape ``(C, I, J, K)``."""
        if self._loaded or self._array is None:
            return super().shape
        channels, i, j, k = self._array.shape
        return channels, i, j, k

    @property
    def affine(self) -> Any:  # noqa: ANN401 - TorchIO's own
        """Affine, 4 x 4, float64."""
        return super().affine if self._loaded or self._array is None else self[AFFINE]

    @affine.setter
    def affine(self, matrix: Any) -> None:  # noqa: ANN401 - TorchIO's own
        self[AFFINE] = self._parse_affine(matrix)

    def __deepcopy__(self, memo: dict[int, Any]) -> tio.Image:
        """Return an image of its own, loaded, of the class that it stands for."""
        self.load()
        return copy.deepcopy(as_plain(self), memo)


class PreparedScalarImage(PreparedImage, FetchedScalarImage):
    """A scalar image of an open prepared volume."""


class PreparedLabelMap(PreparedImage, FetchedLabelMap):
    """A label map of an open prepared volume."""


_LENT: dict[type[tio.Image], type[PreparedImage]] = {
    FetchedScalarImage: PreparedScalarImage,
    FetchedLabelMap: PreparedLabelMap,
}


_PLAIN: dict[type[tio.Image], type[tio.Image]] = {lent: plain for plain, lent in _LENT.items()}


def plain_class(image: tio.Image) -> type[tio.Image]:
    """Return the class that an image has where its voxels are in memory."""
    return _PLAIN.get(type(image), type(image))


def lent_class(kind: type[tio.Image]) -> type[PreparedImage] | None:
    """Return the class of images of a kind whose voxels are lent; None where there is none."""
    return _LENT.get(kind)


def as_plain(image: tio.Image) -> tio.Image:
    """Return a loaded image of an open prepared volume as one of the usual class."""
    if isinstance(image, PreparedImage):
        image.take_back()
        image.__class__ = plain_class(image)  # type: ignore[assignment]
    return image


@contextmanager
def lent(subject: tio.Subject) -> Iterator[tio.Subject]:
    """Let go of the file at the block's end: its bytes are free once nobody maps it."""
    try:
        yield subject
    finally:
        for image in subject.get_images(intensity_only=False):
            if isinstance(image, PreparedImage):
                image.take_back()
