"""What transforms hold while they work, as upper bounds. Owns the tables, and how images grow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import permutations, zip_longest
from math import ceil, prod
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torchio as tio
from torchio.transforms.augmentation import RandomTransform

from tio_openneuro.ram import Need
from tio_openneuro.torchio_seams.in_place import is_known, normalizes_all
from tio_openneuro.torchio_seams.parts import inner_transforms, walk_parts
from tio_openneuro.torchio_seams.private_names import is_loaded
from tio_openneuro.volumes import FLOAT_BYTES, ImageSize, SubjectSize, VolumeFile

# Bytes of temporaries beside the subject's floats, per voxel of an image's grid and per voxel of
# each of its channels: the kernel's peak of RSS at 80**3 with TorchIO 1.2.1, int16, float32 and
# float64, 1 to 4 channels, some at 192**3, and a tenth more (2026-12-01). Who is not here is taken
# for the worst.
_WORST = 0, 128
_CLASSES = {
    (0, 5): ("Clamp", "Crop", "CropOrPad", "EnsureShapeMultiple", "Flip", "Pad", "Transpose"),
    (0, 6): ("Swap", "To", "ToCanonical", "ToOrientation", "ZNormalization"),
    (3, 9): ("Blur", "Gamma", "Noise"),
    (0, 12): ("Anisotropy",),
    (0, 15): ("RescaleIntensity", "Resize"),
    (2, 18): ("Resample",),
    (9, 9): ("OneHot",),
    (12, 12): ("Affine", "AffineElasticDeformation", "ElasticDeformation", "ToReferenceSpace"),
    (26, 9): ("Ghosting", "Spike"),
    (0, 45): ("HistogramStandardization", "ZNormalization by a mask"),
    (62, 0): ("BiasField",),
    (41, 9): ("Motion",),
}
_TEMPORARIES = {name: each for each, names in _CLASSES.items() for name in names}
_MOVEMENT = 14
_MM = {"mm": 1, "cm": 10}
_ROUNDED = 0.01
_AXES = 3

Axes = Sequence[tuple[int, float]]


def trace_transform(
    transform: Any,  # noqa: ANN401 - a class's own attributes tell
    size: SubjectSize,
    *,
    in_place: bool = True,
) -> tuple[SubjectSize, list[Need]]:
    """Return a subject's size once it is transformed, and what each part holds at most.

    Args:
        transform: A TorchIO transform, any callable, or None. It is not called.
        size: The subject's.
        in_place: Whether its copies of the subject are spared, as ``transform_in_place`` does.
    """
    if transform is None:
        return size, []
    compound, inner = type(transform) is tio.Compose, inner_transforms(transform)
    in_place = in_place and (compound or is_known(transform))
    twice = isinstance(transform, RandomTransform) or not knows_cost(transform)
    copied_bytes = 0 if in_place else (1 + twice) * size.stored_bytes
    if not inner:
        return _trace_part(transform, size, copied_bytes)
    after, needs = size, []
    for part in inner:
        result, found = trace_transform(part, after if compound else size, in_place=in_place)
        after = result if compound else _join(after, result)
        needs += [Need(need.size_bytes + copied_bytes, need.name) for need in found]
        # Code of others may keep what it was shown: what follows it works on a copy.
        in_place = in_place and is_known(part)
    return after, needs


def _trace_part(
    transform: Any,  # noqa: ANN401
    size: SubjectSize,
    copied_bytes: int,
) -> tuple[SubjectSize, list[Need]]:
    steps = [_grow(transform, image, size) for image in size.images]
    worked, after = (SubjectSize(images) for images in zip(*steps, strict=True))
    worked = _join(size, worked)
    if getattr(transform, "probability", 1) < 1:
        after = _join(size, after)
    if isinstance(transform, tio.ToReferenceSpace):
        worked = SubjectSize((*worked.images, measure_image(transform.reference) or size.images[0]))
    grid, channel = _count_temporaries(transform)
    # What is kept is copied by a random transform, and by the one that it draws.
    kept = len(getattr(transform, "keep", None) or ())
    held_bytes = copied_bytes + worked.stored_bytes + 2 * kept * size.largest_bytes
    held_bytes += max(
        image.voxels * (grid + channel * image.channels) * image.item_bytes // FLOAT_BYTES
        for image in worked.images
    )
    largest = max(size.images, key=lambda image: image.size_bytes)
    after = SubjectSize(after.images + kept * (largest,))
    return after, [Need(held_bytes, type(transform).__name__)]


def knows_cost(transform: object) -> bool:
    """Return whether what is told of a transform is no guess.

    It is one where voxels alone tell how much grows, and where code of others sees them: a class, a
    function, a callable mask.

    Args:
        transform: As in :func:`trace_transform`.
    """
    for part in walk_parts(transform):
        named = str((part if isinstance(part, FunctionType) else type(part)).__module__)
        ours = named.startswith("torchio.") or isinstance(part, type | MethodType | partial)
        if callable(part) and (not ours or getattr(part, "num_classes", 1) in {None, -1}):
            return False
    return True


def _count_temporaries(transform: Any) -> tuple[int, int]:  # noqa: ANN401
    """Return the bytes per voxel of the grid and of each channel."""
    name = type(transform).__name__.removeprefix("Random")
    if name == "ZNormalization" and not normalizes_all(transform):
        name += " by a mask"
    grid, channel = _TEMPORARIES.get(name, _WORST) if knows_cost(transform) else _WORST
    if name == "Motion":
        times = getattr(transform, "times", range(getattr(transform, "num_transforms", 0)))
        grid += _MOVEMENT * max(map(len, times.values() if isinstance(times, dict) else [times]))
    return grid, channel


def _join(one: SubjectSize, other: SubjectSize) -> SubjectSize:
    """Return what is no smaller than either of two sizes of a subject."""
    pairs = zip_longest(one.images, other.images, fillvalue=ImageSize(0, 0, FLOAT_BYTES))
    return SubjectSize(tuple(max(pair, key=lambda image: image.size_bytes) for pair in pairs))


def _grow(transform: Any, image: ImageSize, subject: SubjectSize) -> tuple[ImageSize, ImageSize]:  # noqa: ANN401
    """Return the largest size that an image has within a transform, and its size after it.

    Which way an image lies is not told: of all orders of its axes the one that grows most counts.
    """
    if isinstance(transform, tio.OneHot):
        image = image._replace(channels=max(transform.num_classes or 1, image.channels))
    axes = image.axes or ((ceil(image.voxels ** (1 / _AXES)), 1.0),) * _AXES
    orders = [_reshape(transform, order, subject) for order in permutations(axes)]
    found = [order for order in orders if order is not None]
    if not found:
        return image, image
    most, after = (max(each, key=_count) for each in zip(*found, strict=True))
    return (
        image._replace(voxels=_count(most), axes=tuple(most)),
        image._replace(voxels=_count(after), axes=tuple(after)),
    )


def _count(axes: Axes) -> int:
    return prod(voxels for voxels, _ in axes)


def _reshape(transform: Any, axes: Axes, subject: SubjectSize) -> tuple[Axes, Axes] | None:  # noqa: ANN401
    """Return the same of an image's axes, in one order; None where they stay."""
    counts, sizes_mm = [n for n, _ in axes], [mm for _, mm in axes]
    match transform:
        case tio.CropOrPad() if transform.target_shape is not None:
            unit_mm = _MM.get(transform.units)
            after = [
                n if each is None else round(each * unit_mm / mm) if unit_mm else int(each)
                for n, mm, each in zip(counts, sizes_mm, transform.target_shape, strict=True)
            ]
        case tio.Pad():
            edges = iter(transform.bounds_parameters or (0,) * 6)
            after = [n + next(edges) + next(edges) for n in counts]
        case tio.EnsureShapeMultiple():
            multiples = transform.target_multiple
            after = [ceil(n / each) * int(each) for n, each in zip(counts, multiples, strict=True)]
        case tio.Resize():
            shape = transform.target_shape
            after = [int(each) if each > 0 else n for n, each in zip(counts, shape, strict=True)]
        case tio.Resample():
            axes = _resample(transform.target, axes, subject)
            after, sizes_mm = [n for n, _ in axes], [mm for _, mm in axes]
        case _:
            return None
    # Around a mask it may be padded at one end and cropped at the other.
    both, masked = zip(counts, after, strict=True), getattr(transform, "mask_name", None)
    padded = [n + target if masked else max(n, target) for n, target in both]
    after = padded if getattr(transform, "only_pad", False) else after
    most, last = (list(zip(each, sizes_mm, strict=True)) for each in (padded, after))
    return most, last


