"""Synthetic heads with a lesion, for a demo that needs no download.

Owns nothing. The heads are drawn from smooth random fields alone: scalp, skull, fluid, a folded
cortex, white matter, ventricles, deep nuclei, one lesion of irregular shape, noise and a smooth
bias field, with intensities ordered as in a FLAIR image. They resemble a head enough to train
and to look at, and are of no anatomical use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

_Field: TypeAlias = NDArray[Any]  # float32 throughout; NumPy's own functions do not say so
_Mask: TypeAlias = NDArray[np.bool_]

# Mean signal of each tissue in air = 0, fat = 1; FLAIR: fluid is dark, cortex above white matter.
_SIGNAL = {
    "scalp": 0.78,
    "skull": 0.10,
    "fluid": 0.16,
    "grey": 0.62,
    "white": 0.47,
    "nuclei": 0.57,
    "lesion": 0.86,
}
# Lengths in radii of the head (the skin is at 1), in the order: left-right, back-front, down-up.
_CORTEX_THICKNESS = 0.06
_FISSURE_HALF_WIDTH = 0.022
_FISSURE_DEPTH = 0.30
_FISSURE_BOTTOM = -0.15
_LESION_CENTRE_RADII = (0.15, 0.66)

_SULCUS_HALF_WIDTH_MM = 0.85
_CORTEX_THICKNESS_MM = 1.75
_LESION_MIN_VOXELS = 120


@dataclass(frozen=True, slots=True)
class Head:
    """One synthetic subject.

    Attributes:
        name: BIDS participant, ``"sub-01"``.
        image: Signal, int16, shape ``(I, J, K)``.
        label: Lesion, uint8, 0 or 1, shape ``(I, J, K)``.
        brain: Grey and white matter, nuclei and lesion included; bool, shape ``(I, J, K)``.
        affine: Voxels to millimetres, shape ``(4, 4)``.
        age: In years.
        sex: ``"F"`` or ``"M"``.
    """

    name: str
    image: NDArray[np.int16]
    label: NDArray[np.uint8]
    brain: _Mask
    affine: NDArray[np.float64]
    age: int
    sex: str


def make_heads(count: int = 24, *, seed: int = 0) -> Iterator[Head]:
    """Yield heads one by one, the same ones for the same seed.

    Args:
        count: How many.
        seed: Head ``n`` depends on the seed and on ``n``, not on ``count``.

    Example:
        >>> [head.name for head in make_heads(2)]
        ['sub-01', 'sub-02']
    """
    for index in range(count):
        yield make_head(index, seed=seed)


def make_head(index: int, *, seed: int = 0) -> Head:
    """Draw one head.

    Args:
        index: Number of the head, from 0; ``sub-01`` is head 0.
        seed: Seed of the whole series.
    """
    rng = np.random.default_rng([seed, index])
    shape, spacing_mm = _draw_grid(rng)
    points_mm = _centred_grid(shape, spacing_mm)
    radius, unit = _head_radius(rng, points_mm, shape, spacing_mm)
    tissues = _draw_tissues(rng, radius, unit, spacing_mm)
    tissue = tissues["grey"] | tissues["white"] | tissues["nuclei"]
    lesion = _draw_lesion(rng, tissue, radius, spacing_mm)
    brain = tissue | lesion  # it has closed the sulci that it swallowed
    image = _acquire(rng, tissues, lesion, spacing_mm)
    mirrored = bool(index % 2)  # a second "scanner" stores its voxels from right to left
    return Head(
        name=f"sub-{index + 1:02d}",
        image=image[::-1].copy() if mirrored else image,
        label=(lesion[::-1] if mirrored else lesion).astype(np.uint8),
        brain=brain[::-1].copy() if mirrored else brain,
        affine=_centred_affine(shape, spacing_mm, mirrored=mirrored),
        age=int(rng.integers(19, 83)),
        sex=str(rng.choice(["F", "M"])),
    )


def _draw_grid(rng: np.random.Generator) -> tuple[tuple[int, int, int], _Field]:
    """Return a shape of 56 to 80 voxels a side, and spacings of 0.9 to 1.4 mm."""
    in_plane_mm = rng.uniform(0.9, 1.25)
    spacing_mm = np.array([in_plane_mm, in_plane_mm, rng.uniform(0.95, 1.4)], dtype=np.float32)
    size_mm = np.array([66.0, 80.0, 70.0]) * rng.uniform(0.95, 1.08, size=3)
    sides = np.clip(np.round(size_mm / spacing_mm), 56, 80).astype(int)
    return (int(sides[0]), int(sides[1]), int(sides[2])), spacing_mm


def _centred_grid(shape: tuple[int, int, int], spacing_mm: _Field) -> _Field:
    """Return the millimetres from the centre of each voxel, shape ``(3, I, J, K)``."""
    axes = [
        (np.arange(side, dtype=np.float32) - (side - 1) / 2) * spacing
        for side, spacing in zip(shape, spacing_mm, strict=True)
    ]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def _centred_affine(
    shape: tuple[int, int, int], spacing_mm: _Field, *, mirrored: bool
) -> NDArray[np.float64]:
    """Return an axis-aligned affine with its origin in the middle, RAS or LAS."""
    scale = spacing_mm.astype(np.float64) * (-1 if mirrored else 1, 1, 1)
    affine = np.diag([*scale, 1.0])
    affine[:3, 3] = -scale * (np.array(shape) - 1) / 2
    return affine


def _smooth_field(
    rng: np.random.Generator, shape: tuple[int, ...], scale_mm: float, spacing_mm: _Field
) -> _Field:
    """Return a Gaussian random field with the given length scale, mean 0, deviation 1."""
    box = [fft.next_fast_len(side, real=True) for side in shape]
    noise = fft.rfftn(rng.standard_normal(box, dtype=np.float32))
    frequencies = (fft.fftfreq, fft.fftfreq, fft.rfftfreq)
    for axis, (side, spacing) in enumerate(zip(box, spacing_mm, strict=True)):
        cycles = frequencies[axis](side, spacing)
        damping = np.exp(-2 * (np.pi * scale_mm * cycles) ** 2).astype(np.float32)
        noise *= np.expand_dims(damping, [other for other in range(3) if other != axis])
    field = fft.irfftn(noise, box)[tuple(slice(side) for side in shape)]
    return np.asarray((field - field.mean()) / field.std())


def _head_radius(
    rng: np.random.Generator, points_mm: _Field, shape: tuple[int, int, int], spacing_mm: _Field
) -> tuple[_Field, _Field]:
    """Return the radius (1 at the skin) and the head's own coordinates (-1 to 1)."""
    half_mm = np.array(shape) * spacing_mm / 2
    axes_mm = half_mm * rng.uniform(0.86, 0.95, size=3)
    unit = points_mm / axes_mm.reshape(3, 1, 1, 1).astype(np.float32)
    narrow = 1 + np.float32(rng.uniform(0.05, 0.14)) * unit[1]  # the forehead is narrower
    unit = np.stack([unit[0] * narrow, unit[1], unit[2]])
    radius = np.sqrt(np.sum(unit**2, axis=0))
    ripple = _smooth_field(rng, shape, 13.0, spacing_mm)
    return radius * (1 + np.float32(0.018) * ripple), unit


