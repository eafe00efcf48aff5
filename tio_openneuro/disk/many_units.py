"""Fetch, evict and adopt many units at once, for people at a prompt rather than for training.

Owns no state. Only tries to reserve, never waits for room, and never evicts for it what anybody
is known to use.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

from tio_openneuro.content import ContentFile, ContentUnit
from tio_openneuro.disk.fetching import Flight
from tio_openneuro.disk.leases import Runtime
from tio_openneuro.errors import DiskBudgetError
from tio_openneuro.ledger import ContentId
from tio_openneuro.sizes import format_size

_LOGGER = logging.getLogger(__name__)
_LATEST = 1 << 60
_QUEUE_TIMEOUT_S = 600.0
_WAIT_S = 60.0


def fetch(
    runtime: Runtime,
    units: Sequence[ContentUnit],
    jobs: int,
    on_progress: Callable[[int, int], None] | None,
) -> int:
    """Fetch units in order, as far as there is room: see :meth:`Engine.fetch`."""
    all_files = [runtime.store.files_of(unit) for unit in units]
    keep = frozenset(content for files in all_files for content in files)
    total_bytes = sum(unit.size_bytes for unit in units)
    done_bytes = 0
    under_way = _UnderWay(runtime)
    for unit, files in zip(units, all_files, strict=True):
        started = _begin(runtime, unit, files, keep)
        if started is None:
            _LOGGER.info("Stopped fetching at %s: the disk budget is full.", unit.name)
            break
        under_way.flights += started
        under_way.collect(2 * jobs - 1)
        done_bytes += unit.size_bytes
        if on_progress is not None:
            on_progress(done_bytes, total_bytes)
    under_way.collect(0)
    if under_way.error is not None:
        raise under_way.error
    return under_way.fetched_bytes


class _UnderWay:
    """Fetches that were begun and have not been looked at since they ended."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.flights: list[Flight] = []
        self.fetched_bytes = 0
        self.error: BaseException | None = None

    def collect(self, most: int) -> None:
        """Wait until no more than that many are under way; each ends within its own deadline."""
        while len(self.flights) > most:
            seen = self._runtime.signal.value
            ended = [flight for flight in self.flights if flight.done.is_set()]
            for flight in ended:
                self.flights.remove(flight)
                if flight.error is None:
                    self.fetched_bytes += flight.file.key.size_bytes or 0
                elif flight.failed:
                    self.error = self.error or flight.error
            if not ended:
                self._runtime.signal.wait(seen, _WAIT_S)


def _begin(
    runtime: Runtime,
    unit: ContentUnit,
    files: dict[ContentId, ContentFile],
    keep: frozenset[ContentId],
) -> list[Flight] | None:
    """Begin to fetch a unit; return its fetches, or None where there is no room for it."""
    deadline_s = time.monotonic() + _QUEUE_TIMEOUT_S
    while True:
        since = runtime.moment()
        wants = runtime.store.wants(files)
        spare_bytes = runtime.store.spare_bytes(files.values())
        outcome = runtime.ledger.request_prefetch(
            wants, _LATEST, keep=keep, spare_bytes=spare_bytes
        )
        if outcome.granted:
            flights = []
            for content in outcome.fetch:
                fresh = content not in outcome.resumed
                flights.append(Flight(content, files[content], unit.name, fresh, prefetch=True))
                runtime.flights.add(flights[-1])
            return flights
        if outcome.why == "room":
            return None
        if outcome.victims:
            keep |= runtime.store.drop(outcome.victims, f"for {unit.name}")
            continue
        if time.monotonic() >= deadline_s:
            message = (
                f"Cannot fetch {unit.name} ({unit.size_bytes} bytes): others waited for room for "
                f"{_QUEUE_TIMEOUT_S:.0f} s; {runtime.who_leases()}. Raise disk_budget."
            )
            raise DiskBudgetError(message, unit=unit.name)
        runtime.wait(since, deadline_s)


def evict(runtime: Runtime, units: Iterable[ContentUnit]) -> int:
    """Drop what the ledger has of units and nobody leases: see :meth:`Engine.evict`."""
    contents = {content for unit in units for content in runtime.store.all_of(unit)}
    return drop(runtime, contents, "as asked")


def drop(runtime: Runtime, contents: Iterable[ContentId], reason: str) -> int:
    """Drop what of this nobody leases; return the bytes that came free."""
    rows = runtime.ledger.give_up(contents)
    failed = runtime.store.drop([row.content for row in rows], reason)
    return sum(row.size_bytes for row in rows if row.content not in failed)


def adopt(runtime: Runtime, units: Iterable[ContentUnit]) -> int:
    """Charge content that was there before: see :meth:`Engine.adopt`."""
    files = {c: file for unit in units for c, file in runtime.store.files_of(unit).items()}
    known = runtime.ledger.rows(files)
    wants = [w for w in runtime.store.wants(files) if w.located and w.content not in known]
    lost = _unavailable([files[want.content] for want in wants])
    adopted_bytes = 0
    spared = frozenset(want.content for want in wants)
    for want in wants:
        if want.content.key in lost:
            continue
        if not runtime.ledger.adopt(want):
            _, victims = runtime.ledger.make_room(want.size_bytes, spared)
            spared |= runtime.store.drop(victims, "for adopted content")
            if not runtime.ledger.adopt(want):
                _LOGGER.warning(
                    "Adopted %s; the rest does not fit into the disk budget and stays yours.",
                    format_size(adopted_bytes),
                )
                break
        adopted_bytes += want.size_bytes
    return adopted_bytes


def _unavailable(files: Iterable[ContentFile]) -> set[str]:
    """Return the keys that no remote could give back, as far as the clone can tell."""
    found = set()
    by_repo: dict[int, list[ContentFile]] = {}
    for file in files:
        by_repo.setdefault(id(file.repo), []).append(file)
    for group in by_repo.values():
        for key, reason in group[0].repo.unavailable([file.key for file in group]).items():
            _LOGGER.warning("Not adopted, since it could not be fetched again: %s: %s", key, reason)
            found.add(key.name)
    return found
