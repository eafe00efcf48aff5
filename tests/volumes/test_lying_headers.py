"""Headers that lie: an error that names file and field, or what nibabel reads of them."""

import gzip
import warnings
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torchio as tio
from test_reader import by_torchio, fetched, load_quietly, nifti_bytes, numbers, quaternion_fields

import tio_openneuro as tno
from tio_openneuro.errors import DamagedImageError, TioOpenNeuroError

SHAPE = (6, 5, 4)
# Of all bytes those that are no text.
NUMBERS = (*range(4), *range(38, 148), *range(252, 328), *range(344, 348))
MILLIMETRES = {1: 1e3, 3: 1e-3}


def written(path: Path, fields: Mapping[str, object], shape: tuple[int, ...] = SHAPE) -> Path:
    """Write a file of sound voxels whose header has these fields."""
    content = nifti_bytes(numbers("i2", shape), fields=dict(fields))
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


LIES: dict[str, tuple[dict[str, object], str]] = {
    "no extent": ({"dim": [3, 6, 0, 4, 1, 1, 1, 1]}, r"dim is \[3, 6, 0, 4"),
    "no volume": ({"dim": [4, 6, 5, 4, 0, 1, 1, 1]}, "dim is"),
    "negative extent": ({"dim": [3, 6, -5, 4, 1, 1, 1, 1]}, "dim is"),
    "vectors over time": ({"dim": [5, 3, 5, 2, 2, 2, 1, 1]}, "dim is"),
    "type 0": ({"datatype": 0}, "datatype is 0"),
    "type 999": ({"datatype": 999}, "datatype is 999"),
    "size of another header": ({"sizeof_hdr": 349}, "sizeof_hdr is 349"),
    "magic": ({"magic": b"n+3"}, "magic is"),
    "voxels in the header": ({"vox_offset": 348}, "vox_offset is 348"),
    "voxels nowhere": ({"vox_offset": np.nan}, "vox_offset is nan"),
    "voxels at its beginning": ({"vox_offset": 0}, "vox_offset is 0"),
    "voxels too late": ({"vox_offset": 360}, "voxels end early: 8 of"),
    "larger type": ({"datatype": 16, "bitpix": 32}, "voxels end early: 240 of"),
    "sform": ({"srow_y": [0, np.nan, 0, 0]}, r"srow_y is \[0\.0, nan"),
    "sform without end": ({"srow_z": [0, 0, np.inf, 0]}, "srow_z is"),
    "code of sform": ({"sform_code": 77}, "sform_code is 77"),
    "qform": ({"sform_code": 0, "qform_code": 1, "quatern_c": np.nan}, "quatern_c is nan"),
    "no rotation": ({"sform_code": 0, "qform_code": 1, "quatern_b": 7}, "quatern_b is 7"),
    "spacing": ({"sform_code": 0, "pixdim": [1, np.nan, 1, 1, 1, 1, 1, 1]}, "pixdim is"),
    "intercept": ({"scl_slope": 2, "scl_inter": np.nan}, "scl_inter is nan"),
}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("lie", LIES)
def test_lie_is_told_with_file_and_field(tmp_path: Path, lie: str, suffix: str) -> None:
    """Whether voxels, shape or place are asked for, where the header alone tells."""
    fields, said = LIES[lie]
    path = written(tmp_path / f"sub-01_T1w{suffix}", fields)
    image = fetched(path)
    with pytest.raises(DamagedImageError, match=rf"sub-01_T1w\{suffix} of sub-01.*{said}"):
        image.load()
    if "early" not in said:
        for name in ("shape", "affine"):
            with pytest.raises(DamagedImageError, match=said):
                getattr(fetched(path), name)


def assert_as_nibabel(path: Path) -> None:
    """Compare voxels and place with nibabel's; also what is told before the voxels are loaded.

    In space that is the place of sform or of qform, in mm where the header has another unit. Where
    it codes none, TorchIO's own; of two dimensions the third axis is none of the file's.
    """
    image, header = fetched(path), fetched(path)
    load_quietly(image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shape, affine = header.shape, header.affine
        reference = nib.load(path, mmap=False)
        voxels = reference.get_fdata()
    voxels = np.moveaxis(voxels.reshape(*[*voxels.shape, 1, 1][:3], -1), -1, 0)
    assert tuple(image.data.shape) == shape == voxels.shape
    # Of what is no finite number the NIfTI library makes zero.
    expected = np.nan_to_num(voxels.astype(np.float32), posinf=0, neginf=0)
    np.testing.assert_allclose(np.nan_to_num(image.numpy()), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(image.affine, affine)
    stated, unit = reference.header, MILLIMETRES.get(int(reference.header["xyzt_units"]) & 7, 1.0)
    places = [reference.affine * unit]
    if stated["sform_code"] > 0 and stated["qform_code"] > 0:
        places.append(stated.get_qform() * unit)
    if not stated["sform_code"] and not stated["qform_code"]:
        places = [by_torchio(path)[1]]
    seen = np.ix_(range(3), range(4)) if stated["dim"][0] > 2 else np.ix_((0, 1), (0, 1, 3))
    near = [np.allclose(affine[seen], place[seen], rtol=2e-3, atol=2e-3) for place in places]
    assert any(near), (affine, places)


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"scl_slope": 0, "scl_inter": 7}, SHAPE),
        ({"scl_slope": np.nan, "scl_inter": 7}, SHAPE),
        ({"scl_slope": np.nan, "scl_inter": np.nan}, SHAPE),
        ({"scl_slope": np.inf, "scl_inter": -2.5}, SHAPE),
        ({"scl_slope": 0, "scl_inter": np.inf}, SHAPE),
        ({"scl_slope": 5e-20, "scl_inter": 1}, SHAPE),
        ({}, (6, 5, 4, 1, 3)),
        ({"intent_code": 2003}, (6, 5, 4, 1, 3)),
        ({}, (6, 5, 1, 1, 3)),
        ({}, (3, 2, 2, 1, 1, 3)),
        ({"pixdim": [1, 3, 3, 3, 1, 1, 1, 1]}, SHAPE),
        ({**quaternion_fields(1, 1.0), "sform_code": 0}, SHAPE),
        ({**quaternion_fields(1, 0.0), "sform_code": 0}, SHAPE),
        (
            {**quaternion_fields(1, 1.0), "sform_code": 0, "pixdim": [1, -2, 1, 3, 1, 1, 1, 1]},
            SHAPE,
        ),
        ({"xyzt_units": 3}, SHAPE),
        ({"qform_code": 1, "quatern_b": np.nan}, SHAPE),
    ],
    ids=str,
)
def test_what_simpleitk_misreads_is_read_as_the_standard_says(
    tmp_path: Path, fields: dict[str, object], shape: tuple[int, ...]
) -> None:
    """No slope is no intercept either; a fifth dimension is channels; sform needs no pixdim."""
    assert_as_nibabel(written(tmp_path / "image.nii.gz", fields, shape))


