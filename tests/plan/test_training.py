"""What a plan foretells, against arithmetic and against every other choice of victims."""

from itertools import pairwise

import pytest
import torch
import torchio as tio
from hypothesis import given, settings
from hypothesis import strategies as st

from tio_openneuro.cli.plan import answer
from tio_openneuro.errors import DiskBudgetError, RamBudgetError
from tio_openneuro.plan import Training, foresee, ram_budgets
from tio_openneuro.plan.training import Play
from tio_openneuro.queue import BudgetedQueue
from tio_openneuro.queue.draw import permute
from tio_openneuro.ram import bound_subject
from tio_openneuro.volumes import sum_sizes


def make_training(units, **options):
    """Return a training on units of these bytes, on a link of 10 bytes a second."""
    given = {"make_s": [0.0] * len(units), "step_s": 1000.0, "rate": 10.0, "window": 1,
             "samples": 1, "batch": 1, "workers": 1}  # fmt: skip
    return Training(units=units, **given | options)


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
    """Of units of one size, no less than the best of all choices, within the budget."""
    training = make_training([{f"k{n}": 10} for n in range(units)], epochs=4, seed=seed)
    played = Play(training, 10 * room)
    order = tuple(n for epoch in range(4) for n in permute(units, seed, "subjects", epoch))
    fetched = played.marks[3].fetched_bytes[0] // 10
    assert fewest_fetches(order, room) <= fetched
    # What comes ahead takes the room of what would have stayed, two units at most.
    assert room < 3 or fetched <= fewest_fetches(order, room - 2) + room
    assert played.peak_bytes <= 10 * room
    assert (fetched == units) == (room >= units)


def test_shared_content_is_fetched_and_held_once() -> None:
    """Two units of one key cost it once, and larger units leave less room."""
    played = Play(make_training([{"k": 60}, {"k": 60, "l": 30}]), 90)
    assert {mark.fetched_bytes for mark in played.marks} == {(90,)}
    assert played.peak_bytes == 90


def test_the_slowest_part_decides_the_time() -> None:
    """The link, the workers or the model: as long as that takes alone, and who waits for what."""
    units = [{f"k{n}": 100} for n in range(20)]
    first = {"workers": 4, "window": 4, "epochs": 2}
    link = Play(make_training(units, step_s=0.1, **first), 100).marks
    assert link[1].seconds - link[0].seconds == pytest.approx(20 * 10, rel=0.06)
    assert link[1].link_s == pytest.approx(link[1].seconds, rel=0.05)
    made = make_training(units, step_s=0.1, make_s=[40.0] * 20, **first)
    making = Play(made, 2000).marks
    assert making[1].seconds - making[0].seconds == pytest.approx(20 * 40 / 4, rel=0.06)
    assert making[1].making_s > 0.8 * making[1].seconds
    model = Play(make_training(units, step_s=50.0, **first), 2000).marks
    assert model[1].seconds - model[0].seconds == 20 * 50
    assert model[1].link_s - model[0].link_s == 0
    assert model[0].busy_s == (200.0,)


def test_nodes_have_a_root_each_and_step_together() -> None:
    """Each fetches no key twice that it has room for; a link that is shared takes longer."""
    units = [{f"k{n}": 100} for n in range(32)]
    options = {"step_s": 0.1, "ranks": 8, "epochs": 3}
    apart = Play(make_training(units, nodes=4, **options), 3200).marks
    for fetched_bytes in zip(*(mark.fetched_bytes for mark in apart), strict=True):
        assert 800 <= fetched_bytes[0] <= fetched_bytes[-1] <= 3200
    assert sum(apart[-1].fetched_bytes) > 3200
    together = Play(make_training(units, nodes=1, **options), 3200).marks
    assert {mark.fetched_bytes for mark in together} == {(3200,)}
    assert together[0].seconds > 3 * 80


def test_the_smallest_ram_budget_is_the_one_that_the_queue_takes() -> None:
    """One byte less is refused."""
    side, samples = 32, 4
    subject = tio.Subject(t1=tio.ScalarImage(tensor=torch.zeros(1, side, side, side)), name="sub-1")
    dataset = tio.SubjectsDataset([subject] * 300)
    size = sum_sizes([(1, side**3, 4)])
    work_bytes = bound_subject(size, size, (), 0).size_bytes
    smallest, enough = ram_budgets(work_bytes, 16**3 * 4, samples, 1)
    assert smallest < enough
    given = {"samples_per_volume": samples, "sampler": tio.UniformSampler(16), "num_workers": 1}
    BudgetedQueue(dataset, ram_budget=smallest, start_background=False, **given).close()
    with pytest.raises(RamBudgetError):
        BudgetedQueue(dataset, ram_budget=smallest - 1, start_background=False, **given)


def test_more_disk_is_never_told_to_cost_more() -> None:
    """The curve falls, from the whole dataset each epoch to nothing; the last budget is enough."""
    units = [{f"k{n}": 90 + n % 20} for n in range(40)]
    told = foresee(make_training(units, step_s=1.0, window=8, samples=4, batch=4), 2000)
    fetched = [point.fetched_bytes for point in told.curve]
    # An epoch ends with more or less fetched ahead for the next one: less than a unit of 40.
    assert all(after <= before + 120 for before, after in pairwise(fetched))
    assert fetched[0] > 0.9 * sum(sum(unit.values()) for unit in units)
    assert fetched[-1] == 0
    assert told.later.fetched_bytes > 0
    assert told.enough_bytes > 2000


def test_a_unit_above_the_budget_is_named() -> None:
    """The message says which, and the bytes."""
    given = {"epochs": 2, "voxels_per_byte": 1.0, "patch_size": 8, "ram_budget": "1 GB",
             "remote_rate": None, "unit_s": None, "rate": 10}  # fmt: skip
    with pytest.raises(DiskBudgetError, match=r"hold b: its 2 files need 90 bytes"):
        answer({"a": {"k": 60}, "b": {"k": 60, "l": 30}}, 89, **given)
