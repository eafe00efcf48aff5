"""One process's part of an engine: its owner in the ledger, its threads, and its leases.

Made anew in every process that uses an engine, never carried over a fork. Keeps the rules against
deadlock: a unit's bytes are reserved at once, in the order of the queue; who holds a lease waits
for content alone, whose fetch is bounded.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tio_openneuro.content import ContentFile, ContentUnit
from tio_openneuro.disk.fetching import Flight, Flights, Signal, growing_pause_s
from tio_openneuro.disk.look_ahead import Prefetcher
from tio_openneuro.disk.statistics import Counters
from tio_openneuro.disk.store import OpenRepo, Store
from tio_openneuro.errors import DiskBudgetError, FetchError, LedgerError, TioOpenNeuroError
from tio_openneuro.ledger import (
    ContentId,
    ContentState,
    Ledger,
    Outcome,
    Row,
    free_bytes,
    prepare_ledger_folder,
)
from tio_openneuro.sizes import format_size

_LOGGER = logging.getLogger(__name__)
_REAP_S = 1.0
_SLOWEST_BYTES_PER_S = 50_000
_GRACE_S = 60.0
"""Fetches are bounded by the clone; these bound the wait for them a little more widely."""
_CLOSE_TIMEOUT_S = 2.0
_SHRINK_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What an engine is told; crosses processes.

    Attributes:
        root: Folder of clones and ledger.
        budget_bytes: Disk budget, or None while it is to be chosen.
        floor_bytes: Free bytes of the disk that are never used, or zero.
        jobs: Fetches at once in one process.
        open_repo: Opens a clone that only the ledger knows.
    """

    root: Path
    budget_bytes: int | None
    floor_bytes: int
    jobs: int
    open_repo: OpenRepo


