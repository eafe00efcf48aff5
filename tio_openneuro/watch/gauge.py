"""Rates between two readings of a queue, and what they say holds it up. Owns no thread."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from operator import attrgetter

from tio_openneuro.queue import BudgetedQueue, Reading, read

# Of the time: a consumer that waits less than this is what the rest waits for.
_LITTLE_WAITING = 0.05
_WINDOW = 20
_making = attrgetter("decode_s", "transform_s", "sample_s")
HELD_UP = {
    "consumer": "patches are ready for the step",
    "link": "patches wait for content to arrive",
    "decoding": "patches wait until they are made",
}


@dataclass(frozen=True, slots=True)
class Moment:
    """What happened between two readings.

    Attributes:
        reading: The second one.
        patches_per_s: Patches delivered in a second.
        wait_share: Share of the time in which the consumer stood waiting, from 0 to 1.
        link_bytes_per_s: Bytes of whole files fetched in a second.
        held_up_by: ``"consumer"``, ``"link"`` or ``"decoding"``: what took longest.
    """

    reading: Reading
    patches_per_s: float
    wait_share: float
    link_bytes_per_s: float
    held_up_by: str


def between(before: Reading, now: Reading) -> Moment:
    """Return what happened between two readings of one queue."""
    old, new = before.queue, now.queue
    seconds = max(now.time_s - before.time_s, 1e-9)
    wait_share = min(max(new.wait_s - old.wait_s, 0.0) / seconds, 1.0)
    made_s = sum(_making(new)) - sum(_making(old))
    waits_for = "link" if new.content_s - old.content_s > made_s else "decoding"
    return Moment(
        now,
        max(new.patches - old.patches, 0) / seconds,
        wait_share,
        max(now.disk.fetched_bytes - before.disk.fetched_bytes, 0) / seconds,
        "consumer" if wait_share < _LITTLE_WAITING else waits_for,
    )


class Gauge:
    """Reads a queue again and again; rates are those of the last few readings."""

    def __init__(self, queue: BudgetedQueue) -> None:
        """Read it for the first time."""
        self._queue = queue
        self._readings = deque([read(queue)], maxlen=_WINDOW)

    def read(self) -> Moment:
        """Return what happened since a few readings ago."""
        self._readings.append(read(self._queue))
        return between(self._readings[0], self._readings[-1])
