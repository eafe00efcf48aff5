"""The fast reader against TorchIO's own, bit for bit, on files written by nibabel and by hand."""

import gzip
import itertools
import struct
import tracemalloc
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torchio as tio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchio.data.io import read_image

from tio_openneuro.content import TreeFile
from tio_openneuro.errors import DamagedImageError
from tio_openneuro.select.patterns import Scalar
from tio_openneuro.torchio_seams.images import FetchedScalarImage, ImageFiles, Metadata
from tio_openneuro.volumes.headers import VolumeFile
from tio_openneuro.volumes.reader import read_nifti

TYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "i8", "f4", "f8")
PLACED = np.array([[-1.0, 0, 0, 90], [0, 1.2, 0, -126], [0, 0, 1.5, -72], [0, 0, 0, 1]])


def numbers(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return voxels over the whole range of a type; of floats, what is not finite among them."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(kind)
    if dtype.kind != "f":
        bounds = np.iinfo(dtype)
        return rng.integers(bounds.min, bounds.max, shape, dtype=dtype, endpoint=True)
    voxels = (rng.normal(size=shape) * 1e3).astype(dtype)
    odd = [np.nan, np.inf, -np.inf, -0.0, 1e-40, np.finfo(dtype).max]
    voxels.flat[: len(odd)] = odd[: voxels.size]
    return voxels


def nifti_bytes(
    voxels: np.ndarray,
    *,
    order: str = "<",
    second: bool = False,
    extension: bytes = b"",
    fields: dict[str, object] | None = None,
) -> bytes:
    """Return a NIfTI file of these voxels, with header fields set by hand.

    Args:
        voxels: In the file's order of axes.
        order: Of bytes, ``"<"`` or ``">"``.
        second: Whether it is NIfTI-2.
        extension: What stands between header and voxels, a multiple of 16 bytes.
        fields: Further fields of the header, set last.
    """
    kind = nib.Nifti2Header if second else nib.Nifti1Header
    header = kind(endianness=order)
    header.set_data_shape(voxels.shape)
    header.set_data_dtype(voxels.dtype)
    header["magic"] = header["magic"] if second else b"n+1"
    header["vox_offset"] = len(header.binaryblock) + 4 + len(extension)
    header["scl_slope"], header["scl_inter"] = 1, 0
    header.set_sform(PLACED, 1)
    header["pixdim"][1:4] = abs(PLACED.diagonal()[:3])
    for name, value in (fields or {}).items():
        header[name] = value
    extender = b"\1\0\0\0" if extension else bytes(4)
    stored = voxels.astype(voxels.dtype.newbyteorder(order)).tobytes(order="F")
    return header.binaryblock + extender + extension + stored


def note(text_bytes: int, order: str = "<") -> bytes:
    """Return an extension of a header: a comment of that length."""
    assert text_bytes % 16 == 8
    return struct.pack(f"{order}ii", text_bytes + 8, 6) + b"x" * text_bytes


def by_torchio(path: Path) -> tuple[torch.Tensor, np.ndarray]:
    """Read as TorchIO's own image does."""
    with warnings.catch_warnings():
        # It warns where SimpleITK cannot read a file and nibabel is asked.
        warnings.simplefilter("ignore")
        tensor, affine = read_image(path)
    return torch.cat([tensor]), affine


def assert_equal_to_torchio(path: Path) -> None:
    """Compare every bit of voxels and affine, the type, and the layout."""
    found = read_nifti(VolumeFile(path), path.name)
    assert found is not None
    voxels, affine = by_torchio(path)
    assert found[0].dtype == voxels.dtype
    assert found[0].shape == voxels.shape
    assert found[0].is_contiguous()
    assert voxels.is_contiguous()
    assert found[0].numpy().tobytes() == voxels.numpy().tobytes()
    assert found[1].dtype == affine.dtype
    assert found[1].tobytes() == affine.tobytes()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", TYPES)
def test_every_type_in_both_orders_of_bytes(tmp_path: Path, kind: str, order: str) -> None:
    """Also unsigned types, which become wider signed ones, and floats that are not finite."""
    content = nifti_bytes(numbers(kind, (7, 6, 5)), order=order)
    (tmp_path / "plain.nii").write_bytes(content)
    (tmp_path / "image.nii.gz").write_bytes(gzip.compress(content))
    assert_equal_to_torchio(tmp_path / "plain.nii")
    assert_equal_to_torchio(tmp_path / "image.nii.gz")


@pytest.mark.parametrize(
    ("slope", "intercept"), [(2.5, -3.25), (0.1, 0.3), (1, 5), (-1.7, 2), (3e-7, 0), (0, 0)]
)
@pytest.mark.parametrize("kind", TYPES)
def test_scaled_numbers(tmp_path: Path, kind: str, slope: float, intercept: float) -> None:
    """Integers become floats, in the very roundings of SimpleITK."""
    fields = {"scl_slope": slope, "scl_inter": intercept}
    path = tmp_path / "image.nii.gz"
    path.write_bytes(gzip.compress(nifti_bytes(numbers(kind, (9, 8, 7)), fields=fields)))
    assert_equal_to_torchio(path)


@pytest.mark.parametrize(
    "shape",
    [
        (6, 5),
        (6, 5, 1),
        (6, 5, 1, 1),
        (6, 5, 4, 1),
        (6, 5, 4, 3),
        (6, 5, 1, 3),
        (1, 5, 4),
        (6, 1, 4, 2),
        (6, 5, 4, 3, 1),
        (300, 280, 40),
        (70, 80, 90, 2),
    ],
    ids=str,
)
def test_dimensions_and_slabs(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Two to five dimensions, and volumes that are read in several slabs."""
    path = tmp_path / "image.nii.gz"
    path.write_bytes(gzip.compress(nifti_bytes(numbers("i2", shape)), 1))
    assert_equal_to_torchio(path)


@pytest.mark.parametrize("kind", ["u1", "i2", "u2", "f4"])
def test_vectors_are_channels(tmp_path: Path, kind: str) -> None:
    """Components of a vector, the fifth dimension, become channels."""
    path = tmp_path / "image.nii.gz"
    content = nifti_bytes(numbers(kind, (6, 5, 4, 1, 3)), fields={"intent_code": 1007})
    path.write_bytes(gzip.compress(content))
    assert_equal_to_torchio(path)


def quaternion_fields(code: int, factor: float) -> dict[str, object]:
    """Return fields of a rotation, in the header's own way."""
    return {
        "qform_code": code,
        "pixdim": [factor, 1.1, 0.9, 2.0, 1, 1, 1, 1],
        "quatern_b": 0.1,
        "quatern_c": -0.2,
        "quatern_d": 0.3,
        "qoffset_x": -12.5,
        "qoffset_y": 7.25,
        "qoffset_z": 3.0,
    }


@pytest.mark.parametrize("sform", [0, 1, 4])
@pytest.mark.parametrize("qform", [0, 1])
@pytest.mark.parametrize("factor", [1.0, -1.0])
def test_place_in_space(tmp_path: Path, sform: int, qform: int, factor: float) -> None:
    """With either form, both, and neither; also mirrored."""
    path = tmp_path / "image.nii.gz"
    fields = {**quaternion_fields(qform, factor), "sform_code": sform}
    fields |= {"srow_x": [-1.1, 0, 0, 90], "srow_y": [0, 0.9, 0, -126], "srow_z": [0, 0, 2, -72]}
    path.write_bytes(gzip.compress(nifti_bytes(numbers("i2", (6, 5, 4)), fields=fields)))
    assert_equal_to_torchio(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_extensions_trailing_bytes_and_members(tmp_path: Path, compressed: bool) -> None:
    """Voxels begin behind extensions; several gzip members are one file; what follows is not."""
    content = nifti_bytes(numbers("i2", (20, 20, 20)), extension=note(1000)) + b"rest" * 9
    path = tmp_path / ("image.nii.gz" if compressed else "image.nii")
    path.write_bytes(content)
    if compressed:
        cuts = [0, 100, 348, 349, 349, 9000, len(content)]
        members = [gzip.compress(content[a:b]) for a, b in itertools.pairwise(cuts)]
        path.write_bytes(b"".join(members) + b"no member")
    assert_equal_to_torchio(path)


def test_file_as_nibabel_writes_it(tmp_path: Path) -> None:
    """What most tools write is read fast, not by TorchIO."""
    for kind in TYPES:
        path = tmp_path / f"{kind}.nii.gz"
        nib.save(nib.Nifti1Image(numbers(kind, (8, 7, 6)), PLACED, dtype=np.dtype(kind)), path)
        assert_equal_to_torchio(path)
    with_scale = nib.Nifti1Image(np.linspace(0, 7, 336).reshape(8, 7, 6), PLACED)
    with_scale.set_data_dtype(np.int16)
    nib.save(with_scale, path)
    assert_equal_to_torchio(path)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"second": True}, "i2"),
        ({"srow_x": [1.0, 0.5, 0, 0], "srow_y": [0, 1.0, 0, 0]}, "i2"),
        ({"intent_code": 1006}, "f4"),
        ({"magic": b"ni1"}, "i2"),
        ({}, "u8"),
        ({}, "c8"),
        ({}, [("R", "u1"), ("G", "u1"), ("B", "u1")]),
    ],
    ids=[
        "nifti2",
        "shear",
        "displacement",
        "pair",
        "uint64",
        "complex",
        "colours",
    ],
)
def test_what_is_not_certain_is_left_to_torchio(
    tmp_path: Path, change: dict[str, object], kind: object
) -> None:
    """Odd places, scales and types: the image loads as TorchIO loads it, or fails as there."""
    path = tmp_path / "image.nii.gz"
    voxels = np.frombuffer(np.random.default_rng(0).bytes(64 * np.dtype(kind).itemsize), kind)
    fields = {name: value for name, value in change.items() if name != "second"}
    content = nifti_bytes(voxels.reshape(4, 4, 4), second="second" in change, fields=fields)
    path.write_bytes(gzip.compress(content))
    assert read_nifti(VolumeFile(path), "image") is None
    image = fetched(path)
    try:
        voxels, affine = by_torchio(path)
    except (RuntimeError, AssertionError):
        with pytest.raises(DamagedImageError, match=r"image\.nii\.gz"):
            load_quietly(image)
        return
    load_quietly(image)
    assert image.data.dtype == voxels.dtype
    assert image.data.numpy().tobytes() == voxels.numpy().tobytes()
    assert np.array_equal(image.affine, affine)


