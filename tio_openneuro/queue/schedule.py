"""Which subject is made next, and how far ahead of the consumer. Pure bookkeeping.

A place is an epoch and a position in its order. Places are claimed in ascending order; one that
was given back is claimed again before all others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torchio as tio

    from tio_openneuro.queue.source import Production
    from tio_openneuro.ram import Admission

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tio_openneuro.queue.draw import EpochPlan

Place = tuple[int, int]


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
        self._plans: dict[int, EpochPlan] = {}
        self._wanted: dict[Place, frozenset[int]] = {}
        self._claimed: set[Place] = set()
        self._head: Place = (0, 0)
        self._taken: Place = (0, 0)

    def begin(self, plan: EpochPlan, left: Iterable[int], following: EpochPlan | None) -> bool:
        """Make an epoch the current one; return whether what was made of it can stay.

        It can where the epoch was made ahead, and nothing of it was taken before.

        Args:
            plan: The epoch.
            left: Production indices that are still to be delivered.
            following: The epoch that may be begun before this one ends, or None.
        """
        indices = sorted(left)
        whole = len(indices) == plan.total
        begun = self._taken[0] == plan.epoch and self._taken[1] > 0
        continues = whole and not begun and self._plans.get(plan.epoch) == plan
        if not continues:
            self.forget()
            self._head = (plan.epoch, 0)
            if not whole:
                self._want(plan, indices)
        self._plans = {plan.epoch: plan}
        if following is not None:
            self._plans[following.epoch] = following
        self._claimed = {place for place in self._claimed if place[0] in self._plans}
        self._head = max(self._head, (plan.epoch, 0))
        self._taken = (plan.epoch, plan.total - len(indices))
        return continues

    def extend(self, plan: EpochPlan) -> None:
        """Go on with a plan of the current epoch that has more subjects at its end.

        Args:
            plan: What the present plan is the beginning of.
        """
        place = (plan.epoch, len(self._plans[plan.epoch].order))
        self._plans[plan.epoch] = plan
        self._head = min(self._head, place)

    def forget(self) -> None:
        """Have nothing to make."""
        self._plans = {}
        self._wanted = {}
        self._claimed = set()

    def plan(self, epoch: int) -> EpochPlan:
        """Return the plan of an epoch that :meth:`covers` is true of."""
        return self._plans[epoch]

    def covers(self, epoch: int) -> bool:
        """Return whether patches of an epoch are to be made."""
        return epoch in self._plans

    def advance(self, epoch: int, step: int) -> None:
        """Note how many patches of the current epoch were taken.

        Args:
            epoch: The current epoch.
            step: Patches delivered or skipped.
        """
        self._taken = (epoch, step)

    def next(self) -> Place | None:
        """Return the first place that is not claimed and within reach, or None."""
        epoch, position = self._head
        while epoch in self._plans:
            plan = self._plans[epoch]
            while position < len(plan.order):
                place = (epoch, position)
                if place not in self._claimed and self.wanted(place):
                    self._head = place
                    return place if self._within_reach(place) else None
                position += 1
            epoch, position = epoch + 1, 0
        return None

    def claim(self, place: Place) -> None:
        """Take a place out of what is to be made."""
        self._claimed.add(place)

    def give_back(self, place: Place) -> None:
        """Put a claimed place back to what is to be made."""
        if place in self._claimed:
            self._claimed.discard(place)
            self._head = min(self._head, place)

    def wanted(self, place: Place) -> frozenset[int]:
        """Return which patches of a subject are to be delivered."""
        if place in self._wanted:
            return self._wanted[place]
        return frozenset(range(self._plans[place[0]].counts[place[1]]))

    def index(self, place: Place) -> int:
        """Return the dataset's index of a place's subject."""
        return self._plans[place[0]].order[place[1]]

    def ahead(self) -> list[int]:
        """Return the dataset's indices of the subjects to be made, in order."""
        return [
            plan.order[position]
            for epoch, plan in sorted(self._plans.items())
            for position in range(len(plan.order))
            if (epoch, position) not in self._claimed and self.wanted((epoch, position))
        ]

    def _within_reach(self, place: Place) -> bool:
        if self._subjects_ahead is None:
            return True
        epoch, position = place
        taken_epoch, step = self._taken
        distance = self._plans[epoch].start(position) - step
        if epoch > taken_epoch and taken_epoch in self._plans:
            distance += self._plans[taken_epoch].total
        ahead = self._subjects_ahead * self._plans[epoch].counts[position]
        return distance < self._window + ahead

    def _want(self, plan: EpochPlan, indices: list[int]) -> None:
        places: dict[int, set[int]] = {}
        for index in indices:
            position, place = plan.locate(index)
            places.setdefault(position, set()).add(place)
        self._wanted = {
            (plan.epoch, position): frozenset(places.get(position, ()))
            for position in range(len(plan.order))
        }


@dataclass(slots=True)
class _Made:
    """A subject's patches that wait to be delivered, or why there are none."""

    patches: dict[int, tio.Subject] = field(default_factory=dict)
    patch_bytes: int = 0
    error: BaseException | None = None


class Buffer:
    """The patches of each subject that was made, by its place, until the last one is taken."""

    def __init__(self, admission: Admission) -> None:
        """Begin empty.

        Args:
            admission: The RAM charges.
        """
        self._admission = admission
        self._made: dict[Place, _Made] = {}

    def __contains__(self, place: object) -> bool:
        """Return whether a subject was made, or could not be, and is not wholly taken."""
        return place in self._made

    def __iter__(self) -> Iterator[tuple[Place, int, tio.Subject]]:
        """Give each patch with its subject's place and its number among the subject's."""
        for place, made in self._made.items():
            for number, patch in made.patches.items():
                yield place, number, patch

    def keep(
        self, place: Place, production: Production, wanted: frozenset[int], charged_bytes: int
    ) -> None:
        """Keep what became of a subject, and settle its charge.

        Args:
            place: Its epoch and position.
            production: Its patches, or its error.
            wanted: Numbers of the patches that are to be delivered.
            charged_bytes: What was charged for the work and the patches.
        """
        kept = {n: patch for n, patch in enumerate(production.patches) if n in wanted}
        self._made[place] = _Made(kept, production.patch_bytes, production.error)
        self._admission.settle(charged_bytes, len(kept) * production.patch_bytes)

    def fail(self, place: Place, error: BaseException) -> None:
        """Note what stops a subject for which nothing is charged."""
        self._made[place] = _Made(error=error)

    def get(self, place: Place, number: int) -> tio.Subject | BaseException:
        """Return a patch of a subject that is here, or what stopped the subject."""
        made = self._made[place]
        return made.patches[number] if made.error is None else made.error

    def take(self, place: Place, number: int) -> None:
        """Let go of a patch that was delivered, if it is here still."""
        made = self._made.get(place)
        if made is not None and made.patches.pop(number, None) is not None:
            self._admission.release(made.patch_bytes)
            if not made.patches:
                del self._made[place]

    def discard(self, chosen: Callable[[Place], bool]) -> None:
        """Drop the subjects whose places are chosen."""
        for place in [place for place in self._made if chosen(place)]:
            made = self._made.pop(place)
            self._admission.release(len(made.patches) * made.patch_bytes)

    def furthest(self, wanted: Callable[[Place], frozenset[int]]) -> Place | None:
        """Return the last place whose patches are all here still, so that it can be made again.

        Args:
            wanted: Returns the numbers of a subject's patches that are to be delivered.
        """
        whole = (
            place
            for place, made in self._made.items()
            if made.patches and made.patches.keys() == wanted(place)
        )
        return max(whole, default=None)
