"""The same patches for any number of threads, timing and restarts."""

import hashlib
import json
import random
import threading
import time
from collections import Counter
from itertools import islice

import pytest
import torch
import torchio as tio
from torch.utils.data import RandomSampler, SequentialSampler, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from tio_openneuro.queue.queue import BudgetedQueue

_SIZE = 32
_SUBJECTS = 7
_SAMPLES = 5


class SlowDataset(tio.SubjectsDataset):
    """A dataset whose subjects take times of their own, as over a throttled link."""

    delays = random.Random(0)

    def __getitem__(self, index):
        """Load a subject after a moment."""
        threading.Event().wait(self.delays.random() * 0.02)
        return super().__getitem__(index)


def _subject(number):
    generator = torch.Generator().manual_seed(number)
    label = torch.zeros(1, _SIZE, _SIZE, _SIZE, dtype=torch.uint8)
    label[:, 8:20, 8:20, 8:20] = 1
    return tio.Subject(
        t1=tio.ScalarImage(tensor=torch.rand(1, _SIZE, _SIZE, _SIZE, generator=generator)),
        label=tio.LabelMap(tensor=label),
        name=f"sub-{number:02d}",
    )


def make_dataset(transform=None, kind=tio.SubjectsDataset, count=_SUBJECTS):
    """Return subjects in RAM, augmented as in training."""
    if transform is None:
        transform = tio.Compose(
            [tio.RandomAffine(), tio.RandomNoise(), tio.RandomFlip(), tio.ZNormalization()]
        )
    return kind([_subject(n) for n in range(count)], transform=transform)


SAMPLERS = {
    "uniform": lambda: tio.UniformSampler(12),
    "label": lambda: tio.LabelSampler(12, "label"),
    "weighted": lambda: tio.WeightedSampler(12, "label"),
}


@pytest.fixture
def make_queue():
    """Return a function that makes queues, which are closed when the test ends."""
    queues = []

    def make(sampler="uniform", dataset=None, max_length=11, **options):
        queue = BudgetedQueue(
            make_dataset() if dataset is None else dataset,
            max_length,
            _SAMPLES,
            SAMPLERS[sampler]() if isinstance(sampler, str) else sampler,
            **{"num_workers": 2, "seed": 3, **options},
        )
        queues.append(queue)
        return queue

    yield make
    for queue in queues:
        queue.close()


def digest(patch):
    """Return a digest of everything that a patch consists of."""
    name = patch["name"] if "name" in patch else patch["subject_id"]
    parts = hashlib.sha256(name.encode())
    parts.update(str(patch[tio.LOCATION].tolist()).encode())
    for image in patch.get_images(intensity_only=False):
        parts.update(image.data.numpy().tobytes())
    return parts.hexdigest()[:12]


def take(queue, count):
    """Return the digests of the first patches of a pass."""
    return [digest(queue[index]) for index in range(count)]


