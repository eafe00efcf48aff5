"""The queue on subjects in RAM and in local files: passes, counts, samplers, errors, RAM, ends.

Resuming and equality of sequences are in test_state.py.
"""

import gc
import pickle
import re
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
import torchio as tio
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from tio_openneuro.errors import FetchError, RamBudgetError
from tio_openneuro.queue.queue import BudgetedQueue
from tio_openneuro.queue.source import NoContent
from tio_openneuro.ram.admission import BASE_BYTES, bound_subject
from tio_openneuro.volumes.headers import announce_size, sum_sizes

_SIZE = 16


def make_subject(number, **attributes):
    """Return a subject of 16 x 16 x 16 voxels, all of them its number, with a label."""
    label = torch.zeros(1, _SIZE, _SIZE, _SIZE, dtype=torch.uint8)
    label[:, 5:11, 5:11, 5:11] = 1
    return tio.Subject(
        t1=tio.ScalarImage(tensor=torch.full((1, _SIZE, _SIZE, _SIZE), float(number))),
        label=tio.LabelMap(tensor=label),
        name=f"sub-{number:02d}",
        **attributes,
    )


def make_dataset(count=6, transform=None):
    """Return a dataset of subjects in RAM."""
    return tio.SubjectsDataset([make_subject(n) for n in range(count)], transform=transform)


@pytest.fixture
def make_queue():
    """Return a function that makes queues, which are closed when the test ends."""
    queues = []

    def make(dataset=None, max_length=10, samples_per_volume=4, sampler=None, **options):
        queue = BudgetedQueue(
            make_dataset() if dataset is None else dataset,
            max_length,
            samples_per_volume,
            tio.UniformSampler(8) if sampler is None else sampler,
            **{"num_workers": 2, **options},
        )
        queues.append(queue)
        return queue

    yield make
    for queue in queues:
        queue.close()
    left = [t.name for t in threading.enumerate() if t.name.startswith("tio-openneuro-queue")]
    assert left == []


def names(patches):
    """Return how many patches there are of each subject."""
    return Counter(patch["name"] for patch in patches)


class BrokenDataset(tio.SubjectsDataset):
    """A dataset some of whose subjects cannot be loaded."""

    def __init__(self, broken, count=6, error=None):
        """Break the subjects with these indices."""
        super().__init__([make_subject(n) for n in range(count)])
        self.broken = set(broken)
        self.error = error or FetchError("no such key", key="MD5E-s1--0")
        self.raised = threading.Semaphore(0)

    def __getitem__(self, index):
        """Load a subject, or raise."""
        if index in self.broken:
            self.raised.release()
            raise self.error
        return super().__getitem__(index)


# --- counts, order, loaders ---


@pytest.mark.parametrize("max_length", [1, 7, 19, 25, 40, None])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_subject_gives_its_patches_in_every_epoch(make_queue, max_length, num_workers):
    """Counts are exact for any max_length, also below samples_per_volume."""
    queue = make_queue(max_length=max_length, samples_per_volume=10, num_workers=num_workers)
    expected = {f"sub-{n:02d}": 10 for n in range(6)}
    for _ in range(3):
        assert len(queue) == 60
        assert names(queue) == expected


@pytest.mark.parametrize("max_length", [11, 12])
def test_a_subjects_own_number_of_samples_wins(make_queue, max_length):
    """num_samples of a subject replaces samples_per_volume, in a loader's batches too."""
    subjects = [make_subject(n, num_samples=n) for n in (2, 10)]
    queue = make_queue(
        tio.SubjectsDataset(subjects), max_length, 3, tio.UniformSampler(1), shuffle_patches=False
    )
    assert queue.iterations_per_epoch == 12
    for _ in range(2):
        batches = [batch["t1"][tio.DATA] for batch in tio.SubjectsLoader(queue, batch_size=5)]
        assert [len(batch) for batch in batches] == [5, 5, 2]
        assert Counter(torch.cat(batches).flatten().tolist()) == {2.0: 2, 10.0: 10}


@pytest.mark.parametrize("options", [{"num_workers": 0}, {}, {"start_background": False}])
def test_it_serves_a_subjects_loader_from_files(make_queue, tmp_path, options):
    """Files are loaded lazily, and batches hold image and label, epoch after epoch."""
    subjects = []
    for number in range(4):
        subject = make_subject(number)
        for name, image in subject.get_images_dict(intensity_only=False).items():
            image.save(tmp_path / f"{number}-{name}.nii.gz")
        subjects.append(
            tio.Subject(
                t1=tio.ScalarImage(tmp_path / f"{number}-t1.nii.gz"),
                label=tio.LabelMap(tmp_path / f"{number}-label.nii.gz"),
            )
        )
    queue = make_queue(tio.SubjectsDataset(subjects), **options)
    assert "iterations_per_epoch=16" in str(queue)
    for _ in range(2):
        shapes = [
            (tuple(batch["t1"][tio.DATA].shape), tuple(batch["label"][tio.DATA].shape))
            for batch in tio.SubjectsLoader(queue, batch_size=4)
        ]
        assert shapes == [((4, 1, 8, 8, 8),) * 2] * 4


def test_unshuffled_patches_come_subject_by_subject(make_queue):
    """With both shuffles off the order is that of the dataset."""
    queue = make_queue(shuffle_subjects=False, shuffle_patches=False)
    found = [patch["name"] for patch in queue]
    assert found == [f"sub-{n:02d}" for n in range(6) for _ in range(4)]