class Runtime:
    """What one process has of an engine."""

    def __init__(self, settings: Settings) -> None:
        """Enter an owner in the ledger, and make way for its budget.

        Raises:
            DiskBudgetError: Leases of others exceed the budget.
            LedgerError: The root cannot hold a ledger.
        """
        self.pid = os.getpid()
        folder = prepare_ledger_folder(settings.root)
        self.ledger = Ledger(folder, settings.budget_bytes, free_bytes(folder))
        self.counters = Counters()
        self.signal = Signal()
        self.store = Store(
            self.ledger, self.counters, self.signal, settings.open_repo, settings.floor_bytes
        )
        self.prefetcher = Prefetcher(self.ledger, self.store, self.signal)
        self.flights = Flights(
            settings.jobs, self.signal, self._run, self._look_ahead, self.ledger.cancelled
        )
        self._reaped_s = time.monotonic()
        self._closed = False
        try:
            self._settle()
            self._shrink()
        except BaseException:
            self.close()
            raise

    def _run(self, flight: Flight) -> None:
        try:
            self.store.fetch(flight)
        except BaseException:
            if flight.cancel.is_set():
                self.prefetcher.lost([flight.content])
            raise

    def _look_ahead(self) -> float:
        return self.prefetcher.look_ahead(self.flights)

    # Waiting

    def moment(self) -> tuple[int, int]:
        """Return what changes whenever anything does, here or in another process."""
        return self.signal.value, self.ledger.changes()

    def wait(self, since: tuple[int, int], deadline_s: float) -> None:
        """Wait until something differs from then; reap dead owners meanwhile."""
        begun_s = time.monotonic()
        while (now_s := time.monotonic()) < deadline_s:
            if now_s - self._reaped_s > _REAP_S:
                self._reaped_s = now_s
                if self.ledger.reap():
                    return
            # Within the process a notification wakes us; other processes can only be looked at,
            # the more rarely the longer it takes.
            pause_s = min(growing_pause_s(now_s - begun_s), deadline_s - now_s)
            if self.signal.wait(since[0], pause_s) or self.ledger.changes() != since[1]:
                return

    def who_leases(self) -> str:
        """Return, for messages, how much is leased and by whom."""
        now = self.ledger.holdings()
        lease_pids = ", ".join(map(str, now.lease_pids)) or "none"
        fetch_pids = ", ".join(map(str, now.fetch_pids)) or "none"
        return (
            f"{now.leased_bytes} bytes ({format_size(now.leased_bytes)}) of the "
            f"{format_size(now.budget_bytes)} disk budget are leased (processes: {lease_pids}), "
            f"{format_size(now.used_bytes)} are held (processes that fetch: {fetch_pids})"
        )

    def _settle(self) -> None:
        """Finish what dead owners began: downloads that were whole, drops that were under way."""
        unfinished = self.ledger.unfinished()
        for row in unfinished:
            if row.state is ContentState.RESERVED and self.store.is_whole(row):
                self.ledger.arrived(row.content)
        dropping = [row.content for row in unfinished if row.state is ContentState.DROPPING]
        marked = self.ledger.give_up(dropping)
        self.store.drop([row.content for row in marked], "begun by a process that died")

    def _shrink(self) -> None:
        """Evict until the budget holds.

        Raises:
            DiskBudgetError: What others lease does not let it.
        """
        deadline_s = time.monotonic() + _SHRINK_TIMEOUT_S
        while True:
            since = self.moment()
            over_bytes, victims = self.ledger.make_room()
            if over_bytes <= 0:
                return
            failed = self.store.drop(victims, "for a smaller budget")
            if victims and not failed:
                continue
            if time.monotonic() > deadline_s:
                message = (
                    f"Cannot keep to a disk budget of {self.ledger.budget_bytes} bytes: "
                    f"{over_bytes} bytes too many are in use, and {self.who_leases()}. End those "
                    f"processes, or state a larger disk_budget."
                )
                raise DiskBudgetError(message)
            self.wait(since, deadline_s)

    # Leases

    @contextmanager
    def lease(self, unit: ContentUnit, timeout_s: float) -> Iterator[dict[ContentId, Path]]:
        """Hold a unit's content: see :meth:`Engine.lease`."""
        files = self.store.files_of(unit)
        lease = self._acquire(unit, files, timeout_s)
        flights: dict[ContentId, Flight] = {}
        try:
            patience_s = timeout_s + _GRACE_S + unit.size_bytes / _SLOWEST_BYTES_PER_S
            yield self._arrive(unit, files, lease, flights, time.monotonic() + patience_s)
        finally:
            self._cancel([flight for flight in flights.values() if not flight.done.is_set()])
            self.end_lease(lease.lease_id)

    def end_lease(self, lease_id: int) -> None:
        """End a lease, unless all of this process's have ended."""
        if not self._closed:
            self.ledger.end_lease(lease_id)
            self.signal.notify()

    @staticmethod
    def _cancel(flights: list[Flight]) -> None:
        """End what a lease that failed still fetches, so that its room is free when it raises."""
        for flight in flights:
            flight.cancel.set()
        deadline_s = time.monotonic() + _CLOSE_TIMEOUT_S
        for flight in flights:
            flight.done.wait(max(0.0, deadline_s - time.monotonic()))

    def _check_open(self, unit: ContentUnit) -> None:
        if self._closed:
            message = f"Cannot hold {unit.name}: the engine was closed meanwhile."
            raise FetchError(message, unit=unit.name)

    def _acquire(
        self, unit: ContentUnit, files: dict[ContentId, ContentFile], timeout_s: float
    ) -> Outcome:
        """Reserve and lease all or none, evicting what is used last."""
        position = self.prefetcher.take(unit, files)
        deadline_s = time.monotonic() + timeout_s
        ticket = 0
        avoid: frozenset[ContentId] = frozenset()
        progress: tuple[int, ...] = ()
        try:
            while True:
                self._check_open(unit)
                since = self.moment()
                outcome = self.ledger.request(
                    unit.name,
                    self.store.wants(files),
                    ticket=ticket,
                    avoid=avoid,
                    spare_bytes=self.store.spare_bytes(files.values()),
                    position=position,
                )
                ticket = outcome.ticket
                if outcome.granted:
                    if self._is_sound(outcome, files):
                        self.counters.hit(len(files) - len(outcome.fetch))
                        if position is not None:
                            self.signal.notify()  # one more may be fetched ahead
                        return outcome
                    self.ledger.end_lease(outcome.lease_id)
                    continue
                if outcome.victims:
                    self.prefetcher.lost(outcome.victims)
                    avoid |= self.store.drop(outcome.victims, f"for {unit.name}")
                    continue
                if outcome.progress != progress:
                    progress = outcome.progress
                    deadline_s = time.monotonic() + timeout_s
                elif time.monotonic() >= deadline_s:
                    self._stall(unit, outcome, avoid, timeout_s)
                self.wait(since, deadline_s)
        except BaseException:
            if ticket and not self._closed:
                self.ledger.withdraw(ticket)
                self.signal.notify()
            raise

    @staticmethod
    def _is_sound(outcome: Outcome, files: Mapping[ContentId, ContentFile]) -> bool:
        """Return whether content of others is there still; ours could have been dropped."""
        found = (files[content] for content in outcome.foreign)
        return all(file.repo.locate(file.key) is not None for file in found)

    def _stall(
        self, unit: ContentUnit, outcome: Outcome, avoid: frozenset[ContentId], timeout_s: float
    ) -> NoReturn:
        kept = f", {len(avoid)} files could not be dropped" if avoid else ""
        message = (
            f"Cannot make room for {unit.name} ({unit.size_bytes} bytes, "
            f"{format_size(unit.size_bytes)}): waited {timeout_s:.0f} s without progress for "
            f"{outcome.why}; {self.who_leases()}{kept}. Raise disk_budget, use fewer workers, or "
            f"run `tio-openneuro status`."
        )
        raise DiskBudgetError(message, unit=unit.name)

    def _arrive(
        self,
        unit: ContentUnit,
        files: dict[ContentId, ContentFile],
        lease: Outcome,
        flights: dict[ContentId, Flight],
        deadline_s: float,
    ) -> dict[ContentId, Path]:
        """Fetch what is reserved, wait for what others fetch, and return the files."""
        for content in lease.fetch:
            flights[content] = Flight(content, files[content], unit.name, fresh=True)
            self.flights.add(flights[content])
        found: dict[ContentId, Path] = {}
        while True:
            self._check_open(unit)
            since = self.moment()
            left = [content for content in files if content not in found]
            failed = [c for c in left if c in flights and flights[c].failed]
            if failed:
                raise _failure(unit, files[failed[0]], flights[failed[0]])
            asked = [c for c in left if c not in flights or flights[c].done.is_set()]
            rows = self.ledger.rows(asked)
            for content in asked:
                path = self._look(unit, files[content], rows.get(content), flights, content)
                if path is not None:
                    found[content] = path
            if len(found) == len(files):
                return found
            if time.monotonic() >= deadline_s:
                raise self._late(unit, [files[c].path for c in files if c not in found])
            self.wait(since, deadline_s)

    def _look(
        self,
        unit: ContentUnit,
        file: ContentFile,
        row: Row | None,
        flights: dict[ContentId, Flight],
        content: ContentId,
    ) -> Path | None:
        """Return a leased file once it is whole; see to it that somebody fetches it."""
        # What the ledger does not know is not ours, and nothing but the user drops it.
        whole = row is None or row.state is ContentState.PRESENT
        path = file.repo.locate(file.key) if whole else None
        if path is not None:
            return path
        if row is None:
            message = (
                f"Cannot hold {unit.name}: {file.path} vanished while it was leased. Somebody "
                f"deleted it, or repaired the ledger meanwhile. Try again."
            )
            raise LedgerError(message, key=content.key, unit=unit.name)
        if not row.owner_id:
            if self.ledger.claim(content, absent=whole):
                flights[content] = Flight(content, file, unit.name, fresh=False)
                self.flights.add(flights[content])
        else:
            ours = self.flights.promote(content)
            if ours is not None:
                flights[content] = ours
        return None

    def _late(self, unit: ContentUnit, names: list[str]) -> FetchError:
        message = (
            f"Cannot fetch {unit.name}: {', '.join(names)} did not arrive in time "
            f"({unit.size_bytes} bytes); {self.who_leases()}. The remote is slow or hangs, or "
            f"another process that fetches it does."
        )
        return FetchError(message, unit=unit.name)

    # The end

    def abandon(self) -> None:
        """Let go of what a fork carried over, without touching what is the parent's."""
        self.ledger.lock.let_go()

    def close(self) -> None:
        """End threads, fetches, children and the owner; at once, and at most once."""
        if self._closed or os.getpid() != self.pid:
            return
        self._closed = True
        if not self.flights.close(_CLOSE_TIMEOUT_S, self._leave):
            self.store.close()
            # Until then the lock stays, so what a thread may still write is counted.
            _LOGGER.warning("A fetch did not end in time; its room is returned when it does.")

    def _leave(self) -> None:
        """End the children, then the owner: who is killed between leaves none without an owner."""
        self.store.close()
        self.ledger.close()


def _failure(unit: ContentUnit, file: ContentFile, flight: Flight) -> BaseException:
    """Return the error of a fetch, naming the unit."""
    error = flight.error
    if isinstance(error, TioOpenNeuroError):
        message = f"Cannot hold {unit.name}: {file.path} did not arrive. {error}"
        named = type(error)(message, key=file.key.name, unit=unit.name)
        named.__cause__ = error
        return named
    return error or FetchError(f"Cannot fetch {file.path} of {unit.name}.", unit=unit.name)
