"""Whether a result was kept or is made anew changes nothing: of a subject, of a patch, of a draw.

A preprocess is drawn from steps of TorchIO's and of custom ones; the snapshots of small datasets
follow one another under one root, and are opened in a fresh one.
"""

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchio as tio
from faulty import LoopbackOpenNeuro
from truths import CHANGES, IMAGES, STEPS, TORCHIO, Step, digest, publish_truths, told

import tio_openneuro as tno

Open = dict[tuple[str, int], tno.DataladSubjectsDataset]
# Seeds of datasets, and cases of each: 300 by hand.
DATASETS = [(1, 20), *(pytest.param(seed, 30, marks=pytest.mark.slow) for seed in range(2, 12))]


@pytest.fixture(scope="session")
def publish(_published: LoopbackOpenNeuro) -> Callable[[int], str]:
    """Return a function that publishes the dataset of a seed, once, and returns its name."""

    @functools.cache
    def published(seed: int) -> str:
        publish_truths(_published, f"ds9001{seed:02}", seed)
        return f"ds9001{seed:02}"

    return published


def drawn_preprocess(rng: random.Random) -> tuple[tio.Transform, str | None]:
    """Return a transform of up to five steps, and its id where one is custom."""
    custom = rng.random() < 0.75
    steps = []
    for _ in range(rng.randint(1, 5)):
        word = rng.choice(list(STEPS))
        steps.append(Step(word) if custom and rng.random() < 0.6 else rng.choice(TORCHIO)())
    named = any(isinstance(step, Step) for step in steps)
    return tio.Compose(steps), "1" if named else None


def subjects(dataset: tno.DataladSubjectsDataset) -> list[object]:
    """Return all of each subject; of what cannot be prepared, the error."""
    found: list[object] = []
    for index in range(len(dataset)):
        try:
            found.append(told(dataset[index], dataset._root))
        except (KeyError, ValueError, RuntimeError, AttributeError, FloatingPointError) as error:
            found.append(type(error))
    return found


def patches(dataset: tno.DataladSubjectsDataset) -> list[object]:
    """Return all of an epoch's patches; or the error that stopped it."""
    try:
        return list(digest(dataset, dataset._root, tio.UniformSampler(4), 2))
    except (KeyError, ValueError, RuntimeError, AttributeError, FloatingPointError) as error:
        return [type(error)]


def check_case(opened: Open, rng: random.Random) -> int:
    """Compare cold, warm, half warm and fresh of one preprocess; return the hits."""
    preprocess, preprocess_id = drawn_preprocess(rng)
    before, after = sorted(rng.sample(range(len(CHANGES) + 1), 2))
    first, second, fresh = opened["root", before], opened["root", after], opened["fresh", after]
    for dataset in (first, second, fresh):
        dataset.evict()
        dataset._prepare(preprocess, preprocess_id)
    cold = subjects(first)
    assert subjects(first) == cold
    following = subjects(second)
    hits = second.statistics().hit_files
    assert subjects(second) == following
    hits = second.statistics().hit_files - hits
    assert subjects(fresh) == following
    second[[rng.randrange(len(second))]].evict()
    half_warm = patches(second)
    fresh.evict()
    assert patches(fresh) == half_warm
    assert patches(second) == patches(fresh) == half_warm
    assert subjects(first) == cold
    return hits


@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("seed", "cases"), DATASETS)
def test_cold_warm_half_warm_and_fresh_are_equal(
    seed: int,
    cases: int,
    publish: Callable[[int], str],
    openneuro: LoopbackOpenNeuro,
    tmp_path: Path,
) -> None:
    """Of each case all subjects and patches, whatever preprocess reads, adds or takes away."""
    del openneuro  # It serves what is installed.
    accession, opened, hits = publish(seed), Open(), []
    try:
        for root, number in itertools.product(("root", "fresh"), range(len(CHANGES) + 1)):
            opened[root, number] = tno.DataladSubjectsDataset(
                accession,
                IMAGES,
                root=tmp_path / root,
                version=f"1.0.{number}",
                disk_budget="1 GB",
            )
        for case in range(cases):
            hits.append(check_case(opened, random.Random(f"{seed} {case}")))  # noqa: PERF401
    finally:
        for dataset in opened.values():
            dataset.close()
    # Most are kept: what cannot be prepared, or be told, is not.
    assert sum(hit >= len(opened["root", 0]) for hit in hits) > len(hits) / 2


@pytest.fixture
def dataset(
    publish: Callable[[int], str], openneuro: LoopbackOpenNeuro
) -> Iterator[tno.DataladSubjectsDataset]:
    """Return the small dataset, with room for everything."""
    del openneuro  # It serves what is installed.
    with tno.DataladSubjectsDataset(publish(1), IMAGES, version="1.0.0", disk_budget="1 GB") as ds:
        yield ds


