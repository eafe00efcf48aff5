"""How a prepared subject differs from the unprepared one.

Owns the note from which images and attributes are put together again: JSON of values of a few
kinds, none of which runs code when it is read. A value of another kind, unless it is a part of the
transform, cannot be told.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torchio as tio
from torchio.constants import AFFINE, DATA

from tio_openneuro.prepared.file import DAMAGED, DamagedVolumeError, PreparedArray
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


# How values of each kind are taken apart and put together; of a dictionary keys come before values.
_FORMS: dict[type, tuple[Callable[[Any], Sequence[Any]], Callable[..., Any]]] = {
    list: (list, lambda *items: list(items)),
    tuple: (list, lambda *items: items),
    dict: (
        lambda held: [*held, *held.values()],
        lambda *items: dict(zip(items, items[len(items) // 2 :], strict=False)),
    ),
    type(Path()): (lambda path: [str(path)], Path),
    np.ndarray: (
        lambda array: [array.dtype.str, array.shape, array.reshape(-1).view("u1").tobytes().hex()],
        lambda kind, shape, text: np.frombuffer(bytearray.fromhex(text), kind).reshape(shape),
    ),
    torch.Tensor: (lambda tensor: [tensor.numpy()], torch.from_numpy),
    **{
        kind: (lambda note: [*vars(note).values()], kind)
        for kind in (Difference, ImageNote, SubjectNote)
    },
}


def write_note(note: SubjectNote, parts: Iterable[object]) -> bytes:
    """Return a note as text.

    Args:
        note: The note.
        parts: What it may name by number, since whoever reads has it too.

    Raises:
        KeyError: It holds a value of another kind.
    """
    numbers = {id(part): number for number, part in enumerate(parts)}

    def told(value: Any) -> Any:  # noqa: ANN401 - any of a few kinds
        if value is None or type(value) in {bool, int, float, str}:
            return value
        if isinstance(value, np.generic):
            return ["number", told(np.asarray(value))]
        if type(value) not in _FORMS:
            return ["part", numbers[id(value)]]
        return [type(value).__name__, *map(told, _FORMS[type(value)][0](value))]

    return json.dumps(told(note)).encode()


def read_note(text: bytes, parts: Iterable[object]) -> SubjectNote:
    """Return the note of a text that :func:`write_note` made.

    Raises:
        DamagedVolumeError: It made no such text.
    """
    makers = {kind.__name__: make for kind, (_, make) in _FORMS.items()}
    makers |= {"number": lambda array: array[()], "part": list(parts).__getitem__}

    def made(told: Any) -> Any:  # noqa: ANN401 - any of a few kinds
        return makers[told[0]](*map(made, told[1:])) if isinstance(told, list) else told

    try:
        note: SubjectNote = made(json.loads(text))
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise DamagedVolumeError(DAMAGED) from error
    return note


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
