"""Which patch comes next: seeds, permutations, windows and draws. Pure arithmetic.

Every number here is a function of the queue's seed, the epoch and a count, and of nothing else:
no generator is kept, so that any point of the sequence can be reached again from two integers.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate

_BUDGET_SHARE = 4
_LARGEST_WINDOW = 1024
_FIRST_SUBJECTS = 2


def derive_seed(*parts: int | str) -> int:
    """Return a seed below 2**63 that depends on every part.

    Args:
        parts: The queue's seed, then what the seed is for.

    Example:
        >>> derive_seed(0, "patch", 1) == derive_seed(0, "patch", 2)
        False
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw_below(count: int, *parts: int | str) -> int:
    """Return a uniform draw from ``range(count)`` that depends on every part.

    Args:
        count: Number of outcomes, at least one. The bias is below ``count / 2**63``.
        parts: As in :func:`derive_seed`.
    """
    return (derive_seed(*parts) * count) >> 63


def permute(count: int, *parts: int | str) -> list[int]:
    """Return a uniform permutation of ``range(count)`` that depends on every part.

    Args:
        count: Number of elements.
        parts: As in :func:`derive_seed`.
    """
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        other = draw_below(last + 1, *parts, last)
        order[last], order[other] = order[other], order[last]
    return order


def choose_window(ram_budget_bytes: int, patch_bytes: int) -> int:
    """Return the window in patches for a queue that was given no ``max_length``.

    A quarter of the budget at most, so that three are left for volumes in work; a power of two,
    so that a budget that follows the machine's free memory seldom changes it.

    Args:
        ram_budget_bytes: The RAM budget.
        patch_bytes: Bytes of one patch, all images together.
    """
    affordable = ram_budget_bytes // _BUDGET_SHARE // max(patch_bytes, 1)
    return int(min(_LARGEST_WINDOW, 1 << max(affordable.bit_length() - 1, 0)))


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """The subjects of one epoch in the order of their production, and their patches' indices.

    Attributes:
        epoch: Number of the epoch, from zero.
        order: Index in the dataset of each subject, by position.
        counts: Patches of each subject, by position.
        ends: Production index after the last patch of each subject, by position.
        occurrences: How often each subject came before in this epoch, by position.
    """

    epoch: int
    order: tuple[int, ...]
    counts: tuple[int, ...]
    ends: tuple[int, ...] = field(init=False, compare=False)
    occurrences: tuple[int, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Sum the counts up."""
        object.__setattr__(self, "ends", tuple(accumulate(self.counts)))
        seen: Counter[int] = Counter()
        occurrences = []
        for index in self.order:
            occurrences.append(seen[index])
            seen[index] += 1
        object.__setattr__(self, "occurrences", tuple(occurrences))

    def extended(self, index: int, count: int) -> EpochPlan:
        """Return the plan with one more subject at its end.

        Args:
            index: Its index in the dataset.
            count: Its patches.
        """
        return EpochPlan(self.epoch, (*self.order, index), (*self.counts, count))

    @property
    def total(self) -> int:
        """Patches of the whole epoch."""
        return self.ends[-1] if self.ends else 0

    def start(self, position: int) -> int:
        """Return the production index of the first patch of the subject at a position."""
        return self.ends[position] - self.counts[position]

    def locate(self, index: int) -> tuple[int, int]:
        """Return the position of the subject that a patch is of, and its place among its patches.

        Args:
            index: Production index of the patch.
        """
        position = bisect_right(self.ends, index)
        return position, index - self.start(position)


class Draw:
    """The order in which the patches of one epoch are delivered.

    At step ``t`` a patch is taken uniformly from those not yet taken whose production index is
    below ``min(t + W(t), total)``. In epoch 0 ``W(t)`` grows by counts, so that training starts
    with the first subjects: the first steps take from two alone, and from two thirds of their
    patches it grows by three quarters of a patch per step. In later epochs it is the whole window
    from the start, since production is ahead by then.
    """

    def __init__(self, seed: int, plan: EpochPlan, window: int, *, shuffled: bool) -> None:
        """Begin at step zero.

        Args:
            seed: The queue's seed.
            plan: The epoch.
            window: ``W``, in patches, at least one.
            shuffled: False takes the patches in the order of their production.
        """
        self.plan = plan
        self.step = 0
        self._seed = seed
        self._window = window
        self._shuffled = shuffled
        self._first = sum(plan.counts[:_FIRST_SUBJECTS])
        self._reached = 0
        self._candidates: list[int] = []
        self._chosen: int | None = None

    def extend(self, plan: EpochPlan) -> None:
        """Go on with a plan that has more subjects at its end.

        Args:
            plan: What the present plan is the beginning of.
        """
        self.plan = plan
        self._chosen = None

    @property
    def finished(self) -> bool:
        """Whether every patch was taken."""
        return self.step >= self.plan.total

    def window_end(self) -> int:
        """Return the production index below which patches may be taken at this step."""
        window = self._window
        if self.plan.epoch == 0:
            grown = self._first * 2 // 3 + self.step * 3 // 4
            window = min(window, max(self._first - self.step, grown))
        return min(self.step + max(window, 1), self.plan.total)

    def peek(self) -> int:
        """Return the production index of the next patch, without taking it."""
        if not self._shuffled:
            return self.step
        return self._candidates[self._slot()]

    def take(self) -> int:
        """Take the next patch, and return its production index."""
        index = self.peek()
        if self._shuffled:
            self._candidates[self._slot()] = self._candidates[-1]
            self._candidates.pop()
        self.step += 1
        self._chosen = None
        return index

    def advance(self, step: int) -> None:
        """Take patches until a step is reached; what was taken is no longer in :meth:`left`."""
        while self.step < step:
            self.take()

    def left(self) -> list[int]:
        """Return the production indices that were not taken, in ascending order."""
        if not self._shuffled:
            return list(range(self.step, self.plan.total))
        return sorted([*self._candidates, *range(self._reached, self.plan.total)])

    def candidates(self) -> list[int]:
        """Return the production indices from which this step takes one, in no fixed order."""
        if not self._shuffled:
            return list(range(self.step, self.window_end()))
        self._reach()
        return list(self._candidates)

    def _slot(self) -> int:
        if self._chosen is None:
            self._reach()
            count = len(self._candidates)
            self._chosen = draw_below(count, self._seed, "patch", self.plan.epoch, self.step)
        return self._chosen

    def _reach(self) -> None:
        end = self.window_end()
        if end > self._reached:
            self._candidates.extend(range(self._reached, end))
            self._reached = end
