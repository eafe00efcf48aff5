"""What is an image, and that every file that a pattern hits is accounted for.

Real: plain BIDS folders on the disk, read by the dataset itself, and the trees of ten OpenNeuro
repositories. Synthetic: trees of names, drawn at random, against an oracle that tries every set of
files.
"""

import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import heads

import tio_openneuro as tno
from tio_openneuro.content import TreeFile
from tio_openneuro.loopback.volume import write_content
from tio_openneuro.select.patterns import Label, Scalar, is_volume
from tio_openneuro.select.selection import Selection, select
from tio_openneuro.volumes.headers import VolumeFile
from tio_openneuro.volumes.reader import read_nifti


def tree(*paths: str) -> list[TreeFile]:
    """Return files of these paths."""
    return [TreeFile(path, "", None, 1_000_000) for path in paths]


def chosen(selection: Selection) -> dict[str, dict[str, list[str]]]:
    """Return the paths of each row's images that are there."""
    return {
        row.unit: {name: [f.path for f in files] for name, files in row.images.items() if files}
        for row in selection.rows
    }


def skipped(selection: Selection) -> dict[str, str]:
    """Return the reason of each unit or file left out."""
    return {entry.unit: entry.reason for entry in selection.skipped}


def write_plain(folder: Path, names: list[str]) -> Path:
    """Write a plain BIDS folder with a head under each path."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_content(heads(1)["sub-01/anat/sub-01_T1w.nii.gz"], folder / name)
    (folder / "dataset_description.json").write_text('{"Name": "Plain", "BIDSVersion": "1.10.0"}')
    return folder


# -- what is an image ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("sub-1/sub-1_T1w.NII.GZ", True),
        ("sub-1/sub-1_T1w.Nii", True),
        ("sub-1/mri/T1.MGZ", True),
        ("sub-1/sub-1_res-0.5_T1w.nii", True),
        ("sub-1/sub-1_dscalar.nii", True),
        *((f"sub-1/sub-1_bold.{kind}.nii", False) for kind in ("dtseries", "ptseries", "dscalar")),
        *((f"sub-1/sub-1_bold.{kind}.nii", False) for kind in ("dlabel", "pconn", "DCONN")),
        ("sub-1/sub-1_hemi-L_pial.surf.gii", False),
        ("sub-1/sub-1_dwi.png", False),
        ("sub-1/sub-1_photo.tif", False),
    ],
)
def test_image_is_a_file_of_voxels_whatever_its_case(path: str, *, answer: bool) -> None:
    """Neither CIFTI, nor a surface, nor a picture."""
    assert is_volume(path) is answer


def test_pictures_and_cifti_beside_images_are_not_selected() -> None:
    """Reports have a picture of each image, fMRIPrep its time series on a surface."""
    files = tree(
        *(f"sub-{n}/dwi/sub-{n}_dwi.nii.gz" for n in "12"),
        *(f"derivatives/qc/sub-{n}/dwi/sub-{n}_dwi.png" for n in "12"),
        *(f"derivatives/fmriprep/sub-{n}/func/sub-{n}_bold.dtseries.nii" for n in "12"),
    )
    selection = select(files, {"dwi": Scalar(suffix="dwi", scope="all")})
    assert chosen(selection) == {f"sub-{n}": {"dwi": [f"sub-{n}/dwi/sub-{n}_dwi.nii.gz"]}
                                 for n in "12"}  # fmt: skip
    assert list(select(files, None).images) == ["dwi"]
    with pytest.raises(tno.SelectionError, match=r"2 files that are no images \(\.dtseries\.nii"):
        select(files, {"bold": Scalar("**/*_bold.*")})


def test_file_named_in_capitals_is_read_and_guarded_as_any_other(tmp_path: Path) -> None:
    """``.NII.GZ`` and ``.NII`` take the fast reader, and a header that lies is refused."""
    names = [f"sub-{n}/anat/sub-{n}_T1w{end}" for n, end in ((1, ".nii.gz"), (2, ".nii"))]
    folder = write_plain(tmp_path / "plain", names)
    for name in names:
        stem, _, ending = name.partition(".")
        (folder / name).rename(folder / f"{stem}.{ending.upper()}")
    (first, second) = sorted(folder.rglob("*.NII*"))
    assert read_nifti(VolumeFile(first), "first") is not None
    with tno.DataladSubjectsDataset(folder, {"t1": tno.Scalar(suffix="T1w")}) as dataset:
        assert [subject.subject_id for subject in dataset] == ["sub-1", "sub-2"]
        assert dataset[0].t1.data.float().std() > 0
        assert dataset["sub-2"].t1.path == second
        header = bytearray(second.read_bytes())
        struct.pack_into("<4h", header, 40, 3, 30_000, 30_000, 30_000)
        second.write_bytes(header)
        with pytest.raises(tno.RamBudgetError, match=r"sub-2_T1w\.NII.*30000|27000"):
            dataset[1]
    with tno.DataladSubjectsDataset(folder, {"t1": tno.Scalar(extension=".NII.GZ")}) as dataset:
        np.testing.assert_array_equal([s.subject_id for s in dataset.dry_iter()], ["sub-1"])
