"""Code that draws from elsewhere than torch: run so that it repeats, or refused; never unseen.

Two runs with one seed give the same patches, or one of them raises and names what differs.
"""

import random
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
import torchio as tio

import tio_openneuro as tno
from tio_openneuro.queue.source import NoContent

EPOCHS = 2


def subjects() -> list[tio.Subject]:
    """Return four noisy subjects in RAM."""
    found = []
    for number in range(4):
        voxels = torch.rand(1, 8, 8, 8, generator=torch.Generator().manual_seed(number))
        found.append(tio.Subject(t1=tio.ScalarImage(tensor=voxels), subject_id=f"sub-{number}"))
    return found


def add(subject: tio.Subject, number: float) -> tio.Subject:
    """Return a subject with a number added."""
    subject.t1.set_data(subject.t1.data + number)
    return subject


class Method:
    """Draws from NumPy in a method that ``__call__`` calls."""

    def __call__(self, subject: tio.Subject) -> tio.Subject:
        """Add a number."""
        return add(subject, self.draw())

    def draw(self) -> float:
        """Draw it."""
        return float(np.random.normal())  # noqa: NPY002 - as users do


class Helper(tio.Transform):
    """Draws in a helper of a transform of TorchIO's kind."""

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        """Add a number."""
        return add(subject, self.draw())

    def draw(self) -> float:
        """Draw it from Python's own generator."""
        return random.random()


class CxxNoise:
    """Draws in C++, seeded by the clock."""

    def __call__(self, subject: tio.Subject) -> tio.Subject:
        """Add noise."""
        noisy = SimpleITK.AdditiveGaussianNoise(subject.t1.as_sitk(), 2.0)
        voxels = SimpleITK.GetArrayFromImage(noisy).T.copy()
        subject.t1.set_data(torch.from_numpy(voxels)[None])
        return subject


class Clock:
    """Adds what time it is."""

    def __call__(self, subject: tio.Subject) -> tio.Subject:
        """Add it."""
        return add(subject, time.perf_counter())


class Own(tio.SubjectsDataset):
    """A dataset that draws in its own ``__getitem__``."""

    def __getitem__(self, index: int) -> tio.Subject:
        """Load the subject and add a number."""
        return add(super().__getitem__(index), float(np.random.normal()))  # noqa: NPY002


class Sampler(tio.UniformSampler):
    """Draws where a patch lies in a helper."""

    def _generate_patches(self, subject: tio.Subject, num_patches: int | None = None):
        while True:
            yield self.extract_patch(subject, self.place())

    def place(self) -> tuple[int, int, int]:
        """Draw it from NumPy."""
        i, j, k = np.random.randint(0, 5, 3).tolist()  # noqa: NPY002
        return i, j, k


