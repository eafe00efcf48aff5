"""Patches from kept maps against those that TorchIO's samplers draw themselves."""

import tracemalloc
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import pytest
import torch
import torchio as tio
from hypothesis import given, settings
from hypothesis import strategies as st
from torchio.constants import LOCATION

from tio_openneuro.torchio_seams.sampler_maps import (
    KeptMaps,
    compute_map,
    draw_patches,
    has_map,
    map_bytes,
)

Draw = Callable[[tio.Subject], Iterator[tio.Subject]]


def subject_of(labels: np.ndarray, *, channels: int = 1) -> tio.Subject:
    """Return a subject of labels, and of weights that differ in every voxel where they are."""
    rng = np.random.default_rng(0)
    weights = torch.from_numpy(rng.random(labels.shape, np.float32) * (labels > 0))[None]
    stack = [torch.from_numpy(np.roll(labels, n, axis=0)) for n in range(channels)]
    return tio.Subject(
        weights=tio.ScalarImage(tensor=weights),
        label=tio.LabelMap(tensor=torch.stack(stack)),
    )


def blobs(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Return labels 0 to 3 in boxes, over a fifth of the volume or so."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    for value in (1, 2, 3, 1, 2):
        corner = [rng.integers(0, size) for size in shape]
        ends = [
            int(at + rng.integers(1, max(2, size // 2)))
            for at, size in zip(corner, shape, strict=True)
        ]
        labels[tuple(slice(at, end) for at, end in zip(corner, ends, strict=True))] = value
    labels[tuple(size // 2 for size in shape)] = 1
    return labels


def locations(draw: Draw, subject: tio.Subject, count: int, seed: int = 0) -> list[list[int]]:
    """Return where patches were cut, and at last the state of the generator."""
    torch.manual_seed(seed)
    found = [patch[LOCATION].tolist() for patch in islice(draw(subject), count)]
    return [*found, torch.randint(2**31, (1,)).tolist()]


def assert_same_patches(sampler: tio.WeightedSampler, subject: tio.Subject, count: int) -> None:
    """Compare a sampler's own patches with those of a map, fresh and kept."""
    own = locations(sampler, subject, count)
    assert locations(lambda s: draw_patches(sampler, s), subject, count) == own
    kept = compute_map(sampler, subject)
    assert kept is not None
    assert locations(lambda s: draw_patches(sampler, s, kept), subject, count) == own


SAMPLERS = {
    "labels": tio.LabelSampler((5, 4, 3)),
    "labels by name": tio.LabelSampler(4, "label"),
    "probabilities": tio.LabelSampler((3, 4, 5), "label", {0: 1, 1: 2, 2: 0, 3: 7.5}),
    "one label": tio.LabelSampler(6, "label", {1: 1}),
    "weights": tio.WeightedSampler(4, "weights"),
    "weights of labels": tio.WeightedSampler((1, 2, 7), "label"),
}


@pytest.mark.parametrize("shape", [(24, 20, 16), (31, 9, 17), (12, 40, 8)], ids=str)
@pytest.mark.parametrize("name", SAMPLERS)
def test_patches_are_those_that_torchio_draws(name: str, shape: tuple[int, int, int]) -> None:
    """In place and order, from the same state of the generator, which ends the same."""
    assert_same_patches(SAMPLERS[name], subject_of(blobs(shape)), 200)


@pytest.mark.parametrize("name", SAMPLERS)
def test_running_sum_is_torchios_to_the_last_bit(name: str) -> None:
    """Each rounding counts, also one that seldom moves a patch."""
    sampler, subject = SAMPLERS[name], subject_of(blobs((24, 20, 16)))
    own = sampler.process_probability_map(sampler.get_probability_map(subject), subject)
    sums = sampler.get_cumulative_distribution_function(own)
    kept = compute_map(sampler, subject)
    assert kept is not None
    starts = kept.starts if len(kept.starts) else np.arange(len(sums))
    before = np.concatenate([[0], kept.ends[:-1]])
    assert np.array_equal(kept.ends[-1:], sums[-1:])
    assert np.array_equal(np.where(starts > 0, sums[starts.astype(int) - 1], 0), before)


def test_voxels_are_those_that_torchio_cuts() -> None:
    """Also what a patch holds beside its place."""
    subject = subject_of(blobs((24, 20, 16)))
    sampler = tio.LabelSampler(8)
    torch.manual_seed(3)
    own = list(islice(sampler(subject), 5))
    torch.manual_seed(3)
    for patch, other in zip(islice(draw_patches(sampler, subject), 5), own, strict=True):
        assert torch.equal(patch["weights"].data, other["weights"].data)
        assert np.array_equal(patch["label"].affine, other["label"].affine)
        assert patch[LOCATION].dtype == other[LOCATION].dtype


def test_channels_of_a_label_are_classes() -> None:
    """With probabilities, each channel is a class; without, the first decides."""
    subject = subject_of(blobs((20, 18, 16)), channels=3)
    assert_same_patches(tio.LabelSampler(4, "label", {0: 0, 1: 2, 2: 1}), subject, 100)
    assert_same_patches(tio.LabelSampler(4, "label"), subject, 100)


def test_labels_in_fortran_order() -> None:
    """The layout in memory makes no difference that TorchIO's does not make."""
    subject = subject_of(blobs((20, 18, 16)))
    turned = subject.label.data.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    subject.label.set_data(turned)
    assert not subject.label.data.is_contiguous()
    for sampler in (tio.LabelSampler(4), tio.LabelSampler(4, None, {1: 1, 3: 2})):
        assert_same_patches(sampler, subject, 100)


def test_long_runs_are_followed_to_their_end() -> None:
    """A volume that is likely throughout: one run, cut into parts, searched in strides."""
    subject = subject_of(np.ones((70, 60, 50), np.uint8))
    assert_same_patches(tio.LabelSampler(1), subject, 400)
    assert_same_patches(tio.LabelSampler((1, 1, 9)), subject, 400)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*[st.integers(4, 14)] * 3),
    patch=st.tuples(*[st.integers(1, 4)] * 3),
    probabilities=st.none()
    | st.dictionaries(st.integers(0, 3), st.sampled_from([0, 0.1, 1, 3])).filter(
        lambda chances: any(chances.values())
    ),
    seed=st.integers(0, 99),
)
def test_any_labels_give_torchios_patches_or_its_error(shape, patch, probabilities, seed) -> None:
    """Whatever the labels, the patch size and the probabilities."""
    subject = subject_of(blobs(shape, seed))
    for sampler in (
        tio.LabelSampler(patch, "label", probabilities),
        tio.WeightedSampler(patch, "weights"),
    ):
        own = outcome(sampler, subject)
        assert outcome(lambda s, sampler=sampler: draw_patches(sampler, s), subject) == own
        if not isinstance(own, str):
            assert_same_patches(sampler, subject, 30)


def outcome(draw: Draw, subject: tio.Subject) -> list[list[int]] | str:
    """Return where patches were cut, or what was said of an empty map."""
    try:
        return locations(draw, subject, 20)
    except RuntimeError as error:
        return str(error)


def test_probabilities_that_sum_to_nothing_are_torchios_matter() -> None:
    """It divides by zero, and cuts at the first voxel if that is no border."""
    subject = subject_of(blobs((6, 6, 6)))
    sampler = tio.LabelSampler(1, "label", {0: 0})
    assert compute_map(sampler, subject) is None
    own = locations(sampler, subject, 3)
    assert locations(lambda s: draw_patches(sampler, s), subject, 3) == own


@pytest.mark.parametrize(
    ("sampler", "labels", "raises"),
    [
        (tio.LabelSampler(4), np.zeros((8, 8, 8), np.uint8), RuntimeError),
        (tio.LabelSampler(4, "absent"), blobs((8, 8, 8)), KeyError),
        (tio.WeightedSampler(4, "absent"), blobs((8, 8, 8)), KeyError),
        (tio.WeightedSampler(4, "label"), -blobs((8, 8, 8)).astype(np.int16), ValueError),
        (tio.LabelSampler(9), blobs((8, 8, 8)), RuntimeError),
    ],
    ids=["empty", "no label", "no weights", "negative", "patch too large"],
)
def test_what_cannot_be_sampled_has_torchios_error(
    sampler: tio.WeightedSampler, labels: np.ndarray, raises: type[Exception]
) -> None:
    """The same type and text."""
    subject = subject_of(labels)
    with pytest.raises(raises) as own:
        next(iter(sampler(subject)))
    with pytest.raises(raises) as ours:
        next(draw_patches(sampler, subject))
    assert str(ours.value) == str(own.value)


def test_other_samplers_draw_as_they_are() -> None:
    """A subclass may change anything, and a uniform sampler needs no map."""

    class Corner(tio.LabelSampler):
        def get_probability_map(self, subject: tio.Subject) -> torch.Tensor:
            chances = torch.zeros(1, *subject.spatial_shape)
            chances[0, 3, 3, 3] = 1
            return chances

    subject = subject_of(blobs((12, 12, 12)))
    for sampler in (Corner(4), tio.UniformSampler(4)):
        own = locations(sampler, subject, 20)
        assert locations(lambda s, sampler=sampler: draw_patches(sampler, s), subject, 20) == own
        assert not has_map(sampler)
    assert map_bytes(Corner(4)) > map_bytes(tio.LabelSampler(4)) > map_bytes(tio.UniformSampler(4))


def test_map_of_labels_is_small_and_said_in_bytes() -> None:
    """Its runs are kept, not its voxels; its arrays are what it says it holds."""
    subject = subject_of(blobs((96, 96, 96)))
    kept = compute_map(tio.LabelSampler(16), subject)
    assert kept is not None
    voxels = int((subject.label.data > 0).sum())
    assert 0 < kept.size_bytes < voxels
    assert sum(array.nbytes for array in (kept.starts, kept.steps, kept.ends)) == kept.size_bytes


def test_computing_a_map_holds_less_than_torchio_does() -> None:
    """The running sum is one array of float64; TorchIO has three."""
    subject = subject_of(blobs((80, 80, 80)))
    for sampler in (tio.LabelSampler(8), tio.WeightedSampler(8, "weights")):
        peaks = []
        for draw in (sampler, lambda s, sampler=sampler: draw_patches(sampler, s)):
            tracemalloc.start()
            locations(draw, subject, 1)
            peaks.append(tracemalloc.get_traced_memory()[1] / 80**3)
            tracemalloc.stop()
        own, ours = peaks
        assert own >= 24
        assert 8 <= ours <= 14
        assert map_bytes(sampler) > ours


def test_maps_are_kept_while_there_is_room() -> None:
    """What is kept is not computed again, and what does not fit is computed each time."""
    sampler = tio.LabelSampler(16)
    subjects = [subject_of(blobs((48, 48, 48), seed=seed)) for seed in range(2)]
    sizes = [compute_map(sampler, subject).size_bytes for subject in subjects]
    kept = KeptMaps(sizes[0])
    first = kept.of(0, sampler, subjects[0])
    assert kept.of(0, sampler, subjects[0]) is first
    assert kept.of(1, sampler, subjects[1]) is not kept.of(1, sampler, subjects[1])
    assert (0 in kept, 1 in kept) == (True, False)
    assert kept.of(2, tio.UniformSampler(16), subjects[0]) is None