@pytest.mark.parametrize("kind", ["u8", "c8", "u1u1u1", "c16"])
@pytest.mark.parametrize("second", [False, True])
def test_cut_file_of_any_type_is_told(tmp_path: Path, kind: str, second: bool) -> None:
    """Also of types that only TorchIO reads, and of NIfTI-2."""
    dtype = np.dtype([(c, "u1") for c in "RGB"]) if kind == "u1u1u1" else np.dtype(kind)
    voxels = np.zeros(SHAPE, dtype)
    content = nifti_bytes(voxels, second=second)
    (tmp_path / "image.nii").write_bytes(content[:-1])
    (tmp_path / "image.nii.gz").write_bytes(gzip.compress(content[:-1]))
    for path in tmp_path.glob("image*"):
        with pytest.raises(DamagedImageError, match=f"{path.name} of sub-01: its voxels end early"):
            fetched(path).load()


def test_file_that_vanished_is_told(tmp_path: Path) -> None:
    """An image whose file went since the dataset was opened names it."""
    for name in ("image.nii.gz", "image.mgz"):
        path = written(tmp_path / name, {})
        image = fetched(path)
        path.unlink()
        for ask in (image.load, lambda image=image: image.shape):
            with pytest.raises(DamagedImageError, match=rf"{name} of sub-01: .* not there"):
                ask()


@pytest.fixture(scope="module")
def flipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a dataset of an image for each byte of a header but its texts, which is wrong there."""
    folder = tmp_path_factory.mktemp("flipped") / "bids"
    content = nifti_bytes(numbers("i2", SHAPE), fields=quaternion_fields(0, 1.0))
    for number in NUMBERS:
        damaged = bytearray(content)
        damaged[number] ^= 0xFF
        suffix = (".nii", ".nii.gz")[number % 2]
        path = folder / f"sub-{number:03}" / "anat" / f"sub-{number:03}_T1w{suffix}"
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress(bytes(damaged)) if number % 2 else bytes(damaged))
    (folder / "dataset_description.json").write_text("{}")
    return folder


def test_whatever_byte_is_wrong_it_is_told_or_read_as_nibabel_reads_it(
    flipped: Path, tmp_path: Path
) -> None:
    """By the dataset and by the queue: an error of ours that names the file, or its voxels."""
    images = {"t1": tno.Scalar(suffix="T1w")}
    refused: dict[str, str] = {}
    with (
        warnings.catch_warnings(),
        tno.DataladSubjectsDataset(flipped, images, root=tmp_path / "root") as dataset,
    ):
        warnings.simplefilter("ignore")
        for number, row in enumerate(dataset.dry_iter()):
            try:
                subject = dataset[number]
            except TioOpenNeuroError as error:
                refused[row.subject_id] = str(error)
                continue
            assert_as_nibabel(row.t1.path)
            assert torch.equal(subject.t1.data, row.t1.data)
        assert [name for name, text in refused.items() if f"{name}_T1w.nii" not in text] == []
        # Each extent and its count, type, offset, magic and code, and the sizes of two headers.
        assert 20 < len(refused) < 60
        assert {"sub-000", "sub-042", "sub-070", "sub-109", "sub-344"} <= refused.keys()
        sampler = tio.UniformSampler((2, 2, 1))
        queue = tno.BudgetedQueue(dataset, 40, 1, sampler, num_workers=1, seed=0, on_error="skip")
        with queue:
            seen = {patch["subject_id"] for patch in queue}
            skipped = {entry.unit: entry.reason for entry in queue.skipped}
    assert skipped.keys() == refused.keys()
    assert seen == {f"sub-{n:03}" for n in NUMBERS} - refused.keys()
    for name, reason in skipped.items():
        assert refused[name] in reason
