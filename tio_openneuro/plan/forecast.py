"""What a training will cost, and what other budgets would change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tio_openneuro.plan.training import Mark, Play, Training
from tio_openneuro.queue import choose_window
from tio_openneuro.ram import BASE_BYTES

_SHARES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0)
_CURVE_UNITS = 96
_CURVE_UNITS_EACH = 8
_AS_FAST = 1.01


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch costs.

    Attributes:
        fetched_bytes: Over all nodes.
        seconds: From its first patch wanted to its last step's end.
        link_wait_s: Of these the consumer waits for the link.
        making_wait_s: Of these it waits for workers that load and transform.
        node_bytes: Fetched by each node.
        node_busy_s: Seconds in which the link of each is busy.
    """

    fetched_bytes: int
    seconds: float
    link_wait_s: float
    making_wait_s: float
    node_bytes: tuple[int, ...]
    node_busy_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """What a later epoch costs under another disk budget.

    Attributes:
        budget_bytes: The disk budget of each node.
        fetched_bytes: Over all nodes.
        seconds: From its first patch wanted to its last step's end.
        wait_share: Share of them in which the consumer waits.
    """

    budget_bytes: int
    fetched_bytes: int
    seconds: float
    wait_share: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a training under a disk budget of each node costs.

    Attributes:
        first: The first epoch.
        later: Each later one, their mean.
        peak_bytes: Most that a node holds.
        curve: Under other budgets, the smallest that works first; of a part of the units, scaled.
        enough_bytes: Disk budget from which later epochs are no more than 1 % slower than with all.
    """

    first: Epoch
    later: Epoch
    peak_bytes: int
    curve: tuple[Point, ...]
    enough_bytes: int


def foresee(training: Training, budget_bytes: int) -> Forecast:
    """Play a training under a disk budget, and some units of it under others.

    Args:
        training: Of two epochs at least.
        budget_bytes: The disk budget of each node, no less than the largest unit.
    """
    played = Play(training, budget_bytes)
    first, later = _epochs(played.marks)
    stride = max(len(training.units) // max(_CURVE_UNITS, _CURVE_UNITS_EACH * training.ranks), 1)
    some = replace(
        training, units=training.units[::stride], make_s=training.make_s[::stride], epochs=2
    )
    whole_bytes, some_bytes = total_bytes(training.units), total_bytes(some.units)
    scale, longer = whole_bytes / some_bytes, len(training.units) / len(some.units)
    least_bytes, scripts = max(sum(unit.values()) for unit in some.units), some.scripts()
    curve = []
    for wanted_bytes in sorted({max(round(s * some_bytes), least_bytes) for s in _SHARES}):
        _, epoch = _epochs(Play(some, wanted_bytes, scripts).marks)
        waits = (epoch.link_wait_s + epoch.making_wait_s) / epoch.seconds
        sizes = round(wanted_bytes * scale), round(epoch.fetched_bytes * scale)
        curve.append(Point(*sizes, epoch.seconds * longer, waits))
    fast_s = _AS_FAST * min(point.seconds for point in curve)
    enough_bytes = next(point.budget_bytes for point in curve if point.seconds <= fast_s)
    return Forecast(first, later, played.peak_bytes, tuple(curve), enough_bytes)


def total_bytes(units: Sequence[dict[str, int]]) -> int:
    """Return the bytes of some units, each key once."""
    return sum({key: size for unit in units for key, size in unit.items()}.values())


def ram_budgets(work_bytes: int, patch_bytes: int, samples: int, workers: int) -> tuple[int, int]:
    """Return the smallest RAM budget that works, and the one beyond which more brings nothing.

    Args:
        work_bytes: Bound of the largest subject's work.
        patch_bytes: Of each patch.
        samples: Patches of a subject.
        workers: Subjects in work at a time.
    """
    own_bytes = BASE_BYTES + work_bytes + samples * patch_bytes
    windows = [1 << power for power in range(11)]
    asked = [max(own_bytes + w * patch_bytes, 4 * w * patch_bytes) for w in windows]
    smallest = min(
        size
        for w, size in zip(windows, asked, strict=True)
        if choose_window(size, patch_bytes) == w
    )
    most = own_bytes + (workers - 1) * (work_bytes + samples * patch_bytes)
    return smallest, most + (windows[-1] + workers * samples) * patch_bytes


def _epochs(marks: Sequence[Mark]) -> tuple[Epoch, Epoch]:
    """Return the first epoch, and the mean of those after it."""
    begin = Mark(0.0, (0,) * len(marks[0].fetched_bytes), (0.0,) * len(marks[0].busy_s), 0.0, 0.0)
    return _between(begin, marks[0], 1), _between(marks[0], marks[-2], len(marks) - 2)


def _between(begin: Mark, end: Mark, epochs: int) -> Epoch:
    pairs = zip(begin.fetched_bytes, end.fetched_bytes, strict=True)
    node_bytes = tuple((after - before) // epochs for before, after in pairs)
    busy = zip(begin.busy_s, end.busy_s, strict=True)
    return Epoch(
        sum(node_bytes),
        (end.seconds - begin.seconds) / epochs,
        (end.link_s - begin.link_s) / epochs,
        (end.making_s - begin.making_s) / epochs,
        node_bytes,
        tuple((after - before) / epochs for before, after in busy),
    )