def _resample(target: Any, axes: Axes, subject: SubjectSize) -> Axes:  # noqa: ANN401 - TorchIO's many
    """Return the axes of an image that is resampled onto a target."""
    if isinstance(target, str) and not Path(target).is_file():
        # The image of that name, whichever it is.
        return max((image.axes for image in subject.images if image.axes), key=_count, default=axes)
    if isinstance(target, str | Path | tio.Image):
        found = (
            measure_image(target)
            if isinstance(target, tio.Image)
            else VolumeFile(Path(target)).size
        )
        return axes if found is None else found.axes
    if isinstance(target, int | float):
        target = [target] * _AXES
    if len(target) < _AXES:
        return [(int(n), 1.0) for n in target[0]]
    pairs = zip(axes, target, strict=True)
    # It rounds down, a size in mm that was rounded itself.
    return [(max(int(n * mm / each + _ROUNDED), 1), each) for (n, mm), each in pairs]


def measure_subject(subject: tio.Subject) -> SubjectSize | None:
    """Return the size of a subject's images from memory or local headers, or None.

    Args:
        subject: Loaded or not; it is not loaded.
    """
    sizes = [measure_image(image) for image in subject.get_images(intensity_only=False)]
    known = [size for size in sizes if size is not None]
    return SubjectSize(tuple(known)) if 0 < len(known) == len(sizes) else None


def measure_image(image: tio.Image) -> ImageSize | None:
    """Return the size of an image from memory or its local header, or None."""
    if not is_loaded(image):
        return VolumeFile(image.path).size if isinstance(image.path, Path) else None
    shape, item_bytes = image.data.shape, max(image.data.element_size(), FLOAT_BYTES)
    axes = tuple(zip(shape[1:], image.spacing, strict=True))
    return ImageSize(shape[0], prod(shape[1:]), item_bytes, axes)
