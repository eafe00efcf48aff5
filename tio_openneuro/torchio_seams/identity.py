"""Digests that tell whether two runs use the same dataset, transform and sampler.

The same in every process: nothing depends on addresses, hash seeds or where files lie.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import PurePath
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
import torchio as tio

_DEEPEST = 20


def identify(value: object) -> str:
    """Return a digest of what a transform or sampler is made of, the same in every process.

    Numbers, text, arrays and tensors count by content, functions by their code, other objects by
    class and attributes.

    Source: the ``repr`` of TorchIO's transforms (1.2.1) leaves out ``p``, ``include`` and more.
    """
    digest = hashlib.blake2b(digest_size=12)
    _feed(value, digest.update, seen={}, depth=0)
    return digest.hexdigest()


def identify_dataset(dataset: tio.SubjectsDataset) -> tuple[str, str]:
    """Return what names a dataset, and a digest of its subjects' names, images and shapes.

    No image content is read.
    """
    name = f"{getattr(dataset, 'dataset_id', '') or type(dataset).__name__}"
    version = getattr(dataset, "version", "")
    digest = hashlib.blake2b(digest_size=12)
    for subject in dataset.dry_iter():
        for key, value in subject.items():
            digest.update(repr(key).encode())
            if isinstance(value, tio.Image):
                loaded = value._loaded  # noqa: SLF001 - the public attributes would load it
                shape = tuple(value.data.shape) if loaded else ()
                stem = value.get("stem", "")
                digest.update(repr((type(value).__name__, stem, shape)).encode())
            elif isinstance(value, str | int | float):
                digest.update(repr(value).encode())
        digest.update(b"|")
    return f"{name} {version}".strip(), digest.hexdigest()


def identify_parts(
    dataset: tio.SubjectsDataset,
    sampler: object,
    patch_transform: object,
) -> dict[str, str]:
    """Return a name or digest of each thing that decides what the patches are, by its name.

    Args:
        dataset: The subjects, with its preprocess and transform.
        sampler: The patch sampler.
        patch_transform: Applied to each patch, or None.
    """
    name, selection = identify_dataset(dataset)
    preprocess = getattr(dataset, "preprocess", None)
    transform = getattr(dataset, "_transform", None)
    return {
        "dataset": name,
        "selection": selection,
        "transform": identify([preprocess, transform, patch_transform]),
        "patch sampler": identify(sampler),
        "TorchIO version": tio.__version__,
    }


def _feed(
    value: object, update: Callable[[bytes], Any], *, seen: dict[int, object], depth: int
) -> None:
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        update(repr(value).encode())
        return
    if isinstance(value, PurePath):
        update(value.name.encode())
        return
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray | np.generic):
        array_value = np.ascontiguousarray(value)
        update(repr((array_value.dtype.str, array_value.shape)).encode())
        update(array_value.tobytes())
        return
    update(f"<{type(value).__module__}.{type(value).__qualname__}>".encode())
    if id(value) in seen or depth > _DEEPEST:
        return
    seen[id(value)] = value  # kept, so that no later object gets its id
    for part in _parts_of(value):
        _feed(part, update, seen=seen, depth=depth + 1)


def _parts_of(value: object) -> list[object]:  # noqa: PLR0911 - one per kind of value
    if isinstance(value, FunctionType):
        code = value.__code__
        constants = [c for c in code.co_consts if isinstance(c, str | int | float | bytes)]
        closed = list(inspect.getclosurevars(value).nonlocals.values())
        return [value.__qualname__, code.co_code, *code.co_names, *constants, *closed]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, ModuleType):
        return [value.__name__]
    if isinstance(value, torch.Generator):
        return [value.get_state()]
    if isinstance(value, type):
        return [value.__module__, value.__qualname__]
    if isinstance(value, Mapping):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, list | tuple | range):
        return list(value)
    attributes = getattr(value, "__dict__", {})
    return [part for name in sorted(attributes) for part in (name, attributes[name])]
