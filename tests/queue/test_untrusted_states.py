"""States that somebody else wrote: refused by name, and bounded before they are unpacked."""

import base64
import copy
import zlib
from array import array

import pytest
import torch
import torchio as tio
from rank_dealing import make_dataset, make_queue
from test_queue import BrokenDataset
from torch.utils.data import WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from tio_openneuro.errors import RamBudgetError


def pack(values: list[int]) -> str:
    """Return an order as a state holds it."""
    return base64.b64encode(zlib.compress(array("q", values).tobytes())).decode()


WRONG: dict[str, tuple[dict[str, object], str]] = {
    "step": ({"step": -5}, "step"),
    "late step": ({"step": 10_000}, "step"),
    "epoch": ({"epoch": -1}, "epoch"),
    "text": ({"epoch": "1"}, "epoch"),
    "fraction": ({"step": 0.5}, "step"),
    "seed": ({"seed": None}, "seed"),
    "index": ({"next_index": -1}, "next_index"),
    "holes": ({"holes": [-1]}, "holes"),
    "far holes": ({"holes": [10**9]}, "holes"),
    "replacements": ({"replacements": [[0, 99, 2]]}, "replacements"),
    "no replacements": ({"replacements": [[0]]}, "replacements"),
    "many replaced": ({"replacements": [[0, 1, 10**12]]}, "replacements"),
    "skipped": ({"skipped": ["sub-1"]}, "skipped"),
    "skipped outside": ({"skipped": [["sub-9", "gone", 9, 0]]}, "skipped"),
    "long text": ({"skipped": [["sub-1", "x" * 10**5, 1, 0]]}, "skipped"),
    "many skipped": ({"skipped": [["sub-1", "gone", 1, 0]] * 501}, "skipped"),
    "index ahead": ({"next_index": 4}, "next_index"),
    "truth": ({"step": True, "next_index": 0}, "step"),
    "endless epoch": ({"epoch": 10**12}, "epoch"),
    "endless seed": ({"seed": 10**100}, "seed"),
    "unheld replacements": ({"replacements": [[0, 1, 2]]}, "replacements"),
    "late replacements": ({"holes": [0], "replacements": [[4, 1, 2]]}, "replacements"),
    "no ranks": ({"ranks": None}, "ranks"),
    "another rank": ({"ranks": [1, 2]}, "rank 1 of 2"),
    "holes of nothing": ({"step": 0, "next_index": 0, "order": None, "holes": [0]}, "holes"),
    "no order": ({"order": None}, "order"),
    "parts": ({"parts": None}, "parts"),
    "window": ({"window": -1}, "window"),
    "no base64": ({"order": "§§"}, "order"),
    "no zlib": ({"order": base64.b64encode(b"nothing").decode()}, "order"),
    "halves": ({"order": base64.b64encode(zlib.compress(b"1234567")).decode()}, "order"),
    "outside": ({"order": pack([0, 1, 2, 3, 4, 5, 99])}, "order|index"),
    "long": ({"order": pack([0] * 8)}, "order"),
    "bomb": ({"order": base64.b64encode(zlib.compress(bytes(1 << 27), 9)).decode()}, "order"),
}


def make(**options: object) -> tio.Queue:
    """Return a queue whose order cannot be drawn again, so that its state keeps it."""

    class Unforeseen(WeightedRandomSampler):
        """A sampler of a class that nobody knows."""

    sampler = Unforeseen(torch.ones(7), 7)
    return make_queue(make_dataset(), subject_sampler=sampler, shuffle_subjects=False, **options)


def state() -> dict[str, object]:
    """Return a state in mid-epoch."""
    with make() as queue:
        for index in range(3):
            queue[index]
        return queue.state_dict()


@pytest.mark.parametrize("case", WRONG)
def test_a_state_with_values_out_of_range_is_refused_by_their_name(case: str) -> None:
    """And the queue goes on as if nothing had been loaded."""
    changes, name = WRONG[case]
    with make() as queue:
        queue[0]
        before = queue.state_dict()
        with pytest.raises(ValueError, match=name):
            queue.load_state_dict(copy.deepcopy(state()) | changes)
        assert queue.state_dict() == before
        assert [queue[index] for index in range(1, len(queue))]
        assert len(list(queue)) == len(queue)


def test_an_order_for_a_sampler_that_draws_again_is_refused() -> None:
    """Only what cannot be drawn again is kept; nothing else takes the place of the sampler."""
    with make_queue(make_dataset()) as queue:
        saved = queue.state_dict() | {"order": pack([0] * 7)}
        with pytest.raises(ValueError, match="order"):
            queue.load_state_dict(saved)


def test_a_state_of_an_epoch_that_others_shared_is_refused_within_it() -> None:
    """Between epochs the number of ranks may change; within one each has another share."""
    with make_queue(make_dataset(), ranks=(0, 2)) as queue:
        queue[0]
        within = queue.state_dict()
        for index in range(1, len(queue)):
            queue[index]
        at_end = queue.state_dict()
    for ranks in ((0, 3), None):
        with make_queue(make_dataset(), ranks=ranks) as queue:
            with pytest.raises(ValueError, match="rank 0 of 2"):
                queue.load_state_dict(within)
            queue.load_state_dict(at_end)
            assert queue.statistics().epoch == 1


@pytest.mark.parametrize("whole", [None, [], {}, "state", {"version": 1}])
def test_what_is_no_state_is_refused(whole: object) -> None:
    """By the word, or by what it lacks."""
    with make() as queue, pytest.raises((TypeError, ValueError), match="state"):
        queue.load_state_dict(whole)


def test_a_window_that_the_ram_budget_cannot_hold_is_refused() -> None:
    """It says so, in bytes, before anything is made."""
    with make_queue(make_dataset()) as queue:
        saved = queue.state_dict()
    saved["window"] = 10**9
    saved["parts"] = {**saved["parts"], "max_length": str(10**9)}
    with (
        make_queue(make_dataset(), max_length=None) as queue,
        pytest.raises((RamBudgetError, ValueError), match="bytes"),
    ):
        queue.load_state_dict(saved)


def test_a_state_with_skips_is_valid_on_its_rank_alone() -> None:
    """It names its rank and world size; one without is valid on every rank."""

    def make_rank(rank: int, world: int = 2) -> tio.Queue:
        sampler = DistributedSampler(make_dataset(6), num_replicas=world, rank=rank, seed=1)
        return make_queue(
            BrokenDataset([0, 1, 2]),
            subject_sampler=sampler,
            shuffle_subjects=False,
            on_error="skip",
        )

    saved = None
    for rank in range(2):
        with make_rank(rank) as queue:
            for _ in zip(range(4), queue, strict=False):
                pass
            if queue.skipped:
                saved, own = queue.state_dict(), rank
    assert saved is not None
    with make_rank(own) as queue:
        queue.load_state_dict(saved)
    for rank, world in ((1 - own, 2), (own, 3)):
        with make_rank(rank, world) as queue, pytest.raises(ValueError, match=r"rank"):
            queue.load_state_dict(saved)
