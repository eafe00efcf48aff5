"""Which subject is made next, and how far ahead of the consumer. Pure bookkeeping.

Turns are claimed in ascending order; one that was given back is claimed again before all others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

import torchio as tio

from tio_openneuro.queue.draw import EpochPlan, Pass, Turn
from tio_openneuro.queue.source import Production
from tio_openneuro.ram import Admission


def is_within_reach(distance: int, count: int, window: int, subjects_ahead: int) -> bool:
    """Return whether a subject may be made now.

    Args:
        distance: Patches from what the consumer takes next to the subject's first one.
        count: Its patches.
        window: Patches from which the consumer draws.
        subjects_ahead: Subjects that may be made beyond the window.
    """
    return distance < window + subjects_ahead * count


class Schedule:
    """The current epoch and the next, and what was claimed of them.

    Not safe to share by threads: its owner locks.
    """

    def __init__(self, *, window: int, subjects_ahead: int | None) -> None:
        """Begin with nothing to make.

        Args:
            window: Patches from which the consumer draws.
            subjects_ahead: Subjects that may be made beyond the window; None sets no bound.
        """
        self._window = window
        self._subjects_ahead = subjects_ahead
        self._current: Pass | None = None
        self._plans: dict[int, EpochPlan] = {}
        self._wanted: dict[Turn, set[int]] = {}
        self._claimed: set[Turn] = set()
        self._head = (0, 0)

    def begin(self, current: Pass, following: EpochPlan | None) -> bool:
        """Make a pass the current one; return whether what was made for it can stay.

        It can where it was made ahead, and nothing of it was taken before. After an error it may
        not: what was made ahead may be the same error again.

        Args:
            current: The pass, of which nothing was taken yet.
            following: The epoch that may be begun before this one ends, or None.
        """
        plan, before = current.plan, self._current
        continues = before is current
        if before is not None and not continues and not before.failed:
            used = before.plan.epoch == plan.epoch and before.step > 0
            continues = not used and self._plans.get(plan.epoch) == plan
        if not continues:
            self.forget()
            self._head = (plan.epoch, 0)
            left = current.left()
            if len(left) < plan.total:
                self._want(plan, left)
        self._current = current
        self._plans = {known.epoch: known for known in (plan, following) if known is not None}
        self._claimed = {turn for turn in self._claimed if turn.epoch in self._plans}
        self._head = max(self._head, (plan.epoch, 0))
        return continues

    def begin_anew(self) -> None:
        """Make what is left of the current epoch, and the next one, as if nothing were made yet."""
        current, plans = self._current, self._plans
        if current is not None:
            self._current, self._plans = None, {}
            self.begin(current, plans.get(current.plan.epoch + 1))

    def extend(self, plan: EpochPlan) -> None:
        """Go on with a plan of the current epoch that has more subjects at its end.

        Args:
            plan: What the present plan is the beginning of.
        """
        self._head = min(self._head, (plan.epoch, len(self._plans[plan.epoch].order)))
        self._plans[plan.epoch] = plan

    def forget(self) -> None:
        """Have nothing to make."""
        self._plans = {}
        self._wanted = {}
        self._claimed = set()

    def covers(self, turn: Turn) -> bool:
        """Return whether the subject at a turn is to be made, or was."""
        return turn.epoch in self._plans

    def next(self) -> Turn | None:
        """Return the first turn that is not claimed and within reach, or None."""
        turn = next(self._unclaimed(), None)
        if turn is None:
            return None
        self._head = (turn.epoch, turn.position)
        return turn if self._within_reach(turn) else None

    def claim(self, turn: Turn) -> None:
        """Take a turn out of what is to be made."""
        self._claimed.add(turn)

    def give_back(self, turn: Turn) -> None:
        """Put a claimed turn back to what is to be made."""
        self._claimed.remove(turn)
        self._head = min(self._head, (turn.epoch, turn.position))

    def wanted(self, turn: Turn) -> Collection[int]:
        """Return which patches of a subject are to be delivered."""
        return self._wanted.get(turn, range(self._plans[turn.epoch].counts[turn.position]))

    def index(self, turn: Turn, number: int) -> int:
        """Return the production index of a patch, by its number among its subject's."""
        return self._plans[turn.epoch].start(turn.position) + number

    def ahead(self, made_twice: Callable[[Turn], bool] = lambda _: False) -> list[int]:
        """Return the dataset's indices of the subjects to be made, in order.

        Args:
            made_twice: Tells of which turns the subject is used twice, which counts as two uses.
        """
        return [turn.index for turn in self._unclaimed() for _ in range(1 + made_twice(turn))]

    def _unclaimed(self) -> Iterator[Turn]:
        epoch, position = self._head
        while epoch in self._plans:
            plan = self._plans[epoch]
            for later in range(position, len(plan.order)):
                turn = plan.turn(later)
                if turn not in self._claimed:
                    yield turn
            epoch, position = epoch + 1, 0

    def _within_reach(self, turn: Turn) -> bool:
        if self._subjects_ahead is None or self._current is None:
            return True
        plan, current = self._plans[turn.epoch], self._current
        distance = plan.start(turn.position) - current.step
        if turn.epoch > current.plan.epoch:
            distance += current.plan.total
        count = plan.counts[turn.position]
        return is_within_reach(distance, count, self._window, self._subjects_ahead)

    def _want(self, plan: EpochPlan, left: list[int]) -> None:
        """Want what is left of an epoch; subjects of which nothing is count as claimed."""
        for index in left:
            position, number = plan.locate(index)
            self._wanted.setdefault(plan.turn(position), set()).add(number)
        turns = {plan.turn(position) for position in range(len(plan.order))}
        self._claimed = turns - self._wanted.keys()


