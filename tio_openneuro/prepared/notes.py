"""How a prepared subject differs from the unprepared one.

Owns the note from which images and attributes are put together again.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

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
    image: tio.Image
    if base is not None and issubclass(kind, FetchedImage):
        image = kind.lent(base, array, note.affine, sourced=note.sourced)
    else:
        tensor = torch.from_numpy(array.read())
        image = kind(tensor=tensor, affine=note.affine, path=note.changed.get("path") or None)
    for key in note.removed:
        image.pop(key, None)
    for key, value in note.changed.items():
        image[key] = value
    return image
