"""One fingerprint of what a transform, a sampler or a function is, the same in every process.

Owns what tells two of them apart, for a state of the queue and for the name of a prepared volume.
Each value counts by its kind and content, and each part by a digest of its own, so that none
passes for another one. Nothing depends on addresses or on the seeds of hashes.

For a state everything has a digest: what tells nothing of itself counts by its class, functions by
their code, and where files lie makes no difference. For a prepared volume what cannot be pinned
down, as a function or a class of the user's, is told, and files count by what they hold.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from pathlib import Path, PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
import torchio as tio

from tio_openneuro.torchio_seams.parts import DEEPEST, parts_of
from tio_openneuro.torchio_seams.private_names import is_loaded, transform_of

_VERSIONED = frozenset({"torchio", "torch", "numpy", "builtins"})
_CODE = (FunctionType, BuiltinFunctionType, type, ModuleType)
_CONTAINERS: dict[str, Any] = {
    "mapping": Mapping,
    "set": (set, frozenset),
    # Not told apart: TorchIO makes the one of the other.
    "sequence": (list, tuple),
    "method": MethodType,
    "partial": partial,
}
_PICKLE_PROTOCOL = 4
_DIGEST_BYTES = 16


class UnpinnedError(Exception):
    """A part of a transform cannot be told from another one with the same name."""


def identify(value: object) -> str:
    """Return a digest of what a transform or sampler is made of, for a state.

    Source: the ``repr`` of TorchIO's transforms (1.2.1) leaves out ``p``, ``include`` and more.
    """
    return _Fingerprint(for_state=True, strict=False).of(value).hex()


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
    fingerprint = _Fingerprint(for_state=False, strict=preprocess_id is None)
    return fingerprint.of(["preprocess", preprocess_id, transform]).hex()


def identify_items(subjects: Iterable[tio.Subject]) -> dict[str, list[str]]:
    """Return a digest of each image of loaded subjects, and of each other value, by its name.

    Images come first. Voxels and affines count bit for bit; NaN is what it is, too.
    """
    found: dict[str, list[str]] = {}
    for subject in subjects:
        items = sorted(subject.items(), key=lambda item: not isinstance(item[1], tio.Image))
        for name, value in items:
            found.setdefault(name, []).append(identify(value))
    return found


def identify_parts(
    dataset: tio.SubjectsDataset, sampler: object, patch_transform: object
) -> dict[str, str]:
    """Return a name or digest of each thing that decides what the patches are, by its name.

    Reads no image content.

    Args:
        dataset: The subjects, with its preprocess and transform.
        sampler: The patch sampler.
        patch_transform: Applied to each patch, or None.
    """
    name = getattr(dataset, "dataset_id", "") or type(dataset).__name__
    preprocess, subjects = getattr(dataset, "preprocess", None), dataset.dry_iter()
    digests: dict[str, str] = getattr(subjects, "digests", {})
    if "selection" not in digests:
        digests["selection"] = identify(repr([_describe(subject) for subject in subjects]))
    return {
        "dataset": f"{name} {getattr(dataset, 'version', '')}".strip(),
        "selection": digests["selection"],
        "transform": identify([preprocess, transform_of(dataset), patch_transform]),
        "patch sampler": identify(sampler),
        "TorchIO version": tio.__version__,
    }


def _describe(subject: tio.Subject) -> list[tuple[object, ...]]:
    """Return the names of a subject's images and their shapes where they are loaded, and values."""
    found: list[tuple[object, ...]] = []
    for name, value in subject.items():
        if isinstance(value, tio.Image):
            shape = tuple(value.data.shape) if is_loaded(value) else ()
            found.append((name, type(value).__name__, value.get("stem", ""), shape))
        else:
            found.append((name, value if isinstance(value, str | int | float) else None))
    return found


_Parts = tuple[str, bytes, Sequence[object]]


