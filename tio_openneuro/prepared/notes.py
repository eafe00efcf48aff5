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
from typing import Any

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

_IMAGES = (FetchedScalarImage, FetchedLabelMap, tio.ScalarImage, tio.LabelMap)
_CLASSES: dict[str, Any] = {each.__name__: each for each in (*_IMAGES, FetchedSubject, tio.Subject)}
_NAMES = {each: name for name, each in _CLASSES.items()}
_VOXELS = frozenset({DATA, AFFINE})
_LENT = frozenset({"source", "_array"})
PLAIN = (bool, int, float, str, type(None), np.generic)


@dataclass(frozen=True)
class Same:
    """Stands for an item that another mapping has just so."""


@dataclass(frozen=True)
class ImageNote:
    """What a prepared image is beside its voxels.

    Attributes:
        kind: Name of its class.
        base: Name of the image of the unprepared subject that it was, or empty.
        affine: 4 x 4.
        items: Its other items, but for those of its base, or of an image of no file.
        attributes: Those that a new image of its class and path does not have so.
        sourced: Whether it still knows its files.
    """

    kind: str
    base: str
    affine: np.ndarray[Any, Any]
    items: dict[str, Any]
    attributes: dict[str, Any]
    sourced: bool


@dataclass(frozen=True)
class SubjectNote:
    """What a prepared subject is beside its voxels: how it differs from the unprepared one.

    Attributes:
        volume: Name of the prepared volume, for which no other one passes.
        kind: Name of its class.
        items: Its items, but for those of the unprepared subject; of images notes.
        attributes: Its attributes, of which its history is one, but for its own items.
    """

    volume: str
    kind: str
    items: dict[str, Any]
    attributes: dict[str, Any]


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
        kind: (lambda note: [*vars(note).values()], kind) for kind in (Same, ImageNote, SubjectNote)
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
    others = [p for p in parts if type(p) not in _FORMS and not isinstance(p, PLAIN)]
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
    items, attributes = _left_out(noted, before), _left_out(vars(after), after)
    return SubjectNote(volume, _NAMES[type(after)], items, attributes)


def _describe_image(name: str, image: tio.Image, originals: dict[str, tio.Image]) -> ImageNote:
    alike = [each for each, other in originals.items() if other.path == image.path]
    base = name if name in alike else next(iter(alike), "")
    kind, source = _NAMES[type(image)], vars(image).get("source")
    blank = _blank(kind, originals.get(base))
    if source not in (None, vars(originals.get(base, blank)).get("source")):
        raise ValueError(f"{name} has files of which the unprepared subject has none")
    items = {key: value for key, value in image.items() if key not in _VOXELS}
    own = {key: value for key, value in vars(image).items() if key not in _LENT}
    return ImageNote(
        kind,
        base,
        np.array(image.affine),
        _left_out(items, originals.get(base, blank)),
        {k: v for k, v in _left_out(own, vars(blank)).items() if not isinstance(v, Same)},
        sourced=source is not None,
    )


def _blank(kind: str, base: tio.Image | None) -> Any:  # noqa: ANN401 - an image
    """Return a new image of a class, and of another one's path."""
    path = None if base is None else base.path
    return _CLASSES[kind](tensor=torch.zeros(1, 1, 1, 1), path=path, verify_path=False)


def _same(one: object, other: object) -> bool:
    if one is other or isinstance(one, tio.Image | ImageNote):
        return one is other
    return pickle.dumps(one) == pickle.dumps(other)


def _left_out(items: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return items but for those that another mapping has just so."""
    return {
        key: Same() if key in others and _same(value, others[key]) else value
        for key, value in items.items()
    }


def _filled_in(items: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return the items of which another mapping's were left out."""
    return {key: others[key] if isinstance(each, Same) else each for key, each in items.items()}


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
    subject: tio.Subject = (kind := _CLASSES[note.kind]).__new__(kind)
    for name, value in _filled_in(note.items, template).items():
        is_image = isinstance(value, ImageNote)
        subject[name] = _rebuild_image(value, originals, array(name)) if is_image else value
    vars(subject).update(_filled_in(note.attributes, subject))
    return subject


def _rebuild_image(
    note: ImageNote, originals: Mapping[str, tio.Image], array: PreparedArray
) -> tio.Image:
    base = originals[note.base] if note.base else None
    image: tio.Image = _blank(note.kind, base)
    others = dict(image if base is None else base)
    image.clear()
    image.update(_filled_in(note.items, others) | {AFFINE: note.affine})
    if isinstance(image, FetchedImage):
        image.lend(array, vars(base)["source"] if base and note.sourced else None)
    else:
        image.set_data(torch.from_numpy(array.read()))
    vars(image).update(note.attributes)
    return image
