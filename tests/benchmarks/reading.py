"""Reading NIfTI files into subjects: the fast reader and TorchIO's own, side by side.

Smooth noise within a head, zeros around it, as nibabel writes them. Each case runs in turns with
its peer; intra-op threads are as in the queue's workers (one) unless the case says otherwise.
"""

import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torchio as tio
from isal import igzip
from measure import interleaved, median
from rich.console import Console
from rich.table import Table
from scipy.ndimage import gaussian_filter

from tio_openneuro.content import TreeFile
from tio_openneuro.select.patterns import Label, Scalar
from tio_openneuro.torchio_seams.images import (
    FetchedLabelMap,
    FetchedScalarImage,
    ImageFiles,
    Metadata,
)
from tio_openneuro.volumes.reader import _Inflated, _skip

RUNS = 7
SIDE = 192
WANTED_SUBJECT = 2.0
WANTED_INFLATING = 1.3
_PIPELINE = tio.Compose([tio.ToCanonical(), tio.ZNormalization(), tio.RandomFlip(0, 1.0)])


def measure(runs: int, folder: Path, console: Console) -> dict[str, object]:
    """Run it, print its tables and return its figures."""
    threads = torch.get_num_threads()
    pairs = _pairs(folder)
    cases = {f"{name}: {whose}": pair[whose] for name, pair in pairs.items() for whose in pair}
    try:
        seconds = interleaved(cases, runs, lambda _: None)
    finally:
        torch.set_num_threads(threads)
    table = Table(title=f"Milliseconds, medians of {runs}; ratio: the other's over ours")
    for name in ("case", "ours", "the other", "ratio"):
        table.add_column(name, justify="left" if name == "case" else "right")
    ratios = {}
    for name, pair in pairs.items():
        other = next(whose for whose in pair if whose != "ours")
        ours_s, other_s = (median(seconds[f"{name}: {whose}"]) for whose in ("ours", other))
        ratios[name] = other_s / ours_s
        figures = [f"{value * 1e3:.1f}" for value in (ours_s, other_s)]
        table.add_row(f"{name} ({other})", *figures, f"{ratios[name]:.2f}")
    console.print(table)
    console.print(
        f"Wanted: a subject at least {WANTED_SUBJECT}, inflating at least "
        f"{1 / WANTED_INFLATING:.2f}, with transforms above 1."
    )
    return {"runs": runs, "seconds": seconds, "ratio": ratios}


def _pairs(folder: Path) -> dict[str, dict[str, Callable[[], float]]]:
    image, label = _head((SIDE,) * 3)
    files = {
        "image": _write(folder / "image.nii.gz", image),
        "label": _write(folder / "label.nii.gz", label),
    }
    odd = _head((256, 256, 180))
    anatomy = {
        "image": _write(folder / "odd.nii.gz", odd[0]),
        "label": _write(folder / "odd-label.nii.gz", odd[1]),
    }
    plain = {"image": _write(folder / "plain.nii", image)}
    floats = {"image": _write(folder / "floats.nii.gz", image.astype(np.float32))}
    scaled = {"image": _write(folder / "scaled.nii.gz", image, slope=0.37)}
    functional = {"image": _write(folder / "bold.nii.gz", _series(image))}
    sheared = {"image": _write(folder / "sheared.nii.gz", image, shear=0.2)}
    small = {"image": _write(folder / "small.nii.gz", image[:32, :32, :32])}
    return {
        "subject, 192**3 int16 and uint8": _both(files),
        "the same, two threads": _both(files, threads=2),
        "the same, ToCanonical, ZNormalization, flip": _both(files, _PIPELINE),
        "the same, two threads with transforms": _both(files, _PIPELINE, threads=2),
        "inflating 192**3 int16": _inflating(files["image"]),
        "subject, 256 x 256 x 180": _both(anatomy),
        "float32": _both(floats),
        "int16, scaled": _both(scaled),
        "4D, 64 x 64 x 40 x 100": _both(functional),
        "not compressed": _both(plain),
        "32**3": _both(small),
        "sheared: TorchIO reads, after a check": _both(sheared),
    }


def _both(
    files: dict[str, Path],
    transform: Callable[[tio.Subject], tio.Subject] | None = None,
    **how: int,
) -> dict[str, Callable[[], float]]:
    return {
        "ours": lambda: _load(_ours(files), transform, **how),
        "TorchIO": lambda: _load(_stock(files), transform, **how),
    }


def _load(
    subject: tio.Subject,
    transform: Callable[[tio.Subject], tio.Subject] | None,
    threads: int = 1,
) -> float:
    torch.set_num_threads(threads)
    began_s = time.perf_counter()
    subject.load()
    if transform is not None:
        transform(subject)
    return time.perf_counter() - began_s


def _ours(files: dict[str, Path]) -> tio.Subject:
    images = {}
    for name, path in files.items():
        kind = FetchedLabelMap if name == "label" else FetchedScalarImage
        selector = Label("*") if name == "label" else Scalar("*")
        file = TreeFile(path.name, None, "", path.stat().st_size)
        source = ImageFiles((file,), path.parent, None, None, "sub-01", selector)
        images[name] = kind.of(source, Metadata({}))
    return tio.Subject(images)


def _stock(files: dict[str, Path]) -> tio.Subject:
    kinds = {"image": tio.ScalarImage, "label": tio.LabelMap}
    return tio.Subject({name: kinds[name](path) for name, path in files.items()})


def _inflating(path: Path) -> dict[str, Callable[[], float]]:
    inflated_bytes = len(igzip.decompress(path.read_bytes()))

    def ours() -> float:
        began_s = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            _skip(_Inflated(file), inflated_bytes)
        return time.perf_counter() - began_s

    def one_shot() -> float:
        began_s = time.perf_counter()
        igzip.decompress(path.read_bytes())
        return time.perf_counter() - began_s

    return {"ours": ours, "isal's one shot": one_shot}


def _head(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return an image and a label that compress as those of heads do."""
    rng = np.random.default_rng(0)
    smooth = gaussian_filter(rng.normal(size=shape).astype(np.float32), 3)
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    axes = np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij")
    head = sum(axis**2 for axis in axes) < 1.1
    image = head * (smooth * 900 + 100) + np.abs(rng.normal(0, 8, shape))
    return image.astype(np.int16), (head & (smooth > smooth[head].mean())).astype(np.uint8)


def _series(image: np.ndarray) -> np.ndarray:
    part = image[64:128, 64:128, 76:116]
    return np.stack([np.roll(part, n, axis=0) + n for n in range(100)], axis=-1)


def _write(path: Path, voxels: np.ndarray, *, slope: float = 1.0, shear: float = 0.0) -> Path:
    affine = np.diag([1.0, 1.0, 1.2, 1.0])
    affine[0, 1] = shear
    written = nib.Nifti1Image(voxels, affine)
    if slope != 1:
        written.header.set_slope_inter(slope, 0.0)
    nib.save(written, path)
    return path
