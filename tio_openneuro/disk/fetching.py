"""Fetches under way: one per key in a process, on a bounded number of daemon threads.

Owns the threads and the queue of fetches: some that fetch, and one that reserves ahead of them,
so that a connection that is done goes on at once. What is leased goes before what is prefetched.
The threads hold nothing of the user's but the units that they fetch; they end with :meth:`close`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tio_openneuro.content import ContentFile
from tio_openneuro.ledger import ContentId

_LOGGER = logging.getLogger(__name__)
_IDLE_S = 60.0
_CANCEL_POLL_S = 0.1
_SHORTEST_PAUSE_S = 0.002
_LONGEST_PAUSE_S = 0.25
_PAUSE_SHARE = 8


def growing_pause_s(waited_s: float) -> float:
    """Return how long to wait before looking again at what other processes change.

    What they do is found out late by an eighth of the wait at most, and a long wait costs next to
    no processor time: four looks a second.

    Args:
        waited_s: Seconds since the wait began.
    """
    return min(max(_SHORTEST_PAUSE_S, waited_s / _PAUSE_SHARE), _LONGEST_PAUSE_S)


class Signal:
    """A number that rises whenever something changes in this process, and can be waited for."""

    def __init__(self) -> None:
        """Start from zero."""
        self._condition = threading.Condition()
        self.value = 0

    def notify(self) -> None:
        """Wake everybody who waits."""
        with self._condition:
            self.value += 1
            self._condition.notify_all()

    def wait(self, seen: int, timeout_s: float) -> bool:
        """Return whether the number differs from the one seen, waiting for it at most so long."""
        with self._condition:
            return self._condition.wait_for(lambda: self.value != seen, timeout_s)


@dataclass(eq=False, slots=True)
class Flight:
    """One fetch, from its reservation to its end.

    Attributes:
        content: Whose content it is.
        file: Clone, key and path.
        unit: Name of the unit, for messages.
        fresh: Whether the content was reserved just now, so nothing of it is ours yet.
        prefetch: Whether nobody in this process waits for it.
        cancel: Set to end it soon.
        done: Set when it has ended, and the ledger knows.
        error: Why it failed.
    """

    content: ContentId
    file: ContentFile
    unit: str
    fresh: bool
    prefetch: bool = False
    started: bool = False
    cancel: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether it ended with an error that is not its being cancelled."""
        return self.done.is_set() and self.error is not None and not self.cancel.is_set()