def test_subjects_and_patches_are_shuffled_anew_in_each_epoch(make_queue):
    """Epochs differ, batches mix subjects, and another seed gives another order."""
    orders = {}
    for seed in (0, 1):
        queue = make_queue(max_length=16, seed=seed)
        for epoch in range(2):
            orders[seed, epoch] = tuple(patch["name"] for patch in queue)
    assert len(set(orders.values())) == 4
    assert all(len(set(order[12:16])) > 1 for order in orders.values())


def test_the_seed_alone_shuffles_patches_where_subjects_come_in_order(make_queue):
    """With subjects in order, patches of several mix, in another way for each seed and epoch."""
    orders = []
    for seed in (0, 1):
        queue = make_queue(max_length=24, seed=seed, shuffle_subjects=False)
        orders += [tuple(patch["name"] for patch in queue) for _ in range(2)]
    assert len({*orders, tuple(sorted(orders[0]))}) == 5


def test_the_buffer_shows_what_may_be_drawn_next_and_never_more_than_max_length(make_queue):
    """Without threads what is left of a subject; with them, a full window once it is made."""
    plain = {"max_length": 5, "shuffle_subjects": False, "shuffle_patches": False}
    queue = make_queue(num_workers=0, **plain)
    assert [queue.num_patches for _ in queue] == [3, 2, 1, 0] * 6
    queue = make_queue(**plain)
    for number, _ in enumerate(queue):
        due = min(5, 23 - number)
        deadline_s = time.monotonic() + 60
        while queue.num_patches < due and time.monotonic() < deadline_s:
            threading.Event().wait(0.001)
        assert queue.num_patches == len(queue.patches_list) == due


def test_a_patch_transform_runs_on_each_patch(make_queue):
    """It sees patches, after sampling, with the subject's attributes."""

    def mark(patch):
        patch["extent"] = patch.t1.data.shape[-1]
        return patch

    assert {patch["extent"] for patch in make_queue(patch_transform=mark)} == {8}


def test_a_patch_transform_draws_what_its_subject_decides(make_queue):
    """Its draws are the same for any number of workers, differ between patches, and cost nobody."""
    noise = tio.Compose([tio.RandomNoise(std=(1, 2)), tio.RandomFlip((0, 1, 2))])
    torch.manual_seed(11)
    before = torch.get_rng_state()
    found = [
        [p.t1.data for p in make_queue(patch_transform=noise, num_workers=workers, seed=6)]
        for workers in (0, 1, 3)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    assert len({patch.std().item() for patch in found[0]}) == len(found[0])
    plain = [patch.t1.data for patch in make_queue(seed=6)]
    assert not any(map(torch.equal, plain, found[0]))


# --- passes and indices ---


def test_a_pass_begun_after_a_break_is_the_next_epoch(make_queue):
    """Breaking out early loses the rest of that epoch and nothing of the next."""
    whole = make_queue(seed=4)
    epochs = [[p[tio.LOCATION].tolist() for p in whole] for _ in range(3)]
    queue = make_queue(seed=4)
    for number, patch in enumerate(queue):
        assert patch[tio.LOCATION].tolist() == epochs[0][number]
        if number == 7:
            break
    assert [p[tio.LOCATION].tolist() for p in queue] == epochs[1]
    assert [p[tio.LOCATION].tolist() for p in queue] == epochs[2]


def test_set_epoch_decides_the_next_pass(make_queue):
    """An epoch is the same wherever the queue was before; the epoch due anyway changes nothing."""
    whole = make_queue(seed=4)
    epochs = [[p[tio.LOCATION].tolist() for p in whole] for _ in range(3)]
    queue = make_queue(seed=4)
    for epoch in (2, 0, 0, 1):
        queue.set_epoch(epoch)
        assert [p[tio.LOCATION].tolist() for p in queue] == epochs[epoch]
    queue.set_epoch(2)
    next(iter(queue))
    queue.set_epoch(2)
    assert [p[tio.LOCATION].tolist() for p in queue] == epochs[2]
    with pytest.raises(ValueError, match="-1"):
        queue.set_epoch(-1)


def test_indices_that_jump_are_refused(make_queue):
    """A loader that shuffles is told to leave that to the queue."""
    queue = make_queue()
    with pytest.raises(RuntimeError, match="patch 0 comes next"):
        queue[3]
    queue[0]
    with pytest.raises(RuntimeError, match=r"shuffle=False and num_workers=0"):
        queue[2]
    assert queue[1]["name"].startswith("sub-")


def test_loaders_with_workers_are_told_so(make_queue):
    """Patches are popped in the process of the queue, forked or spawned workers are refused."""
    queue = make_queue(num_workers=0)
    loader = tio.SubjectsLoader(queue, batch_size=2, num_workers=1, multiprocessing_context="fork")
    batches = iter(loader)
    with pytest.raises(RuntimeError, match="number of workers"):
        next(batches)
    batches._shutdown_workers()
    with pytest.raises(RuntimeError, match="number of workers"):
        pickle.dumps(queue)


def test_the_most_memory_is_told_without_loading(make_queue):
    """A full window of float patches, of image and label, in bytes and for people."""
    dataset = BrokenDataset(broken=range(6))
    queue = make_queue(dataset, max_length=10, start_background=False)
    assert queue.get_max_memory() == 10 * 2 * 8**3 * 4
    assert queue.get_max_memory(make_subject(0)) == 10 * 2 * 8**3 * 4
    assert queue.get_max_memory_pretty() == "40.0 KiB"


# --- parameters ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"subject_sampler": [0, 1]}, "shuffle_subjects cannot be set"),
        ({"max_length": 0}, "max_length=0"),
        ({"samples_per_volume": 0}, "samples_per_volume=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
        ({"on_release": "delete"}, "on_release='delete'"),
        ({"ram_budget": "much"}, "'much'"),
    ],
)
def test_parameters_out_of_range_are_named(make_queue, options, words):
    """Each refusal names the parameter and what was given."""
    with pytest.raises(ValueError, match=words):
        make_queue(**options)


