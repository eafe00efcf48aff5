"""What training under a disk budget will fetch, told beforehand. Pure.

Plays the queue's own order of subjects against a disk of the budget's size that evicts what is
used last: the bytes that every order of eviction must fetch at least, and that the engine comes
close to. Sizes come in as numbers; nothing is fetched and no clock is read.

Source: L. A. Belady, "A study of replacement algorithms", IBM Systems Journal 5(2), 1966.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tio_openneuro.ledger import too_large
from tio_openneuro.queue import permute

_NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """What epochs under a disk budget fetch.

    Attributes:
        units: Units of an epoch.
        epoch_bytes: Bytes of their content, each annex key once.
        largest_bytes: Bytes of the largest unit, the smallest budget that works.
        budget_bytes: The disk budget.
        first_epoch_bytes: Bytes that the first epoch fetches.
        later_epoch_bytes: Bytes that each later epoch fetches, their mean.
        peak_bytes: Most bytes held.
    """

    units: int
    epoch_bytes: int
    largest_bytes: int
    budget_bytes: int
    first_epoch_bytes: int
    later_epoch_bytes: int
    peak_bytes: int

    def seconds(self, rate: float, epochs: int) -> float:
        """Return how long the link is busy.

        Args:
            rate: Bytes per second, over all connections.
            epochs: Passes over the units, at least one.
        """
        return (self.first_epoch_bytes + (epochs - 1) * self.later_epoch_bytes) / rate


def plan_disk(
    units: Mapping[str, Mapping[str, int]], budget_bytes: int, *, epochs: int = 4, seed: int = 0
) -> DiskPlan:
    """Play shuffled epochs against a disk budget.

    Args:
        units: Bytes of each annex key of a unit, by its name, in the dataset's order.
        budget_bytes: The disk budget.
        epochs: Epochs to play, at least two.
        seed: Decides the order of the units, as a queue's ``seed`` does.

    Raises:
        DiskBudgetError: A unit is larger than the budget.
    """
    contents = list(units.values())
    totals = {name: sum(files.values()) for name, files in units.items()}
    largest = max(totals, key=totals.__getitem__)
    if totals[largest] > budget_bytes:
        raise too_large(largest, list(units[largest].values()), budget_bytes)
    orders = [permute(len(contents), seed, "subjects", epoch) for epoch in range(epochs)]
    fetched, peak_bytes = _play([[contents[n] for n in order] for order in orders], budget_bytes)
    sizes = {key: size for files in contents for key, size in files.items()}
    return DiskPlan(
        len(contents),
        sum(sizes.values()),
        totals[largest],
        budget_bytes,
        fetched[0],
        round(sum(fetched[1:]) / (epochs - 1)),
        peak_bytes,
    )


def _play(
    epochs: Sequence[Sequence[Mapping[str, int]]], budget_bytes: int
) -> tuple[list[int], int]:
    """Return the bytes that each epoch fetches, and the most bytes held."""
    steps = [files for epoch in epochs for files in epoch]
    # The steps that use a key, the next one last.
    uses: dict[str, list[int]] = {}
    for step in reversed(range(len(steps))):
        for key in steps[step]:
            uses.setdefault(key, [_NEVER]).append(step)
    held: dict[str, int] = {}
    farthest: list[tuple[int, str]] = []
    held_bytes = peak_bytes = 0
    fetched = []
    for epoch in epochs:
        epoch_bytes = 0
        for files in epoch:
            missing = {key: size for key, size in files.items() if key not in held}
            needed_bytes = sum(missing.values())
            while held_bytes + needed_bytes > budget_bytes:
                # This unit's own files are used now, and come last: it fits without the others.
                next_use, key = heapq.heappop(farthest)
                if key in held and -next_use == uses[key][-1]:
                    held_bytes -= held.pop(key)
            held |= missing
            held_bytes += needed_bytes
            peak_bytes = max(peak_bytes, held_bytes)
            epoch_bytes += needed_bytes
            for key in files:
                uses[key].pop()
                heapq.heappush(farthest, (-uses[key][-1], key))
        fetched.append(epoch_bytes)
    return fetched, peak_bytes