def fetched(path: Path) -> FetchedScalarImage:
    """Return an image of a plain file."""
    file = TreeFile(path.name, None, "", path.stat().st_size)
    source = ImageFiles((file,), path.parent, None, None, "sub-01", Scalar("*.nii.gz"))
    return FetchedScalarImage.of(source, Metadata({}))


def load_quietly(image: tio.Image) -> None:
    """Load an image; TorchIO warns where it asks nibabel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.load()


def test_names_that_lie_about_compression_are_left_to_torchio(tmp_path: Path) -> None:
    """A compressed file named ``.nii``, a plain one named ``.nii.gz``, and other formats."""
    content = nifti_bytes(numbers("i2", (4, 4, 4)))
    for name, stored in (
        ("a.nii", gzip.compress(content)),
        ("b.nii.gz", content),
        ("c.hdr", content),
        ("d.nii.gz", b"\x1f\x8b"),
        ("e.nii", content[:300]),
    ):
        (tmp_path / name).write_bytes(stored)
        assert read_nifti(VolumeFile(tmp_path / name), name) is None


# -- damaged files ---------------------------------------------------------------------------


def damage(stored: bytes, way: str) -> bytes:
    """Return a compressed file that is damaged in one way."""
    if way == "cut":
        return stored[: len(stored) // 2]
    if way == "cut in the trailer":
        return stored[:-3]
    if way == "checksum":
        return stored[:-8] + bytes(4) + stored[-4:]
    if way == "length":
        return stored[:-4] + bytes(4)
    middle = len(stored) // 2
    return (
        stored[:middle] + bytes(byte ^ 0xFF for byte in stored[middle : middle + 64]) + stored[-99:]
    )


@pytest.mark.parametrize("way", ["cut", "cut in the trailer", "checksum", "length", "flipped"])
@pytest.mark.parametrize("kind", ["i2", "f4"])
def test_damaged_compression_is_said_and_never_read(tmp_path: Path, way: str, kind: str) -> None:
    """SimpleITK makes zeros or noise of such files without a word; here it is one clear error."""
    sound = gzip.compress(nifti_bytes(numbers(kind, (30, 30, 30))))
    path = tmp_path / "sub-01_T1w.nii.gz"
    path.write_bytes(damage(sound, way))
    image = fetched(path)
    with pytest.raises(DamagedImageError, match=r"sub-01_T1w.*of sub-01.*(54000|108000) bytes"):
        image.load()
    path.write_bytes(sound)
    image.load()
    assert image.data.shape == (1, 30, 30, 30)


def test_member_that_is_damaged_before_the_last_is_said(tmp_path: Path) -> None:
    """Each member's checksum counts."""
    content = nifti_bytes(numbers("i2", (30, 30, 30)))
    first, last = gzip.compress(content[:20_000]), gzip.compress(content[20_000:])
    path = tmp_path / "image.nii.gz"
    path.write_bytes(first[:-8] + bytes(4) + first[-4:] + last)
    with pytest.raises(DamagedImageError):
        read_nifti(VolumeFile(path), "image")
    path.write_bytes(first + last)
    assert_equal_to_torchio(path)