SAMPLERS = {
    "uniform": lambda _: tio.UniformSampler((4, 5, 6)),
    "label": lambda _: tio.LabelSampler(4, "lesion"),
    "weighted": lambda _: tio.WeightedSampler(4, "lesion"),
    "grid": lambda subject: tio.GridSampler(subject, 4, 2),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_patches_of_each_sampler_are_equal_cold_and_warm(
    name: str, dataset: tno.DataladSubjectsDataset, root: Path
) -> None:
    """Their keys, attributes, voxels, places and history, from the whole and from boxes."""
    dataset._prepare(
        tio.Compose([tio.ToCanonical(), tio.CropOrPad(12), Step("item and attribute")]), "1"
    )
    sampler = SAMPLERS[name](dataset[0])
    dataset.evict()
    cold = list(digest(dataset, root, sampler, 5))
    fetched_files = dataset.statistics().fetched_files
    assert list(digest(dataset, root, sampler, 5)) == cold
    assert dataset.statistics().fetched_files == fetched_files
    assert len(cold) == 15
    assert all("z" in dict(patch[1]) for patch in cold)


TYPES: list[Any] = [torch.uint8, torch.int16, torch.int32, torch.int64]
TYPES += [torch.float16, torch.float32, torch.float64]
WHOLE: dict[str, Any] = {
    "ToCanonical": tio.ToCanonical,
    "ToOrientation": lambda: tio.ToOrientation("LPS"),
    "Crop": lambda: tio.Crop((1, 2, 0, 1, 3, 0)),
    "Pad": lambda: tio.Pad((1, 2, 0, 1, 3, 0)),
    "CropOrPad": lambda: tio.CropOrPad((9, 14, 10)),
    "CropOrPad by a mask": lambda: tio.CropOrPad(mask_name="lesion"),
    "EnsureShapeMultiple": lambda: tio.EnsureShapeMultiple(8),
    "Resize": lambda: tio.Resize((9, 8, 7)),
    "Resample": lambda: tio.Resample(1.6),
    "Resample, nearest": lambda: tio.Resample((2, 1, 1), image_interpolation="nearest"),
    "Resample to an image": lambda: tio.Resample("t2"),
    "ToReferenceSpace": lambda: tio.ToReferenceSpace(
        tio.ScalarImage(tensor=torch.ones(1, 8, 8, 8))
    ),
    "Transpose": tio.Transpose,
    "CopyAffine": lambda: tio.CopyAffine("t2"),
    "Flip": lambda: tio.Flip((0, 2)),
    "Affine": lambda: tio.Affine(scales=(1.1, 0.9, 1), degrees=(5, 0, 3), translation=(1, 0, 2)),
    "Blur": lambda: tio.Blur((1, 1, 2)),
    "Gamma": lambda: tio.Compose([tio.RescaleIntensity(), tio.Gamma(0.8)]),
    "ZNormalization": tio.ZNormalization,
    "ZNormalization, masked": lambda: tio.ZNormalization(tio.ZNormalization.mean),
    "ZNormalization by a label": lambda: tio.ZNormalization("lesion"),
    "RescaleIntensity": lambda: tio.RescaleIntensity((0, 1), (1, 99)),
    "Clamp": lambda: tio.Clamp(10, 300),
    "Mask": lambda: tio.Mask("lesion", outside_value=-1),
    "OneHot": tio.OneHot,
    "RemapLabels": lambda: tio.RemapLabels({1: 3}),
    "RemoveLabels": lambda: tio.RemoveLabels([1]),
    "SequentialLabels": tio.SequentialLabels,
    "Contour": tio.Contour,
    "KeepLargestComponent": tio.KeepLargestComponent,
    "keep": lambda: tio.Clamp(0, 9, keep={"t1": "original", "lesion": "twin"}),
    "p=1, include": lambda: tio.ZNormalization(include=["t2"]),
    "exclude": lambda: tio.Pad(1, exclude=["t2"]),
    "copy=False": lambda: tio.Clamp(0, 9, copy=False),
    **{f"To {dtype}": lambda dtype=dtype: tio.To(dtype) for dtype in TYPES},
    **{
        f"{name} of {dtype}": lambda dtype=dtype, made=made: tio.Compose([tio.To(dtype), made()])
        for dtype in TYPES[1:6]
        for name, made in {
            "CropOrPad": lambda: tio.CropOrPad(9),
            "Pad": lambda: tio.Pad(2),
            "Clamp": lambda: tio.Clamp(1, 99),
            "Mask": lambda: tio.Mask("lesion"),
        }.items()
    },
}


@pytest.mark.filterwarnings("ignore")
def test_transforms_and_types_come_back_as_they_were(
    dataset: tno.DataladSubjectsDataset, root: Path
) -> None:
    """Each of TorchIO's deterministic transforms and each type of voxels, kept and equal."""
    assert len(WHOLE) >= 59
    for name, made in WHOLE.items():
        dataset._prepare(made(), None)
        cold = told(dataset[1], root)
        hits = dataset.statistics().hit_files
        assert told(dataset[1], root) == cold, name
        assert dataset.statistics().hit_files == hits + 1, name
