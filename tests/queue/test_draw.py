"""The draw, the window and the schedule, as pure arithmetic."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tio_openneuro.queue.draw import (
    EpochPlan,
    Pass,
    PassStart,
    choose_window,
    draw_below,
    permute,
)
from tio_openneuro.queue.schedule import Schedule


def _plan(counts, epoch=1):
    return EpochPlan(epoch, tuple(range(len(counts))), tuple(counts))


def _pass(plan, window, *, seed=0, step=0, shuffled=True):
    start = PassStart(plan.epoch, step)
    return Pass(plan, start, seed=seed, window=window, shuffled=shuffled)


def _take(current):
    """Take the next patch, and return its production index."""
    turn, number = current.next()
    current.take()
    return current.plan.start(turn.position) + number


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    window=st.integers(1, 60),
    epoch=st.integers(0, 2),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_every_patch_is_taken_once_and_from_within_the_window(counts, window, epoch, seed):
    """Each epoch takes every patch once, never one beyond the window at that step."""
    plan = _plan(counts, epoch)
    current = _pass(plan, window, seed=seed)
    taken = []
    while not current.finished:
        end = min(current.step + window, plan.total)
        taken.append(_take(current))
        assert taken[-1] < end
    assert sorted(taken) == list(range(sum(counts)))


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    window=st.integers(1, 40),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_a_draw_can_be_reached_again_from_a_count(counts, window, data):
    """A pass that begins within its epoch goes on as the one that took each patch."""
    plan = _plan(counts)
    step = data.draw(st.integers(0, plan.total))
    first = _pass(plan, window, seed=7)
    before = {_take(first) for _ in range(step)}
    second = _pass(plan, window, seed=7, step=step)
    assert set(second.left()) == set(range(plan.total)) - before
    while not first.finished:
        assert _take(second) == _take(first)
    assert second.finished


def test_the_first_epoch_begins_with_the_first_two_subjects():
    """In epoch 0 training starts when two subjects are made, whatever the window is."""
    plan = EpochPlan(0, tuple(range(50)), (8,) * 50)
    current = _pass(plan, 300)
    assert current.window_end() == 16
    ends = []
    while not current.finished:
        ends.append(current.window_end() - current.step)
        current.take()
    assert [end + step for step, end in enumerate(ends[:4])] == [16] * 4
    assert ends[100] == 10 + 75
    later = _pass(EpochPlan(1, plan.order, plan.counts), 300)
    assert later.window_end() == 300


def test_unshuffled_patches_come_in_order():
    """Without shuffling the window plays no part."""
    current = _pass(_plan([2, 3]), 2, shuffled=False)
    assert current.candidates() == [0, 1]
    assert [_take(current) for _ in range(5)] == [0, 1, 2, 3, 4]


def test_each_patch_of_the_window_is_as_likely_as_another_and_no_two_seeds_agree():
    """Over two thousand seeds the newest candidate is taken as often as one of ten would be."""
    plan = _plan([4, 6, 10])
    whole = [_pass(plan, 10, seed=seed) for seed in range(2000)]
    orders = [tuple(_take(current) for _ in range(plan.total)) for current in whole]
    assert len(set(orders)) == 2000
    for step in (0, 7):
        taken = Counter(order[step] for order in orders)
        assert set(taken) == set(range(10 + step))
        assert 150 < taken[9 + step] < 250, "the newest of ten candidates"
    again, later = (_pass(_plan([4, 6, 10], epoch), 10, seed=3) for epoch in (1, 2))
    assert tuple(_take(again) for _ in range(plan.total)) == orders[3]
    assert tuple(_take(later) for _ in range(plan.total)) != orders[3]


def test_draws_are_uniform():
    """A hundred thousand draws of ten hit each outcome about ten thousand times."""
    counts = Counter(draw_below(10, 3, "patch", step) for step in range(100_000))
    assert set(counts) == set(range(10))
    assert max(counts.values()) < 10_500
    assert min(counts.values()) > 9_500


def test_permutations_differ_between_epochs_and_repeat_for_a_seed():
    """A permutation depends on every part of its seed, and on nothing else."""
    first = permute(100, 5, "subjects", 0)
    assert sorted(first) == list(range(100))
    assert permute(100, 5, "subjects", 0) == first
    assert permute(100, 5, "subjects", 1) != first
    assert permute(100, 6, "subjects", 0) != first


@pytest.mark.parametrize(
    ("budget_bytes", "patch_bytes", "window"),
    [(4_000, 1, 512), (4_000_000, 1_000, 512), (10**12, 1, 1024), (100, 1_000, 1)],
)
def test_the_chosen_window_takes_a_quarter_of_the_budget_at_most(budget_bytes, patch_bytes, window):
    """A window is a power of two that a quarter of the budget holds, one patch at least."""
    assert choose_window(budget_bytes, patch_bytes) == window


def test_a_skipped_subject_is_passed_over_and_no_other_patch_is_lost():
    """With one subject skipped, all patches of the others are delivered, in the same order."""
    plan = _plan([3, 3, 3])
    whole = _pass(plan, 5, seed=2)
    order = [_take(whole) for _ in range(plan.total)]
    current = _pass(plan, 5, seed=2)
    delivered = []
    while not current.finished:
        if current.next()[0].position == 1:
            current.skip(1)
        else:
            delivered.append(_take(current))
    assert delivered == [index for index in order if plan.locate(index)[0] != 1]
    assert current.here().holes == {1}


def _drain(schedule):
    turns = []
    while (turn := schedule.next()) is not None:
        schedule.claim(turn)
        turns.append((turn.epoch, turn.position))
    return turns


def test_a_schedule_reaches_a_window_and_one_subject_per_thread_ahead():
    """Subjects are claimed in order, across the epoch's end, as far as counts allow."""
    schedule = Schedule(window=4, subjects_ahead=2)
    second = _plan([2, 2, 2], epoch=1)
    first = _pass(_plan([2, 2, 2], epoch=0), 4)
    schedule.begin(first, second)
    assert _drain(schedule) == [(0, 0), (0, 1), (0, 2), (1, 0)]
    for _ in range(3):
        first.take()
    assert _drain(schedule) == [(1, 1), (1, 2)]
    assert schedule.begin(_pass(second, 4), _plan([2, 2, 2], epoch=2))
    assert _drain(schedule) == [(2, 0)]