def test_cut_file_that_torchio_would_read_is_said(tmp_path: Path) -> None:
    """Voxels are counted also where TorchIO is to read them."""
    sheared = {"srow_x": [1.0, 0.5, 0, 0], "srow_y": [0, 1.0, 0, 0]}
    content = nifti_bytes(numbers("i2", (9, 9, 9)), fields=sheared)
    path = tmp_path / "image.nii"
    path.write_bytes(content[:-1])
    with pytest.raises(DamagedImageError, match="image: its voxels end early: 1 of"):
        read_nifti(VolumeFile(path), "image")
    path.write_bytes(content)
    assert read_nifti(VolumeFile(path), "image") is None


def test_no_more_is_inflated_than_the_header_states(tmp_path: Path) -> None:
    """Gigabytes behind a few voxels cost no memory, and no time either: they stay compressed."""
    zeros = gzip.compress(bytes(1 << 26))
    path = tmp_path / "image.nii.gz"
    path.write_bytes(gzip.compress(nifti_bytes(numbers("i2", (8, 8, 8)))) + zeros * 40)
    tracemalloc.start()
    found = read_nifti(VolumeFile(path), "image")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found is not None
    # The chunk of the file that is read, and what 64 KiB take; 2.7 GB would be inflated.
    assert 2 * 8**3 < peak_bytes < 2_000_000
    one = gzip.compress(nifti_bytes(numbers("i2", (8, 8, 8))) + bytes(1 << 28))
    path.write_bytes(one)
    tracemalloc.start()
    assert read_nifti(VolumeFile(path), "image") is not None
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2_000_000


