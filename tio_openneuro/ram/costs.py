"""What transforms hold while they work, as upper bounds. Owns the tables."""

from __future__ import annotations

import torchio as tio

from tio_openneuro.ram.admission import TransformCost

_UNKNOWN_VOXEL_BYTES = 128
_UNKNOWN_COPIES = 2
_CONTAINER_COPIES = 2

# Bytes of temporaries per voxel of one image beside the transform's own copy of its subject, as
# the kernel's peak of RSS at 128**3 and 192**3 with TorchIO 1.2.1, the larger and a tenth more
# (2026-11-21). Classes that are not here are taken for the worst.
_VOXEL_BYTES = {
    "Compose": 0,
    "OneOf": 0,
    "Clamp": 8,
    "Crop": 8,
    "CropOrPad": 8,
    "EnsureShapeMultiple": 8,
    "Pad": 8,
    "ToCanonical": 8,
    "ToOrientation": 8,
    "RandomFlip": 12,
    "RandomSwap": 12,
    "RandomBlur": 16,
    "RandomGamma": 16,
    "RescaleIntensity": 16,
    "Resample": 16,
    "ToReferenceSpace": 16,
    "RandomAnisotropy": 20,
    "RandomAffine": 26,
    "RandomElasticDeformation": 26,
    "RandomNoise": 26,
    "Resize": 26,
    "ZNormalization": 48,
    "RandomGhosting": 60,
    "RandomSpike": 60,
    "RandomBiasField": 74,
    "RandomMotion": 114,
}
# What these hold depends on the size of their results, which the first subject tells.
_GROWING = frozenset(
    {
        "CropOrPad",
        "EnsureShapeMultiple",
        "OneHot",
        "Pad",
        "Resample",
        "Resize",
        "ToReferenceSpace",
    },
)


def measure_cost(transform: object) -> TransformCost:
    """Return an upper bound of what a transform holds while it works.

    Args:
        transform: A TorchIO transform, any callable, or None.
    """
    if transform is None:
        return TransformCost()
    name = type(transform).__name__
    inner = getattr(transform, "transforms", None)
    children = list(inner) if isinstance(inner, list | tuple) else []
    children += list(getattr(transform, "transforms_dict", {}))
    costs = [measure_cost(child) for child in children]
    known = isinstance(transform, tio.Transform) and name not in _GROWING
    known = known and type(transform).__module__.startswith("torchio.")
    # A container holds its own copy and the last result, beside what a transform in it copies.
    inner_copies = [_CONTAINER_COPIES + cost.copies for cost in costs]
    return TransformCost(
        copies=max(inner_copies, default=1 if known else _UNKNOWN_COPIES),
        voxel_bytes=max(
            [_VOXEL_BYTES.get(name, _UNKNOWN_VOXEL_BYTES), *(c.voxel_bytes for c in costs)],
        ),
        known=known and all(cost.known for cost in costs),
    )


def add_costs(first: TransformCost, second: TransformCost) -> TransformCost:
    """Return the bound of two transforms that follow one another."""
    return TransformCost(
        copies=max(first.copies, second.copies),
        voxel_bytes=max(first.voxel_bytes, second.voxel_bytes),
        known=first.known and second.known,
    )
