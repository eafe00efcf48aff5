"""Subjects that nobody else holds: read fast, and transformed without copies of them.

Every TorchIO transform copies its subject before it changes it, a random one twice, since its
caller may still need it (1.2.1). A subject that was loaded to be transformed has no such caller.
Owns no state, changes no transform of the user's, and takes nothing for granted of classes that
are not TorchIO's own.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torchio as tio
from torchio.data.io import read_image

from tio_openneuro.recording import doing
from tio_openneuro.torchio_seams.parts import inner_transforms
from tio_openneuro.torchio_seams.private_names import is_loaded, transform_of
from tio_openneuro.volumes import VolumeFile, read_volume

# False to TorchIO, and told from the False of a user or of TorchIO's own.
_SPARED = 0
_IMAGE_CLASSES = (tio.ScalarImage, tio.LabelMap, tio.Image)
_THROUGH_SITK = (
    tio.RandomAffine,
    tio.Affine,
    tio.RandomElasticDeformation,
    tio.ElasticDeformation,
    tio.RandomAffineElasticDeformation,
    tio.AffineElasticDeformation,
    tio.Resample,
)
"""What hands every image to SimpleITK and takes another one back."""
# Whose arithmetic is known, to the order of its sums.
_KNOWN_VERSIONS = frozenset({"1.2.1"})


def get_subject(dataset: tio.SubjectsDataset, index: int) -> tio.Subject:
    """Return what ``dataset[index]`` returns: the same voxels, sooner.

    Args:
        dataset: The subjects; where its class has a ``__getitem__`` of its own, that is asked.
        index: Number of the subject.
    """
    if type(dataset).__getitem__ is not tio.SubjectsDataset.__getitem__:
        return dataset[index]
    subject = copy.deepcopy(dataset.dry_iter()[index])
    if dataset.load_getitem:
        with doing("decode"):
            for image in subject.get_images(intensity_only=False):
                _load(image)
    return transform_in_place(transform_of(dataset), subject)


def _load(image: tio.Image) -> None:
    if type(image) not in _IMAGE_CLASSES or is_loaded(image) or not isinstance(image.path, Path):
        image.load()
        return
    tensor, affine = read_file(image, VolumeFile(image.path), str(image.path))
    image.set_data(tensor.contiguous())
    image.affine = affine


def read_file(image: tio.Image, file: VolumeFile, name: str) -> tuple[torch.Tensor, Any]:
    """Return the voxels and affine that an image's own reader returns, by the fast one if it can.

    Args:
        image: The image, whose reader and check for NaN hold.
        file: The file.
        name: What it is called in messages.

    Raises:
        DamagedImageError: The file is gone or cut off, fails its own checksum, or has a header that
            lies.
    """
    plain = image.reader is read_image and not image.check_nans
    read = image.read_and_check
    return read_volume(file, name, read) if plain else read(file.path)


def transform_in_place(
    transform: Callable[[tio.Subject], tio.Subject] | None, subject: tio.Subject
) -> tio.Subject:
    """Return what a transform makes of a subject that the caller does not need any more.

    Args:
        transform: A TorchIO transform, any callable, or None. Not changed.
        subject: May be changed.
    """
    if transform is None:
        return subject
    with doing("transform"):
        result = cast("tio.Subject", _sparing(transform)(subject))
    for _, arguments in getattr(result, "applied_transforms", ()):
        # A replay of the history has a caller again.
        if type(arguments.get("copy")) is int:
            arguments["copy"] = True
    return result


def is_known(transform: object) -> bool:
    """Return whether a transform is TorchIO's own, and shows its subject to no code of others."""
    ours = isinstance(transform, tio.Transform) and not isinstance(transform, tio.Lambda)
    ours = ours and type(transform).__module__.startswith("torchio.")
    return ours and all(map(is_known, inner_transforms(transform)))


def _sparing(transform: Any) -> Any:  # noqa: ANN401
    """Return a transform that does the same without copies, where nobody can tell."""
    compound = type(transform) is tio.Compose
    if not compound and not is_known(transform):
        return transform
    sparing = copy.copy(transform)
    sparing.copy = transform.copy and _SPARED
    if compound:
        sparing.transforms = []
        shown = False
        for part in transform.transforms:
            # Code of others may keep what it was shown: what follows it works on a copy.
            sparing.transforms.append(part if shown else _sparing(part))
            shown = not is_known(part)
    elif type(transform) is tio.OneOf:
        odds = transform.transforms_dict.items()
        sparing.transforms_dict = {_sparing(part): share for part, share in odds}
    elif normalizes_all(transform):
        sparing.ones, sparing.znorm = _no_mask, _standardize
    elif type(transform) in _THROUGH_SITK:
        return partial(_apply_transposed, sparing)
    return sparing


def normalizes_all(transform: object) -> bool:
    """Return whether a transform is a ``ZNormalization`` of all voxels, which is done faster."""
    unmasked = type(transform) is tio.ZNormalization and transform.masking_method is None
    return unmasked and tio.__version__ in _KNOWN_VERSIONS


def _no_mask(_: torch.Tensor) -> None:
    """Return nothing in place of a mask of ones, for :func:`_standardize`."""


def _standardize(tensor: torch.Tensor, _: None) -> torch.Tensor | None:
    """Return what ``ZNormalization`` makes of all voxels; None where they are equal.

    TorchIO looks them up by a mask of ones first, which takes 148 of 158 ms at 192**3 (1.2.1).
    Here they are in the order in which that gives them, since sums depend on it.
    """
    result = tensor.clone() if tensor.dtype == torch.float32 else tensor.float()
    values = result.reshape(-1)
    mean, std = values.mean(), values.std()
    if std == 0:
        return None
    del values
    result -= mean
    result /= std
    return result


def _apply_transposed(transform: Any, subject: tio.Subject) -> tio.Subject:  # noqa: ANN401
    """Apply a transform that hands images to SimpleITK, in the order in which that wants voxels.

    SimpleITK 2.5.7 copies any other order voxel by voxel while it holds Python's lock: 70 ms for
    192**3 of float32, 5 after a transposition that takes 14 and holds nothing (2026-11-24).
    """
    handed = []
    for image in filter(is_loaded, transform.get_images(subject)):
        if image.data.is_contiguous():
            image.set_data(_in_fortran_order(image.data))
            # Neither order is held beside the other, nor beside what becomes of it.
            handed.append((image, weakref.ref(image.data)))
    result: tio.Subject = transform(subject)
    for image, reference in handed:
        tensor = reference()
        if tensor is not None and image.data is tensor:
            image.set_data(_in_fortran_order(tensor.permute(0, 3, 2, 1)).permute(0, 3, 2, 1))
    return result


def _in_fortran_order(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same ``(C, I, J, K)`` with I varying fastest in the memory of each channel."""
    channels, i, j, k = tensor.shape
    fast = torch.empty((channels, k, j, i), dtype=tensor.dtype)
    for channel, target in zip(tensor, fast, strict=True):
        # Torch transposes matrices in blocks, and nothing else.
        rows = channel.reshape(i, j * k).t().contiguous()
        target.copy_(rows.reshape(j, k, i).transpose(0, 1))
    return fast.permute(0, 3, 2, 1)