CASES: dict[str, Callable[[], tuple[tio.SubjectsDataset, tio.data.PatchSampler]]] = {
    **{
        kind.__name__: lambda kind=kind: (
            tio.SubjectsDataset(subjects(), transform=kind()),
            tio.UniformSampler(4),
        )
        for kind in (Method, Helper, CxxNoise, Clock)
    },
    "Own": lambda: (Own(subjects()), tio.UniformSampler(4)),
    "Sampler": lambda: (tio.SubjectsDataset(subjects()), Sampler(4)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_runs_are_the_same_or_one_says_why_not(case: str, num_workers: int) -> None:
    """In a method, a helper, a sampler, the dataset, in C++ and by the clock."""
    runs = []
    try:
        for _ in range(2):
            dataset, sampler = CASES[case]()
            with tno.BudgetedQueue(
                dataset, 4, 2, sampler, num_workers=num_workers, ram_budget="4 GB", seed=0
            ) as queue:
                patches = [patch for _ in range(EPOCHS) for patch in queue]
            runs.append([patch.t1.data.numpy().tobytes() for patch in patches])
    except (RuntimeError, ValueError) as error:
        # Seen beforehand, by what draws; or while it runs, by the subject and its image.
        found_out = "sub-" in str(error) and "t1" in str(error)
        assert found_out or case in str(error)  # noqa: PT017 - either is right
    else:
        assert runs[0] == runs[1]


class Observed(NoContent, tio.SubjectsDataset):
    """A dataset that writes down what it is asked for."""

    def __init__(self) -> None:
        """Have heard nothing yet."""
        super().__init__(subjects(), transform=tio.RandomNoise())
        self.heard: list[int] = []
        self.events: list[tuple[str, int]] = []

    def __getitem__(self, index: int) -> tio.Subject:
        """Note the use."""
        self.events.append(("use", index))
        return super().__getitem__(index)

    def prefetch_indices(self, indices: Sequence[int], *, likely_later: Sequence[int] = ()) -> None:
        """Note the first order."""
        self.heard = self.heard or list(indices)

    def release_index(self, index: int, *, drop: bool) -> None:
        """Note the end of a use."""
        self.events.append(("drop" if drop else "keep", index))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_one_subject_of_each_epoch_is_made_twice(num_workers: int) -> None:
    """The dataset hears of both uses, one after the other, and drops content after the second."""
    dataset, epochs = Observed(), 6
    with tno.BudgetedQueue(
        dataset, 4, 2, tio.UniformSampler(4), num_workers=num_workers, seed=0, on_release="drop"
    ) as queue:
        names = [{patch["subject_id"] for patch in queue} for _ in range(epochs)]
    assert names == [{f"sub-{number}" for number in range(4)}] * epochs
    used = [index for what, index in dataset.events if what == "use"]
    assert used[:10] == dataset.heard
    twice = []
    for epoch in range(epochs):
        part = used[5 * epoch : 5 * epoch + 5]
        again = [place for place in range(1, 5) if part[place] == part[place - 1]]
        assert len(again) == 1
        twice += again
        events = dataset.events[10 * epoch : 10 * epoch + 10]
        assert [what for what, _ in events[1::2]].index("keep") == again[0] - 1
        assert [what for what, _ in events[1::2]].count("drop") == 4
    assert len(set(twice)) > 1


def test_without_a_seed_nothing_is_asked_to_repeat() -> None:
    """Code that draws from elsewhere runs as in TorchIO, and each subject is made once."""
    dataset = Observed()
    dataset.set_transform(Clock())
    with tno.BudgetedQueue(dataset, 4, 2, tio.UniformSampler(4), num_workers=0) as queue:
        assert len(list(queue)) == 8
    assert sorted(index for what, index in dataset.events if what == "use") == [0, 1, 2, 3]


def test_not_a_number_is_the_same_each_time() -> None:
    """Patches are compared by their bits, and every other value by what it holds."""
    made = subjects()
    for subject in made:
        subject.t1.set_data(torch.full((1, 8, 8, 8), float("nan")))
        subject["age"] = float("nan")
    with tno.BudgetedQueue(
        tio.SubjectsDataset(made), 4, 2, tio.UniformSampler(4), num_workers=0, seed=0
    ) as queue:
        assert len(list(queue)) == 8


@pytest.mark.parametrize("what", ["value", "affine"])
def test_what_differs_is_named(what: str) -> None:
    """Also where it is not a voxel; it is never taken for a subject that is to be skipped."""

    def change(subject: tio.Subject) -> tio.Subject:
        if what == "value":
            subject["target"] = time.perf_counter()
            subject.update_attributes()
        else:
            subject.t1.affine = np.diag([1, 1, time.perf_counter(), 1])
        return subject

    dataset = tio.SubjectsDataset(subjects(), transform=change)
    options = {"num_workers": 0, "seed": 0, "on_error": "skip"}
    with (
        tno.BudgetedQueue(dataset, 4, 2, tio.UniformSampler(4), **options) as queue,
        pytest.raises(NotImplementedError, match=r"sub-\d: made twice .* differ in") as raised,
    ):
        list(queue)
    assert ("target" if what == "value" else "t1") in str(raised.value)
    assert "seed=None" in str(raised.value)


def test_a_busy_ledger_leaves_the_consumers_generators_alone(openneuro: object, root: Path) -> None:
    """Waiting for another process's transaction draws from no generator that is the user's."""
    images = {"t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz")}
    with tno.DataladSubjectsDataset("ds900001", images, disk_budget="1 MB", jobs=1) as dataset:
        other = sqlite3.connect(
            root / "ledger" / "ledger.sqlite", isolation_level=None, check_same_thread=False
        )
        other.execute("BEGIN IMMEDIATE")
        over = threading.Timer(0.5, other.execute, ("COMMIT",))
        over.start()
        before = (random.getstate(), torch.get_rng_state(), np.random.get_state()[1])  # noqa: NPY002
        assert dataset[0]["subject_id"] == "sub-01"
        assert dataset[1]["subject_id"] == "sub-02"
        after = (random.getstate(), torch.get_rng_state(), np.random.get_state()[1])  # noqa: NPY002
        over.join()
        other.close()
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])
    assert np.array_equal(before[2], after[2])