def test_code_that_draws_from_numpy_is_refused_with_a_seed_only(make_queue):
    """It cannot be repeated on threads; without a seed nobody asked for that."""

    def shift(tensor):
        return tensor + np.random.rand()  # noqa: NPY002 - what users write

    dataset = make_dataset(transform=tio.Lambda(shift))
    with pytest.raises(ValueError, match=r"numpy\.random"):
        make_queue(dataset, seed=0)
    assert sum(names(make_queue(dataset)).values()) == 24


# --- subject samplers ---


def test_a_subject_sampler_needs_a_length(make_queue):
    """Without __len__ the number of subjects is not known, and the message says so."""
    queue = make_queue(subject_sampler=iter([0, 1]), shuffle_subjects=False, start_background=False)
    with pytest.raises(ValueError, match="__len__ method"):
        _ = queue.num_subjects


class TwoSubjects:
    """A subject sampler of a class that nobody knows, which counts how often it was asked."""

    def __init__(self):
        """Begin at zero."""
        self.asked = 0

    def __len__(self):
        """Return two."""
        return 2

    def __iter__(self):
        """Give two indices, others each time."""
        self.asked += 1
        return iter([self.asked % 6, (self.asked + 1) % 6])


def test_the_subject_sampler_decides_the_epoch(make_queue):
    """Lists, ranges and unknown classes work; the unknown one is asked once per epoch."""
    for sampler, count in (([0, 1], 2), (range(3), 3)):
        queue = make_queue(subject_sampler=sampler, shuffle_subjects=False)
        assert (queue.num_subjects, queue.iterations_per_epoch) == (count, count * 4)
        assert names(queue) == {f"sub-{n:02d}": 4 for n in range(count)}
    sampler = TwoSubjects()
    queue = make_queue(subject_sampler=sampler, shuffle_subjects=False, start_background=False)
    assert [len(queue), len(queue)] == [8, 8]
    assert sampler.asked == 0
    assert names(queue) == {"sub-01": 4, "sub-02": 4}
    assert sampler.asked == 1
    assert names(queue) == {"sub-02": 4, "sub-03": 4}


@pytest.mark.parametrize("kind", ["random", "weighted", "subset", "own generator"])
def test_samplers_of_torch_are_copied_and_repeat_with_the_seed(make_queue, kind):
    """The user's sampler and generator are left as they were, and len() draws nothing."""

    def make():
        dataset = make_dataset()
        if kind == "random":
            return RandomSampler(dataset)
        if kind == "weighted":
            return WeightedRandomSampler([5, 1, 1, 1, 1, 1], 7, replacement=True)
        if kind == "subset":
            return SubsetRandomSampler([1, 3, 5])
        return RandomSampler(dataset, generator=torch.Generator().manual_seed(3))

    state = torch.get_rng_state()
    orders = []
    for num_workers in (0, 2):
        sampler = make()
        queue = make_queue(
            subject_sampler=sampler, shuffle_subjects=False, num_workers=num_workers, seed=1
        )
        assert len(queue) == len(sampler) * 4
        orders.append([patch["name"] for _ in range(3) for patch in queue])
        if kind == "own generator":
            assert torch.equal(
                sampler.generator.get_state(), torch.Generator().manual_seed(3).get_state()
            )
    assert orders[0] == orders[1]
    length = len(orders[0]) // 3
    assert orders[0][:length] != orders[0][length : 2 * length]
    assert torch.equal(torch.get_rng_state(), state)


def test_ranks_see_disjoint_subjects_in_every_epoch(make_queue):
    """The queue sets the sampler's epoch itself, and ranks have equal numbers of patches."""
    for _ in range(2):
        queues = [
            make_queue(
                subject_sampler=DistributedSampler(make_dataset(), num_replicas=2, rank=rank),
                shuffle_subjects=False,
                seed=0,
            )
            for rank in range(2)
        ]
        found = [[set(names(queue)) for _ in range(3)] for queue in queues]
        for first, second in zip(*found, strict=True):
            assert len(first) == len(second) == 3
            assert first | second == {f"sub-{n:02d}" for n in range(6)}
        assert len({frozenset(epoch) for epoch in found[0]}) > 1


def test_ranks_with_unequal_subjects_are_refused(make_queue):
    """num_samples that differ would leave a rank waiting for the others."""
    dataset = tio.SubjectsDataset([make_subject(n, num_samples=n) for n in (2, 3)])
    sampler = DistributedSampler(dataset, num_replicas=2, rank=0)
    with pytest.raises(ValueError, match="num_samples"):
        make_queue(dataset, subject_sampler=sampler, shuffle_subjects=False)


