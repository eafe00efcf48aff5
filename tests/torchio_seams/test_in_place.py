"""Subjects that nobody else holds: the same as TorchIO's own way gives, and whose copies go."""

import copy
import gc
import weakref

import numpy as np
import pytest
import SimpleITK
import torch
import torchio as tio

import tio_openneuro as tno
from tio_openneuro.loopback.volume import Volume, write_content
from tio_openneuro.torchio_seams import in_place
from tio_openneuro.torchio_seams.in_place import get_subject, transform_in_place


@pytest.fixture
def subjects(tmp_path):
    """Return two subjects in files, an image of int16 and a label each."""
    found = []
    for number in range(2):
        random = np.random.default_rng(number)
        image = random.integers(-50, 900, (20, 24, 28)).astype(np.int16)
        affine = np.diag([-1.0, 1.5, 2.0, 1.0])
        write_content(Volume(image, affine), tmp_path / f"{number}_t1.nii.gz")
        label = (image > 400).astype(np.uint8)
        write_content(Volume(label, affine), tmp_path / f"{number}_label.nii.gz")
        found.append(
            tio.Subject(
                t1=tio.ScalarImage(tmp_path / f"{number}_t1.nii.gz"),
                label=tio.LabelMap(tmp_path / f"{number}_label.nii.gz"),
                number=number,
            )
        )
    return found


def make_transform():
    """Return most of what a transform can be made of."""
    return tio.Compose(
        [
            tio.ToCanonical(copy=False),
            tio.ZNormalization(keep={"t1": "before"}),
            tio.RandomAffine(p=0.8),
            tio.Resample((1, 2, 2)),
            tio.RandomElasticDeformation(num_control_points=5, max_displacement=2, p=0.5),
            tio.OneOf({tio.RandomNoise(): 1, tio.RandomBlur(): 2}),
            tio.Compose([tio.RandomFlip(axes=(0, 1, 2)), tio.RandomGamma()]),
            tio.CropOrPad(16),
            tio.OneHot(),
        ]
    )


def assert_same(one, other):
    """Compare two subjects bit for bit, and how they came about."""
    assert list(one) == list(other)
    for name, image in one.get_images_dict(intensity_only=False).items():
        assert type(image) is type(other[name])
        assert image.data.dtype == other[name].data.dtype
        assert torch.equal(image.data, other[name].data)
        # What later code computes may be rounded otherwise in another order.
        assert image.data.stride() == other[name].data.stride()
        assert np.array_equal(image.affine, other[name].affine)
    assert repr(one.applied_transforms) == repr(other.applied_transforms)


def test_a_subject_is_the_same_as_the_datasets_own(subjects):
    """Whatever the transforms draw, voxels, places and history are those of ``dataset[i]``."""
    transform = make_transform()
    told = repr([vars(part) for part in transform.transforms])
    dataset = tio.SubjectsDataset(subjects, transform=transform)
    for seed in range(8):
        torch.manual_seed(seed)
        own = dataset[seed % 2]
        torch.manual_seed(seed)
        assert_same(get_subject(dataset, seed % 2), own)
    lone = tio.SubjectsDataset(subjects, transform=tio.RandomAffine(p=0.5))
    for seed in range(4):
        torch.manual_seed(seed)
        own = lone[0]
        torch.manual_seed(seed)
        assert_same(get_subject(lone, 0), own)
    assert repr([vars(part) for part in transform.transforms]) == told
    assert not any(image._loaded for each in subjects for image in each.get_images())


def laid_out(tensor, layout):
    """Return the same voxels in another order of memory."""
    if layout == "fortran":
        return tensor.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    if layout == "flipped axes":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        return torch.stack((tensor, tensor + 1), -1)[..., 0]
    return tensor


@pytest.mark.parametrize("layout", ["c", "fortran", "flipped axes", "strided"])
@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int16, torch.int32, torch.float16, torch.float32, torch.float64],
    ids=str,
)
def test_normalizing_without_a_mask_gives_the_same_bits(dtype, layout):
    """For each shape, channel count and number of torch's threads; and no mask is looked up."""
    assert tio.__version__ in in_place._KNOWN_VERSIONS
    transform = tio.Compose([tio.ZNormalization(p=1), tio.ZNormalization(exclude=["t1"])])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for shape in ((1, 5, 7, 3), (1, 33, 64, 65), (3, 40, 24, 31), (1, 1, 1, 2)):
                random = torch.Generator().manual_seed(sum(shape))
                voxels = torch.rand(shape, generator=random).mul(200).to(dtype)
                image = tio.ScalarImage(tensor=laid_out(voxels, layout))
                subject = tio.Subject(t1=image, t2=copy.deepcopy(image))
                own = transform(subject)
                assert_same(transform_in_place(transform, copy.deepcopy(subject)), own)
                assert torch.equal(subject.t1.data, voxels)
    finally:
        torch.set_num_threads(before)


