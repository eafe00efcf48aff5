"""Several ranks: equal numbers of patches, also where subjects are skipped.

First the queues of two ranks in one process, then two real ranks under torchrun with gloo, on one
root with one disk budget, which an observer outside watches.
"""

import json
from collections import Counter

import pytest
import torchio as tio
from conftest import heads
from faulty import Fault, FaultKind
from test_campaigns import Clone
from test_queue import BrokenDataset, make_dataset, make_queue
from test_state import digest
from torch.utils.data.distributed import DistributedSampler
from torchrun import run_ranks

from tio_openneuro.demo.watch import DiskWatch
from tio_openneuro.errors import FetchError

__all__ = ["make_queue"]
ACCESSION = "ds900091"
SUBJECTS = 8


def make_ranks(make_queue, broken, **options):
    """Return the queues of two ranks over six subjects, some of which are broken."""
    return [
        make_queue(
            BrokenDataset(broken),
            subject_sampler=DistributedSampler(make_dataset(), num_replicas=2, rank=rank, seed=1),
            **{"shuffle_subjects": False, "on_error": "skip", "seed": 0, **options},
        )
        for rank in range(2)
    ]


def names_of(patches):
    """Return how many patches there are of each subject."""
    return Counter(patch["name"] for patch in patches)


@pytest.mark.parametrize("max_length", [1, 10, 100])
@pytest.mark.parametrize("broken", [[], [1], [1, 4], [0, 2, 5]])
def test_a_skipped_share_is_taken_by_the_ranks_next_subjects(make_queue, max_length, broken):
    """Each rank has its twelve patches in every epoch, all of them of subjects of its own."""
    for queue in make_ranks(make_queue, broken, max_length=max_length):
        for epoch in range(3):
            own = {f"sub-{index:02d}" for index in queue._planner.plan(epoch).order}
            bad = {f"sub-{index:02d}" for index in broken}
            if own <= bad:
                with pytest.raises(FetchError, match="no such key"):
                    list(queue)
                continue
            assert len(queue) == 12
            found = names_of(queue)
            assert sum(found.values()) == 12
            assert set(found) == own - bad
            assert all(count % 4 == 0 for count in found.values())
            statistics = queue.statistics()
            assert statistics.epoch_patches == statistics.epoch_total


def test_the_next_subject_in_the_epochs_order_takes_the_share_with_other_patches(make_queue):
    """It follows the skipped one, cyclically, and draws anew."""
    for queue in make_ranks(make_queue, [1], max_length=100):
        order = queue._planner.plan(0).order
        found = list(queue)
        if 1 not in order:
            continue
        taker = order[(order.index(1) + 1) % 3]
        patches = [p for p in found if p["name"] == f"sub-{taker:02d}"]
        assert len(patches) == 8
        assert len({str(p[tio.LOCATION].tolist()) for p in patches}) > 4


def test_shares_are_the_same_for_any_number_of_threads_and_after_a_restart(make_queue):
    """Skips and who took their shares are part of the state, in one and in several restarts."""
    for rank in range(2):
        expected = None
        for num_workers in (0, 2, 4):
            queue = make_ranks(make_queue, [1, 4], num_workers=num_workers)[rank]
            found = [digest(patch) for _ in range(2) for patch in queue]
            expected = expected or found
            assert found == expected
        for stops in ([3], [11], [5, 9], [1, 12]):
            found, state = [], None
            for stop in [*stops, 24]:
                queue = make_ranks(make_queue, [1, 4], num_workers=len(found) % 3)[rank]
                if state is not None:
                    queue.load_state_dict(json.loads(json.dumps(state)))
                while len(found) < stop:
                    left = min(stop, (len(found) // 12 + 1) * 12) - len(found)
                    found += [digest(queue[index]) for index in range(left)]
                    assert (len(queue), queue.left) == (12, -len(found) % 12)
                state = queue.state_dict()
            assert found == expected


def test_a_subject_that_fails_after_a_restart_owes_only_what_was_due_of_it(make_queue):
    """What it gave before the restart counts: the rank still has its twelve patches."""
    dataset = BrokenDataset([])
    sampler = DistributedSampler(make_dataset(), num_replicas=2, rank=0)
    options = {"subject_sampler": sampler, "shuffle_subjects": False, "on_error": "skip"}
    queue = make_queue(dataset, max_length=4, seed=0, **options)
    found = [queue[index]["name"] for index in range(6)]
    state = queue.state_dict()
    other = make_queue(dataset, max_length=4, **options)
    partly = next(n for n, count in Counter(found).items() if 0 < count < 4)
    dataset.broken = {int(partly.removeprefix("sub-"))}
    other.load_state_dict(state)
    assert (len(other), other.left) == (12, 6)
    found += [patch["name"] for patch in other]
    assert len(found) == 12
    assert Counter(found)[partly] < 4


def test_a_rank_of_which_everything_fails_raises(make_queue):
    """There is nobody to take its share: the last error is raised, with its subject."""
    for queue in make_ranks(make_queue, range(6)):
        with pytest.raises(FetchError, match=r"sub-0\d: no such key"):
            list(queue)
        assert len(queue.skipped) == 3


# Two real ranks


def train(root, results, *options, units=2):
    """Run two ranks to their end; return what each found, the observed peak and the budget."""
    budget_bytes = units * Clone(root, ACCESSION).largest_bytes
    arguments = (ACCESSION, str(root), str(budget_bytes), *options)
    with DiskWatch(root) as watch:
        found = run_ranks("rank_training.py", results, *arguments)
    peak_bytes = max(sample.held_bytes for sample in watch.samples())
    return found, peak_bytes, budget_bytes


@pytest.fixture(scope="session")
def _subjects(_published):
    _published.publish(ACCESSION, heads(SUBJECTS, shape=(48, 48, 48)))


@pytest.mark.slow
@pytest.mark.usefixtures("_subjects", "openneuro")
def test_two_ranks_share_one_root_and_one_budget(root, tmp_path):
    """Equal numbers at every step, disjoint subjects, all of them, within the disk budget."""
    found, peak_bytes, budget_bytes = train(root, tmp_path / "raise")
    for first, second in zip(*[rank["epochs"] for rank in found], strict=True):
        assert len(first) == len(second) == SUBJECTS
        assert set(first).isdisjoint(second)
        assert Counter(first + second) == {f"sub-{n:02}": 2 for n in range(1, SUBJECTS + 1)}
    assert budget_bytes // 2 < peak_bytes <= budget_bytes


@pytest.mark.usefixtures("_subjects")
def test_two_ranks_share_what_is_left_where_a_subject_is_skipped(openneuro, root, tmp_path):
    """As many at every step still, and all the others, within the disk budget."""
    openneuro.set_faults(Fault(FaultKind.NOT_FOUND, f"{ACCESSION}/sub-03/*"))
    options = ("--on-error", "skip")
    found, peak_bytes, budget_bytes = train(root, tmp_path / "skip", *options)
    for first, second in zip(*[rank["epochs"] for rank in found], strict=True):
        assert len(first) == len(second) == SUBJECTS
        assert set(first).isdisjoint(second)
        assert set(first + second) == {f"sub-{n:02}" for n in range(1, SUBJECTS + 1) if n != 3}
    assert {unit for rank in found for unit in rank["skipped"]} == {"sub-03"}
    assert budget_bytes // 2 < peak_bytes <= budget_bytes