# --- errors ---


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_failing_subject_raises_in_the_loop_with_its_name(make_queue, num_workers):
    """Class, attributes and original traceback stay; the next iteration is usable."""
    dataset = BrokenDataset(broken=[3])
    queue = make_queue(dataset, max_length=100, num_workers=num_workers)
    with pytest.raises(FetchError, match="sub-03: no such key") as raised:
        list(queue)
    assert (raised.value.unit, raised.value.key) == ("sub-03", "MD5E-s1--0")
    assert "raise self.error" in "".join(traceback.format_exception(raised.value.__cause__))
    # The next epoch's share of the subject has failed ahead of time as well.
    for _ in range(2 if num_workers else 1):
        assert dataset.raised.acquire(timeout=60)
    dataset.broken.clear()
    for _ in range(2):
        last = names(queue)
    assert last == {f"sub-{n:02d}": 4 for n in range(6)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_that_is_kept_pins_no_volume(make_queue, num_workers):
    """What was loaded before it, and before its cause, is let go; the lines of both stay."""
    volumes = []

    def decode():
        volume = torch.zeros(8)
        volumes.append(weakref.ref(volume))
        raise KeyError("x" * len(volume))

    class PinningDataset(tio.SubjectsDataset):
        def __getitem__(self, index):
            volume = torch.zeros(8)
            volumes.append(weakref.ref(volume))
            try:
                decode()
            except KeyError as error:
                message = f"{len(volume)} voxels are unreadable"
                raise OSError(message) from error

    queue = make_queue(PinningDataset([make_subject(0)]), num_workers=num_workers)
    with pytest.raises(OSError, match="unreadable") as raised:
        list(queue)
    lines = "".join(traceback.format_exception(raised.value))
    assert "decode()" in lines
    assert 'raise KeyError("x"' in lines
    queue.close()
    gc.collect()
    assert len(volumes) >= 2
    assert [volume() for volume in volumes] == [None] * len(volumes)


@pytest.mark.parametrize("error", [KeyError("x"), UnicodeDecodeError("utf8", b"", 0, 1, "bad")])
def test_errors_of_any_class_are_named(make_queue, error):
    """A class with other parameters than a message becomes RuntimeError, with its cause."""
    queue = make_queue(BrokenDataset(broken=range(6), error=error))
    with pytest.raises((KeyError, RuntimeError), match="sub-0") as raised:
        next(iter(queue))
    assert raised.value.__cause__ is error


def test_an_error_of_the_system_keeps_its_words(make_queue):
    """Its number alone would tell nothing."""
    error = FileNotFoundError(2, "No such file or directory", "t1.nii")
    queue = make_queue(BrokenDataset(broken=range(6), error=error))
    with pytest.raises(FileNotFoundError, match=r"sub-0\d: .*No such file or directory.*t1\.nii"):
        next(iter(queue))


def test_a_subject_that_cannot_be_sampled_is_named(make_queue):
    """An empty label map stops LabelSampler, in the training loop."""
    subjects = [make_subject(n) for n in range(3)]
    subjects[1].label.set_data(torch.zeros(1, _SIZE, _SIZE, _SIZE))
    queue = make_queue(tio.SubjectsDataset(subjects), sampler=tio.LabelSampler(8, "label"))
    with pytest.raises(RuntimeError, match="sub-01"):
        list(queue)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_subjects_are_listed_and_cost_no_other_patch(make_queue, num_workers):
    """The epoch ends short, in a loader too, and the next one tries again."""
    dataset = BrokenDataset(broken=[1, 4])
    queue = make_queue(dataset, num_workers=num_workers, on_error="skip", seed=0)
    expected = {f"sub-{n:02d}": 4 for n in (0, 2, 3, 5)}
    loader = tio.SubjectsLoader(queue, batch_size=3)
    for epoch in range(2):
        found = Counter(name for batch in loader for name in batch["name"])
        assert found == expected
        skipped = {(s.unit, s.index, s.epoch) for s in queue.skipped}
        assert {("sub-01", 1, epoch), ("sub-04", 4, epoch)} <= skipped
    assert queue.statistics().skipped == len(queue.skipped) == 4
    assert "no such key" in queue.skipped[0].reason
    dataset.broken.clear()
    names(queue)
    assert names(queue) == {f"sub-{n:02d}": 4 for n in range(6)}


def test_an_epoch_of_which_everything_is_skipped_is_empty(make_queue):
    """No subject works: each pass ends at once, and none hangs."""
    queue = make_queue(BrokenDataset(broken=range(6)), on_error="skip")
    assert list(queue) == []
    assert list(DataLoader(queue, batch_size=2, collate_fn=list)) == []
    assert list(DataLoader(queue, batch_size=None)) == []


def test_a_sampler_that_gives_too_few_patches_is_an_error(make_queue):
    """Counts are exact, or somebody says so."""

    class Meagre(tio.UniformSampler):
        def __call__(self, subject):
            return iter(list(super().__call__(subject, 2)))

    with pytest.raises(RuntimeError, match=r"sub-\d\d: The patch sampler gave 2 of 4"):
        list(make_queue(sampler=Meagre(8)))


# --- RAM ---


def test_a_budget_too_small_for_a_subject_is_refused_at_construction(make_queue):
    """In-RAM subjects have a known shape: the message names the subject and the bytes."""
    subjects = [make_subject(0), make_subject(1)]
    subjects[1].t1.set_data(torch.zeros(1, 128, 128, 128))
    subjects[1].label.set_data(torch.zeros(1, 128, 128, 128))
    with pytest.raises(RamBudgetError, match=r"sub-01 .* \(80000000 bytes\)") as raised:
        make_queue(tio.SubjectsDataset(subjects), ram_budget=80_000_000)
    assert raised.value.unit == "sub-01"
    make_queue(tio.SubjectsDataset(subjects), ram_budget=150_000_000)


def test_what_a_patch_transform_holds_is_charged(make_queue):
    """A budget that holds a subject and its patches is refused where it cannot transform one."""
    side = 96
    subject = make_subject(0)
    subject.t1.set_data(torch.zeros(1, side, side, side))
    subject.label.set_data(torch.zeros(1, side, side, side, dtype=torch.uint8))
    dataset, sampler = tio.SubjectsDataset([subject]), tio.UniformSampler(side)
    options = {"sampler": sampler, "max_length": 1, "samples_per_volume": 1}
    # Before a patch is made, whose size would take the place of its bound.
    bounds = make_queue(dataset, start_background=False, **options)._source.bounds(0)
    budget_bytes = BASE_BYTES + bounds.work_bytes + 2 * bounds.patch_bytes
    make_queue(dataset, ram_budget=budget_bytes, **options)
    assert len(list(make_queue(dataset, ram_budget=budget_bytes, **options))) == 1
    heavy = tio.RandomSpike()
    with pytest.raises(RamBudgetError, match="sub-00"):
        make_queue(dataset, ram_budget=budget_bytes, patch_transform=heavy, **options)
    bounds = make_queue(dataset, patch_transform=heavy, **options)._source.bounds(0)
    assert bounds.work_bytes >= 80 * side**3


def test_the_growth_of_a_transformed_subject_is_learnt_for_those_to_come(make_queue):
    """After one subject became 64 times as large, as much more is charged for the others."""
    pad = tio.Pad(24)
    dataset = make_dataset(transform=lambda subject: pad(subject))  # noqa: PLW0108 - not TorchIO's
    queue = make_queue(dataset, num_workers=0)
    before = queue._source.bounds(5)
    queue[0]
    after = queue._source.bounds(5)
    assert before.known
    assert after.work_bytes > before.work_bytes + 3 * 2 * 4 * (64**3 - _SIZE**3)


def test_the_growth_of_a_subject_is_known_before_the_first_one(make_queue):
    """What a transform makes larger is refused at construction, and nothing is learnt of it."""
    dataset = make_dataset(transform=tio.CropOrPad(160))
    with pytest.raises(RamBudgetError, match=r"sub-0\d .* CropOrPad takes most"):
        make_queue(dataset, ram_budget=BASE_BYTES + 40_000_000)
    queue = make_queue(dataset, num_workers=0, max_length=4, samples_per_volume=1)
    before = queue._source.bounds(5)
    queue[0]
    assert queue._source.bounds(5).work_bytes == before.work_bytes > 2 * 4 * 160**3


@pytest.mark.parametrize("max_length", [10, None])
def test_a_refusal_tells_the_smallest_budget_that_works(make_queue, max_length):
    """Also where the window grows with the budget: that one is accepted, a byte less is not."""
    subject = make_subject(0)
    subject.t1.set_data(torch.zeros(1, 64, 64, 64))
    subject.label.set_data(torch.zeros(1, 64, 64, 64))
    transform = tio.Compose([tio.RandomFlip(), tio.RandomGhosting()])
    dataset = tio.SubjectsDataset([subject] * 12, transform=transform)
    options = {"max_length": max_length, "sampler": tio.UniformSampler(48), "num_workers": 1}
    with pytest.raises(RamBudgetError, match="RandomGhosting takes most") as raised:
        make_queue(dataset, ram_budget="70 MB", **options)
    smallest = int(
        re.search(r"smallest ram_budget that works for it is (\d+)", str(raised.value))[1]
    )
    assert sum(names(make_queue(dataset, ram_budget=smallest, **options)).values()) == 48
    with pytest.raises(RamBudgetError, match=f"is {smallest} bytes"):
        make_queue(dataset, ram_budget=smallest - 1, **options)


def test_a_refusal_tells_that_nobody_stated_the_budget(make_queue):
    """The message names what "auto" took half of; a budget that was stated has no such words."""
    subject = make_subject(0)
    subject.t1.set_data(torch.zeros(1, 1, 1, 1).expand(1, 4000, 4000, 8000))
    subject.label.set_data(torch.zeros(1, 1, 1, 1).expand(1, 4000, 4000, 8000))
    dataset = tio.SubjectsDataset([subject])
    with pytest.raises(RamBudgetError, match=r"'auto' took half of the \d+ bytes"):
        make_queue(dataset)
    with pytest.raises(RamBudgetError, match=r"sub-00") as raised:
        make_queue(dataset, ram_budget="4 GB")
    assert "auto" not in str(raised.value)


def test_files_that_make_up_one_image_are_joined_in_the_bound():
    """All lie beside what they become; a label that is made of zeros takes room like any other."""
    files = sum_sizes([(1, 10**6, 4), (2, 10**6, 8)])
    joined = files.of_images(1)
    assert (joined.channels, joined.largest_bytes) == (3, 3 * 8 * 10**6)
    assert bound_subject(joined, joined, [], 0).size_bytes >= 2 * 24 * 10**6
    assert files.of_images(2) == files
    assert files.of_images(3).stored_bytes == files.stored_bytes + 8 * 10**6


def test_what_was_charged_to_work_that_ran_is_told_beside_what_was_held(make_queue):
    """A charge of all that the budget had left, for a size that nobody knew, is not told."""
    queue = make_queue(RemoteDataset([90]), num_workers=1, ram_budget="1 GB", max_length=4)
    list(queue)
    statistics = queue.statistics()
    assert BASE_BYTES + 4 * 90**3 < statistics.ram_peak_bytes < 500_000_000
    assert 0 < statistics.ram_held_peak_bytes < 1_000_000_000


def test_patches_that_a_transform_makes_larger_are_charged_as_they_came_out(make_queue):
    """After one subject's patches were padded to 24 voxels, those of others are taken for alike."""
    queue = make_queue(num_workers=0, patch_transform=tio.Pad(8))
    before = queue._source.bounds(5).patch_bytes
    patch = queue[0]
    images = patch.get_images(intensity_only=False)
    padded = sum(image.data.nbytes for image in images)
    assert (before, patch.t1.spatial_shape) == (2 * 4 * 8**3, (24, 24, 24))
    assert queue._source.bounds(5).patch_bytes == padded > 2 * before
    statistics = queue.statistics()
    held_bytes = statistics.buffer_patches * padded
    assert statistics.ram_charged_bytes == BASE_BYTES + held_bytes > BASE_BYTES


def test_a_large_subject_in_a_local_file_is_refused_at_construction(make_queue, tmp_path):
    """Its header tells; the file is not decoded: it has no voxels behind its header at all."""
    image = tio.ScalarImage(tensor=torch.zeros(1, 400, 400, 4))
    image.save(tmp_path / "t1.nii")
    path = tmp_path / "t1.nii"
    header = bytearray(path.read_bytes()[:352])
    header[46:48] = (4000).to_bytes(2, "little")
    path.write_bytes(header)
    big = tio.Subject(t1=tio.ScalarImage(path), name="sub-big")
    small = tio.Subject(t1=tio.ScalarImage(tensor=torch.zeros(1, 8, 8, 8)), name="sub-small")
    dataset = tio.SubjectsDataset([small, big])
    with pytest.raises(RamBudgetError, match=r"sub-big .* \(1000000000 bytes\)"):
        make_queue(dataset, ram_budget="1 GB", on_error="skip")
    assert not big.t1._loaded


class RemoteDataset(tio.SubjectsDataset):
    """A dataset that learns sizes from its files' headers after it fetched them."""

    def __init__(self, sizes):
        """Make subjects of which nothing is known before they are loaded."""
        absent = tio.ScalarImage("absent.nii.gz", verify_path=False)
        super().__init__([tio.Subject(t1=absent, name=f"sub-{n:02d}") for n in range(len(sizes))])
        self.sizes = sizes
        self.loads = []

    def __getitem__(self, index):
        """Announce the size, then load."""
        size = self.sizes[index]
        announce_size(sum_sizes([(1, size**3, 4)]))
        self.loads.append(index)
        return tio.Subject(
            t1=tio.ScalarImage(tensor=torch.zeros(1, size, size, size)), name=f"sub-{index:02d}"
        )


def test_the_first_subject_runs_alone_only_until_its_header_tells(make_queue):
    """Of subjects of unknown size, two are in work at once as soon as one size is known."""

    class MeetingDataset(RemoteDataset):
        met = threading.Barrier(2, timeout=60)

        def __getitem__(self, index):
            subject = super().__getitem__(index)
            self.met.wait()
            return subject

    queue = make_queue(MeetingDataset([12, 12, 12, 12]), num_workers=2, ram_budget="2 GB")
    try:
        assert len([queue[step] for step in range(16)]) == 16
    finally:
        MeetingDataset.met.abort()  # those of the next epoch may be waiting


def test_the_first_subject_through_an_unknown_transform_runs_alone(make_queue):
    """Its bound is a guess until it came out; two of those that follow are in work at once."""

    class MeetingDataset(tio.SubjectsDataset):
        barrier, met = threading.Barrier(2), []

        def __getitem__(self, index):
            if len(self.met) < 2:
                try:
                    self.barrier.wait(60 if self.met else 1)
                    self.met.append(True)
                except threading.BrokenBarrierError:
                    self.barrier.reset()
                    self.met.append(False)
            return super().__getitem__(index)

    dataset = MeetingDataset([make_subject(n) for n in range(6)], transform=tio.Lambda(torch.clone))
    queue = make_queue(dataset, max_length=100)
    assert len(list(queue)) == 24
    assert dataset.met[:2] == [False, True]


def test_a_subject_that_was_given_back_finds_room_though_others_were_made_meanwhile(make_queue):
    """They are dropped and made again: nothing is refused for the room that they take."""

    class LateDataset(RemoteDataset):
        def __getitem__(self, index):
            deadline_s = time.monotonic() + 60
            while index == 0 and set(self.loads) < {1, 2, 3, 4, 5, 6}:
                assert time.monotonic() < deadline_s
                threading.Event().wait(0.001)
            return super().__getitem__(index)

    # Five subjects of 64**3 wait with four patches of 1 MB each when the header of one of 120**3
    # tells: it needs 33 MB, where 29 are left.
    dataset = LateDataset([120, *[64] * 6])
    queue = make_queue(
        dataset,
        max_length=28,
        sampler=tio.UniformSampler(64),
        ram_budget=BASE_BYTES + 50_000_000,
        subject_sampler=[1, 0, 2, 3, 4, 5, 6],
        shuffle_subjects=False,
        shuffle_patches=False,
    )
    found = [queue[index]["name"] for index in range(28)]
    assert found == [f"sub-{n:02d}" for n in (1, 0, 2, 3, 4, 5, 6) for _ in range(4)]
    assert len(dataset.loads) > 7, "those that made way were made again"
    assert queue.statistics().ram_peak_bytes <= BASE_BYTES + 50_000_000


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_header_that_tells_more_than_was_charged_is_admitted_anew(make_queue, num_workers):
    """The load is begun again with its true size, and every patch comes, in the same order."""
    expected = None
    for ram_budget in ("100 MB", "4 GB"):
        dataset = RemoteDataset([12, 90, 16, 64])
        queue = make_queue(
            dataset, num_workers=num_workers, ram_budget=ram_budget, shuffle_subjects=False, seed=2
        )
        found = [(p["name"], p[tio.LOCATION].tolist()) for p in queue]
        expected = expected or found
        assert found == expected
        assert Counter(name for name, _ in found) == {f"sub-{n:02d}": 4 for n in range(4)}


@pytest.mark.parametrize("order", [[1, 0, 2], [2, 1, 0], [0, 2, 1]])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_header_that_tells_more_than_the_budget_stops_the_load(make_queue, num_workers, order):
    """The subject is named with the bytes, is not decoded, and is not skipped, wherever it comes.

    With another subject behind it the consumer's own thread once waited for room for ever.
    """
    dataset = RemoteDataset([12, 300, 16])
    queue = make_queue(
        dataset,
        num_workers=num_workers,
        ram_budget="100 MB",
        on_error="skip",
        seed=5,
        subject_sampler=order,
        shuffle_subjects=False,
    )
    with pytest.raises(RamBudgetError, match=r"sub-01 .* 100\.0 MB"):
        list(queue)
    assert 1 not in dataset.loads


@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_the_smallest_budget_makes_progress_and_is_kept(make_queue, num_workers):
    """At the edge of what is accepted every patch comes, and charges stay within the budget."""
    sampler = tio.LabelSampler(8, "label")
    low, high = 1, 10**9
    while high - low > 1000:
        middle = (low + high) // 2
        try:
            make_queue(sampler=sampler, ram_budget=middle, start_background=False)
        except RamBudgetError:
            low = middle
        else:
            high = middle
    queue = make_queue(sampler=sampler, ram_budget=high, num_workers=num_workers, seed=0)
    for _ in range(3):
        assert sum(names(queue).values()) == 24
    statistics = queue.statistics()
    assert BASE_BYTES < statistics.ram_peak_bytes <= high
    assert statistics.wait_s >= 0
    assert set(statistics.as_dict()) >= {"patches", "subjects", "buffer_patches", "window"}
    assert (statistics.patches, statistics.epoch, statistics.epoch_patches) == (72, 2, 24)


def test_a_queue_that_idles_gives_freed_memory_back(make_queue):
    """What its subjects left free counts no longer once nothing was made for a while."""
    queue = make_queue(num_workers=2)
    filler = queue._filler
    deadline_s = time.monotonic() + 30
    while filler.subjects < 2 or filler.admission.retained_bytes:
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.02)
    assert filler.buffered()
    assert filler.admission.charged_bytes > BASE_BYTES


