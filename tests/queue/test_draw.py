"""The draw, the window and the schedule, as pure arithmetic."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tio_openneuro.queue.draw import (
    Draw,
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
    draw = Draw(seed, plan, window, shuffled=True)
    taken = []
    while not draw.finished:
        end = min(draw.step + window, plan.total)
        taken.append(draw.take())
        assert taken[-1] < end
    assert sorted(taken) == list(range(sum(counts)))


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    window=st.integers(1, 40),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_a_draw_can_be_reached_again_from_a_count(counts, window, data):
    """A draw that is advanced to a step goes on as the one that took each patch."""
    plan = _plan(counts)
    step = data.draw(st.integers(0, plan.total))
    first = Draw(7, plan, window, shuffled=True)
    before = {first.take() for _ in range(step)}
    second = Draw(7, plan, window, shuffled=True)
    second.advance(step)
    assert set(second.left()) == set(range(plan.total)) - before
    while not first.finished:
        assert second.take() == first.take()


def test_the_first_epoch_begins_with_the_first_two_subjects():
    """In epoch 0 training starts when two subjects are made, whatever the window is."""
    plan = EpochPlan(0, tuple(range(50)), (8,) * 50)
    draw = Draw(0, plan, 300, shuffled=True)
    assert draw.window_end() == 16
    ends = []
    while not draw.finished:
        ends.append(draw.window_end() - draw.step)
        draw.take()
    assert [end + step for step, end in enumerate(ends[:4])] == [16] * 4
    assert ends[100] == 10 + 75
    later = Draw(0, EpochPlan(1, plan.order, plan.counts), 300, shuffled=True)
    assert later.window_end() == 300


def test_unshuffled_patches_come_in_order():
    """Without shuffling the window plays no part."""
    draw = Draw(0, _plan([2, 3]), 2, shuffled=False)
    assert [draw.take() for _ in range(5)] == [0, 1, 2, 3, 4]


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
    whole = Draw(2, plan, 5, shuffled=True)
    order = [whole.take() for _ in range(plan.total)]
    current = Pass(PassStart(1), Draw(2, plan, 5, shuffled=True))
    delivered = []
    while not current.finished:
        index = current.peek()
        if plan.locate(index)[0] == 1:
            current.skip(1)
            continue
        current.take()
        delivered.append(index)
    assert delivered == [index for index in order if plan.locate(index)[0] != 1]
    assert current.here().holes == {1}


def _drain(schedule):
    places = []
    while (place := schedule.next()) is not None:
        schedule.claim(place)
        places.append(place)
    return places


def test_a_schedule_reaches_a_window_and_one_subject_per_thread_ahead():
    """Subjects are claimed in order, across the epoch's end, as far as counts allow."""
    schedule = Schedule(window=4, subjects_ahead=2)
    first, second = _plan([2, 2, 2], epoch=0), _plan([2, 2, 2], epoch=1)
    schedule.begin(first, range(6), second)
    assert _drain(schedule) == [(0, 0), (0, 1), (0, 2), (1, 0)]
    schedule.advance(0, 3)
    assert _drain(schedule) == [(1, 1), (1, 2)]
    assert schedule.begin(second, range(6), _plan([2, 2, 2], epoch=2))
    assert _drain(schedule) == [(2, 0)]


def test_a_place_that_was_given_back_is_the_next_again():
    """What was claimed and not made is claimed again before what comes later, once."""
    schedule = Schedule(window=10, subjects_ahead=1)
    schedule.begin(_plan([2, 2, 2]), range(6), None)
    assert _drain(schedule) == [(1, 0), (1, 1), (1, 2)]
    schedule.give_back((1, 1))
    assert _drain(schedule) == [(1, 1)]


def test_a_resumed_epoch_makes_only_subjects_that_are_still_wanted():
    """Subjects whose patches were all delivered before are not made again."""
    schedule = Schedule(window=10, subjects_ahead=1)
    schedule.begin(_plan([2, 2, 2]), [3, 4, 5], None)
    assert schedule.wanted((1, 1)) == {1}
    assert _drain(schedule) == [(1, 1), (1, 2)]


def test_an_epoch_that_is_begun_again_is_made_again():
    """Patches taken in an abandoned pass are made anew when the same epoch restarts."""
    schedule = Schedule(window=10, subjects_ahead=1)
    plan = _plan([2, 2])
    schedule.begin(plan, range(4), None)
    _drain(schedule)
    schedule.advance(1, 1)
    assert not schedule.begin(plan, range(4), None)
    assert _drain(schedule) == [(1, 0), (1, 1)]
