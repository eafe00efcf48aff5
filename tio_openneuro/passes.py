"""One pass over an epoch: what was delivered, what is left, what was skipped. Pure bookkeeping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tio_openneuro.shuffle import Draw

if TYPE_CHECKING:
    from tio_openneuro.shuffle import EpochPlan


@dataclass(frozen=True, slots=True)
class PassStart:
    """Where a pass begins.

    Attributes:
        epoch: Number of the epoch.
        step: Patches that were delivered or skipped before.
        next_index: Index that a loader that goes on where it stopped will ask for.
        holes: Positions of skipped subjects in the epoch's order.
        keeps_indices: Whether the pass goes on at ``next_index`` and has the length of its whole
            epoch, instead of beginning at 0 with the length of what is left.
    """

    epoch: int = 0
    step: int = 0
    next_index: int = 0
    holes: frozenset[int] = frozenset()
    keeps_indices: bool = False


class Pass:
    """The patches of one epoch, one after another."""

    def __init__(self, start: PassStart, draw: Draw) -> None:
        """Go to where the pass begins.

        Args:
            start: Where that is.
            draw: The draw of its epoch, at step zero.
        """
        draw.advance(start.step)
        self._draw = draw
        self._holes = set(start.holes)
        self.failed = False
        self.expected = start.next_index if start.keeps_indices else 0
        self.length = self.plan.total if start.keeps_indices else len(self.left())

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
        return PassStart(epoch, self._draw.step, self.expected, frozenset(self._holes))
