"""What a plan foretells."""

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tio_openneuro.cli.plan import plan_disk
from tio_openneuro.errors import DiskBudgetError
from tio_openneuro.queue.draw import permute


def fewest_fetches(order: tuple[int, ...], room: int) -> int:
    """Return the fewest fetches that any choice of victims needs, by trying them all."""
    states = {(): 0}
    for unit in order:
        after: dict[tuple[int, ...], int] = {}
        for held, cost in states.items():
            options = [held] if unit in held else [tuple(sorted({*held, unit}))]
            if len(options[0]) > room:
                options = [tuple(n for n in options[0] if n != v) for v in held]
            for option in options:
                now = cost + (unit not in held)
                after[option] = min(after.get(option, now), now)
        states = after
    return min(states.values())


@settings(max_examples=30, deadline=None)
@given(units=st.integers(2, 6), room=st.integers(1, 6), seed=st.integers(0, 99))
def test_no_choice_of_victims_fetches_less(units: int, room: int, seed: int) -> None:
    """Of units of one size, the plan fetches as few as the best of all choices."""
    plan = plan_disk({f"u{n}": {f"k{n}": 10} for n in range(units)}, 10 * room, seed=seed)
    order = tuple(n for epoch in range(4) for n in permute(units, seed, "subjects", epoch))
    whole = plan.first_epoch_bytes + 3 * plan.later_epoch_bytes
    assert abs(whole / 10 - fewest_fetches(order, room)) <= 0.15
    assert plan.peak_bytes <= plan.budget_bytes
    assert (plan.later_epoch_bytes == 0) == (room >= units)


def test_shared_content_is_fetched_and_held_once() -> None:
    """Two units of one key cost it once, and larger units leave less room."""
    plan = plan_disk({"a": {"k": 60}, "b": {"k": 60, "l": 30}}, 90)
    assert (plan.epoch_bytes, plan.first_epoch_bytes, plan.later_epoch_bytes) == (90, 90, 0)
    assert (plan.largest_bytes, plan.peak_bytes) == (90, 90)
    for sizes in permutations((40, 30, 20)):
        named = {f"u{n}": {f"k{n}": size} for n, size in enumerate(sizes)}
        plan = plan_disk(named, 60)
        assert 90 == plan.first_epoch_bytes > plan.later_epoch_bytes >= 30
    assert plan.seconds(10, 3) == (plan.first_epoch_bytes + 2 * plan.later_epoch_bytes) / 10


def test_a_unit_above_the_budget_is_named() -> None:
    """The message says which, and the bytes."""
    with pytest.raises(DiskBudgetError, match=r"hold b: its 2 files need 90 bytes"):
        plan_disk({"a": {"k": 60}, "b": {"k": 60, "l": 30}}, 89)
