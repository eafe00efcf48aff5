"""What threads spend their time on, and how a run went, in memory that stays small.

Owns counts. Whoever does work says what it is with :func:`doing`; where the seconds are counted is
for whoever asked for the work. Promises that a day takes no more memory than a minute. Never starts
a thread.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Generic, TypeVar

_Reading = TypeVar("_Reading")


class Activity:
    """Seconds of threads by what they do, up to now; safe to share by them."""

    def __init__(self) -> None:
        """Count nothing yet."""
        self._mutex = threading.Lock()
        self._seconds: Counter[str] = Counter()
        self._now: dict[int, tuple[str, float]] = {}

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Count this thread's seconds while the block runs, but for what is counted within it."""
        before = self._turn_to(what)
        try:
            yield
        finally:
            self._turn_to(before)

    def _turn_to(self, what: str) -> str:
        """Have this thread do something else from now on, or nothing; return what it did."""
        thread, now_s = threading.get_ident(), time.monotonic()
        with self._mutex:
            before, since_s = self._now.pop(thread, ("", now_s))
            self._seconds[before] += now_s - since_s  # type: ignore[assignment]
            if what:
                self._now[thread] = what, now_s
        return before

    def seconds(self, what: str) -> float:
        """Return how long threads did this, those that still do included."""
        with self._mutex:
            now_s = time.monotonic()
            under_way = (now_s - since_s for name, since_s in self._now.values() if name == what)
            return self._seconds[what] + sum(under_way)

    def threads(self, what: str) -> int:
        """Return how many threads do this now."""
        with self._mutex:
            return sum(name == what for name, _ in self._now.values())


_activity: ContextVar[Activity | None] = ContextVar("activity", default=None)


@contextmanager
def counted_by(activity: Activity) -> Iterator[None]:
    """Count what this thread says that it does while the block runs."""
    token = _activity.set(activity)
    try:
        yield
    finally:
        _activity.reset(token)


def doing(what: str) -> AbstractContextManager[None]:
    """Say what this thread does while the block runs, to whoever counts that.

    Args:
        what: ``"content"``: waits until it is on disk; ``"decode"``, ``"transform"``, ``"sample"``.

    Example:
        >>> activity = Activity()
        >>> with counted_by(activity), doing("decode"):
        ...     activity.threads("decode")
        1
    """
    activity = _activity.get()
    return nullcontext() if activity is None else activity.doing(what)


class History(Generic[_Reading]):
    """Readings in order, the first and the last among them, never more than so many.

    Where they become too many, every second one is forgotten and they come half as often.

    Example:
        >>> history = History(most=4)
        >>> for number in range(10):
        ...     history.add(number)
        >>> history.readings()
        (0, 6, 8, 9)
    """

    def __init__(self, *, most: int, interval_s: float = 0.0) -> None:
        """Have none yet.

        Args:
            most: How many are kept, an even number.
            interval_s: Seconds between two, at first.
        """
        self._most = most
        self._interval_s = interval_s
        self._due_s = 0.0
        self._kept: list[_Reading] = []

    def is_due(self) -> bool:
        """Tell whether the next one should be added."""
        return time.monotonic() >= self._due_s

    def add(self, reading: _Reading) -> None:
        """Keep a reading, the newest."""
        kept = [*self._kept, reading]
        if len(kept) > self._most:
            kept = kept[::2]
            self._interval_s *= 2
        self._kept = kept
        self._due_s = time.monotonic() + self._interval_s

    def readings(self) -> tuple[_Reading, ...]:
        """Return what is kept, the oldest first."""
        return tuple(self._kept)