class _Fingerprint:
    """The digests of values, and of what they hold."""

    def __init__(self, *, for_state: bool, strict: bool) -> None:
        self._for_state = for_state
        self._strict = strict
        self._above: list[int] = []
        # With the values, so that no later one gets the id of one that is gone.
        self._known: dict[int, tuple[object, bytes]] = {}

    def of(self, value: object) -> bytes:
        """Return the digest of a value."""
        if id(value) in self._known:
            return self._known[id(value)][1]
        if id(value) in self._above:
            return _digest("above", str(len(self._above) - self._above.index(id(value))).encode())
        kind, content, parts = self._take_apart(value)
        if len(self._above) > DEEPEST and parts:
            if self._strict:
                raise UnpinnedError(f"{type(value).__name__}, nested too deep")
            parts = ()
        self._above.append(id(value))
        digests = [self.of(part) for part in parts]
        self._above.pop()
        found = _digest(kind, content, sorted(digests) if kind == "set" else digests)
        if parts:
            self._known[id(value)] = value, found
        return found

    def _take_apart(self, value: object) -> _Parts:  # noqa: PLR0911 - one per kind of value
        """Return the kind of a value, what it is in itself, and what it holds."""
        if isinstance(value, Enum):
            return "enum", f"{_name_of(type(value))}.{value.name}".encode(), ()
        if isinstance(value, torch.Tensor):
            # Torch counts what changes a tensor in its place, but for those of inference mode.
            version = object() if value.is_inference() else value._version  # noqa: SLF001
            digest = _hash_tensor(weakref.ref(value), version)
            return f"{value.dtype} {tuple(value.shape)}", digest, ()
        if isinstance(value, np.ndarray | np.generic):
            return self._array(value)
        if value is None or isinstance(value, bool | int | float | complex | bytes):
            return type(value).__name__, repr(value).encode(), ()
        if isinstance(value, str | PurePath):
            return self._text(value)
        if isinstance(value, tio.Image):
            held = not self._for_state or is_loaded(value)
            content = (value.data, value.affine) if held else (value.get("stem"),)
            return "image", type(value).__name__.encode(), content
        for kind, types in _CONTAINERS.items():
            if isinstance(value, types):
                return kind, b"", parts_of(value)
        return self._object(value)

    def _array(self, array: np.ndarray[Any, Any] | np.generic) -> _Parts:
        kind = f"{type(array).__name__} {array.dtype} {array.shape}"
        if not array.dtype.hasobject:
            return kind, array.tobytes(), ()
        if self._strict:
            raise UnpinnedError(f"an array of objects ({array.dtype})")
        return kind, b"", [array.tolist()]

    def _text(self, value: str | PurePath) -> _Parts:
        if self._for_state and isinstance(value, PurePath):
            return "path", _bytes(value.name), ()
        if self._for_state or not os.path.isfile(value):  # noqa: PTH113 - a path takes 5 times as long
            return "text", _bytes(str(value)), ()
        # Where it lies does not matter, what it holds does.
        path, found = Path(value), Path(value).stat()
        content = _hash_file(path, found.st_size, found.st_mtime_ns, found.st_ino)
        return f"file {''.join(path.suffixes)}", content, ()

    def _object(self, value: object) -> _Parts:
        """Take a function, a class or any other object apart."""
        is_code = isinstance(value, _CODE)
        owner = value if is_code else type(value)
        name = _name_of(owner)
        versioned = _is_versioned(owner, name)
        if self._strict and (not versioned or isinstance(value, torch.Generator)):
            raise UnpinnedError(name)
        if is_code:
            by_name = versioned or not self._for_state
            return "code", name.encode(), () if by_name else parts_of(value)
        if isinstance(value, torch.Generator):
            return "object", name.encode(), [value.get_state()]
        parts = parts_of(value) or _saved(value)
        if self._strict and not parts:
            raise UnpinnedError(name)
        return "object", name.encode(), parts


def _digest(kind: str, content: bytes, digests: Sequence[bytes] = ()) -> bytes:
    lengths = f"{len(kind)} {len(content)} {len(digests)} {kind}".encode()
    whole = b"".join((lengths, content, *digests))
    return hashlib.blake2b(whole, digest_size=_DIGEST_BYTES).digest()


@functools.lru_cache(maxsize=4096)
def _hash_tensor(held: Callable[[], Any], _version: object) -> bytes:
    flat = held().detach().cpu().flatten().contiguous().view(torch.uint8)
    return hashlib.blake2b(flat.numpy()).digest()


@functools.lru_cache(maxsize=64)
def _hash_file(path: Path, *_written: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _name_of(value: object) -> str:
    """Return module and qualified name of a function, class or module."""
    module = getattr(value, "__module__", None) or type(value).__module__
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", "")
    return f"{module}:{name}"


def _is_versioned(value: object, name: str) -> bool:
    """Return whether a function or class is found by its name in a library whose version counts."""
    module, _, path = name.partition(":")
    if module.partition(".")[0] not in _VERSIONED:
        return False
    found: object = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found is value


def _saved(value: object) -> list[object]:
    """Return what pickle would keep of an object without attributes; nothing where it cannot."""
    reduce = copyreg.dispatch_table.get(type(value))
    try:
        reduced = reduce(value) if reduce else value.__reduce_ex__(_PICKLE_PROTOCOL)
    except Exception:  # noqa: BLE001 - whatever its class raises
        return []
    if isinstance(reduced, str):
        return [reduced]
    return [list(part) if isinstance(part, Iterator) else part for part in reduced]
