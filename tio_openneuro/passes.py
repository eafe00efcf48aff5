"""One pass over an epoch: what was delivered, what is left, what was skipped. Pure bookkeeping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tio_openneuro.shuffle import Draw

if TYPE_CHECKING:
    from tio_openneuro.shuffle import EpochPlan


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