def _draw_tissues(
    rng: np.random.Generator, radius: _Field, unit: _Field, spacing_mm: _Field
) -> dict[str, _Mask]:
    """Return one mask per tissue; they do not overlap."""
    skin = 1.0
    bone = skin - rng.uniform(0.07, 0.11)
    inside = bone - rng.uniform(0.06, 0.09)
    pia = inside - rng.uniform(0.02, 0.04)
    depth = np.float32(pia) - radius

    # Sheets where a smooth field crosses zero run inwards from the surface: sulci. The field over
    # its slope is about the distance from the sheet, so that sulci are of one width.
    folds = _smooth_field(rng, radius.shape, 3.3, spacing_mm)
    slope = np.linalg.norm(np.array(np.gradient(folds, *spacing_mm)), axis=0)
    from_sheet_mm = np.abs(folds) / (slope + np.float32(0.02))
    reach = 0.25 + 0.05 * _smooth_field(rng, radius.shape, 6.0, spacing_mm)
    within = np.clip(1 - depth / reach, 0, 1)
    fissure = np.abs(unit[0]) < _FISSURE_HALF_WIDTH
    fissure &= (depth < _FISSURE_DEPTH) & (unit[2] > _FISSURE_BOTTOM)
    in_skull = radius < inside
    brain = (depth > 0) & in_skull
    fluid = brain & ((from_sheet_mm < _SULCUS_HALF_WIDTH_MM * np.sqrt(within)) | fissure)
    lining = (from_sheet_mm < _SULCUS_HALF_WIDTH_MM + _CORTEX_THICKNESS_MM) & (depth < reach + 0.04)
    cortex = brain & ~fluid & ((depth < _CORTEX_THICKNESS) | lining)

    ventricles = _pair(unit, (0.13, 0.02, 0.06), (0.085, 0.30, 0.13), rng) & brain
    nuclei = _pair(unit, (0.27, 0.08, -0.03), (0.085, 0.17, 0.13), rng) & brain & ~cortex
    fluid |= ventricles | (in_skull & ~brain)
    nuclei &= ~fluid
    grey = cortex & ~fluid & ~nuclei
    return {
        "scalp": (radius < skin) & (radius >= bone),
        "skull": (radius < bone) & ~in_skull,
        "fluid": fluid & in_skull,
        "grey": grey,
        "white": brain & ~fluid & ~grey & ~nuclei,
        "nuclei": nuclei,
    }


