"""Fetches under way: one per key in a process, on a bounded number of daemon threads.

Owns the threads and the queue of fetches. What is leased goes before what is fetched ahead. The
threads hold nothing of the user's but the units that they fetch. They end when they find nothing
to do for a while, since a notebook's output may hold a dataset that nobody uses, and with
:meth:`close`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable

from tio_openneuro.content import ContentId
from tio_openneuro.disk.store import Fetch, Store
from tio_openneuro.ledger import Changes

IDLE_S = 2.0
_MOST_GIVEN_UP = 10_000


class Fetches:
    """The fetches of one process."""

    def __init__(self, jobs: int, store: Store, changes: Changes) -> None:
        """Start nothing yet.

        Args:
            jobs: Fetches at once.
            store: Carries out each.
            changes: Notified when a fetch ends.
        """
        self.jobs = jobs
        self.closing = False
        self._given_up: deque[ContentId] = deque(maxlen=_MOST_GIVEN_UP)
        self._store = store
        self._changes = changes
        self._mutex = threading.Lock()
        self._known: dict[ContentId, Fetch] = {}
        self._leased: deque[Fetch] = deque()
        self._ahead: deque[Fetch] = deque()
        self._threads: list[threading.Thread] = []
        self._running: Counter[Callable[[], None]] = Counter()
        self._starts = 0
        self._at_end: Callable[[], None] | None = None

    def add(self, fetch: Fetch) -> None:
        """Queue a fetch whose content this process has reserved; cancelled once we are closing."""
        with self._mutex:
            closing = self.closing
            if not closing:
                self._known[fetch.content] = fetch
                (self._ahead if fetch.ahead else self._leased).append(fetch)
                if not fetch.ahead:
                    self._preempt()
        if closing:
            fetch.cancel.set()
            self._carry_out(fetch)
            return
        self.start(self._fetch, self.jobs)
        self._changes.notify()

    def promote(self, content: ContentId) -> Fetch | None:
        """Return the fetch of this content, which somebody now waits for; None if there is none."""
        with self._mutex:
            fetch = self._known.get(content)
            if fetch is not None and fetch.ahead:
                fetch.ahead = False
                if not fetch.started:
                    self._ahead.remove(fetch)
                    self._leased.append(fetch)
            return fetch

    def _preempt(self) -> None:
        """End the prefetch begun last where all threads are busy and some of them prefetch."""
        running = [fetch for fetch in self._known.values() if fetch.started]
        ahead = [fetch for fetch in running if fetch.ahead and not fetch.cancel.is_set()]
        ending = sum(fetch.cancel.is_set() for fetch in running)
        if ahead and len(running) - ending + len(self._leased) > self.jobs:
            ahead[-1].cancel.set()

    def cancel_ahead(self, keep: frozenset[ContentId]) -> None:
        """End the fetches ahead of anything else."""
        with self._mutex:
            for fetch in self._known.values():
                if fetch.ahead and fetch.content not in keep:
                    fetch.cancel.set()

    def start(self, work: Callable[[], None], threads: int = 1) -> None:
        """Start the threads that lack for a work, which returns when it has nothing to do."""
        with self._mutex:
            if self.closing:
                return
            self._starts += 1
            name = work.__name__.replace("_", "-")
            for _ in range(threads - self._running[work]):
                thread = threading.Thread(
                    target=self._work, args=(work,), name=f"tio-openneuro{name}", daemon=True
                )
                self._threads = [each for each in self._threads if each.is_alive()] + [thread]
                self._running[work] += 1
                thread.start()

    def _take(self) -> Fetch | None:
        with self._mutex:
            queue = self._leased or self._ahead
            if not queue:
                return None
            fetch = queue.popleft()
            fetch.started = True
            return fetch

    def _work(self, work: Callable[[], None]) -> None:
        ended = False
        while not ended:
            ended, starts = True, self._starts
            try:
                work()
                ended = self.closing
            finally:
                with self._mutex:
                    # Whoever started it meanwhile found us here, and relies on us.
                    ended = ended or starts == self._starts
                    self._running[work] -= ended
                    last = self._at_end if ended and not self._running.total() else None
                if last is not None:
                    last()

    def _fetch(self) -> None:
        """Carry out what is queued."""
        while True:
            seen = self._changes.value
            if self.closing:
                return
            fetch = self._take()
            if fetch is not None:
                self._carry_out(fetch)
            elif not self._changes.wait_here(seen, IDLE_S):
                return

    def given_up(self) -> list[ContentId]:
        """Return what was cancelled since the last call."""
        return [self._given_up.popleft() for _ in range(len(self._given_up))]

    def end_cancelled(self) -> int:
        """End what is cancelled and never began; return how many more wait to fetch ahead."""
        with self._mutex:
            waiting = list(self._ahead)
        for fetch in waiting:
            if self._store.is_cancelled(fetch) and self._claim(fetch):
                self._carry_out(fetch)
        with self._mutex:
            return len(self._ahead)

    def _claim(self, fetch: Fetch) -> bool:
        """Take one prefetch out of the queue; return whether nobody else did."""
        with self._mutex:
            if fetch not in self._ahead:
                return False
            self._ahead.remove(fetch)
            fetch.started = True
            return True

    def _carry_out(self, fetch: Fetch) -> None:
        try:
            self._store.carry_out(fetch)
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits for it
            fetch.error = error
            if fetch.cancel.is_set():
                self._given_up.append(fetch.content)
        finally:
            with self._mutex:
                if self._known.get(fetch.content) is fetch:
                    del self._known[fetch.content]
            fetch.done.set()
            self._changes.notify()

    def close(self, timeout_s: float, at_end: Callable[[], None]) -> bool:
        """Cancel everything, and have something done once every thread has ended.

        Args:
            timeout_s: Seconds to wait for the threads.
            at_end: Called by us, or by the last thread where that takes longer.

        Returns:
            Whether the threads ended in time.
        """
        with self._mutex:
            self.closing = True
            waiting = [*self._leased, *self._ahead]
            self._leased.clear()
            self._ahead.clear()
            for fetch in self._known.values():
                fetch.cancel.set()
            threads = list(self._threads)
        # Those that never started are run once more, to find that they are cancelled.
        for fetch in waiting:
            self._carry_out(fetch)
        self._changes.notify()
        deadline_s = time.monotonic() + timeout_s
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline_s - time.monotonic()))
        with self._mutex:
            ended = not self._running.total()
            if not ended:
                self._at_end = at_end
        if ended:
            at_end()
        return ended
