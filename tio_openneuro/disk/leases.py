"""One process's leases: a unit's content is reserved, fetched, held, and let go.

Owns what one process has of an engine: its owner in the ledger, threads and children. Made anew in
every process, never carried over a fork. Keeps the rules against deadlock: a unit's bytes are
reserved at once, in the order of the queue; who holds a lease waits for content alone, whose
fetch is bounded.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tio_openneuro.content import AnnexKey, ContentFile, ContentId, ContentUnit
from tio_openneuro.disk.fetching import Fetches
from tio_openneuro.disk.look_ahead import Ask, LookAhead
from tio_openneuro.disk.statistics import DiskCounters, SharedCounts
from tio_openneuro.disk.store import Fetch, OpenRepo, Store
from tio_openneuro.errors import DiskBudgetError, FetchError, LedgerError, TioOpenNeuroError
from tio_openneuro.ledger import (
    Answer,
    Changes,
    ContentRow,
    ContentState,
    Ledger,
    Transaction,
    Want,
    free_bytes,
    prepare_ledger_folder,
)
from tio_openneuro.sizes import format_size

_LOGGER = logging.getLogger(__name__)
_SLOWEST_BYTES_PER_S = 50_000
_AT_ONCE = 100
# Fetches are bounded by the clone; these bound the wait for them a little more widely.
_GRACE_S = 60.0
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


class Leases:
    """What one process has of an engine."""

    def __init__(self, settings: Settings, counts: SharedCounts) -> None:
        """Enter an owner in the ledger, and make way for its budget.

        Args:
            settings: What the engine was told.
            counts: The engine's in this process.

        Raises:
            DiskBudgetError: Leases of others exceed the budget.
            LedgerError: The root cannot hold a ledger.
        """
        self.pid = os.getpid()
        folder = prepare_ledger_folder(settings.root)
        self.ledger = Ledger(folder, settings.budget_bytes, free_bytes(folder))
        self.counters = DiskCounters(counts)
        self.changes = Changes(self.ledger)
        self.store = Store(
            self.ledger, self.counters, self.changes, settings.open_repo, settings.floor_bytes
        )
        self.fetches = Fetches(settings.jobs, self.store, self.changes)
        self.look_ahead = LookAhead(self.ledger, self.store, self.fetches, self.changes)
        self._has_floor = settings.floor_bytes > 0
        self._closed = False
        try:
            self.store.count_again()
            self._settle()
            self._shrink()
        except BaseException:
            self.close()
            raise

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
        self.store.settle(unfinished)
        dropping = [row.content for row in unfinished if row.state is ContentState.DROPPING]
        self.drop(dropping, "begun by a process that died")

    def drop(self, contents: Iterable[ContentId], reason: str) -> int:
        """Drop what of this nobody leases; return the bytes that came free."""
        left = list(contents)
        freed_bytes = 0
        while left:
            # Not all at once: others want to write to the ledger meanwhile.
            some, left = left[:_AT_ONCE], left[_AT_ONCE:]
            with self.ledger.transaction() as decide:
                rows = decide.give_up(some)
            failed = self.store.drop([row.content for row in rows], reason)
            freed_bytes += sum(row.size_bytes for row in rows if row.content not in failed)
        return freed_bytes

    def _shrink(self) -> None:
        """Evict until the budget holds.

        Raises:
            DiskBudgetError: What others lease does not let it.
        """

        def stalled(answer: Answer) -> str:
            return (
                f"Cannot keep to a disk budget of {self.ledger.budget_bytes} bytes: "
                f"{answer.short_bytes} bytes too many are in use, and {self.who_leases()}. End "
                f"those processes, or state a larger disk_budget."
            )

        def ask(decide: Transaction, kept: frozenset[ContentId]) -> Answer:
            return decide.make_room(0, kept)

        self.make_room(ask, "for a smaller budget", set(), _SHRINK_TIMEOUT_S, stalled)

    def make_room(
        self,
        ask: Ask,
        reason: str,
        kept: set[ContentId],
        timeout_s: float,
        stalled: Callable[[Answer], str],
        unit: str = "",
    ) -> Answer:
        """Have content give way for a request, and wait for those who were there before.

        Args:
            ask: Decides within one transaction, given what must not be chosen.
            reason: Why content gives way, for the log.
            kept: What must not give way; what cannot be dropped is added.
            timeout_s: Seconds to wait while nobody gets ahead.
            stalled: Returns the message where that is too long.
            unit: Name of the unit concerned.

        Returns:
            The answer: granted, or refused for now.

        Raises:
            DiskBudgetError: Nobody got ahead for that long.
        """
        deadline_s = time.monotonic() + timeout_s
        progress: tuple[int, ...] = ()
        while True:
            since = self.changes.moment()
            answer = self.look_ahead.make_way(ask, reason, kept)
            if answer.granted or answer.refused:
                return answer
            if answer.progress != progress:
                progress = answer.progress
                deadline_s = time.monotonic() + timeout_s
            elif time.monotonic() >= deadline_s:
                raise DiskBudgetError(stalled(answer), unit=unit)
            self.changes.wait(since, deadline_s)

    # Leases

    @contextmanager
    def lease(self, unit: ContentUnit, timeout_s: float) -> Iterator[dict[AnnexKey, Path]]:
        """Hold a unit's content: see :meth:`Engine.lease`."""
        files = self.store.files_of(unit)
        lease = self._acquire(unit, files, timeout_s)
        fetches: dict[ContentId, Fetch] = {}
        try:
            patience_s = timeout_s + _GRACE_S + unit.size_bytes / _SLOWEST_BYTES_PER_S
            deadline_s = time.monotonic() + patience_s
            found = self._arrive(unit, files, lease, fetches, deadline_s)
            yield {files[content].key: path for content, path in found.items()}
        finally:
            self._cancel([fetch for fetch in fetches.values() if not fetch.done.is_set()])
            self.end_lease(lease.lease_id)

    def end_lease(self, lease_id: int) -> None:
        """End a lease, unless all of this process's have ended."""
        if not self._closed:
            self.ledger.end_lease(lease_id)
            self.changes.notify()

    @staticmethod
    def _cancel(fetches: list[Fetch]) -> None:
        """End what a lease that failed still fetches, so that its room is free when it raises."""
        for fetch in fetches:
            fetch.cancel.set()
        deadline_s = time.monotonic() + _CLOSE_TIMEOUT_S
        for fetch in fetches:
            fetch.done.wait(max(0.0, deadline_s - time.monotonic()))

    def _check_open(self, unit: ContentUnit) -> None:
        if self._closed:
            message = f"Cannot hold {unit.name}: the engine was closed meanwhile."
            raise FetchError(message, unit=unit.name)

    def _acquire(
        self,
        unit: ContentUnit,
        files: Mapping[ContentId, ContentFile],
        timeout_s: float,
    ) -> Answer:
        """Reserve and lease all or none, evicting what is used last."""
        position, following = self.look_ahead.take(unit, files)
        kept: set[ContentId] = set()
        ticket = 0
        wants: list[Want] = []

        def ask(decide: Transaction, avoid: frozenset[ContentId]) -> Answer:
            nonlocal ticket, wants
            self._check_open(unit)
            wants = wants or self.store.wants(files)
            answer = decide.request(
                unit.name,
                wants,
                ticket=ticket,
                avoid=avoid,
                spare_bytes=self.store.spare_bytes(files.values()) if self._has_floor else None,
                position=position,
                following=following,
            )
            ticket = answer.ticket
            if not answer.victims:
                wants = []  # after a wait the disk may be another
            return answer

        def stalled(answer: Answer) -> str:
            undropped = f", {len(kept)} files could not be dropped" if kept else ""
            return (
                f"Cannot make room for {unit.name} ({unit.size_bytes} bytes, "
                f"{format_size(unit.size_bytes)}): waited {timeout_s:.0f} s without progress for "
                f"{answer.why}; {self.who_leases()}{undropped}. Raise disk_budget, use fewer "
                f"workers, or run `tio-openneuro status`."
            )

        try:
            while True:
                answer = self.make_room(
                    ask, f"for {unit.name}", kept, timeout_s, stalled, unit.name
                )
                if self._is_sound(answer, files):
                    break
                self.ledger.end_lease(answer.lease_id)
        except BaseException:
            if ticket and not self._closed:
                self.ledger.withdraw(ticket)
                self.changes.notify()
            raise
        self.counters.add(hit_files=len(files) - len(answer.fetch))
        if position is not None:
            self.changes.notify()  # one more may be fetched ahead
        return answer

    @staticmethod
    def _is_sound(answer: Answer, files: Mapping[ContentId, ContentFile]) -> bool:
        """Return whether content of others is there still; ours could have been dropped."""
        found = (files[content] for content in answer.foreign)
        return all(file.repo.locate(file.key) is not None for file in found)

    def _arrive(
        self,
        unit: ContentUnit,
        files: Mapping[ContentId, ContentFile],
        lease: Answer,
        fetches: dict[ContentId, Fetch],
        deadline_s: float,
    ) -> dict[ContentId, Path]:
        """Fetch what is reserved, wait for what others fetch, and return the files."""
        for content in lease.fetch:
            fetches[content] = Fetch(content, files[content], unit.name)
            self.fetches.add(fetches[content])
        found: dict[ContentId, Path] = {}
        while True:
            self._check_open(unit)
            seen = self.changes.value
            found |= self._arrived(unit, fetches)
            # What we fetch ourselves wakes us; what others fetch, the ledger alone tells.
            asked = [c for c in files.keys() - found.keys() if not _under_way(fetches.get(c))]
            since = (seen, self.ledger.changes() if asked else 0)
            rows = self.ledger.rows(asked) if asked else {}
            for content in asked:
                path = self._look(unit, files[content], rows.get(content), fetches, content)
                if path is not None:
                    found[content] = path
            if len(found) == len(files):
                return found
            if time.monotonic() >= deadline_s:
                raise self._late(unit, [files[c].path for c in files if c not in found])
            if asked:
                self.changes.wait(since, deadline_s)
            else:
                self.changes.wait_here(seen, deadline_s - time.monotonic())

    @staticmethod
    def _arrived(unit: ContentUnit, fetches: Mapping[ContentId, Fetch]) -> dict[ContentId, Path]:
        """Return what our own fetches have brought; raise the error of one that failed."""
        found = {}
        for fetch in fetches.values():
            if fetch.path is not None and fetch.done.is_set():
                found[fetch.content] = fetch.path
            elif fetch.error is not None and fetch.failed:
                raise _failure(unit, fetch)
        return found

    def _look(
        self,
        unit: ContentUnit,
        file: ContentFile,
        row: ContentRow | None,
        fetches: dict[ContentId, Fetch],
        content: ContentId,
    ) -> Path | None:
        """Return a leased file once it is whole; see to it that somebody fetches it."""
        # What the ledger does not know is not ours, and nothing but the user drops it.
        whole = row is None or row.state is ContentState.PRESENT
        path = file.repo.locate(file.key) if whole else None
        if path is not None:
            self.store.has_owner(row)
            return path
        if row is None:
            message = (
                f"Cannot hold {unit.name}: {file.path} vanished while it was leased. Somebody "
                f"deleted it, or repaired the ledger meanwhile. Try again."
            )
            raise LedgerError(message, key=content.key, unit=unit.name)
        if not row.owner_id:
            with self.ledger.transaction() as decide:
                claimed = decide.claim(content, absent=whole)
            if claimed:
                fetches[content] = Fetch(content, file, unit.name)
                self.fetches.add(fetches[content])
        else:
            ours = self.fetches.promote(content)
            if ours is not None:
                fetches[content] = ours
        return None

    def _late(self, unit: ContentUnit, names: list[str]) -> FetchError:
        message = (
            f"Cannot fetch {unit.name}: {', '.join(names)} did not arrive in time "
            f"({unit.size_bytes} bytes); {self.who_leases()}. The remote is slow or hangs, or "
            f"another process that fetches it does."
        )
        return FetchError(message, unit=unit.name)

    # The end

    def close(self) -> None:
        """End threads, fetches, children and the owner; at once, and at most once."""
        if self._closed or os.getpid() != self.pid:
            return
        self._closed = True
        if not self.fetches.close(_CLOSE_TIMEOUT_S, self._leave):
            self.store.close()
            # Until then the lock stays, so what a thread may still write is counted.
            _LOGGER.warning("A fetch did not end in time; its room is returned when it does.")

    def _leave(self) -> None:
        """End the children, then the owner: who is killed between leaves none without an owner."""
        self.store.close()
        self.ledger.close()


def _under_way(fetch: Fetch | None) -> bool:
    return fetch is not None and not fetch.done.is_set()


def _failure(unit: ContentUnit, fetch: Fetch) -> BaseException:
    """Return the error of a fetch, naming the unit."""
    error, file = fetch.error, fetch.file
    if isinstance(error, TioOpenNeuroError):
        message = f"Cannot hold {unit.name}: {file.path} did not arrive. {error}"
        named = type(error)(message, key=file.key.name, unit=unit.name)
        named.__cause__ = error
        return named
    return error or FetchError(f"Cannot fetch {file.path} of {unit.name}.", unit=unit.name)
