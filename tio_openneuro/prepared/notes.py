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
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torchio as tio
from torchio.constants import AFFINE, DATA

from tio_openneuro.prepared.file import DAMAGED, DamagedVolumeError, PreparedArray
from tio_openneuro.torchio_seams import (
    FetchedImage,
    FetchedLabelMap,
    FetchedScalarImage,
    FetchedSubject,
)

_KINDS: dict[str, type[tio.Image]] = {
    "fetched scalar": FetchedScalarImage,
    "fetched label": FetchedLabelMap,
    "scalar": tio.ScalarImage,
    "label": tio.LabelMap,
}
_SUBJECTS: dict[str, type[tio.Subject]] = {"fetched": FetchedSubject, "plain": tio.Subject}
_VOXELS = frozenset({DATA, AFFINE})
_LENT = frozenset({"source", "_array"})
_PLAIN = (bool, int, float, str, type(None), np.generic)


@dataclass(frozen=True)
class Difference:
    """How the items of one mapping differ from those of another.

    Attributes:
        changed: Its items that the other does not have so.
        order: Its keys; none where they are the other's, and then those of ``changed``.
        before: The other's keys; none where ``order`` has none.
    """

    changed: dict[str, Any]
    order: tuple[str, ...] = ()
    before: tuple[str, ...] = ()

    @classmethod
    def between(cls, before: Mapping[str, Any], after: Mapping[str, Any]) -> Self:
        """Return what made the one the other."""
        changed = {k: v for k, v in after.items() if k not in before or not _same(v, before[k])}
        plain = [*{**before, **changed}] == [*after]
        return cls(changed) if plain else cls(changed, tuple(after), tuple(before))

    def apply(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """Return the one, made of the other, which may have lost and got items since."""
        items = {**before, **self.changed}
        if not self.order:
            return items
        order = [key for key in self.order if key in items]
        for last, key in pairwise(before):
            if key not in self.before and last in order:
                order.insert(order.index(last) + 1, key)
        return {key: items[key] for key in order}


@dataclass(frozen=True)
class ImageNote:
    """What a prepared image is beside its voxels.

    Attributes:
        kind: Its class, by :data:`_KINDS`.
        base: Name of the image of the unprepared subject that it was, or empty.
        affine: 4 x 4.
        items: How its other items differ from those of its base, or of an image of no file.
        attributes: Those that a new image of its class and path does not have so.
        sourced: Whether it still knows its files.
    """

    kind: str
    base: str
    affine: np.ndarray[Any, Any]
    items: Difference
    attributes: dict[str, Any]
    sourced: bool


@dataclass(frozen=True)
class SubjectNote:
    """What a prepared subject is beside its voxels: how it differs from the unprepared one.

    Attributes:
        volume: Name of the prepared volume, for which no other one passes.
        kind: Its class, by :data:`_SUBJECTS`.
        items: How its items differ; each of its images is an :class:`ImageNote`.
        attributes: How its attributes, of which its history is one, differ from its own items.
    """

    volume: str
    kind: str
    items: Difference
    attributes: Difference


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
        TypeError: It holds a value of another kind.
    """
    numbers = {id(part): number for number, part in _numbered(parts).items()}

    def told(value: Any) -> Any:  # noqa: ANN401 - any of a few kinds
        if value is None or type(value) in {bool, int, float, str}:
            return value
        if isinstance(value, np.generic):
            return ["number", told(np.asarray(value))]
        if id(value) in numbers:
            return ["part", *numbers[id(value)]]
        if type(value) not in _FORMS:
            raise TypeError(f"it holds a value of the class {type(value).__name__}")
        return [type(value).__name__, *map(told, _FORMS[type(value)][0](value))]

    return json.dumps(told(note)).encode()


def read_note(text: bytes, parts: Iterable[object]) -> SubjectNote:
    """Return the note of a text that :func:`write_note` made.

    Raises:
        DamagedVolumeError: It made no such text.
    """
    numbered = _numbered(parts)
    makers = {kind.__name__: make for kind, (_, make) in _FORMS.items()}
    makers |= {"number": lambda array: array[()], "part": lambda *number: numbered[number]}

    def made(told: Any) -> Any:  # noqa: ANN401 - any of a few kinds
        return makers[told[0]](*map(made, told[1:])) if isinstance(told, list) else told

    try:
        note: SubjectNote = made(json.loads(text))
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise DamagedVolumeError(DAMAGED) from error
    return note


def _numbered(parts: Iterable[object]) -> dict[tuple[int, str], object]:
    """Return the parts that have no form, by number and name.

    Others, as equal text, may be one object in this process and several in the next.
    """
    others = [p for p in parts if type(p) not in _FORMS and not isinstance(p, _PLAIN)]
    return {(n, getattr(p, "__qualname__", type(p).__name__)): p for n, p in enumerate(others)}


def describe(before: tio.Subject, after: tio.Subject, volume: str) -> SubjectNote:
    """Return how a prepared subject differs from the unprepared one, voxels aside.

    Args:
        before: The unprepared subject.
        after: The prepared one.
        volume: Name of the prepared volume.

    Raises:
        KeyError: An image, or the subject, is of a class that is not known here.
        ValueError: Two images are one, or an image has files of which the subject had none.
    """
    images = after.get_images(intensity_only=False)
    places = [image.data.untyped_storage().data_ptr() for image in images if image.data.numel()]
    if len({*places}) < len(places):
        raise ValueError("two of its images share their voxels")
    originals = before.get_images_dict(intensity_only=False)
    noted = {
        name: _describe_image(name, value, originals) if isinstance(value, tio.Image) else value
        for name, value in after.items()
    }
    kind = {cls: name for name, cls in _SUBJECTS.items()}[type(after)]
    items, attributes = Difference.between(before, noted), Difference.between(after, vars(after))
    return SubjectNote(volume, kind, items, attributes)


def _describe_image(name: str, image: tio.Image, originals: dict[str, tio.Image]) -> ImageNote:
    kind = {cls: name for name, cls in _KINDS.items()}[type(image)]
    source = vars(image).get("source")
    alike = [
        each
        for each, other in originals.items()
        if other.path == image.path and source in (None, vars(other)["source"])
    ]
    if source is not None and not alike:
        raise ValueError(f"{name} has files of which the unprepared subject has none")
    base = name if name in alike else next(iter(alike), "")
    blank = _blank(kind, originals.get(base))
    own = {key: value for key, value in vars(image).items() if key not in _LENT}
    return ImageNote(
        kind,
        base,
        np.array(image.affine),
        Difference.between(_items(originals.get(base, blank)), _items(image)),
        Difference.between(vars(blank), own).changed,
        sourced=source is not None,
    )


def _blank(kind: str, base: tio.Image | None) -> tio.Image:
    """Return a new image of a class, and of another one's path."""
    path = None if base is None else base.path
    return _KINDS[kind](tensor=torch.zeros(1, 1, 1, 1), path=path, verify_path=False)


def _items(image: tio.Image) -> dict[str, Any]:
    return {key: value for key, value in image.items() if key not in _VOXELS}


def _same(one: object, other: object) -> bool:
    if one is other or isinstance(one, tio.Image | ImageNote):
        return one is other
    return pickle.dumps(one) == pickle.dumps(other)


def rebuild(
    note: SubjectNote, template: tio.Subject, array: Callable[[str], PreparedArray]
) -> tio.Subject:
    """Return the prepared subject, its images unread where their class allows it.

    Args:
        note: How it differs.
        template: The unprepared subject; may be changed.
        array: Gives an image's voxels by its name.
    """
    originals = template.get_images_dict(intensity_only=False)
    subject = (kind := _SUBJECTS[note.kind]).__new__(kind)
    for name, value in note.items.apply(template).items():
        is_image = isinstance(value, ImageNote)
        subject[name] = _rebuild_image(value, originals, array(name)) if is_image else value
    vars(subject).update(note.attributes.apply(subject))
    return subject


def _rebuild_image(
    note: ImageNote, originals: Mapping[str, tio.Image], array: PreparedArray
) -> tio.Image:
    base = originals[note.base] if note.base else None
    image = _blank(note.kind, base)
    items = note.items.apply(_items(image if base is None else base))
    image.clear()
    image.update(items | {AFFINE: note.affine})
    if isinstance(image, FetchedImage):
        image.lend(array, vars(base)["source"] if base and note.sourced else None)
    else:
        image.set_data(torch.from_numpy(array.read()))
    vars(image).update(note.attributes)
    return image
