"""What is used next, and fetching it before it is asked for.

Owns the known order of one process. Prefetched content carries no lease: it takes room that is
free or held by what is used later still, gives way to every lease, and is cancelled for one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tio_openneuro.content import ContentFile, ContentId, ContentUnit
from tio_openneuro.disk.fetching import IDLE_S, Fetches
from tio_openneuro.disk.store import Fetch, Store
from tio_openneuro.errors import TioOpenNeuroError
from tio_openneuro.ledger import Answer, Changes, Ledger, Transaction, Want, growing_pause_s

_LOGGER = logging.getLogger(__name__)
_VERIFY_S = 1.0
_RETRY_S = 60.0
_POLL_S = 0.05
_CANCEL_POLL_S = 0.1
_EXPECTED = 1 << 40
"""Position, beyond any known one, of the first use that is expected at a time not known yet."""

Ask = Callable[[Transaction, frozenset[ContentId]], Answer]


@dataclass(eq=False, slots=True)
class _Entry:
    """One use of a unit, in order.

    Attributes:
        position: Its place; rises along the order.
        unit: The unit.
        files: Its files by content.
        ready: Whether all of it was there or on its way when last looked at.
        fetched_bytes: Bytes of it that were absent and are fetched ahead.
        dropped: Whether another order took the place of the one that it belongs to.
    """

    position: int
    unit: ContentUnit
    files: dict[ContentId, ContentFile]
    ready: bool = False
    fetched_bytes: int = 0
    dropped: bool = False

    def is_use_of(self, name: str, contents: Iterable[ContentId]) -> bool:
        """Return whether it is a use of that unit."""
        return self.unit.name == name and self.files.keys() == set(contents)


class LookAhead:
    """The known order of one process, and how far it is fetched."""

    def __init__(self, ledger: Ledger, store: Store, fetches: Fetches, changes: Changes) -> None:
        """Know no order yet."""
        self._fetches = fetches
        self._changes = changes
        self._ledger = ledger
        self._store = store
        self._mutex = threading.Lock()
        # Held while a fetch may be about to begin: who takes it knows that none is.
        self._planning = threading.Lock()
        self._entries: list[_Entry] = []
        self._fetched: set[_Entry] = set()
        self._expected: list[ContentUnit] = []
        self._largest_bytes = 0
        self._reached = 0
        self._last = 0
        self._taken: Counter[str] = Counter()
        self._spared: set[str] = set()
        self._holders = 0
        self._avoid: set[ContentId] = set()
        self._blocked: tuple[int, int] | None = None
        self._blocked_s = 0.0
        self._verified: tuple[int, float] = (-1, 0.0)

    # The order

    def replace(self, units: Sequence[ContentUnit], expected: Sequence[ContentUnit] = ()) -> None:
        """Make this the order from now on, and fetch ahead along it.

        Args:
            units: The next uses, in order.
            expected: What is used after them in an order not known yet, the likeliest first.
        """
        files = [self._store.files_of(unit) for unit in units]
        with self._mutex:
            rest = self._entries
            follows = len(rest) <= len(units) and all(
                entry.is_use_of(unit.name, contents)
                for entry, unit, contents in zip(rest, units, files, strict=False)
            )
            if not follows:
                for entry in rest:
                    entry.dropped = True
                self._entries = []
                self._fetched.clear()
                self._reached = self._last
            added = [
                _Entry(self._last + step, unit, contents)
                for step, (unit, contents) in enumerate(
                    zip(units[len(self._entries) :], files[len(self._entries) :], strict=True), 1
                )
            ]
            self._entries = self._entries + added
            self._last += len(added)
            self._blocked = None
            self._largest_bytes = max((unit.size_bytes for unit in units), default=0)
            uses = [(e.position, e.unit.name, c) for e in added for c in self._used(e.unit)]
            if not follows or list(expected) != self._expected:
                follows, self._expected = False, list(expected)
                uses = [
                    (e.position, e.unit.name, c) for e in self._entries for c in self._used(e.unit)
                ]
                uses += [
                    (_EXPECTED + rank, unit.name, content)
                    for rank, unit in enumerate(expected)
                    for content in self._used(unit)
                ]
            if uses or not follows:
                with self._ledger.transaction() as decide:
                    decide.set_order(uses, replace=not follows, reached=self._reached)
        self._fetches.cancel_ahead(frozenset(c for contents in files for c in contents))
        if units:
            self._fetches.start(self._plan)
        self._changes.notify()

    def _used(self, unit: ContentUnit) -> Iterable[ContentId]:
        """Return the content that a use of the unit is a use of; the rest is the first to go."""
        if unit.prepared is not None and is_prepared(unit) and unit.name not in self._spared:
            return [self._store.content_of(unit.prepared)]
        return self._store.files_of(unit)

    def steps_to(self, name: str) -> int | None:
        """Return how many steps ahead a unit is used next, where that is known."""
        with self._mutex:
            steps = (e.position - self._reached for e in self._entries if e.unit.name == name)
            return next(steps, None)

    def prepared(self, unit: ContentUnit, *, worth: bool) -> None:
        """Note that a unit's prepared volume was kept, or is gone.

        Args:
            unit: The unit.
            worth: Whether the volume is worth more room than the files.
        """
        with self._mutex:
            (self._spared.discard if worth else self._spared.add)(unit.name)
            self._publish_anew([e for e in self._entries if e.unit.name == unit.name])

    @contextmanager
    def held(self) -> Iterator[None]:
        """Begin no prefetch while the block runs: it makes room for something of its own."""
        with self._mutex:
            self._holders += 1
        try:
            yield
        finally:
            with self._mutex:
                self._holders -= 1

    def _publish_anew(self, entries: Sequence[_Entry]) -> None:
        uses = [(e.position, e.unit.name, c) for e in entries for c in self._used(e.unit)]
        gone = [entry.position for entry in entries]
        with self._ledger.transaction() as decide:
            decide.set_order(uses, replace=False, reached=self._reached, gone=gone)

    def take(self, unit: ContentUnit, contents: Iterable[ContentId]) -> int | None:
        """Strike out the next use of a unit, now begun; return its position, if it has one."""
        wanted = set(contents)
        with self._mutex:
            for index, entry in enumerate(self._entries):
                if entry.is_use_of(unit.name, wanted):
                    del self._entries[index]
                    self._fetched.discard(entry)
                    self._reached = max(self._reached, entry.position)
                    self._taken[unit.name] += 1
                    return entry.position
        return None

    def release(self, unit: ContentUnit, contents: Iterable[ContentId]) -> None:
        """Strike out a use that another process took, a worker that loads for this one."""
        with self._mutex:
            if self._taken[unit.name] > 0:
                self._taken[unit.name] -= 1
                return
        position = self.take(unit, contents)
        if position is not None:
            self._taken[unit.name] -= 1
            self.reach(position)

    def reach(self, position: int) -> None:
        """Tell all processes how far this one has come."""
        with self._ledger.transaction() as decide:
            decide.reach(position)

    def lost(self, contents: Iterable[ContentId]) -> None:
        """Note that content is gone, so that it is prefetched again when there is room."""
        gone = set(contents)
        if not gone:
            return
        with self._mutex:
            for entry in self._entries:
                if entry.ready and not gone.isdisjoint(self._store.all_of(entry.unit)):
                    self._look_anew(entry)

    def _look_anew(self, entry: _Entry) -> None:
        """Let an entry be prefetched once more; its files are needed where nothing else is there.

        Held: the lock.
        """
        entry.ready = False
        self._fetched.discard(entry)
        if entry.unit.prepared is not None:
            self._publish_anew([entry])

    # Room

    def make_way(self, ask: Ask, reason: str, kept: set[ContentId]) -> Answer:
        """Ask the ledger, drop what is to give way, and ask again, until nothing more is.

        Args:
            ask: Decides within one transaction, given what must not be chosen.
            reason: Why content gives way, for the log.
            kept: What must not give way; what cannot be dropped is added.

        Returns:
            The last answer: granted, or refused with nothing to drop.
        """
        while True:
            with self._ledger.transaction() as decide:
                answer = ask(decide, frozenset(kept))
            if not answer.victims:
                return answer
            self.lost(answer.victims)
            kept |= self._store.drop(answer.victims, reason)

    # Fetching ahead

    def begin(
        self, unit: ContentUnit, files: Mapping[ContentId, ContentFile], answer: Answer
    ) -> list[Fetch]:
        """Begin to fetch what was reserved ahead of its use, and return the fetches."""
        begun = []
        for content in answer.fetch:
            fresh = content not in answer.resumed
            begun.append(Fetch(content, files[content], unit.name, fresh, ahead=True))
            self._fetches.add(begun[-1])
        self._fetches.start(self._plan)
        return begun

    def _plan(self) -> None:
        """Keep as many fetches queued as can run at once, and give up those not wanted."""
        while not self._fetches.closing:
            seen = self._changes.value
            try:
                with self._planning:
                    self.lost(self._fetches.given_up())
                    waiting = self._fetches.end_cancelled()
                    pause_s = _CANCEL_POLL_S
                    if waiting < self._fetches.jobs:
                        ahead_s = self._look_ahead()
                        pause_s = min(ahead_s, pause_s) if waiting else ahead_s
            except Exception:
                if self._fetches.closing:
                    return
                _LOGGER.exception("Fetching ahead stops: the ledger could not be used.")
                pause_s = _RETRY_S
            changed = pause_s <= 0 or self._changes.wait_here(seen, pause_s)
            if pause_s == IDLE_S and not changed:
                return

    def _look_ahead(self) -> float:
        """Begin the next fetch if there is room for it.

        Returns:
            Seconds after which another look is worth its while; zero if one was begun.
        """
        with self._mutex:
            waiting = bool(self._entries)
            held = self._holders > 0
            entry = next((entry for entry in self._entries if not entry.ready and not held), None)
            steps = entry.position - self._reached if entry else 0
            ahead_bytes = sum(each.fetched_bytes for each in self._fetched)
        if entry is None:
            self._verify()
            return _POLL_S if held else _VERIFY_S if waiting else IDLE_S
        now = self._changes.moment()
        if now == self._blocked:
            self._verify()
            return growing_pause_s(time.monotonic() - self._blocked_s)
        wants = self._wants(entry)
        if wants is None:
            entry.ready = True
            return 0

        def ask(decide: Transaction, kept: frozenset[ContentId]) -> Answer:
            if self._holders:
                return Answer()
            return decide.request_ahead(
                wants,
                steps,
                ahead_bytes=ahead_bytes,
                largest_bytes=self._largest_bytes,
                keep=kept,
                spare_bytes=self._store.spare_bytes(entry.files.values()),
            )

        answer = self.make_way(ask, f"for {entry.unit.name}, used sooner", self._avoid)
        if not answer.granted:
            self._blocked, self._blocked_s = now, time.monotonic()
            return growing_pause_s(0)
        entry.ready = True
        entry.fetched_bytes = sum(w.size_bytes for w in wants if w.content in answer.fetch)
        with self._mutex:
            self._fetched.add(entry)
        self._avoid.clear()
        for fetch in self.begin(entry.unit, entry.files, answer):
            if entry.dropped:
                # The order was replaced after we looked, too late for it to cancel this.
                fetch.cancel.set()
        return 0

    def _wants(self, entry: _Entry) -> list[Want] | None:
        """Return what an entry needs, or None where nothing is to be fetched for it."""
        if is_prepared(entry.unit):
            return None
        try:
            return self._store.wants(entry.files)
        except TioOpenNeuroError as error:
            _LOGGER.debug("Not prefetched: %s", error)
            return None

    def _verify(self) -> None:
        """Look again, now and then, whether others evicted what was prefetched."""
        now_s, changes = time.monotonic(), self._ledger.changes()
        # Our own evictions are told to lost(): without a change by others there is nothing new.
        if now_s - self._verified[1] < _VERIFY_S or changes == self._verified[0]:
            return
        self._verified = (changes, now_s)
        with self._mutex:
            ready = [entry for entry in self._entries if entry.ready]
        there = self._ledger.rows(content for entry in ready for content in entry.files)
        for entry in ready:
            if is_prepared(entry.unit):
                continue
            for content, file in entry.files.items():
                if content not in there and file.repo.locate(file.key) is None:
                    entry.ready = False


def is_prepared(unit: ContentUnit) -> bool:
    """Return whether a unit's files are not needed, since its prepared volume is there."""
    return unit.prepared is not None and unit.prepared.repo.locate(unit.prepared.key) is not None
