"""What is used next, and fetching it before it is asked for.

Owns the known order of one process. Prefetched content carries no lease: it takes room that is
free or held by what is used later still, gives way to every lease, and is cancelled for one.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

from tio_openneuro.content import ContentFile, ContentId, ContentUnit
from tio_openneuro.disk.fetching import IDLE_S, Fetches
from tio_openneuro.disk.store import Fetch, Store
from tio_openneuro.errors import TioOpenNeuroError
from tio_openneuro.ledger import (
    Answer,
    Changes,
    ContentState,
    Ledger,
    Transaction,
    Use,
    Want,
    growing_pause_s,
)

_LOGGER = logging.getLogger(__name__)
_VERIFY_S = 1.0
_RETRY_S = 60.0
_POLL_S = 0.05
_CANCEL_POLL_S = 0.1
# Uses that are looked at again, now and then, whether they are there still.
_WINDOW_UNITS = 64
_ROWS_AT_ONCE = 500
# Position, beyond any known one, of the first use that is expected at a time not known yet.
EXPECTED = 1 << 40

Ask = Callable[[Transaction, frozenset[ContentId]], Answer]
Begun = tuple[int | None, list[Use]]


@dataclass(eq=False, slots=True)
class _Entry:
    """One use of a unit, in order.

    Attributes:
        position: Its place; rises along the order.
        unit: The unit.
        files: Its files by content.
        ready: Whether all of it was there or on its way when last looked at.
        fetched_bytes: Bytes of it that were absent and are fetched ahead.
        taken: Whether it was begun.
        dropped: Whether another order took the place of the one that it belongs to.
    """

    position: int
    unit: ContentUnit
    files: dict[ContentId, ContentFile]
    ready: bool = False
    fetched_bytes: int = 0
    taken: bool = False
    dropped: bool = False

    def __lt__(self, other: _Entry) -> bool:
        return self.position < other.position

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
        self._expected: list[ContentUnit] = []
        self._know([])
        self._largest_bytes = 0
        self._reached = 0
        self._last = 0
        self._published = 0
        self._taken: Counter[str] = Counter()
        self._spared: set[str] = set()
        self._holders = 0
        self._avoid: set[ContentId] = set()
        self._blocked: tuple[int, int] | None = None
        self._blocked_s = 0.0
        self._verified: tuple[int, float] = (-1, 0.0)

    def _know(self, entries: list[_Entry]) -> None:
        """Have these uses, in order, and those that are expected after them. Held: the lock."""
        self._entries = deque(entries)
        self._unready = [entry for entry in entries if not entry.ready]
        self._ahead_bytes = sum(entry.fetched_bytes for entry in entries)
        self._of_unit: defaultdict[str, list[_Entry]] = defaultdict(list)
        self._of_content: defaultdict[ContentId, list[_Entry]] = defaultdict(list)
        for entry in entries:
            self._of_unit[entry.unit.name].append(entry)
        likely = (_Entry(EXPECTED + rank, unit, {}) for rank, unit in enumerate(self._expected))
        for entry in (*entries, *likely):
            for content in self._store.all_of(entry.unit):
                self._of_content[content].append(entry)

    # The order

    def replace(self, units: Sequence[ContentUnit], expected: Sequence[ContentUnit] = ()) -> None:
        """Make this the order from now on, and fetch ahead along it.

        Args:
            units: The next uses, in order.
            expected: What is used after them in an order not known yet, the likeliest first.
        """
        files = [self._store.files_of(unit) for unit in units]
        with self._mutex:
            rest = [entry for entry in self._entries if not entry.taken]
            follows = len(rest) <= len(units) and all(
                entry.is_use_of(unit.name, contents)
                for entry, unit, contents in zip(rest, units, files, strict=False)
            )
            for entry in () if follows else rest:
                entry.dropped = True
            rest = rest if follows else []
            changed = not follows or len(rest) < len(units) or list(expected) != self._expected
            self._reached = self._reached if follows else self._last
            for unit, contents in zip(units[len(rest) :], files[len(rest) :], strict=True):
                self._last += 1
                rest.append(_Entry(self._last, unit, contents))
            self._expected = list(expected)
            self._know(rest)
            self._blocked = None
            self._largest_bytes = max((unit.size_bytes for unit in units), default=0)
            if changed:
                some = bool(units or expected)
                with self._ledger.transaction() as decide:
                    decide.set_order((), replace=not some, reached=self._reached, ordered=some)
                self._published = 0
        self._publish()
        self._fetches.cancel_ahead(frozenset(c for contents in files for c in contents))
        if units:
            self._fetches.start(self._plan)
        self._changes.notify()

    def _publish(self) -> None:
        """Tell all processes when this one uses what is held, as far as they do not know it.

        What came since the last call is looked at, whoever fetched it; all of it in a new order.
        """
        more = bool(self._of_content)
        while more:
            with self._mutex:
                held = self._ledger.held_after(self._published, _ROWS_AT_ONCE)
                uses = [(self._next_use(content), known) for _, content, known in held]
                self._tell([use for use, known in uses if use[0] != known])
                self._published = held[-1][0] if held else self._published
            more = len(held) == _ROWS_AT_ONCE

    def _tell(self, uses: Sequence[Use]) -> None:
        if uses:
            with self._ledger.transaction() as decide:
                decide.set_order(uses, replace=False, reached=self._reached)

    def _next_use(self, content: ContentId) -> Use:
        """Return the next use of content. Held: the lock."""
        for entry in self._of_content.get(content, ()):
            if not entry.taken and content in self._used(entry.unit):
                return entry.position, entry.unit.name, content
        return None, "", content

    def _used(self, unit: ContentUnit) -> Collection[ContentId]:
        """Return the content that a use of the unit is a use of; the rest is the first to go."""
        if unit.prepared is not None and is_prepared(unit) and unit.name not in self._spared:
            return [self._store.content_of(unit.prepared)]
        return self._store.files_of(unit)

    def steps_to(self, name: str) -> int | None:
        """Return how many steps ahead a unit is used next, where that is known."""
        with self._mutex:
            uses = (entry for entry in self._of_unit.get(name, ()) if not entry.taken)
            return next((entry.position - self._reached for entry in uses), None)

    def prepared(self, unit: ContentUnit, *, worth: bool) -> None:
        """Note that a unit's prepared volume was kept, or is gone.

        Args:
            unit: The unit.
            worth: Whether the volume is worth more room than the files.
        """
        with self._mutex:
            (self._spared.discard if worth else self._spared.add)(unit.name)
            self._tell([self._next_use(content) for content in self._store.all_of(unit)])

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

    def take(self, unit: ContentUnit, contents: Iterable[ContentId]) -> Begun:
        """Strike out the next use of a unit, now begun.

        Returns:
            Its position, None where it was not known, and the next uses of its content after it.
        """
        wanted = set(contents)
        with self._mutex:
            uses = (e for e in self._of_unit.get(unit.name, ()) if not e.taken)
            entry = next((e for e in uses if e.is_use_of(unit.name, wanted)), None)
            if entry is None:
                return None, []
            entry.taken = entry.ready = True
            self._set_fetched(entry, 0)
            self._reached = max(self._reached, entry.position)
            self._taken[unit.name] += 1
            contents = self._store.all_of(unit)
            lists = (self._of_unit[unit.name], *(self._of_content[c] for c in contents))
            for entries in (self._entries, *lists):
                while entries and entries[0].taken:
                    del entries[0]
            return entry.position, [self._next_use(content) for content in contents]

    def release(self, unit: ContentUnit, contents: Iterable[ContentId]) -> None:
        """Strike out a use that another process took, a worker that loads for this one."""
        with self._mutex:
            if self._taken[unit.name] > 0:
                self._taken[unit.name] -= 1
                return
        if self.begin_use(unit, contents):
            self._taken[unit.name] -= 1

    def begin_use(self, unit: ContentUnit, contents: Iterable[ContentId]) -> bool:
        """Strike out the next use of a unit, and tell all processes; return whether it has one."""
        position, following = self.take(unit, contents)
        if position is not None:
            with self._ledger.transaction() as decide:
                decide.reach(position, following)
        return position is not None

    def _set_fetched(self, entry: _Entry, size_bytes: int) -> None:
        """Note how much of a use is fetched ahead. Held: the lock."""
        self._ahead_bytes += size_bytes - entry.fetched_bytes
        entry.fetched_bytes = size_bytes

    def lost(self, contents: Iterable[ContentId]) -> None:
        """Note that content is gone, so that it is prefetched again when there is room."""
        with self._mutex:
            for content in contents:
                for entry in self._of_content.get(content, ()):
                    self._set_fetched(entry, 0)
                    self._look_anew(entry)

    def _look_anew(self, entry: _Entry) -> None:
        """Have an entry looked at once more, if it is to be used. Held: the lock."""
        if entry.ready and not entry.taken:
            entry.ready = False
            heapq.heappush(self._unready, entry)

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
            begun.append(Fetch(content, files[content], unit.name, ahead=True))
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
        self._publish()
        with self._mutex:
            held, waiting = self._holders > 0, bool(self._entries)
            entry = None if held else self._first_unready()
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
        with self._mutex:
            steps, ahead_bytes = entry.position - self._reached, self._ahead_bytes
            uses = [self._next_use(want.content) for want in wants]

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
                uses=uses,
            )

        answer = self.make_way(ask, f"for {entry.unit.name}, used sooner", self._avoid)
        if not answer.granted:
            self._blocked, self._blocked_s = now, time.monotonic()
            return growing_pause_s(0)
        with self._mutex:
            entry.ready = True
            if not entry.taken and not entry.dropped:
                fetched = (want.size_bytes for want in wants if want.content in answer.fetch)
                self._set_fetched(entry, sum(fetched, entry.fetched_bytes))
        self._avoid.clear()
        for fetch in self.begin(entry.unit, entry.files, answer):
            if entry.dropped:
                # The order was replaced after we looked, too late for it to cancel this.
                fetch.cancel.set()
        return 0

    def _first_unready(self) -> _Entry | None:
        """Return the first use that may need something. Held: the lock."""
        while self._unready and self._unready[0].ready:
            heapq.heappop(self._unready)
        return self._unready[0] if self._unready else None

    def _wants(self, entry: _Entry) -> list[Want] | None:
        """Return what an entry needs, or None where nothing is to be fetched for it."""
        if is_prepared(entry.unit):
            return None
        rows = self._ledger.rows(entry.files)
        try:
            wants = self._store.wants(entry.files)
        except TioOpenNeuroError as error:
            _LOGGER.debug("Not prefetched: %s", error)
            return None
        # Without a transaction, which would be one for each use where everything is there.
        present = {c for c, row in rows.items() if row.state is ContentState.PRESENT}
        there = (w.content in present or (w.located and w.content not in rows) for w in wants)
        return None if all(there) else wants

    def _verify(self) -> None:
        """Look again, now and then, whether others evicted what was prefetched."""
        now_s, changes = time.monotonic(), self._ledger.changes()
        # Our own evictions are told to lost(): without a change by others there is nothing new.
        if now_s - self._verified[1] < _VERIFY_S or changes == self._verified[0]:
            return
        self._verified = (changes, now_s)
        with self._mutex:
            for entry in islice(self._entries, _WINDOW_UNITS):
                self._look_anew(entry)


def is_prepared(unit: ContentUnit) -> bool:
    """Return whether a unit's files are not needed, since its prepared volume is there."""
    return unit.prepared is not None and unit.prepared.repo.locate(unit.prepared.key) is not None
