"""Randomness in disguise: what is done once must come out the same twice."""

import functools
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchio as tio
from faulty import LoopbackOpenNeuro

import tio_openneuro as tno
from tio_openneuro.queue import BudgetedQueue

T1 = {"t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz")}
Change = Callable[[torch.Tensor], torch.Tensor]


def noisy(x: torch.Tensor, scale: float = 1) -> torch.Tensor:
    """Multiply by a draw from torch."""
    return x * (scale + torch.rand(1))


def by_name(x: torch.Tensor) -> torch.Tensor:
    """Draw from NumPy without naming it."""
    return x + float(getattr(np, "ran" + "dom").normal())


class Inside(tio.Transform):
    """A custom transform that uses a random one inside."""

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        """Add noise."""
        return tio.RandomNoise(std=(1, 2))(subject)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Add noise, as a bound method."""
        return x + torch.randn(x.shape)


def closure() -> Change:
    """Return a function that closes over its draw."""
    draw = torch.rand
    return lambda x: x * draw(1)


class Counting:
    """Keeps something from one call to the next."""

    def __init__(self) -> None:
        """Start at none."""
        self.calls = 0

    def __call__(self, subject: tio.Subject) -> tio.Subject:
        """Add the calls so far to the subject."""
        self.calls += 1
        subject["calls"] = self.calls
        return subject


DISGUISES: dict[str, Callable[[tio.Subject], tio.Subject]] = {
    "lambda": tio.Lambda(lambda x: x * torch.rand(1)),
    "function": tio.Lambda(noisy),
    "closure": tio.Lambda(closure()),
    "partial": tio.Lambda(functools.partial(noisy, scale=2)),
    "method": tio.Lambda(Inside().change),
    "inside": Inside(),
    "composed": tio.Compose([tio.ToCanonical(), Inside()]),
    "numpy": tio.Lambda(by_name),
    "time": tio.Lambda(lambda x: x.double() + time.perf_counter()),
    "urandom": tio.Lambda(lambda x: x + int.from_bytes(os.urandom(1), "little") / 7),
    "random": tio.Lambda(lambda x: x * getattr(random, "ran" + "dom")()),
    "state": Counting(),
}


@pytest.fixture
def opened(
    openneuro: LoopbackOpenNeuro,
) -> Iterator[Callable[..., tno.DataladSubjectsDataset]]:
    """Return a way to open the six heads with a preprocess."""
    made: list[tno.DataladSubjectsDataset] = []

    def opened(preprocess: object, **options: object) -> tno.DataladSubjectsDataset:
        made.append(tno.DataladSubjectsDataset("ds900001", T1, preprocess=preprocess, **options))
        return made[-1]

    yield opened
    for dataset in made:
        dataset.close()


@pytest.mark.parametrize("disguise", DISGUISES)
def test_what_is_random_in_disguise_is_found_when_it_runs(
    opened: Callable[..., tno.DataladSubjectsDataset], root: Path, disguise: str
) -> None:
    """With the first volume, whatever it draws from; nothing of it is kept, for no other run."""
    preprocess = DISGUISES[disguise]
    name = type(preprocess).__name__
    words = rf"Cannot use {name} as preprocess: (sub-01 came out otherwise|.* draws from)"
    with pytest.raises(tno.SelectionError, match=words):
        opened(preprocess, preprocess_id="disguised")[0]
    assert not list(root.glob("prepared/**/*.*"))


def test_queue_tells_it_in_the_training_loop(
    opened: Callable[..., tno.DataladSubjectsDataset],
) -> None:
    """By name, and not as a subject that fails."""
    dataset = opened(tio.Lambda(lambda x: x * torch.rand(1)))
    with (
        BudgetedQueue(dataset, 8, 2, tio.UniformSampler(4), num_workers=2) as queue,
        pytest.raises(tno.SelectionError, match=r"Lambda as preprocess.*otherwise"),
    ):
        next(iter(queue))


def test_what_repeats_is_made_twice_once(
    opened: Callable[..., tno.DataladSubjectsDataset],
) -> None:
    """The first volume alone; what is given is what one call gives, and nobody's draws change."""
    calls: list[str] = []

    def preprocess(subject: tio.Subject) -> tio.Subject:
        calls.append(subject["subject_id"])
        return tio.ZNormalization()(subject)

    dataset = opened(preprocess)
    torch.manual_seed(3)
    subjects = list(dataset)
    drawn = torch.rand(1)
    assert calls == ["sub-01", *(f"sub-{n:02}" for n in range(1, 7))]
    torch.manual_seed(3)
    assert drawn == torch.rand(1)
    plain = tio.ZNormalization()(opened(None)[0])
    assert torch.equal(subjects[0].t1.data, plain.t1.data)
