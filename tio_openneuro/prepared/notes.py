"""How a prepared subject differs from the unprepared one.

Owns the note from which images and attributes are put together again.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torchio as tio
from torchio.constants import AFFINE, DATA

from tio_openneuro.prepared.file import PreparedArray
from tio_openneuro.torchio_seams import FetchedImage, FetchedLabelMap, FetchedScalarImage

_KINDS: dict[str, type[tio.Image]] = {
    "fetched scalar": FetchedScalarImage,
    "fetched label": FetchedLabelMap,
    "scalar": tio.ScalarImage,
    "label": tio.LabelMap,
}
_VOXELS = frozenset({DATA, AFFINE})


@dataclass(frozen=True)
class Difference:
    """How the items of one mapping differ from those of another.

    Attributes:
        changed: Its items that the other does not have so.
        removed: The other's items that it has not.
    """

    changed: dict[str, Any]
    removed: tuple[str, ...]

    @classmethod
    def between(cls, before: Mapping[str, Any], after: Mapping[str, Any]) -> Self:
        """Return what made the one the other."""
        changed = {k: v for k, v in after.items() if k not in before or not _same(v, before[k])}
        return cls(changed, tuple(key for key in before if key not in after))

    def apply(self, items: dict[str, Any]) -> None:
        """Make the one the other."""
        for name in self.removed:
            items.pop(name, None)
        items.update(self.changed)


@dataclass(frozen=True)
class ImageNote:
    """What a prepared image is beside its voxels.

    Attributes:
        kind: Its class, by :data:`_KINDS`.
        base: Name of the image of the unprepared subject that it was, or empty.
        affine: 4 x 4.
        items: How its other items differ from those of its base.
        sourced: Whether it still knows its files.
    """

    kind: str
    base: str
    affine: np.ndarray[Any, Any]
    items: Difference
    sourced: bool


@dataclass(frozen=True)
class SubjectNote:
    """What a prepared subject is beside its voxels: how it differs from the unprepared one."""

    images: dict[str, ImageNote]
    items: Difference
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
        notes[name] = ImageNote(
            kinds[type(image)],
            base,
            np.array(image.affine),
            Difference.between(base_items, _items(image)),
            sourced=getattr(image, "source", None) is not None,
        )
    others = [{key: s[key] for key in s if key not in images} for s in (before, after)]
    return SubjectNote(notes, Difference.between(*others), list(after.applied_transforms))


def _items(image: tio.Image) -> dict[str, Any]:
    return {key: value for key, value in image.items() if key not in _VOXELS}


def _same(one: object, other: object) -> bool:
    return one is other or pickle.dumps(one) == pickle.dumps(other)


def rebuild(note: ImageNote, base: tio.Image | None, array: PreparedArray) -> tio.Image:
    """Return a prepared image, unread where its class allows it."""
    kind = _KINDS[note.kind]
    image: tio.Image
    if base is not None and issubclass(kind, FetchedImage):
        image = kind.lent(base, array, note.affine, sourced=note.sourced)
    else:
        tensor = torch.from_numpy(array.read())
        image = kind(tensor=tensor, affine=note.affine, path=note.items.changed.get("path") or None)
    note.items.apply(image)
    return image
