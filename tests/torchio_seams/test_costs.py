"""What transforms are told to hold, and how large what they make is told to be."""

from math import prod

import nibabel as nib
import numpy as np
import pytest
import torch
import torchio as tio

from tio_openneuro.torchio_seams.costs import knows_cost, measure_subject, trace_transform
from tio_openneuro.torchio_seams.in_place import transform_in_place
from tio_openneuro.volumes.headers import VolumeFile, sum_sizes

_SHAPE, _SPACING = (10, 14, 9), (1.5, 0.8, 2.0)
_ORIENTATIONS = ("RAS", "SLP", "PIR")
_REFERENCE = tio.ScalarImage(tensor=torch.zeros(1, 17, 8, 21), affine=np.diag([1, 2, 0.7, 1]))


def _make_subject(orientation="RAS"):
    affine = np.diag([*_SPACING, 1.0])
    image = tio.ScalarImage(tensor=torch.rand(2, *_SHAPE), affine=affine)
    voxels = torch.ones(1, *_SHAPE, dtype=torch.uint8)
    subject = tio.Subject(t1=image, label=tio.LabelMap(tensor=voxels, affine=affine))
    return tio.ToOrientation(orientation)(subject)


_GROWING = {
    "crop or pad": lambda: tio.CropOrPad((20, 5, 12)),
    "crop or pad, one axis": lambda: tio.CropOrPad((None, 30, None)),
    "crop or pad, mm": lambda: tio.CropOrPad((20.0, 15.0, 40.0), units="mm"),
    "crop or pad, cm": lambda: tio.CropOrPad((3.0, 2.0, 2.0), units="cm"),
    "crop or pad around a mask": lambda: tio.CropOrPad((20, 5, 12), mask_name="label"),
    "only pad": lambda: tio.CropOrPad((20, 5, 12), only_pad=True),
    "only crop": lambda: tio.CropOrPad((20, 5, 12), only_crop=True),
    "pad": lambda: tio.Pad((0, 0, 3, 4, 11, 0)),
    "multiple": lambda: tio.EnsureShapeMultiple((8, 16, 1)),
    "resize": lambda: tio.Resize((12, -1, 30)),
    "resample": lambda: tio.Resample(0.6),
    "resample, axes": lambda: tio.Resample((0.5, 1.9, 1.1)),
    "resample onto an image": lambda: tio.Resample(_REFERENCE),
    "resample onto a place": lambda: tio.Resample(((9, 30, 8), np.eye(4))),
    "resample onto a name": lambda: tio.Resample("label"),
    "reference space": lambda: tio.ToReferenceSpace(_REFERENCE),
    "one hot": lambda: tio.OneHot(5),
    "kept": lambda: tio.RandomNoise(keep={"t1": "before"}),
    "anisotropy": tio.RandomAnisotropy,
    "one of": lambda: tio.OneOf([tio.Pad(4), tio.Resample(3), tio.Pad(1)]),
    "sometimes": lambda: tio.Crop(1, p=0.5),
    "in turn": lambda: tio.Compose([tio.Resample(1), tio.ToCanonical(), tio.CropOrPad((9, 40, 9))]),
}


@pytest.mark.parametrize("orientation", _ORIENTATIONS)
@pytest.mark.parametrize("name", _GROWING)
def test_no_result_is_larger_than_told(name, orientation):
    """Header and transform tell how large each image becomes, whichever way it lies."""
    subject, transform = _make_subject(orientation), _GROWING[name]()
    told, needs = trace_transform(transform, measure_subject(subject))
    assert knows_cost(transform)
    for seed in range(4):
        torch.manual_seed(seed)
        found = measure_subject(transform_in_place(transform, _make_subject(orientation)))
        assert len(found.images) <= len(told.images)
        for result, expected in zip(found.images, told.images, strict=False):
            assert result.size_bytes <= expected.size_bytes
        assert found.stored_bytes <= min(told.stored_bytes, max(needs).size_bytes)


def test_a_target_is_told_exactly_where_axes_are_alike():
    """What is cropped is told to be as small as it becomes, so that what follows costs less."""
    subject = tio.Subject(t1=tio.ScalarImage(tensor=torch.zeros(1, 20, 20, 20)))
    transform = tio.Compose([tio.CropOrPad(8), tio.RandomMotion()])
    told, needs = trace_transform(transform, measure_subject(subject))
    assert told.stored_bytes == 4 * 8**3
    assert [need.name for need in needs] == ["CropOrPad", "RandomMotion"]
    assert needs[0] > needs[1]


def test_parameters_that_matter_are_told():
    """Each movement, each image that is kept, and each copy for code of others, adds to a bound."""
    size = sum_sizes([(1, 10**6, 4), (1, 10**6, 4)])

    def held(*transforms):
        _, needs = trace_transform(tio.Compose(transforms), size)
        return max(needs).size_bytes

    two, ten = tio.RandomMotion(num_transforms=2), tio.RandomMotion(num_transforms=10)
    assert held(ten) >= held(two) + 8 * 13 * 10**6
    movements = [[0.0] * 3] * 10
    drawn = tio.Motion(movements, movements, np.linspace(0.1, 0.9, 10), "linear")
    assert held(drawn) == held(ten)
    assert held(tio.RandomNoise(keep={"t1": "before"})) >= held(tio.RandomNoise()) + 4 * 10**6
    shown = held(tio.Lambda(torch.neg, types_to_apply=[tio.INTENSITY]), ten)
    assert shown >= held(ten) + 2 * 8 * 10**6
    alone = trace_transform(ten, size, in_place=False)[1]
    assert max(alone).size_bytes >= held(ten) + 2 * 8 * 10**6
    masked = held(tio.RescaleIntensity(masking_method=lambda voxels: voxels > 0))
    assert masked >= held(tio.RescaleIntensity()) + 100 * 10**6


def test_what_shows_voxels_to_code_of_others_is_a_guess():
    """A function, a class, a callable mask, and classes that voxels alone tell; nothing else is."""
    for transform in (
        tio.Lambda(lambda voxels: voxels),
        tio.Lambda(torch.neg),
        tio.ZNormalization(masking_method=torch.isfinite),
        tio.Compose([tio.ToCanonical(), lambda subject: subject]),
        tio.OneOf([tio.RandomFlip(), type("Own", (tio.RandomFlip,), {})()]),
        tio.OneHot(),
    ):
        assert not knows_cost(transform)
    for name in dir(tio):
        kind = getattr(tio, name)
        if isinstance(kind, type) and issubclass(kind, tio.transforms.Transform):
            try:
                transform = kind()
            except (TypeError, ValueError):
                continue
            assert knows_cost(transform) or name == "OneHot", name


@pytest.mark.parametrize(("kind", "item_bytes"), [("u4", 8), ("u2", 4), ("f8", 8), ("i8", 8)])
def test_a_header_tells_what_its_voxels_take_once_they_are_loaded(tmp_path, kind, item_bytes):
    """What has no sign in the file gets one in twice as many bytes."""
    voxels = np.arange(24).reshape(2, 3, 4).astype(kind)
    affine = np.diag([0.5, 3.0, 2.0, 1.0])
    nib.save(nib.Nifti1Image(voxels, affine, dtype=voxels.dtype), tmp_path / "image.nii")
    size = VolumeFile(tmp_path / "image.nii").size
    image = tio.ScalarImage(tmp_path / "image.nii")
    assert size == (1, 24, item_bytes, ((2, 0.5), (3, 3.0), (4, 2.0)))
    assert image.data.element_size() <= item_bytes
    assert prod(image.shape) * image.data.element_size() <= size.size_bytes
