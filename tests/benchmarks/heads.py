"""Synthetic heads of any size: as a BIDS folder, and published from there on the loopback."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torchio as tio
from scipy import ndimage

import tio_openneuro as tno
from tio_openneuro.demo.phantom import make_head
from tio_openneuro.loopback import Volume
from tio_openneuro.loopback.volume import write_content

IMAGES = {
    "flair": tno.Scalar("sub-*/anat/*_FLAIR.nii*"),
    "lesion": tno.Label("sub-*/anat/*_FLAIR_roi.nii*"),
}
_DRAWN = 4
_NOISE = 8


def write_heads(
    folder: Path, shapes: Sequence[tuple[int, int, int]], *, suffix: str = ".nii.gz"
) -> Path:
    """Write one subject of each shape, FLAIR and lesion label; return the folder.

    The demo's heads, four of them, scaled to the shape, each subject with noise of its own.

    Args:
        folder: Of the BIDS dataset; made here.
        shapes: Voxels of each subject.
        suffix: ``".nii"`` makes files of one shape equally large.
    """
    folder.mkdir(parents=True)
    description = '{"Name": "Heads", "BIDSVersion": "1.10.0"}'
    (folder / "dataset_description.json").write_text(description, encoding="utf-8")
    scaled: dict[tuple[int, tuple[int, int, int]], tuple[np.ndarray, np.ndarray]] = {}
    for number, shape in enumerate(shapes, 1):
        drawn = number % _DRAWN
        if (drawn, shape) not in scaled:
            head = make_head(drawn)
            zoom = np.array(shape) / np.array(head.image.shape)
            image = ndimage.zoom(head.image.astype(np.float32), zoom, order=1)
            scaled[drawn, shape] = image, ndimage.zoom(head.label, zoom, order=0)
        image, label = scaled[drawn, shape]
        random = np.random.default_rng(number)
        image = image + _NOISE * random.standard_normal(shape, dtype=np.float32)
        affine = np.diag([1.0, 1.0, 1.0, 1.0])
        affine[0, 3] = number  # no two labels are the same annex key
        stem = f"sub-{number:04}_FLAIR"
        anat = folder / f"sub-{number:04}" / "anat"
        anat.mkdir(parents=True)
        image = Volume(np.clip(image, 0, 32767).astype(np.int16), affine)
        write_content(image, anat / f"{stem}{suffix}")
        write_content(Volume(label, affine), anat / f"{stem}_roi{suffix}")
    return folder


def open_heads(
    accession: str,
    root: Path,
    budget: int | str,
    transform: tio.Transform | None = None,
    preprocess: tio.Transform | None = None,
) -> tno.DataladSubjectsDataset:
    """Open what was published from such a folder."""
    return tno.DataladSubjectsDataset(
        accession,
        IMAGES,
        root=root,
        disk_budget=budget,
        preprocess=preprocess,
        transform=transform,
    )


def local_heads(folder: Path, transform: tio.Transform | None = None) -> tio.SubjectsDataset:
    """Open such a folder with TorchIO alone."""
    subjects = [
        tio.Subject(
            flair=tio.ScalarImage(path),
            lesion=tio.LabelMap(path.with_name(path.name.replace("FLAIR", "FLAIR_roi"))),
        )
        for path in sorted(folder.glob("sub-*/anat/*_FLAIR.nii*"))
    ]
    return tio.SubjectsDataset(subjects, transform)