def test_normalizing_looks_up_no_mask_unless_it_has_one(monkeypatch):
    """A mask of ones is not even made; one that is given holds; equal voxels are refused."""
    made = []
    real = torch.ones_like
    monkeypatch.setattr(torch, "ones_like", lambda *a, **k: made.append(a) or real(*a, **k))
    voxels = torch.arange(60.0).reshape(1, 3, 4, 5)
    mask = tio.LabelMap(tensor=(voxels > 20).to(torch.uint8))

    def subject(tensor):
        return tio.Subject(t1=tio.ScalarImage(tensor=tensor.clone()), mask=mask)

    result = transform_in_place(tio.ZNormalization(), subject(voxels))
    assert not made
    assert_same(result, tio.ZNormalization()(subject(voxels)))
    assert made
    masked = tio.ZNormalization(masking_method="mask")
    assert_same(transform_in_place(masked, subject(voxels)), masked(subject(voxels)))
    with pytest.raises(RuntimeError, match="Standard deviation is 0"):
        transform_in_place(tio.ZNormalization(), subject(torch.ones(1, 3, 4, 5)))


def test_no_copy_is_made_where_nobody_would_see_it(subjects, monkeypatch):
    """No subject is copied here; a replay of the history would copy again."""
    copied = []

    def deepcopy(thing, memo=None):
        copied.append(type(thing))
        return real(thing, memo)

    real = copy.deepcopy
    transform = tio.Compose([tio.ToCanonical(), tio.RandomFlip(), tio.RandomNoise()])
    subject = real(subjects[0])
    subject.load()
    monkeypatch.setattr("torchio.transforms.transform.copy.deepcopy", deepcopy)
    result = transform_in_place(transform, subject)
    assert tio.Subject not in copied
    assert result.applied_transforms
    assert all(arguments["copy"] for _, arguments in result.applied_transforms)
    transform(subject)
    assert tio.Subject in copied


def test_no_image_is_held_in_two_orders_while_simpleitk_works(monkeypatch):
    """What was handed over is gone at once; an image that is left alone comes back as it was."""
    shape = (8, 9, 10)
    images = {name: tio.ScalarImage(tensor=torch.rand(2, *shape)) for name in ("a", "b", "c")}
    expected = images["c"].data.clone()
    subject = tio.Subject(images)
    before = [weakref.ref(image.data) for image in images.values()]
    alive = []
    execute = SimpleITK.ResampleImageFilter.Execute

    def count(resampler, *given):
        gc.collect()
        alive.append(sum(each() is not None for each in before))
        return execute(resampler, *given)

    monkeypatch.setattr(SimpleITK.ResampleImageFilter, "Execute", count)
    result = transform_in_place(tio.RandomAffine(include=["a", "b"]), subject)
    # The one that is not transformed.
    assert alive == [1] * 4
    assert torch.equal(result["c"].data, expected)
    assert result["c"].data.stride() == expected.stride()
    monkeypatch.undo()
    original = subject_of_two(shape)
    again = transform_in_place(tio.RandomAffine(p=0), copy.deepcopy(original))
    assert_same(again, original)


def subject_of_two(shape):
    """Return a subject of an image and a label in RAM."""
    label = tio.LabelMap(tensor=torch.ones(1, *shape, dtype=torch.uint8))
    return tio.Subject(t1=tio.ScalarImage(tensor=torch.rand(1, *shape)), label=label)


def test_what_code_of_others_was_shown_stays_as_it_was(subjects):
    """A callable may keep the subject that the next transform changes."""
    shown = []

    def show(subject):
        shown.append(subject)
        return subject

    for parts in ([show], [tio.Compose([show])]):
        subject = copy.deepcopy(subjects[0])
        subject.load()
        before = subject.t1.data.clone()
        transform = tio.Compose([tio.ToCanonical(), *parts, tio.RescaleIntensity((0, 1))])
        result = transform_in_place(transform, subject)
        assert not torch.equal(result.t1.data, before)
        assert torch.equal(shown.pop().t1.data.flip(1), before)


def test_subjects_in_ram_stay_as_they_are(subjects):
    """The dataset's own subjects are not the queue's to change."""
    for subject in subjects:
        subject.load()
    before = [subject.t1.data.clone() for subject in subjects]
    dataset = tio.SubjectsDataset(subjects, transform=tio.RescaleIntensity((0, 1)))
    assert get_subject(dataset, 0).t1.data.max() == 1
    for subject, voxels in zip(subjects, before, strict=True):
        assert torch.equal(subject.t1.data, voxels)


def test_a_dataset_that_does_it_its_own_way_is_asked(subjects):
    """A ``__getitem__`` of the user's decides what a subject is."""

    class Cached(tio.SubjectsDataset):
        def __getitem__(self, index):
            return self._subjects[index]

    dataset = Cached(subjects, transform=tio.RescaleIntensity((0, 1)))
    assert get_subject(dataset, 1) is subjects[1]


def test_a_damaged_local_file_is_told(subjects):
    """SimpleITK makes zeros of what a cut-off file lacks, without a word."""
    path = subjects[1].t1.path
    path.write_bytes(path.read_bytes()[:-2000])
    dataset = tio.SubjectsDataset(subjects)
    sampler = tio.UniformSampler(8)
    with (
        tno.BudgetedQueue(dataset, 8, 2, sampler, num_workers=1, shuffle_subjects=False) as queue,
        pytest.raises(tno.DamagedImageError, match=r"1_t1\.nii\.gz"),
    ):
        list(queue)