# -- anything at all -------------------------------------------------------------------------


ODD = {
    "scl_slope": [0, -2.5, 1e-20, 1e-6, np.nan, np.inf],
    "scl_inter": [0, 7, -1e-3, 1e-20, np.nan, np.inf],
    "qform_code": [0, 1, 2],
    "sform_code": [0, 4],
    "pixdim": [
        [a, b, c, d, 0, 1, 1, 1] for a in (1, -1) for b in (0.7, 0, -1) for c, d in [(2, 9)]
    ],
    "quatern_b": [0.1, 0.5, 0.99],
    "quatern_c": [-0.3, 0.5],
    "qoffset_x": [-80.5, 1e-30],
    "srow_x": [[0, 0, 1, 5], [1, 0.5, 0, 0], [0, 0, 0, 0], [1e-3, 0, 0, 0]],
    "srow_y": [[1, 0, 0, 5], [0, np.nan, 0, 0]],
    "srow_z": [[0, 1, 0, 5], [0, 0, -2, 0]],
    "intent_code": [2, 1002, 1005, 1006, 1007, 2003],
    "cal_max": [100],
    "dim_info": [57],
    "xyzt_units": [0, 1, 3, 10],
    "descrip": [b"odd"],
}
FIELDS = st.fixed_dictionaries({}, optional={k: st.sampled_from(v) for k, v in ODD.items()})


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(TYPES),
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    order=st.sampled_from("<>"),
    fields=FIELDS,
    text_bytes=st.sampled_from([0, 8, 24, 1000]),
    cuts=st.lists(st.integers(0, 400), max_size=3),
)
def test_whatever_the_header_says_it_is_torchios_answer_or_none(
    tmp_path: Path, kind, shape, order, fields, text_bytes, cuts
) -> None:
    """No combination of fields makes the fast reader differ from TorchIO's."""
    # Of more than four dimensions TorchIO knows those of a vector.
    shape[3:] = [*(1 for _ in shape[3:-1]), *shape[3:][-1:]]
    content = nifti_bytes(
        numbers(kind, tuple(shape)),
        order=order,
        extension=note(text_bytes, order) if text_bytes else b"",
        fields=fields,
    )
    ends = [0, *sorted(cuts), len(content)]
    members = [gzip.compress(content[a:b], 1) for a, b in itertools.pairwise(ends)]
    path = tmp_path / ("image.nii.gz" if cuts else "plain.nii")
    path.write_bytes(b"".join(members) if cuts else content)
    file = VolumeFile(path)
    assert file.nifti is not None
    if file.nifti.fault:
        with pytest.raises(DamagedImageError, match=r"image: its (srow|quatern|qoff|pixdim|scl_)"):
            read_nifti(file, "image")
    elif read_nifti(file, "image") is not None:
        assert_equal_to_torchio(path)


