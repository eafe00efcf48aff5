"""Patches out of subjects that need not be loaded, as TorchIO's own ``Crop`` would cut them.

Owns one shortcut: TorchIO's samplers choose where, and the box alone is read. Draws, voxels,
affines, attributes and history are those of :class:`torchio.Crop`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torchio as tio
from nibabel.affines import apply_affine

from tio_openneuro.torchio_seams.images import FetchedImage

_KNOWN = (tio.UniformSampler, tio.WeightedSampler, tio.LabelSampler)
_IMMUTABLE = (str, int, float, bool, bytes, type(None))


def reads_boxes(sampler: object) -> bool:
    """Return whether :func:`with_box_crop` lets a patch sampler read boxes alone."""
    return type(sampler) in _KNOWN


def with_box_crop(sampler: Any) -> Any:  # noqa: ANN401 - any patch sampler, ours or the user's
    """Return a copy of one of TorchIO's patch samplers that cuts boxes; any other as it is."""
    if not reads_boxes(sampler):
        return sampler
    quick = copy.copy(sampler)
    quick._get_crop_transform = _BoxCrop  # noqa: SLF001 - there is no public seam
    return quick


class _BoxCrop:
    """Cut one box out of a subject."""

    def __init__(
        self, subject: tio.Subject, index_ini: Iterable[int], patch_size: Iterable[int]
    ) -> None:
        self._start = [int(index) for index in index_ini]
        sizes = zip(self._start, patch_size, strict=True)
        self._stop = [start + int(size) for start, size in sizes]
        self._shape = subject.get_first_image().spatial_shape

    def __call__(self, subject: tio.Subject) -> tio.Subject:
        # Every transform of TorchIO's draws once, to find whether it is applied (1.2.1).
        torch.rand(1)
        patch = type(subject).__new__(type(subject))
        names = subject.keys()
        for key, value in vars(subject).items():
            if key in names and isinstance(value, tio.Image):
                patch[key] = self._crop(value)
                continue
            copied = value if isinstance(value, _IMMUTABLE) else copy.deepcopy(value)
            if key in names:
                patch[key] = copied
            vars(patch)[key] = copied
        patch.update_attributes()
        patch.applied_transforms.append(("Crop", self._arguments()))
        return patch

    def _crop(self, image: tio.Image) -> tio.Image:
        affine = image.affine.copy()
        affine[:3, 3] = apply_affine(image.affine, self._start)  # type: ignore[no-untyped-call]
        box = [(0, image.shape[0]), *zip(self._start, self._stop, strict=True)]
        if isinstance(image, FetchedImage):
            tensor = image.read_box(box)
        else:
            tensor = image.data[tuple(slice(*edge) for edge in box)].clone()
        return type(image)(tensor=tensor, affine=affine, type=image.type, path=image.path)

    def _arguments(self) -> dict[str, object]:
        ends = [size - stop for size, stop in zip(self._shape, self._stop, strict=True)]
        cropping = tuple(edge for pair in zip(self._start, ends, strict=True) for edge in pair)
        return {"include": None, "exclude": None, "copy": False, "cropping": cropping}
