"""Images of an open prepared volume, and how a prepared subject differs from the unprepared one.

Owns what meets :class:`torchio.Image`: images that read the boxes that they are asked for, and
the note from which images and attributes are put together again.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchio as tio
from torchio.constants import AFFINE, DATA

from tio_openneuro.image import FetchedImage, FetchedLabelMap, FetchedScalarImage
from tio_openneuro.prepared_file import Box, PreparedArray

_KINDS: dict[str, type[tio.Image]] = {
    "fetched scalar": FetchedScalarImage,
    "fetched label": FetchedLabelMap,
    "scalar": tio.ScalarImage,
    "label": tio.LabelMap,
}
_VOXELS = frozenset({DATA, AFFINE})


class PreparedImage(FetchedImage):
    """An image whose voxels lie in an open prepared volume, and are read when they are wanted."""

    _array: PreparedArray | None = None

    def lend(self, array: PreparedArray, affine: np.ndarray[Any, Any]) -> None:
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


def as_plain(image: tio.Image) -> tio.Image:
    """Return a loaded image of an open prepared volume as one of the usual class."""
    if isinstance(image, PreparedImage):
        image.take_back()
        image.__class__ = plain_class(image)  # type: ignore[assignment]
    return image


@dataclass(frozen=True)
class ImageNote:
    """What a prepared image is beside its voxels.

    Attributes:
        kind: Its class, by :data:`_KINDS`.
        base: Name of the image of the unprepared subject that it was, or empty.
        affine: 4 x 4.
        changed: Its items that the base does not have so.
        removed: The base's items that it has not.
        sourced: Whether it still knows its files.
    """

    kind: str
    base: str
    affine: np.ndarray[Any, Any]
    changed: dict[str, Any]
    removed: tuple[str, ...]
    sourced: bool


@dataclass(frozen=True)
class SubjectNote:
    """What a prepared subject is beside its voxels: how it differs from the unprepared one."""

    images: dict[str, ImageNote]
    changed: dict[str, Any]
    removed: tuple[str, ...]
    applied_transforms: list[Any]


def describe(before: tio.Subject, after: tio.Subject, images: dict[str, tio.Image]) -> SubjectNote:
    """Return how a prepared subject differs from the unprepared one, voxels aside.

    Args:
        before: The unprepared subject.
        after: The prepared one.
        images: Its images.

    Raises:
        KeyError: An image is of a class that is not known here.
    """
    originals = before.get_images_dict(intensity_only=False)
    kinds = {cls: kind for kind, cls in _KINDS.items()}
    notes = {}
    for name, image in images.items():
        base = name if name in originals else ""
        if not base:
            base = next((n for n, each in originals.items() if each.path == image.path), "")
        base_items = _items(originals[base]) if base else {}
        items = _items(image)
        notes[name] = ImageNote(
            kinds[type(image)],
            base,
            np.array(image.affine),
            {key: items[key] for key in items if not _same(items[key], base_items.get(key))},
            tuple(key for key in base_items if key not in items),
            sourced=getattr(image, "source", None) is not None,
        )
    plain = {key: value for key, value in after.items() if key not in images}
    changed = {k: v for k, v in plain.items() if k not in before or not _same(v, before[k])}
    removed = tuple(key for key in before if key not in after)
    return SubjectNote(notes, changed, removed, list(after.applied_transforms))


def _items(image: tio.Image) -> dict[str, Any]:
    return {key: value for key, value in image.items() if key not in _VOXELS}


def _same(one: object, other: object) -> bool:
    return one is other or pickle.dumps(one) == pickle.dumps(other)


def rebuild(note: ImageNote, base: tio.Image | None, array: PreparedArray) -> tio.Image:
    """Return a prepared image, unread where its class allows it."""
    kind = _KINDS[note.kind]
    lendable = _LENT.get(kind)
    if lendable is None or base is None:
        tensor = torch.from_numpy(array.read())
        image = kind(tensor=tensor, affine=note.affine, path=note.changed.get("path") or None)
    else:
        made = lendable(base.path)
        for key, value in _items(base).items():
            made[key] = value
        if note.sourced:
            made._source = getattr(base, "_source", None)  # noqa: SLF001 - of our own class
        made.lend(array, note.affine)
        image = made
    for key in note.removed:
        image.pop(key, None)
    for key, value in note.changed.items():
        image[key] = value
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
