"""Fetches under way: one per key in a process, on a bounded number of daemon threads.

Owns the threads and the queue of fetches. What is leased goes before what is prefetched. The
threads hold nothing of the user's but the units that they fetch; they end with :meth:`close`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tio_openneuro.content import ContentFile
from tio_openneuro.eviction import ContentId

_LOGGER = logging.getLogger(__name__)
_IDLE_S = 60.0


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
    ) -> None:
        """Start nothing yet.

        Args:
            jobs: Fetches at once.
            signal: Notified when a fetch ends.
            run: Carries out one fetch and tells the ledger; its errors end up in the flight.
            look_ahead: Tries to begin the next prefetch. Returns seconds to wait before it is
                worth another try: zero if it began one.
        """
        self._jobs = jobs
        self._signal = signal
        self._run = run
        self._look_ahead = look_ahead
        self._mutex = threading.Lock()
        self._ahead = threading.Lock()
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
            while not self._closing and len(self._threads) < self._jobs:
                name = f"tio-openneuro-fetch-{len(self._threads)}"
                thread = threading.Thread(target=self._work, name=name, daemon=True)
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

    def _work(self) -> None:
        try:
            self._serve()
        finally:
            with self._mutex:
                self._running -= 1
                last = self._at_end if self._running == 0 else None
            if last is not None:
                last()

    def _serve(self) -> None:
        while True:
            seen = self._signal.value
            if self._closing:
                return
            flight = self._take()
            if flight is not None:
                self._carry_out(flight)
                continue
            pause_s = _IDLE_S
            if self._ahead.acquire(blocking=False):
                # One thread looks ahead at a time; the others wait for what it finds.
                try:
                    pause_s = self._look_ahead()
                except Exception:
                    if self._closing:
                        return
                    _LOGGER.exception("Prefetching stops: the ledger could not be used.")
                finally:
                    self._ahead.release()
            if pause_s > 0:
                self._signal.wait(seen, pause_s)

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