def epochs(queue, count=3):
    """Return the digests of whole epochs, one after another."""
    return [digest(patch) for _ in range(count) for patch in queue]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_sequence_is_the_same_for_any_number_of_workers(make_queue, sampler):
    """Three epochs, bit for bit: in the consumer's thread, on 1, 2 and 4 threads, and slowed."""
    expected = epochs(make_queue(sampler, num_workers=0))
    assert len(expected) == 3 * _SUBJECTS * _SAMPLES
    assert len(set(expected)) > 100
    for num_workers in (1, 2, 4):
        assert epochs(make_queue(sampler, num_workers=num_workers)) == expected
    slow = make_dataset(kind=SlowDataset)
    assert epochs(make_queue(sampler, slow, num_workers=3)) == expected
    assert epochs(make_queue(sampler, ram_budget="75 MB", num_workers=4)) == expected


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("stops", [(9,), (9, 35, 50), (35, 35, 70), (1, 2, 104)])
def test_interruptions_change_nothing(make_queue, sampler, stops):
    """Up to three restarts, with other numbers of workers, at an epoch's end and repeated."""
    length = _SUBJECTS * _SAMPLES
    expected = epochs(make_queue(sampler, num_workers=0))
    found, state = [], None
    for number, stop in enumerate((*stops, 3 * length)):
        queue = make_queue(sampler, num_workers=number)
        if state is not None:
            queue.load_state_dict(state)
            assert (len(queue), queue.left) == (length, length - len(found) % length)
        while len(found) < stop:
            left = min(stop, (len(found) // length + 1) * length) - len(found)
            found += take(queue, left)
            assert (len(queue), queue.left) == (length, -len(found) % length)
        state = json.loads(json.dumps(queue.state_dict()))
        assert len(json.dumps(state)) < 1_000_000
        queue.close()
    assert found == expected


def test_a_state_taken_before_anything_and_loaded_twice_is_the_beginning(make_queue):
    """Loading twice, or saving right after loading, changes nothing."""
    queue = make_queue()
    expected = epochs(make_queue(), 1)
    state = queue.state_dict()
    queue.load_state_dict(state)
    queue.load_state_dict(queue.state_dict())
    assert queue.state_dict() == state
    assert epochs(queue, 1) == expected


def test_after_a_resume_the_first_pass_is_short_and_later_ones_whole(make_queue):
    """len() is that of a whole epoch throughout; left is what remains of the present one."""
    queue = make_queue()
    assert queue.left == 35
    take(queue, 10)
    other = make_queue()
    other.load_state_dict(queue.state_dict())
    assert (len(other), other.iterations_per_epoch, other.left) == (35, 35, 25)
    for number, _ in enumerate(other):
        assert (len(other), other.left) == (35, 24 - number)
    assert len(list(other)) == 35
    assert other.left == 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_after_a_resume_the_first_index_is_0_or_the_next_one(make_queue, num_workers):
    """A loader may count on or anew, in that pass alone; any other index is refused."""
    queue = make_queue()
    expected = epochs(make_queue(), 2)
    take(queue, 10)
    state = queue.state_dict()
    for first in (0, 10):
        other = make_queue(num_workers=num_workers)
        other.load_state_dict(state)
        for wrong in (1, 9, 11, 34, 35):
            with pytest.raises(RuntimeError, match="comes next"):
                other[wrong]
        found = [digest(other[index]) for index in range(first, first + 5)]
        # A state of a resumed pass goes on as its loader counted.
        third = make_queue(num_workers=num_workers)
        third.load_state_dict(other.state_dict())
        found += [digest(third[index]) for index in range(first + 5, first + 25)]
        with pytest.raises(StopIteration):
            third[first + 25]
        with pytest.raises(RuntimeError, match="patch 0 comes next"):
            make_queue(num_workers=num_workers)[10]
        assert found == expected[10:35]
        assert epochs(third, 1) == expected[35:]


def test_the_length_is_that_of_the_epoch_that_index_0_would_begin(make_queue):
    """Where epochs differ, a loader reads that of the one that it begins, also in mid-pass."""
    subjects = [_subject(number) for number in range(4)]
    for number, subject in enumerate(subjects):
        subject["num_samples"] = 2 + 3 * number

    def make():
        sampler = WeightedRandomSampler([1.0] * 4, 3)
        return make_queue(
            dataset=tio.SubjectsDataset(subjects), subject_sampler=sampler, shuffle_subjects=False
        )

    queue = make()
    lengths = [len(list(queue)) for _ in range(4)]
    assert len(set(lengths)) > 2
    queue = make()
    for epoch in range(3):
        assert (len(queue), queue._next.epoch) == (lengths[epoch], epoch)
        queue[0]
        assert (len(queue), queue.left) == (lengths[epoch + 1], lengths[epoch] - 1)
    other = make()
    other.load_state_dict(queue.state_dict())
    assert (len(other), other.left) == (lengths[2], lengths[2] - 1)
    assert len(list(other)) == lengths[2] - 1
    assert len(list(other)) == lengths[3]


def test_what_was_made_after_a_load_is_not_made_twice(make_queue):
    """The subjects that a resumed epoch lacks are made once, ahead of the first index."""

    class Counting(tio.SubjectsDataset):
        def __init__(self, subjects):
            super().__init__(subjects)
            self.loads = []

        def __getitem__(self, index):
            self.loads.append(index)
            return super().__getitem__(index)

    dataset = Counting([_subject(number) for number in range(_SUBJECTS)])
    options = {"max_length": 100, "shuffle_patches": False, "dataset": dataset}
    sampler = SequentialSampler(range(_SUBJECTS))
    queue = make_queue(**options, subject_sampler=sampler, shuffle_subjects=False)
    take(queue, 12)
    state = queue.state_dict()
    queue.close()
    other = make_queue(
        **options, subject_sampler=sampler, shuffle_subjects=False, start_background=False
    )
    dataset.loads.clear()
    other._start_background = True
    other.load_state_dict(state)
    deadline_s = time.monotonic() + 60
    while len(dataset.loads) < 5 and time.monotonic() < deadline_s:
        threading.Event().wait(0.01)
    assert len(list(other)) == 23
    assert sorted(dataset.loads[:5]) == [2, 3, 4, 5, 6]
    assert Counter(dataset.loads)[2] <= 2  # the second time for the epoch that follows


def test_a_resumed_loop_that_drops_short_batches_takes_what_is_left(make_queue):
    """With drop_last, left // batch_size whole batches come, and the next epoch is whole."""
    queue = make_queue()
    take(queue, 12)
    queue.load_state_dict(queue.state_dict())
    loader = tio.SubjectsLoader(queue, batch_size=4, drop_last=True)
    sizes = [len(batch["name"]) for batch in islice(loader, queue.left // 4)]
    assert sizes == [4] * 5
    assert [len(batch["name"]) for batch in loader] == [4] * 8


def test_a_loader_that_leaves_a_resumed_pass_gets_the_next_epoch_whole(make_queue):
    """The length of what was left is not taken for that of the epoch that follows."""
    queue = make_queue()
    take(queue, 30)
    queue.load_state_dict(queue.state_dict())
    loader = tio.SubjectsLoader(queue, batch_size=2)
    next(iter(loader))
    assert (len(queue), queue.left) == (35, 3)
    assert sum(len(batch["name"]) for batch in loader) == 35


def test_an_early_break_is_resumed_where_it_broke(make_queue):
    """A state taken after a break goes on with that epoch; without it the next one begins."""
    queue = make_queue()
    expected = epochs(make_queue(), 2)
    take(queue, 12)
    state = queue.state_dict()
    queue.load_state_dict(state)
    queue.set_epoch(0)
    assert epochs(queue, 2) == expected[12:]


def test_batches_of_a_loader_resume_exactly(make_queue):
    """A loader that is made anew gives the batches that were left."""
    queue = make_queue()
    names = [batch["name"] for _ in range(2) for batch in tio.SubjectsLoader(queue, batch_size=7)]
    queue = make_queue()
    loader = iter(tio.SubjectsLoader(queue, batch_size=7))
    found = [next(loader)["name"] for _ in range(3)]
    other = make_queue(num_workers=0)
    other.load_state_dict(queue.state_dict())
    loader = tio.SubjectsLoader(other, batch_size=7)
    found += [batch["name"] for _ in range(2) for batch in loader]
    assert found == names


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata 0.11
@pytest.mark.parametrize("batches", [2, 5, 6])
def test_a_stateful_loader_resumes_exactly(make_queue, batches):
    """Torchdata keeps the queue's state in its own, and goes on at the next batch."""

    def make():
        return StatefulDataLoader(make_queue(), batch_size=7, num_workers=0, collate_fn=list)

    loader = make()
    expected = [digest(p) for _ in range(3) for batch in loader for p in batch]
    assert len(expected) == 3 * _SUBJECTS * _SAMPLES
    loader = make()
    found = [digest(p) for batch in loader for p in batch]
    iterator = iter(loader)
    found += [digest(p) for _ in range(batches - 1) for p in next(iterator)]
    state = loader.state_dict()
    other = make()
    other.load_state_dict(state)
    while len(found) < len(expected):
        found += [digest(p) for batch in other for p in batch]
    assert found == expected


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata 0.11
def test_a_stateful_loader_with_workers_is_told_so(make_queue):
    """Patches are popped in the process of the queue; no subject vanishes silently."""
    loader = StatefulDataLoader(
        make_queue(num_workers=0), batch_size=7, num_workers=1, collate_fn=list
    )
    with pytest.raises(RuntimeError, match="number of workers"):
        list(loader)


def test_ten_thousand_subjects_have_a_small_state(make_queue):
    """Also with weighted sampling, and in mid-epoch; the state stays below 1 MB."""
    subject = _subject(0)
    dataset = tio.SubjectsDataset([subject] * 10_000)
    weights = torch.ones(10_000)
    for sampler in (None, WeightedRandomSampler(weights, 10_000), list(range(10_000))):
        options = {"subject_sampler": sampler, "shuffle_subjects": sampler is None}
        queue = make_queue(dataset=dataset, max_length=64, **options)
        found = take(queue, 20)
        state = queue.state_dict()
        assert len(json.dumps(state)) < 1_000_000
        queue.close()
        other = make_queue(dataset=dataset, max_length=64, start_background=False, **options)
        other.load_state_dict(state)
        assert (len(other), other.left) == (50_000, 50_000 - len(found))
        assert digest(other[0])


@pytest.mark.parametrize("kind", ["weighted", "own generator", "unknown"])
def test_subject_samplers_go_on_where_they_were(make_queue, kind):
    """Draws with replacement, a user's generator and an unknown class are resumed exactly."""

    class Unknown:
        def __init__(self, first):
            self.epoch = first

        def __len__(self):
            return 5

        def __iter__(self):
            self.epoch += 1
            return iter([(self.epoch * 3 + n) % _SUBJECTS for n in range(5)])

    def make(first=0):
        if kind == "weighted":
            return WeightedRandomSampler([3, 1, 1, 1, 1, 1, 1], 5, replacement=True)
        if kind == "unknown":
            return Unknown(first)
        generator = torch.Generator().manual_seed(9)
        return RandomSampler(range(_SUBJECTS), num_samples=5, generator=generator)

    options = {"shuffle_subjects": False}
    expected = epochs(make_queue(subject_sampler=make(), **options))
    queue = make_queue(subject_sampler=make(), **options)
    found = take(queue, 25) + take(queue, 7)
    other = make_queue(subject_sampler=make(first=2), start_background=False, **options)
    other.load_state_dict(queue.state_dict())
    found += epochs(other, 2)
    assert found == expected


def test_skips_are_part_of_the_state(make_queue):
    """A subject that was skipped stays skipped in the rest of its epoch, though it works now."""

    class Flaky(tio.SubjectsDataset):
        broken = True

        def __getitem__(self, index):
            if self.broken and index == 2:
                message = "unreachable"
                raise OSError(message)
            return super().__getitem__(index)

    dataset = make_dataset(kind=Flaky)
    queue = make_queue(dataset=dataset, on_error="skip", max_length=35)
    expected = epochs(queue, 1)
    assert len(expected) == 30
    queue.set_epoch(0)
    found = []
    while not (queue._pass is not None and queue._pass.here().holes and len(found) > 3):
        found.append(digest(queue[len(found)]))
    state = queue.state_dict()
    dataset.broken = False
    other = make_queue(dataset=dataset, on_error="skip", max_length=35, num_workers=0)
    other.load_state_dict(state)
    assert [s.unit for s in other.skipped][-1] == "sub-02"
    assert (len(other), other.left) == (35, 30 - len(found))
    found += epochs(other, 1)
    assert found == expected
    assert len(epochs(other, 1)) == 35


def test_a_batch_that_was_lost_to_an_error_is_part_of_what_is_left(make_queue):
    """A state taken after an exception in mid-batch begins with that batch."""
    subjects = [_subject(n) for n in range(3)]
    expected = [digest(p) for p in make_queue(dataset=tio.SubjectsDataset(subjects))]

    class Broken(tio.SubjectsDataset):
        def __getitem__(self, index):
            if index == 1:
                message = "unreadable"
                raise OSError(message)
            return super().__getitem__(index)

    queue = make_queue(dataset=Broken(subjects), shuffle_subjects=True)
    loader = tio.SubjectsLoader(queue, batch_size=4)
    delivered = []

    def train():
        for batch in loader:
            delivered.extend(batch["name"])

    with pytest.raises(OSError, match="sub-01: unreadable"):
        train()
    state = queue.state_dict()
    assert state["step"] == len(delivered)
    state["parts"]["dataset"] = "SubjectsDataset"
    other = make_queue(dataset=tio.SubjectsDataset(subjects))
    other.load_state_dict(state)
    assert epochs(other, 1) == expected[len(delivered) :]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dataset": make_dataset(tio.RandomNoise())}, "another transform"),
        ({"dataset": make_dataset(count=6)}, "another selection"),
        ({"sampler": "label"}, "another patch sampler"),
        ({"max_length": 12}, "another max_length"),
        ({"shuffle_patches": False}, "another shuffle"),
        ({"patch_transform": tio.RandomFlip()}, "another transform"),
    ],
)
def test_a_state_of_something_else_is_refused_and_named(make_queue, change, words):
    """What differs is in the message, and the queue stays usable."""
    state = make_queue().state_dict()
    queue = make_queue(**change)
    with pytest.raises(ValueError, match=words):
        queue.load_state_dict(state)
    assert len(list(queue)) == len(queue)


def test_other_versions_are_refused(make_queue):
    """Another TorchIO, or another library's state, is named."""
    queue = make_queue()
    state = queue.state_dict()
    parts = {**state["parts"], "TorchIO version": "1.1.0"}
    with pytest.raises(ValueError, match=r"TorchIO version: 1\.1\.0 then"):
        queue.load_state_dict({**state, "parts": parts})
    for version in (1, 99):
        with pytest.raises(ValueError, match=f"version is {version}, this library reads 2"):
            queue.load_state_dict({**state, "version": version})
    assert len(list(queue)) == 35


def test_a_drawn_seed_and_a_chosen_window_are_kept_in_the_state(make_queue):
    """Without seed and max_length, another machine with another budget goes on exactly."""
    sampler = tio.UniformSampler(24)
    queue = make_queue(sampler, seed=None, max_length=None, ram_budget="1 GB")
    found = take(queue, 8)
    state = queue.state_dict()
    other = make_queue(sampler, seed=None, max_length=None, ram_budget="90 MB")
    assert other.max_length != queue.max_length
    other.load_state_dict(state)
    assert other.max_length == queue.max_length
    rest = take(queue, 0) or [digest(queue[index]) for index in range(8, 35)]
    assert epochs(other, 1) == rest
    assert len(found + rest) == 35
