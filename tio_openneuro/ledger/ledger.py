"""The one place of disk accounting, shared by every process under a root.

Owns ``root/ledger``: an SQLite database in WAL mode and one locked file per owner. Promises that
the bytes of all rows stay within the smallest budget of the live owners at every commit, that a
reservation is on disk before its fetch begins, and that what a killed process held is counted
until somebody has cleared it away. Never touches content: callers drop and fetch, and report.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tio_openneuro.errors import LedgerError
from tio_openneuro.ledger.database import LedgerDatabase
from tio_openneuro.ledger.eviction import ContentId
from tio_openneuro.ledger.owners import OwnerLock, OwnerRecord, runs, take_if_dead, this_process
from tio_openneuro.ledger.prepared_requests import KeepingDecision
from tio_openneuro.ledger.requests import Decision
from tio_openneuro.ledger.root import automatic_budget
from tio_openneuro.ledger.schema import (
    BUDGET,
    FETCH_PIDS,
    FORGET_EMPTY,
    LEASE_PIDS,
    LEASED_BYTES,
    PEAK,
    RECORD_PEAK,
    ROWS,
    SCHEMA_VERSION,
    TABLES,
    USED,
    Holdings,
    Outcome,
    Row,
    Want,
)

_OWNERS = "SELECT id, pid, created_s, budget_bytes FROM owner WHERE id <> ?"
_HERE = "WHERE clone = ? AND key = ?"


class Ledger:
    """One owner's view of the ledger of a root; safe to share by threads, not by processes.

    Attributes:
        folder: ``root/ledger``.
        owner_id: Name of this owner.
        lock: Its lock.
        budget_bytes: Budget that it stated.
    """

    def __init__(self, folder: Path, budget_bytes: int | None, free_bytes: int = 0) -> None:
        """Open the ledger and enter a new owner with its budget.

        Args:
            folder: ``root/ledger``, there already, with its folder ``owners``.
            budget_bytes: Budget that this owner states, or None: half of what is free or held,
                the same for all who say so at one time.
            free_bytes: Free bytes of the root's file system, where there is no budget.

        Raises:
            DiskBudgetError: Too little is free for any budget.
            LedgerError: The database cannot be opened, or is of another version.
        """
        self.folder = folder
        self._db = LedgerDatabase(folder / "ledger.sqlite", TABLES, SCHEMA_VERSION)
        self.owner_id = uuid.uuid4().hex
        pid, created_s = this_process()
        self.reap()
        # Inside the transaction, so that nobody who reaps sees the file before it is locked.
        with self._db.writing() as db:
            auto = budget_bytes is None
            if budget_bytes is None:
                found = db.execute("SELECT budget_bytes FROM owner WHERE auto LIMIT 1").fetchone()
                used_bytes = db.execute(USED).fetchone()[0]
                budget_bytes = found[0] if found else automatic_budget(free_bytes, used_bytes)
            self.budget_bytes = int(budget_bytes)
            self.lock = OwnerLock.create(self._lock_path(self.owner_id))
            row = (self.owner_id, pid, created_s, self.budget_bytes, auto)
            db.execute(
                "INSERT INTO owner (id, pid, created_s, budget_bytes, auto) VALUES (?,?,?,?,?)", row
            )

    def _lock_path(self, owner_id: str) -> Path:
        return self.folder / "owners" / f"{owner_id}.lock"

    # Requests for room, as described at Decision

    def request(
        self,
        unit: str,
        wants: Sequence[Want],
        *,
        ticket: int = 0,
        avoid: frozenset[ContentId] = frozenset(),
        spare_bytes: int | None = None,
        position: int | None = None,
    ) -> Outcome:
        """Reserve and lease a unit's content: see :meth:`Decision.request`."""
        with self._db.writing() as db:
            outcome = Decision(db, self.owner_id).request(
                unit, wants, ticket=ticket, avoid=avoid, spare_bytes=spare_bytes, position=position
            )
        return self._made_durable(outcome)

    def request_prefetch(self, wants: Sequence[Want], steps: int, **how: Any) -> Outcome:  # noqa: ANN401
        """Reserve without a lease: see :meth:`Decision.request_prefetch`."""
        with self._db.writing() as db:
            outcome = Decision(db, self.owner_id).request_prefetch(wants, steps, **how)
        return self._made_durable(outcome)

    def _made_durable(self, outcome: Outcome) -> Outcome:
        """Return an answer once what it reserved outlives a power failure; else take it back."""
        try:
            if outcome.fetch:
                self._db.make_durable()
        except LedgerError:
            for content in outcome.fetch:
                self.failed(content, empty=content not in outcome.resumed)
            self.end_lease(outcome.lease_id)
            raise
        return outcome

    def try_lease(self, unit: str, content: ContentId) -> int:
        """Lease content if it is present: see :meth:`KeepingDecision.try_lease`."""
        with self._db.writing() as db:
            return KeepingDecision(db, self.owner_id).try_lease(unit, content)

    def request_keep(
        self, want: Want, instead: frozenset[ContentId], *, steps: int | None, spare: int | None
    ) -> Outcome:
        """Reserve for a prepared volume: see :meth:`KeepingDecision.request_keep`."""
        with self._db.writing() as db:
            decision = KeepingDecision(db, self.owner_id)
            outcome = decision.request_keep(want, instead, steps=steps, spare_bytes=spare)
        return self._made_durable(outcome)

    def make_room(
        self, needed_bytes: int = 0, spared: Iterable[ContentId] = ()
    ) -> tuple[int, list[ContentId]]:
        """Make way without a reservation: see :meth:`Decision.make_room`."""
        with self._db.writing() as db:
            return Decision(db, self.owner_id).make_room(needed_bytes, spared)

    def give_up(self, contents: Iterable[ContentId]) -> list[Row]:
        """Mark what can be dropped: see :meth:`Decision.give_up`."""
        with self._db.writing() as db:
            return Decision(db, self.owner_id).give_up(contents)

    def withdraw(self, ticket: int) -> None:
        """Leave the queue."""
        self._db.report(("DELETE FROM ticket WHERE number = ?", (ticket,)))

    def queue(self) -> list[str]:
        """Return the units that wait for room, the next one first."""
        return [row[0] for row in self._db.read("SELECT unit FROM ticket ORDER BY number")]

    def end_lease(self, lease_id: int) -> None:
        """End a lease; what it held may be evicted, and what never arrived is forgotten."""
        self._db.report(
            (
                (
                    "UPDATE content SET last_use = ? WHERE EXISTS (SELECT 1 FROM leased WHERE "
                    "lease = ? AND leased.clone = content.clone AND leased.key = content.key)"
                ),
                (lease_id, lease_id),
            ),
            ("DELETE FROM lease WHERE id = ?", (lease_id,)),
            (FORGET_EMPTY, ()),
        )

    # What became of content

    def claim(self, content: ContentId, *, absent: bool) -> bool:
        """Take over the fetch of reserved content that nobody fetches.

        Args:
            content: Content under a lease of the caller.
            absent: Whether the disk lacks what the ledger has as present, so is fetched again.
        """
        with self._db.writing() as db:
            cursor = db.execute(
                "UPDATE content SET state = 'reserved', owner = ?, prefetch = 0, cancel = 0, "
                f"empty = 0 {_HERE} AND owner IS NULL AND (state = 'reserved' OR "
                "(state = 'present' AND ?))",
                (self.owner_id, content.clone, content.key, absent),
            )
            return cursor.rowcount == 1

    def arrived(self, content: ContentId) -> None:
        """Note that reserved content is whole on disk."""
        self._db.report(
            (
                (
                    "UPDATE content SET state = 'present', owner = NULL, prefetch = 0, "
                    f"cancel = 0, refused = 0 {_HERE}"
                ),
                (content.clone, content.key),
            )
        )

    def failed(self, content: ContentId, *, empty: bool) -> None:
        """Note that a fetch ended without its content; the room stays with those that lease it.

        Args:
            content: What was reserved.
            empty: Whether its partial download is gone; else it stays charged, to be resumed.
        """
        self._db.report(
            (
                f"UPDATE content SET owner = NULL, prefetch = 0, cancel = 0, empty = ? {_HERE}",
                (empty, content.clone, content.key),
            ),
            (FORGET_EMPTY, ()),
        )

    def disowned(self, content: ContentId) -> None:
        """Forget content that turned out not to be this library's; it stays on disk."""
        self._db.report((f"DELETE FROM content {_HERE}", (content.clone, content.key)))

    def dropped(self, content: ContentId) -> int:
        """Note that the disk does not have it any more; return the bytes that came free."""
        delete = f"DELETE FROM content {_HERE} AND state = 'dropping' RETURNING size_bytes"
        found = self._db.report((delete, (content.clone, content.key)))
        return int(found[0][0]) if found else 0

    def kept(self, content: ContentId, *, refused: bool, whole: bool) -> None:
        """Note that a drop did not happen.

        Args:
            content: What was to be dropped.
            refused: Whether it will never be, since no remote is known to give it back.
            whole: Whether the disk has all of it, and not a partial download.
        """
        self._db.report(
            (
                (
                    f"UPDATE content SET state = ?, owner = NULL, refused = ? {_HERE} "
                    "AND state = 'dropping'"
                ),
                ("present" if whole else "reserved", refused, content.clone, content.key),
            )
        )

    def adopt(self, want: Want) -> bool:
        """Charge what was on disk before, whole or partial; return whether it fits."""
        with self._db.writing() as db:
            budget_bytes, used_bytes = db.execute(BUDGET).fetchone()[0], db.execute(USED).fetchone()
            if used_bytes[0] + want.size_bytes > budget_bytes:
                return False
            db.execute(
                "INSERT OR IGNORE INTO content (clone, key, size_bytes, state) VALUES (?,?,?,?)",
                (
                    want.content.clone,
                    want.content.key,
                    want.size_bytes,
                    "present" if want.located else "reserved",
                ),
            )
            db.execute(RECORD_PEAK)
            return True

    def unfinished(self) -> list[Row]:
        """Return what was being fetched or dropped when its owner died."""
        found = self._db.read(f"{ROWS} WHERE owner IS NULL AND state <> 'present'")
        return [Row.read(values) for values in found]

    # What is known

    def rows(self, contents: Iterable[ContentId] | None = None) -> dict[ContentId, Row]:
        """Return what the ledger has of this content, or of all."""
        if contents is not None:
            with self._db.reading() as db:
                return Decision(db, self.owner_id).rows(contents)
        found = [Row.read(values) for values in self._db.read(ROWS)]
        return {row.content: row for row in found}

    def cancelled(self, content: ContentId) -> bool:
        """Return whether somebody needs the room of this prefetch."""
        found = self._db.read(f"SELECT cancel FROM content {_HERE}", (content.clone, content.key))
        return not found or bool(found[0][0])

    def needed_by_others(self, content: ContentId, unit: str) -> bool:
        """Return whether a unit of another name is known to use it next."""
        query = f"SELECT 1 FROM upcoming {_HERE} AND unit <> ? LIMIT 1"
        return bool(self._db.read(query, (content.clone, content.key, unit)))

    def holdings(self) -> Holdings:
        """Return what is held, and by whom."""
        with self._db.reading() as db:
            budget_bytes, pid = db.execute(BUDGET).fetchone()
            return Holdings(
                budget_bytes,
                db.execute(USED).fetchone()[0],
                db.execute(PEAK).fetchone()[0],
                db.execute(LEASED_BYTES).fetchone()[0],
                tuple(row[0] for row in db.execute(LEASE_PIDS)),
                tuple(row[0] for row in db.execute(FETCH_PIDS)),
                pid,
            )

    def changes(self) -> int:
        """Return a number that differs once another process has written; cheap."""
        self._db.settle()
        return int(self._db.read("PRAGMA data_version")[0][0]) + self._db.settled

    def remember_clone(self, path: str, remotes: Sequence[str]) -> None:
        """Keep which remotes a clone's content comes from, for whoever evicts it."""
        with self._db.writing() as db:
            db.execute("REPLACE INTO clone VALUES (?, ?)", (path, json.dumps(list(remotes))))

    def clones(self) -> dict[str, tuple[str, ...]]:
        """Return the clones ever used, with their remotes."""
        return {
            path: tuple(json.loads(text)) for path, text in self._db.read("SELECT * FROM clone")
        }

    def set_order(
        self,
        entries: Iterable[tuple[int, str, ContentId]],
        *,
        replace: bool,
        reached: int,
        gone: Iterable[int] = (),
    ) -> None:
        """Publish which content this owner uses next: see :meth:`Decision.set_order`."""
        with self._db.writing() as db:
            decision = Decision(db, self.owner_id)
            decision.set_order(entries, replace=replace, reached=reached, gone=gone)

    def reach(self, position: int) -> None:
        """Note how far this owner has come in its order."""
        with self._db.writing() as db:
            Decision(db, self.owner_id).reach(position)

    # Owners

    def other_owners(self) -> list[OwnerRecord]:
        """Return the other owners."""
        return [OwnerRecord(*row) for row in self._db.read(_OWNERS, (self.owner_id,))]

    def reap(self) -> list[OwnerRecord]:
        """Forget dead owners, their orphans ended; their content stays counted."""
        if all(runs(owner) for owner in self.other_owners()):
            return []
        locks: list[OwnerLock] = []
        dead = []
        with self._db.writing() as db:
            for row in db.execute(_OWNERS, (self.owner_id,)).fetchall():
                owner = OwnerRecord(*row)
                lock = None if runs(owner) else take_if_dead(self._lock_path(owner.owner_id), owner)
                if lock is not None:
                    db.execute("DELETE FROM owner WHERE id = ?", (owner.owner_id,))
                    locks.append(lock)
                    dead.append(owner)
            db.execute(FORGET_EMPTY)
        for lock in locks:
            lock.remove()
        return dead

    def dead(self) -> list[OwnerRecord]:
        """Return the owners that ended without leaving."""
        return [owner for owner in self.other_owners() if not runs(owner)]

    def stray_locks(self, *, remove: bool) -> list[str]:
        """Return the files of owners that the ledger does not know; remove them if asked."""
        with self._db.writing() as db:
            known = {row[0] for row in db.execute("SELECT id FROM owner")}
            files = (self.folder / "owners").glob("*.lock")
            stray = [path for path in files if path.stem not in known]
            for path in stray if remove else ():
                lock = OwnerLock.try_take(path)
                if lock is not None:
                    lock.remove()
            return [path.name for path in stray]

    def close(self) -> None:
        """End this owner and its leases; what it reserved stays counted, to be resumed."""
        if self.lock.descriptor < 0:
            return
        self._db.report(("DELETE FROM owner WHERE id = ?", (self.owner_id,)), (FORGET_EMPTY, ()))
        if self._db.settle():
            self.lock.remove()
        else:
            # The next owner finds the lock free, once this process has ended, and forgets us.
            self.lock.let_go()
        self._db.close()