def test_a_turn_that_was_given_back_is_the_next_again():
    """What was claimed and not made is claimed again before what comes later, once."""
    schedule = Schedule(window=10, subjects_ahead=1)
    plan = _plan([2, 2, 2])
    schedule.begin(_pass(plan, 10), None)
    assert _drain(schedule) == [(1, 0), (1, 1), (1, 2)]
    schedule.give_back(plan.turn(1))
    assert _drain(schedule) == [(1, 1)]


def test_a_resumed_epoch_makes_only_subjects_that_are_still_wanted():
    """Subjects whose patches were all delivered before are not made again, nor fetched."""
    schedule = Schedule(window=10, subjects_ahead=1)
    plan = _plan([2, 2, 2])
    current = _pass(plan, 10, step=3, shuffled=False)
    schedule.begin(current, None)
    assert set(schedule.wanted(plan.turn(1))) == {1}
    assert set(schedule.wanted(plan.turn(2))) == {0, 1}
    assert schedule.ahead() == [1, 2]
    assert _drain(schedule) == [(1, 1), (1, 2)]
    assert schedule.begin(current, None), "what was made of it before it was asked for is dropped"
    assert _drain(schedule) == []


def test_an_epoch_that_is_begun_again_is_made_again():
    """Patches taken in an abandoned pass, or behind an error, are made anew when it restarts."""
    schedule = Schedule(window=10, subjects_ahead=1)
    plan = _plan([2, 2])
    current = _pass(plan, 10)
    schedule.begin(current, None)
    _drain(schedule)
    current.take()
    current = _pass(plan, 10)
    assert not schedule.begin(current, None)
    assert _drain(schedule) == [(1, 0), (1, 1)]
    current.failed = True
    assert not schedule.begin(_pass(plan, 10), None)
    assert _drain(schedule) == [(1, 0), (1, 1)]
