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


@dataclass(frozen=True, slots=True)
class Replacement:
    """A subject that takes the share of a skipped one, at the end of the epoch's order.

    Attributes:
        step: Patches that were delivered or skipped when it was chosen: the window grows then.
        index: Index in the dataset.
        count: Patches that were still due of the skipped one.
    """

    step: int
    index: int
    count: int


@dataclass(frozen=True, slots=True)
class PassStart:
    """Where a pass begins.

    Attributes:
        epoch: Number of the epoch.
        step: Patches that were delivered or skipped before.
        next_index: Index that a loader that goes on where it stopped will ask for.
        holes: Positions of skipped subjects in the epoch's order.
        replacements: Subjects that took the shares of skipped ones, in the order of choosing.
        keeps_indices: Whether the pass goes on at ``next_index`` and has the length of its whole
            epoch, instead of beginning at 0 with the length of what is left.
    """

    epoch: int = 0
    step: int = 0
    next_index: int = 0
    holes: frozenset[int] = frozenset()
    replacements: tuple[Replacement, ...] = ()
    keeps_indices: bool = False


class Pass:
    """The patches of one epoch, one after another."""

    def __init__(self, start: PassStart, draw: Draw) -> None:
        """Go to where the pass begins.

        Args:
            start: Where that is.
            draw: The draw of its epoch, at step zero.
        """
        self._draw = draw
        self._order = draw.plan.order
        self._holes = set(start.holes)
        self._replacements: list[Replacement] = []
        self.failed = False
        self.expected = start.next_index if start.keeps_indices else 0
        whole = draw.plan.total
        for replacement in start.replacements:
            draw.advance(replacement.step)
            self._append(replacement)
        draw.advance(start.step)
        self.length = whole if start.keeps_indices else len(self.left())

    @property
    def plan(self) -> EpochPlan:
        """The epoch's plan."""
        return self._draw.plan

    @property
    def step(self) -> int:
        """Patches that were delivered or skipped."""
        return self._draw.step

    @property
    def finished(self) -> bool:
        """Whether no patch is left; patches that are known to be skipped are passed over."""
        while not self._draw.finished:
            if self.plan.locate(self._draw.peek())[0] not in self._holes:
                return False
            self._draw.take()
        return True

    @property
    def begun(self) -> bool:
        """Whether it gave a patch or an error, so that index 0 does not continue it."""
        return self.expected > 0 or self.failed

    def peek(self) -> int:
        """Return the production index of the next patch of a pass that is not finished."""
        return self._draw.peek()

    def take(self) -> None:
        """Note that the next patch was delivered."""
        self._draw.take()
        self.expected += 1

    def skip(self, position: int) -> None:
        """Pass over all patches of the subject at a position."""
        self._holes.add(position)

    def replace(self, position: int) -> bool:
        """Pass over a subject, and have the next one that works take its share.

        The next one is that which follows in the epoch's own order, cyclically. It comes at the
        end of what is still to be made, and draws as if it came once more in this epoch.

        Args:
            position: Of the subject that does not work.

        Returns:
            Whether there was one; else every subject of the epoch has been skipped.
        """
        due = sum(self.plan.locate(index)[0] == position for index in self._draw.left())
        self.skip(position)
        skipped = {self.plan.order[hole] for hole in self._holes}
        first = self._order.index(self.plan.order[position])
        following = (*self._order[first + 1 :], *self._order[:first])
        index = next((index for index in following if index not in skipped), None)
        if index is not None:
            self._append(Replacement(self.step, index, due))
        return index is not None

    def _append(self, replacement: Replacement) -> None:
        self._replacements.append(replacement)
        self._draw.extend(self.plan.extended(replacement.index, replacement.count))

    def left(self) -> list[int]:
        """Return the production indices that are still to be delivered, in ascending order."""
        return [
            index for index in self._draw.left() if self.plan.locate(index)[0] not in self._holes
        ]

    def candidates(self) -> list[int]:
        """Return the production indices within the window, in ascending order."""
        return [] if self._draw.finished else sorted(self._draw.candidates())

    def here(self) -> PassStart:
        """Return what begins a pass with what is left of this one."""
        epoch = self.plan.epoch
        return PassStart(
            epoch,
            self._draw.step,
            self.expected,
            frozenset(self._holes),
            tuple(self._replacements),
        )