class Buffer:
    """The patches of each subject that was made, by its turn, until the last one is taken."""

    def __init__(self, admission: Admission) -> None:
        """Begin empty.

        Args:
            admission: The RAM charges.
        """
        self._admission = admission
        self._made: dict[Turn, Production] = {}

    def __contains__(self, turn: object) -> bool:
        """Return whether a subject was made, or could not be, and is not wholly taken."""
        return turn in self._made

    def __iter__(self) -> Iterator[tuple[Turn, int, tio.Subject]]:
        """Give each patch with its subject's turn and its number among the subject's."""
        for turn, made in self._made.items():
            for number, patch in made.patches.items():
                yield turn, number, patch

    def keep(
        self, turn: Turn, production: Production, wanted: Collection[int], charged_bytes: int
    ) -> None:
        """Keep what became of a subject, and settle its charge.

        Args:
            turn: The subject's.
            production: Its patches, or its error.
            wanted: Numbers of the patches that are to be delivered.
            charged_bytes: What was charged for the work and the patches.
        """
        kept = {n: patch for n, patch in production.patches.items() if n in wanted}
        self._made[turn] = replace(production, patches=kept, count=len(kept))
        self._admission.settle(charged_bytes, len(kept) * production.patch_bytes)

    def get(self, turn: Turn, number: int) -> tio.Subject | BaseException:
        """Return a patch of a subject that is here, or what stopped the subject."""
        made = self._made[turn]
        return made.patches[number] if made.error is None else made.error

    def take(self, turn: Turn, number: int) -> None:
        """Let go of a patch that was delivered."""
        made = self._made[turn]
        del made.patches[number]
        self._admission.release(made.patch_bytes)
        if not made.patches:
            del self._made[turn]

    def discard(self, chosen: Callable[[Turn], bool]) -> None:
        """Drop the subjects whose turns are chosen."""
        for turn in list(filter(chosen, self._made)):
            made = self._made.pop(turn)
            self._admission.release(len(made.patches) * made.patch_bytes)

    def furthest(self) -> Turn | None:
        """Return the last turn whose patches are all here still, so that it can be made again."""
        whole = (turn for turn, made in self._made.items() if len(made.patches) == made.count > 0)
        return max(whole, default=None)