def test_charges_end_with_the_patches(make_queue):
    """When all is delivered and nothing is ahead, nothing is charged."""
    queue = make_queue(subject_sampler=TwoSubjects(), shuffle_subjects=False)
    list(queue)
    assert queue.statistics().ram_charged_bytes == BASE_BYTES
    queue.close()
    queue = make_queue()
    next(iter(queue))
    queue.close()
    assert queue.statistics().ram_charged_bytes == BASE_BYTES
    assert queue.statistics().buffer_patches == 0


# --- the dataset's side ---


class ObservingDataset(NoContent, tio.SubjectsDataset):
    """A dataset with content, which writes down what it is told."""

    def __init__(self):
        """Make four subjects."""
        tio.SubjectsDataset.__init__(self, [make_subject(n) for n in range(4)])
        self.prefetched = []
        self.likely_later = []
        self.events = []

    def __getitem__(self, index):
        """Note the load."""
        self.events.append(("load", index))
        return super().__getitem__(index)

    def prefetch_indices(self, indices, /, *, likely_later=()):
        """Note the order ahead, and what may follow it."""
        self.prefetched.append(list(indices))
        self.likely_later.append(list(likely_later))

    def release_index(self, index, /, *, drop):
        """Note the release."""
        self.events.append(("drop" if drop else "keep", index))


