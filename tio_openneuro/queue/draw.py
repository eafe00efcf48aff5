"""Which patch comes next: seeds, permutations, windows and draws. Pure arithmetic.

Every number here is a function of the queue's seed, the epoch and a count, and of nothing else:
no generator is kept, so that any point of the sequence can be reached again from two integers.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

_BUDGET_SHARE = 4
LARGEST_WINDOW = 1024
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


def chosen_twice(count: int, seed: int, epoch: int) -> int:
    """Return the position of the subject that is made twice in an epoch, to see that it repeats.

    Args:
        count: Subjects of the epoch.
        seed: The queue's seed.
        epoch: Number of the epoch.
    """
    return draw_below(count, seed, "twice", epoch)


def choose_window(ram_budget_bytes: int, patch_bytes: int) -> int:
    """Return the window in patches for a queue that was given no ``max_length``.

    A quarter of the budget at most, so that three are left for volumes in work; a power of two,
    so that a budget that follows the machine's free memory seldom changes it.

    Args:
        ram_budget_bytes: The RAM budget.
        patch_bytes: Bytes of one patch, all images together.
    """
    affordable = ram_budget_bytes // _BUDGET_SHARE // max(patch_bytes, 1)
    return int(min(LARGEST_WINDOW, 1 << max(affordable.bit_length() - 1, 0)))


@dataclass(frozen=True, slots=True, order=True)
class Turn:
    """A subject's turn to be made into patches. Turns compare in the order of production.

    Attributes:
        epoch: Number of the epoch.
        position: Where the subject stands in the epoch's order.
        index: Its index in the dataset.
        occurrence: How often it came before in this epoch.
    """

    epoch: int
    position: int
    index: int
    occurrence: int


@dataclass(frozen=True)
class EpochPlan:
    """The subjects of one epoch in the order of their production, and their patches' indices.

    Attributes:
        epoch: Number of the epoch, from zero.
        order: Index in the dataset of each subject, by position.
        counts: Patches of each subject, by position.
    """

    epoch: int
    order: tuple[int, ...]
    counts: tuple[int, ...]

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Production index after the last patch of each subject, by position."""
        return tuple(accumulate(self.counts))

    @cached_property
    def occurrences(self) -> tuple[int, ...]:
        """How often each subject came before in this epoch, by position."""
        seen: Counter[int] = Counter()
        occurrences = []
        for index in self.order:
            occurrences.append(seen[index])
            seen[index] += 1
        return tuple(occurrences)

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

    def turn(self, position: int) -> Turn:
        """Return the turn of the subject at a position."""
        return Turn(self.epoch, position, self.order[position], self.occurrences[position])

    def locate(self, index: int) -> tuple[int, int]:
        """Return the position of the subject that a patch is of, and its number among its patches.

        Args:
            index: Production index of the patch.
        """
        position = bisect_right(self.ends, index)
        return position, index - self.start(position)


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
    """

    epoch: int = 0
    step: int = 0
    next_index: int = 0
    holes: frozenset[int] = frozenset()
    replacements: tuple[Replacement, ...] = ()


class Pass:
    """The patches of one epoch, one after another; the one place that knows how far it is.

    At step ``t`` a patch is drawn uniformly from those not yet drawn whose production index is
    below ``min(t + W(t), total)``. In epoch 0 ``W(t)`` grows by counts, so that training starts
    with the first subjects: the first steps draw from two alone, and from two thirds of their
    patches it grows by three quarters of a patch per step. In later epochs it is the whole window
    from the start, since production is ahead by then.

    Attributes:
        plan: The epoch, with the subjects that took the shares of skipped ones at its end.
        start: Where the pass began.
        step: Patches that were delivered or skipped.
        expected: Index that the consumer asks for next.
        failed: Whether a subject's error was raised.
    """

    def __init__(
        self, plan: EpochPlan, start: PassStart, *, seed: int, window: int, shuffled: bool
    ) -> None:
        """Go to where the pass begins.

        Args:
            plan: Its epoch.
            start: Where that is.
            seed: The queue's seed.
            window: ``W``, in patches, at least one.
            shuffled: False draws the patches in the order of their production.
        """
        self.plan = plan
        self.start = start
        self.step = 0
        self.expected = 0
        self.failed = False
        self._seed = seed
        self._window = window
        self._shuffled = shuffled
        self._order = plan.order
        self._first = sum(plan.counts[:_FIRST_SUBJECTS])
        self._reached = 0
        self._candidates: list[int] = []
        self._chosen: int | None = None
        self._holes = set(start.holes)
        self._replacements: list[Replacement] = []
        for replacement in start.replacements:
            self._advance(replacement.step)
            self._append(replacement)
        self._advance(start.step)

    @property
    def finished(self) -> bool:
        """Whether no patch is left; patches that are known to be skipped are passed over."""
        while self.step < self.plan.total:
            if self.plan.locate(self._peek())[0] not in self._holes:
                return False
            self._draw()
        return True

    @property
    def begun(self) -> bool:
        """Whether it gave a patch or an error, or has none, so that index 0 begins another one."""
        return self.expected > 0 or self.failed or self.finished

    def window_end(self) -> int:
        """Return the production index below which patches may be drawn at this step."""
        window = self._window
        if self.plan.epoch == 0:
            grown = self._first * 2 // 3 + self.step * 3 // 4
            window = min(window, max(self._first - self.step, grown))
        return min(self.step + max(window, 1), self.plan.total)

    def next(self) -> tuple[Turn, int]:
        """Return the next patch's subject and number, where the pass is not finished."""
        position, number = self.plan.locate(self._peek())
        return self.plan.turn(position), number

    def take(self) -> None:
        """Note that the next patch was delivered."""
        self._draw()
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
        due = sum(self.plan.locate(index)[0] == position for index in self.left())
        self.skip(position)
        skipped = {self.plan.order[hole] for hole in self._holes}
        first = self._order.index(self.plan.order[position])
        following = (*self._order[first + 1 :], *self._order[:first])
        index = next((index for index in following if index not in skipped), None)
        if index is not None:
            self._append(Replacement(self.step, index, due))
        return index is not None

    def left(self) -> list[int]:
        """Return the production indices that are still to be delivered, in ascending order."""
        return self._undrawn(self.plan.total)

    def candidates(self) -> list[int]:
        """Return those of them that are within the window."""
        return self._undrawn(self.window_end())

    def here(self) -> PassStart:
        """Return what begins a pass with what is left of this one."""
        holes, replacements = frozenset(self._holes), tuple(self._replacements)
        return PassStart(self.plan.epoch, self.step, self.expected, holes, replacements)

    def _undrawn(self, end: int) -> list[int]:
        undrawn = sorted([*self._candidates, *range(self._reached, end)])
        return [index for index in undrawn if self.plan.locate(index)[0] not in self._holes]

    def _append(self, replacement: Replacement) -> None:
        self._replacements.append(replacement)
        self.plan = self.plan.extended(replacement.index, replacement.count)
        self._chosen = None

    def _advance(self, step: int) -> None:
        while self.step < step:
            self._draw()

    def _draw(self) -> None:
        slot = self._slot()
        self._candidates[slot] = self._candidates[-1]
        self._candidates.pop()
        self.step += 1
        self._chosen = None

    def _peek(self) -> int:
        return self._candidates[self._slot()]

    def _slot(self) -> int:
        """Return where the next patch stands among the candidates, drawn once."""
        if self._chosen is None:
            end = self.window_end() if self._shuffled else self.step + 1
            if end > self._reached:
                self._candidates.extend(range(self._reached, end))
                self._reached = end
            parts = self._seed, "patch", self.plan.epoch, self.step
            self._chosen = draw_below(len(self._candidates), *parts)
        return self._chosen