def test_place_that_is_no_number_is_refused(tmp_path: Path) -> None:
    """SimpleITK never returns from this header; it is not asked."""
    path = tmp_path / "image.nii"
    fields = {"srow_x": [0, 0, 1, 5], "srow_y": [0, np.nan, 0, 0], "sform_code": 4, "qform_code": 1}
    path.write_bytes(nifti_bytes(numbers("u1", (6, 2)), fields=fields))
    for ask in (FetchedScalarImage.load, lambda image: image.shape, lambda image: image.affine):
        with pytest.raises(DamagedImageError, match=r"image\.nii of sub-01: .*srow_y is .*nan"):
            ask(fetched(path))
    with pytest.raises(DamagedImageError, match="srow_y"):
        read_nifti(VolumeFile(path), "image")
    path.write_bytes(nifti_bytes(numbers("u1", (6, 2)), fields={**fields, "sform_code": 0}))
    assert fetched(path).shape == (1, 6, 2, 1)


def test_file_beside_its_uncompressed_namesake_is_read_itself(tmp_path: Path) -> None:
    """SimpleITK takes the voxels of ``a.nii`` for those of ``a.nii.gz`` where both exist."""
    voxels = numbers("i2", (6, 5, 4))
    (tmp_path / "a.nii").write_bytes(nifti_bytes(voxels * 0))
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(nifti_bytes(voxels)))
    found = read_nifti(VolumeFile(tmp_path / "a.nii.gz"), "a")
    assert found is not None
    assert np.array_equal(found[0][0], voxels)


def test_subject_through_the_fast_reader_equals_torchios(tmp_path: Path) -> None:
    """Transforms of what was read here give the same bits as of what TorchIO read."""
    path = tmp_path / "image.nii.gz"
    path.write_bytes(gzip.compress(nifti_bytes(numbers("i2", (40, 39, 38)))))
    transform = tio.Compose([tio.ToCanonical(), tio.ZNormalization(), tio.Resample(1.3)])
    ours = transform(tio.Subject(image=fetched(path)))
    stock = transform(tio.Subject(image=tio.ScalarImage(path)))
    assert ours.image.data.numpy().tobytes() == stock.image.data.numpy().tobytes()
    assert np.array_equal(ours.image.affine, stock.image.affine)
