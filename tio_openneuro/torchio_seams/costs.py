"""What transforms hold while they work, as upper bounds. Owns the tables."""

from __future__ import annotations

import torchio as tio

from tio_openneuro.ram import TransformCost
from tio_openneuro.torchio_seams.parts import inner_transforms

_UNKNOWN_VOXEL_BYTES = 128
_UNKNOWN_COPIES = 2
_CONTAINER_COPIES = 2

# Bytes of temporaries per voxel of one image beside the transform's own copy of its subject, as
# the kernel's peak of RSS at 128**3 and 192**3 with TorchIO 1.2.1, the larger and a tenth more
# (2026-11-21). Classes that are not here are taken for the worst.
_CLASSES = {
    0: ("Compose", "OneOf"),
    8: ("Clamp", "Crop", "CropOrPad", "EnsureShapeMultiple", "Pad", "ToCanonical", "ToOrientation"),
    12: ("RandomFlip", "RandomSwap"),
    16: ("RandomBlur", "RandomGamma", "RescaleIntensity", "Resample", "ToReferenceSpace"),
    20: ("RandomAnisotropy",),
    26: ("RandomAffine", "RandomElasticDeformation", "RandomNoise", "Resize"),
    48: ("ZNormalization",),
    60: ("RandomGhosting", "RandomSpike"),
    74: ("RandomBiasField",),
    114: ("RandomMotion",),
}
_VOXEL_BYTES = {name: size_bytes for size_bytes, names in _CLASSES.items() for name in names}
# What these hold depends on the size of their results, which the first subject tells.
_GROWING = frozenset(
    {"CropOrPad", "EnsureShapeMultiple", "OneHot", "Pad", "Resample", "Resize", "ToReferenceSpace"}
)


def measure_cost(transform: object) -> TransformCost:
    """Return an upper bound of what a transform holds while it works.

    Args:
        transform: A TorchIO transform, any callable, or None.
    """
    if transform is None:
        return TransformCost()
    name = type(transform).__name__
    inner = [measure_cost(part) for part in inner_transforms(transform)]
    known = isinstance(transform, tio.Transform) and name not in _GROWING
    known = known and type(transform).__module__.startswith("torchio.")
    own_copies = 1 if known else _UNKNOWN_COPIES
    own_bytes = _VOXEL_BYTES.get(name, _UNKNOWN_VOXEL_BYTES)
    return TransformCost(
        # A container holds its own copy and the last result, beside what a part of it copies.
        copies=max((_CONTAINER_COPIES + cost.copies for cost in inner), default=own_copies),
        voxel_bytes=max([own_bytes, *(cost.voxel_bytes for cost in inner)]),
        known=known and all(cost.known for cost in inner),
    )