@pytest.mark.parametrize("on_release", ["keep", "drop"])
def test_content_is_fetched_ahead_and_released_once_sampled(make_queue, on_release):
    """The dataset hears this epoch's order and the next one's, and of each subject's end."""
    dataset = ObservingDataset()
    queue = make_queue(dataset, on_release=on_release, num_workers=1)
    list(queue)
    first = dataset.prefetched[0]
    assert sorted(first[:4]) == sorted(first[4:]) == [0, 1, 2, 3]
    list(queue)
    queue.close()
    assert dataset.prefetched[-1] == dataset.likely_later[-1] == []
    assert dataset.likely_later[:-1] == [[0, 1, 2, 3]] * (len(dataset.likely_later) - 1)
    events = dataset.events
    assert [index for kind, index in events if kind == "load"][:8] == first
    assert events[1::2] == [(on_release, index) for _, index in events[::2]][: len(events[1::2])]


# --- ends ---


def _threads():
    return [t for t in threading.enumerate() if t.name.startswith("tio-openneuro-queue")]


def _await_end(threads):
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_rebinding_the_name_ends_the_threads(make_queue):
    """Threads hold no reference to the queue: a notebook cell run again leaves no old ones."""
    assert make_queue
    queue = BudgetedQueue(make_dataset(), 10, 4, tio.UniformSampler(8), num_workers=3)
    next(iter(queue))
    old = _threads()
    assert len(old) == 3
    queue = BudgetedQueue(make_dataset(), 10, 4, tio.UniformSampler(8), num_workers=2)
    gc.collect()
    _await_end(old)
    old = _threads()
    assert len(old) == 2
    del queue
    gc.collect()
    _await_end(old)
    assert _threads() == []


