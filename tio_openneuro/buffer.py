"""What is made and not yet delivered, and the RAM that is charged for it.

Knows neither threads nor the order of delivery. Not safe to share by threads: its owner locks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torchio as tio

    from tio_openneuro.memory import Admission
    from tio_openneuro.production import Production
    from tio_openneuro.schedule import Place


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