class Flights:
    """The fetches of one process."""

    def __init__(
        self,
        jobs: int,
        signal: Signal,
        run: Callable[[Flight], None],
        look_ahead: Callable[[], float],
        cancelled: Callable[[ContentId], bool],
    ) -> None:
        """Start nothing yet.

        Args:
            jobs: Fetches at once.
            signal: Notified when a fetch ends.
            run: Carries out one fetch and tells the ledger; its errors end up in the flight.
            look_ahead: Tries to begin the next prefetch. Returns seconds to wait before it is
                worth another try: zero if it began one.
            cancelled: Says whether somebody needs the room of a prefetch that has not begun.
        """
        self._jobs = jobs
        self._signal = signal
        self._run = run
        self._look_ahead = look_ahead
        self._cancelled = cancelled
        self._mutex = threading.Lock()
        # Held while a prefetch may be about to begin: who takes it knows that none is.
        self._planning = threading.Lock()
        self._known: dict[ContentId, Flight] = {}
        self._leased: deque[Flight] = deque()
        self._prefetched: deque[Flight] = deque()
        self._threads: list[threading.Thread] = []
        self._running = 0
        self._at_end: Callable[[], None] | None = None
        self._closing = False

    def add(self, flight: Flight) -> None:
        """Queue a fetch whose content this process has reserved; cancelled once we are closing."""
        with self._mutex:
            closing = self._closing
            if not closing:
                self._known[flight.content] = flight
                (self._prefetched if flight.prefetch else self._leased).append(flight)
                if not flight.prefetch:
                    self._preempt()
        if closing:
            flight.cancel.set()
            self._carry_out(flight)
            return
        self.start()
        self._signal.notify()

    def promote(self, content: ContentId) -> Flight | None:
        """Return the fetch of this content, which somebody now waits for; None if there is none."""
        with self._mutex:
            flight = self._known.get(content)
            if flight is not None and flight.prefetch:
                flight.prefetch = False
                if not flight.started:
                    self._prefetched.remove(flight)
                    self._leased.append(flight)
            return flight

    def _preempt(self) -> None:
        """End the prefetch begun last where all threads are busy and some of them prefetch."""
        running = [flight for flight in self._known.values() if flight.started]
        ahead = [flight for flight in running if flight.prefetch and not flight.cancel.is_set()]
        ending = sum(flight.cancel.is_set() for flight in running)
        if ahead and len(running) - ending + len(self._leased) > self._jobs:
            ahead[-1].cancel.set()

    def cancel_prefetches(self, keep: frozenset[ContentId] = frozenset()) -> None:
        """End the prefetches of anything else."""
        with self._mutex:
            for flight in self._known.values():
                if flight.prefetch and flight.content not in keep:
                    flight.cancel.set()

    def start(self) -> None:
        """Start the threads, if they do not run."""
        with self._mutex:
            if self._closing or self._threads:
                return
            numbered = [(f"fetch-{number}", self._serve) for number in range(self._jobs)]
            for name, work in [*numbered, ("ahead", self._plan)]:
                thread = threading.Thread(
                    target=self._work, args=(work,), name=f"tio-openneuro-{name}", daemon=True
                )
                self._threads.append(thread)
                self._running += 1
                thread.start()

    def _take(self) -> Flight | None:
        with self._mutex:
            queue = self._leased or self._prefetched
            if not queue:
                return None
            flight = queue.popleft()
            flight.started = True
            return flight

    def _work(self, work: Callable[[], None]) -> None:
        try:
            work()
        finally:
            with self._mutex:
                self._running -= 1
                last = self._at_end if self._running == 0 else None
            if last is not None:
                last()

    def _serve(self) -> None:
        """Carry out what is queued."""
        while True:
            seen = self._signal.value
            if self._closing:
                return
            flight = self._take()
            if flight is None:
                self._signal.wait(seen, _IDLE_S)
            else:
                self._carry_out(flight)

    def _plan(self) -> None:
        """Keep as many prefetches queued as can run at once, and give up those not wanted."""
        while True:
            seen = self._signal.value
            if self._closing:
                return
            try:
                with self._planning:
                    pause_s = self._plan_once()
            except Exception:
                if self._closing:
                    return
                _LOGGER.exception("Prefetching stops: the ledger could not be used.")
                pause_s = _IDLE_S
            if pause_s > 0:
                self._signal.wait(seen, pause_s)

    def _plan_once(self) -> float:
        """Return seconds after which another look is worth its while."""
        with self._mutex:
            waiting = list(self._prefetched)
        for flight in waiting:
            if not flight.cancel.is_set() and self._cancelled(flight.content):
                flight.cancel.set()
            if flight.cancel.is_set() and self._claim(flight):
                self._carry_out(flight)
        if len(waiting) >= self._jobs:
            return _CANCEL_POLL_S
        pause_s = self._look_ahead()
        return min(pause_s, _CANCEL_POLL_S) if waiting else pause_s

    def _claim(self, flight: Flight) -> bool:
        """Take one prefetch out of the queue; return whether nobody else did."""
        with self._mutex:
            if flight not in self._prefetched:
                return False
            self._prefetched.remove(flight)
            flight.started = True
            return True

    def _carry_out(self, flight: Flight) -> None:
        try:
            self._run(flight)
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits for it
            flight.error = error
        finally:
            with self._mutex:
                if self._known.get(flight.content) is flight:
                    del self._known[flight.content]
            flight.done.set()
            self._signal.notify()

    def close(self, timeout_s: float, at_end: Callable[[], None]) -> bool:
        """Cancel everything, and have something done once every thread has ended.

        Args:
            timeout_s: Seconds to wait for the threads.
            at_end: Called by us, or by the last thread where that takes longer.

        Returns:
            Whether the threads ended in time.
        """
        with self._mutex:
            self._closing = True
            waiting = [*self._leased, *self._prefetched]
            self._leased.clear()
            self._prefetched.clear()
            for flight in self._known.values():
                flight.cancel.set()
            threads = list(self._threads)
        # Those that never started are run once more, to find that they are cancelled.
        for flight in waiting:
            self._carry_out(flight)
        self._signal.notify()
        deadline_s = time.monotonic() + timeout_s
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline_s - time.monotonic()))
        with self._mutex:
            ended = self._running == 0
            if not ended:
                self._at_end = at_end
        if ended:
            at_end()
        return ended