def test_a_closed_queue_says_so(make_queue):
    """Closing twice is fine; asking for patches then is an error and no wait."""
    for num_workers in (0, 2):
        with make_queue(num_workers=num_workers) as queue:
            next(iter(queue))
        queue.close()
        with pytest.raises(RuntimeError, match="closed"):
            list(queue)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_waiting_threads_wake_for_nothing_but_a_patch_that_is_taken(make_queue):
    """A full queue's threads are parked without a deadline, and one patch sets them to work."""
    queue = make_queue(num_workers=4)
    next(iter(queue))

    def parked():
        calls = []
        for thread in _threads():
            with open(f"/proc/self/task/{thread.native_id}/syscall") as file:  # noqa: PTH123
                calls.append(file.read().split())
        # Number, address, operation, value, deadline; see futex(2), on this processor 202 or 98.
        return [call[0] in {"202", "98"} and call[4] == "0x0" for call in calls] == [True] * 4

    for taken in (1, 2):
        deadline_s = time.monotonic() + 60
        while not parked() or queue._filler._running:
            assert time.monotonic() < deadline_s
            threading.Event().wait(0.01)
        made = queue.statistics().subjects
        for index in range(4 * taken - 3, 4 * taken + 1):
            queue[index]
        while queue.statistics().subjects == made:
            assert time.monotonic() < deadline_s
            threading.Event().wait(0.01)