def _pair(
    unit: _Field,
    centre: tuple[float, float, float],
    axes: tuple[float, float, float],
    rng: np.random.Generator,
) -> _Mask:
    """Return two ellipsoids, one per hemisphere, slightly different from each other."""
    both = np.zeros(unit.shape[1:], dtype=bool)
    for side in (-1, 1):
        lengths = np.array(axes) * rng.uniform(0.85, 1.2, size=3)
        shift = np.array(centre) * (side, 1, 1)
        offset = unit - shift.reshape(3, 1, 1, 1).astype(np.float32)
        bent = offset[0] - np.float32(side * 0.5) * offset[1] ** 2
        scaled = np.stack([bent, offset[1], offset[2]]) / lengths.reshape(3, 1, 1, 1)
        both |= np.sum(scaled**2, axis=0) < 1
    return both


def _draw_lesion(
    rng: np.random.Generator, brain: _Mask, radius: _Field, spacing_mm: _Field
) -> _Mask:
    """Return one connected blob of irregular outline inside the brain."""
    inner, outer = _LESION_CENTRE_RADII
    candidates = np.argwhere(brain & (radius > inner) & (radius < outer))
    ripple = _smooth_field(rng, brain.shape, 3.2, spacing_mm)
    size_mm = rng.uniform(5.5, 9.0)
    while True:
        centre = candidates[rng.integers(len(candidates))]
        offset = np.indices(brain.shape, dtype=np.float32)
        offset -= centre.reshape(3, 1, 1, 1).astype(np.float32)
        stretch = spacing_mm * rng.uniform(0.8, 1.25, size=3).astype(np.float32)
        distance_mm = np.sqrt(np.sum((offset * stretch.reshape(3, 1, 1, 1)) ** 2, axis=0))
        blob = (distance_mm + 1.9 * ripple < size_mm) & brain
        blob = ndimage.binary_fill_holes(ndimage.binary_closing(blob))
        pieces, found = ndimage.label(blob)
        if found:
            sizes = np.bincount(pieces.ravel())[1:]
            lesion = np.asarray(pieces == 1 + int(np.argmax(sizes)))
            if int(sizes.max()) >= _LESION_MIN_VOXELS:
                return lesion
        size_mm *= 1.1


def _acquire(
    rng: np.random.Generator, tissues: dict[str, _Mask], lesion: _Mask, spacing_mm: _Field
) -> NDArray[np.int16]:
    """Return the image: partial volume, texture, bias field, Rician noise, scanner gain."""
    shape = lesion.shape
    signal = np.zeros(shape, dtype=np.float32)
    for tissue, mask in tissues.items():
        signal[mask] = _SIGNAL[tissue] * rng.uniform(0.95, 1.05)
    contrast = rng.uniform(0.75, 1.0)
    inside = ndimage.gaussian_filter(lesion.astype(np.float32), 0.7 / spacing_mm)
    uneven = 1 + 0.12 * _smooth_field(rng, shape, 2.0, spacing_mm)
    signal += contrast * inside * uneven * (_SIGNAL["lesion"] - signal)
    signal = ndimage.gaussian_filter(signal, 0.5 / spacing_mm)
    signal *= 1 + 0.045 * _smooth_field(rng, shape, 1.6, spacing_mm)
    signal *= np.exp(0.14 * _smooth_field(rng, shape, 18.0, spacing_mm))
    deviation = rng.uniform(0.022, 0.038)
    real = signal + deviation * rng.standard_normal(shape, dtype=np.float32)
    imaginary = deviation * rng.standard_normal(shape, dtype=np.float32)
    gain = rng.uniform(500, 1400)
    measured = gain * np.sqrt(real**2 + imaginary**2)
    return np.asarray(np.clip(np.round(measured), 0, 32767), dtype=np.int16)
