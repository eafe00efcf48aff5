"""What transforms and patch samplers hold while they work, as upper bounds. Owns the tables."""

from __future__ import annotations

import torchio as tio

from tio_openneuro.memory import TransformCost

_UNKNOWN_VOXEL_BYTES = 128
_NESTING = 2

# Bytes of temporaries per voxel of one image, measured as peak RSS at 128**3 and 160**3 with
# TorchIO 1.2.1 and rounded up (2026-11-20). Classes that are not here are taken for the worst.
_VOXEL_BYTES = {
    "Compose": 0,
    "OneOf": 0,
    "Crop": 16,
    "RandomFlip": 16,
    "ToCanonical": 16,
    "ToOrientation": 16,
    "Clamp": 32,
    "RandomAffine": 32,
    "RandomAnisotropy": 32,
    "RandomBlur": 32,
    "RandomGamma": 32,
    "RandomNoise": 32,
    "RandomSwap": 32,
    "CropOrPad": 40,
    "EnsureShapeMultiple": 40,
    "Pad": 40,
    "RandomElasticDeformation": 40,
    "Resample": 40,
    "RescaleIntensity": 40,
    "Resize": 40,
    "ToReferenceSpace": 40,
    "ZNormalization": 72,
    "RandomBiasField": 80,
    "RandomGhosting": 80,
    "RandomSpike": 80,
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
_MAP_BYTES = {"UniformSampler": 0, "WeightedSampler": 48, "LabelSampler": 56}
_UNKNOWN_MAP_BYTES = 56


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
    return TransformCost(
        copies=1 + max((cost.copies for cost in costs), default=_NESTING - 1),
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


def sampler_map_bytes(sampler: object) -> int:
    """Return the bytes of a patch sampler's maps per voxel of an image."""
    return _MAP_BYTES.get(type(sampler).__name__, _UNKNOWN_MAP_BYTES)