def test_the_consumers_random_state_is_neither_read_nor_advanced(make_queue):
    """With and without a seed, torch, NumPy and random go on as if there were no queue."""
    transform = tio.Compose([tio.RandomNoise(), tio.RandomFlip()])
    for seed in (None, 3):
        torch.manual_seed(1)
        states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        for num_workers in (0, 2):
            queue = make_queue(
                make_dataset(transform=transform), num_workers=num_workers, seed=seed
            )
            list(queue)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    torch.manual_seed(1)
    orders = []
    for _ in range(2):
        torch.manual_seed(1)
        orders.append([p[tio.LOCATION].tolist() for p in make_queue()])
    assert orders[0] != orders[1]


def test_the_users_intra_op_threads_stay(make_queue):
    """Fills use one intra-op thread; the consumer, and threads started later, keep theirs."""
    before = torch.get_num_threads()
    filling = []

    def look(tensor):
        filling.append(torch.get_num_threads())
        return tensor

    try:
        torch.set_num_threads(3)
        for num_workers in (0, 2):
            queue = make_queue(
                make_dataset(transform=tio.Lambda(look)),
                num_workers=num_workers,
                patch_transform=tio.Lambda(look),
            )
            list(queue)
            assert set(filling) == {1}
            filling.clear()
            found = []
            later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))  # noqa: B023
            later.start()
            later.join()
            assert (torch.get_num_threads(), found) == (3, [3])
            assert queue.statistics().intra_op_threads == 1
    finally:
        torch.set_num_threads(before)


_SCRIPT = """
import signal, sys, threading, torch, torchio as tio
from tio_openneuro.volumes.headers import sum_sizes
from tio_openneuro.ram.admission import BASE_BYTES
from tio_openneuro.volumes.headers import announce_size
from tio_openneuro.queue.queue import BudgetedQueue
image = lambda: tio.ScalarImage(tensor=torch.zeros(1, 16, 16, 16))
dataset = tio.SubjectsDataset([tio.Subject(t1=image()) for _ in range(8)])
queue = BudgetedQueue(dataset, 10, 4, tio.UniformSampler(8), num_workers=int(sys.argv[1]))
first = next(iter(queue))
if sys.argv[2] == "interrupt":
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        while True:
            for patch in queue:
                pass
    except KeyboardInterrupt:
        print("interrupted")
    print(len([patch for patch in queue]))
elif sys.argv[2] == "raise":
    raise ValueError("in the step")
print("end")
"""


@pytest.mark.parametrize(
    ("num_workers", "event", "words"),
    [
        (2, "exit", "end"),
        (2, "raise", "in the step"),
        (0, "interrupt", "interrupted\n32\nend"),
        (2, "interrupt", "interrupted\n32\nend"),
    ],
)
def test_the_interpreter_ends_whatever_happens(num_workers, event, words):
    """At exit, after an exception and after Ctrl-C the process ends, and iterates before that."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(num_workers), event],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert words in done.stdout + done.stderr
    assert done.returncode == (1 if event == "raise" else 0)
