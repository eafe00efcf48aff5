"""What a deterministic transform is, as text that is the same in every process; or that it is not.

Owns the rules by which a prepared volume is named after the transform that made it: everything
that can change a voxel counts, by content. What cannot be pinned down, a function or a class of
the user's, is told, and what is random is refused.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path, PurePath
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
import torchio as tio
from torchio.transforms.augmentation import RandomTransform

from tio_openneuro.errors import SelectionError
from tio_openneuro.torchio_seams.randomness import find_other_generator

_VERSIONED = frozenset({"torchio", "torch", "numpy", "builtins"})
_DEEPEST = 20
_READ_BYTES = 1 << 20


class UnpinnedError(Exception):
    """A part of a transform cannot be told from another one with the same name."""


def pin(transform: object, preprocess_id: str | None = None) -> str:
    """Return a digest of a transform: its class and every attribute, at any depth.

    Numbers, text, arrays, tensors and images count by content; a path, or text that is one of a
    file, by what the file holds. With ``preprocess_id``, what cannot be pinned down counts by
    its class alone.

    Args:
        transform: The transform.
        preprocess_id: The user's word for what it does.

    Raises:
        UnpinnedError: It has such a part, which the message names, and there is no id.
    """
    pinner = _Pinner(strict=preprocess_id is None)
    pinner.feed(["preprocess", preprocess_id], 0)
    pinner.feed(transform, 0)
    return pinner.digest.hexdigest()


class _Pinner:
    """Feed a digest with values; each kind by a tag of its own, so that none passes for another."""

    def __init__(self, *, strict: bool) -> None:
        self.digest = hashlib.blake2b(digest_size=20)
        self._strict = strict
        self._above: list[int] = []

    def _tell(self, *parts: object) -> None:
        self.digest.update(repr(parts).encode())

    def feed(self, value: object, depth: int) -> None:
        if depth > _DEEPEST:
            message = f"{type(value).__name__}, nested too deep"
            raise UnpinnedError(message)
        if id(value) in self._above:
            self._tell("above", len(self._above) - self._above.index(id(value)))
            return
        if isinstance(value, torch.Tensor):
            self._array(value.detach().cpu().numpy(), "tensor")
        elif isinstance(value, np.ndarray | np.generic):
            self._array(np.asarray(value), type(value).__name__)
        elif isinstance(value, Enum):
            self._tell("enum", type(value).__qualname__, value.name)
        elif value is None or isinstance(value, bool | int | float | complex | bytes):
            self._tell(type(value).__name__, value)
        elif isinstance(value, str | PurePath):
            self._text(value)
        elif isinstance(value, tio.Image):
            self._tell("image", type(value).__name__)
            self._array(value.data.numpy(), "data")
            self._array(np.asarray(value.affine), "affine")
        else:
            self._above.append(id(value))
            self._compound(value, depth)
            self._above.pop()

    def _compound(self, value: object, depth: int) -> None:
        parts: list[object]
        if isinstance(value, Mapping):
            parts = [part for pair in value.items() for part in pair]
        elif isinstance(value, set | frozenset):
            parts = sorted(value, key=repr)
        elif isinstance(value, list | tuple | range):
            parts = list(value)
        elif isinstance(value, MethodType):
            parts = [value.__func__, value.__self__]
        else:
            self._object(value, depth)
            return
        # Lists and tuples are not told apart: TorchIO makes the one of the other.
        kind = "mapping" if isinstance(value, Mapping) else "sequence"
        self._tell(kind, len(parts))
        for part in parts:
            self.feed(part, depth + 1)

    def _array(self, array: np.ndarray[Any, Any], kind: str) -> None:
        if array.dtype.hasobject:
            message = f"an array of objects ({array.dtype})"
            raise UnpinnedError(message)
        self._tell(kind, array.dtype.str, array.shape)
        self.digest.update(np.ascontiguousarray(array).tobytes())

    def _text(self, value: str | PurePath) -> None:
        path = Path(value)
        try:
            is_file = path.is_file()
        except (OSError, ValueError):
            is_file = False
        if not is_file:
            self._tell("text", str(value))
            return
        # Where it lies does not matter, what it holds does.
        self._tell("file", "".join(path.suffixes))
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                self.digest.update(block)

    def _object(self, value: object, depth: int) -> None:
        is_function = isinstance(value, FunctionType | BuiltinFunctionType | type)
        named = value if is_function else type(value)
        module, name = _name_of(named)
        self._tell("function" if is_function else "object", module, name)
        if _is_versioned(named, module, name):
            if is_function or isinstance(value, torch.dtype):
                self._tell(repr(value) if isinstance(value, torch.dtype) else name)
                return
        elif self._strict:
            message = f"{module}.{name}"
            raise UnpinnedError(message)
        if is_function:
            return
        attributes = getattr(value, "__dict__", None)
        if attributes is None and self._strict:
            message = f"{module}.{name}"
            raise UnpinnedError(message)
        for key in sorted(attributes or ()):
            self._tell("attribute", key)
            self.feed((attributes or {})[key], depth + 1)


def _name_of(value: object) -> tuple[str, str]:
    """Return module and qualified name of a function or class."""
    module = getattr(value, "__module__", None) or getattr(type(value), "__module__", "")
    return str(module), str(getattr(value, "__qualname__", type(value).__qualname__))


def _is_versioned(value: object, module: str, name: str) -> bool:
    """Return whether a function or class is found by its name in a library whose version counts."""
    if module.partition(".")[0] not in _VERSIONED:
        return False
    found: object = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value


def refuse_random(preprocess: object) -> None:
    """Raise where a transform is random, or holds one that is.

    Args:
        preprocess: What is to be done once.

    Raises:
        SelectionError: It gives another result each time.
    """
    for part in _parts(preprocess, 0):
        name = type(part).__name__
        why = ""
        if isinstance(part, RandomTransform):
            why = f"{name} is random"
        elif isinstance(part, tio.Transform) and part.probability < 1:
            why = f"{name} has p={part.probability:g}"
        elif isinstance(part, tio.Transform) and getattr(part, "location", None) == "random":
            why = f'{name} has location="random"'
        if why:
            raise SelectionError(
                f"Cannot use {type(preprocess).__name__} as preprocess: {why}, and preprocess is "
                f"done once for all epochs. Give what is random as transform, which is done each "
                f"time."
            )
    drawn = find_other_generator(preprocess)
    if drawn:
        raise SelectionError(
            f"Cannot use {type(preprocess).__name__} as preprocess: it draws from {drawn}, and "
            f"preprocess is done once for all epochs. Give what is random as transform."
        )


def _parts(value: object, depth: int) -> Iterator[object]:
    """Yield a transform and everything in it that may be one."""
    if depth > _DEEPEST:
        return
    yield value
    if isinstance(value, Mapping):
        children = [*value, *value.values()]
    elif isinstance(value, list | tuple):
        children = list(value)
    elif isinstance(value, tio.Transform):
        children = list(vars(value).values())
    else:
        return
    for child in children:
        yield from _parts(child, depth + 1)
