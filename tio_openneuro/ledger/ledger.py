"""The one place of disk accounting, shared by every process under a root.

Owns ``root/ledger``: an SQLite database in WAL mode and one locked file per owner. Promises that
the bytes of all rows stay within the smallest budget of the live owners at every commit, that a
reservation is on disk before its fetch begins, and that what a killed process held is counted
until somebody has cleared it away. Never touches content: callers drop and fetch, and report.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from tio_openneuro.content import ContentId
from tio_openneuro.errors import LedgerError
from tio_openneuro.ledger.database import LedgerDatabase
from tio_openneuro.ledger.owners import OwnerLock, OwnerRecord, runs, take_if_dead, this_process
from tio_openneuro.ledger.root import automatic_budget, free_bytes, prepare_ledger_folder
from tio_openneuro.ledger.schema import (
    BUDGET,
    FETCH_PIDS,
    FORGET_EMPTY,
    HERE,
    LEASE_PIDS,
    LEASED_BYTES,
    PEAK,
    ROWS,
    SCHEMA_VERSION,
    TABLES,
    USED,
    ContentRow,
    Holdings,
)
from tio_openneuro.ledger.transaction import Transaction

_OWNERS = "SELECT id, pid, created_s, budget_bytes FROM owner WHERE id <> ?"
_NO_BUDGET_BYTES = 10**18
"""The smallest budget of a root holds; this one never is."""


class Ledger:
    """One owner's view of the ledger of a root; safe to share by threads, not by processes.

    Attributes:
        folder: ``root/ledger``.
        changes: Returns a number that differs once another process has written; cheap.
        owner_id: Name of this owner.
        lock: Its lock.
        budget_bytes: Budget that it stated.
    """

    def __init__(self, folder: Path, budget_bytes: int | None, free: int = 0) -> None:
        """Open the ledger and enter a new owner with its budget.

        Args:
            folder: ``root/ledger``, there already, with its folder ``owners``.
            budget_bytes: Budget that this owner states, or None: half of what is free or held,
                the same for all who say so at one time.
            free: Free bytes of the root's file system, where there is no budget.

        Raises:
            DiskBudgetError: Too little is free for any budget.
            LedgerError: The database cannot be opened, or is of another version.
        """
        self.folder = folder
        self._db = LedgerDatabase(folder / "ledger.sqlite", TABLES, SCHEMA_VERSION)
        self.changes = self._db.changes
        self.owner_id = uuid.uuid4().hex
        pid, created_s = this_process()
        self.reap()
        # Inside the transaction, so that nobody who reaps sees the file before it is locked.
        with self._db.writing() as db:
            self.budget_bytes = self.shared_budget(free) if budget_bytes is None else budget_bytes
            self.lock = OwnerLock.create(self._lock_path(self.owner_id))
            row = (self.owner_id, pid, created_s, self.budget_bytes, budget_bytes is None)
            db.execute(
                "INSERT INTO owner (id, pid, created_s, budget_bytes, auto) VALUES (?,?,?,?,?)", row
            )

    @classmethod
    def planned_budget(cls, root: Path) -> int:
        """Return the budget that an owner would get now who states none; makes no folder.

        Args:
            root: Folder of clones and ledger, where it is there already.

        Raises:
            DiskBudgetError: Too little is free for any budget.
            LedgerError: There is a ledger that cannot be used.
        """
        if not (root / "ledger").is_dir():
            return automatic_budget(free_bytes(root), 0)
        with closing(cls(prepare_ledger_folder(root), _NO_BUDGET_BYTES)) as ledger:
            return ledger.shared_budget(free_bytes(root))

    def shared_budget(self, free: int) -> int:
        """Return the budget of live owners who state none, or of the first one to be."""
        found = self._db.read("SELECT budget_bytes FROM owner WHERE auto LIMIT 1")
        used_bytes = self._db.read(USED)[0][0]
        return int(found[0][0]) if found else automatic_budget(free, used_bytes)

    def _lock_path(self, owner_id: str) -> Path:
        return self.folder / "owners" / f"{owner_id}.lock"

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Decide within one write transaction, which happens whole or not at all.

        What it reserved outlives a power failure once the block has ended; else it is taken back.
        """
        with self._db.writing() as db:
            transaction = Transaction(db, self.owner_id)
            yield transaction
        answer = transaction.granted
        if answer is None or not answer.fetch:
            return
        try:
            self._db.make_durable()
        except LedgerError:
            for content in answer.fetch:
                self.failed(content, empty=content not in answer.resumed)
            self.end_lease(answer.lease_id)
            raise

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

    def arrived(self, content: ContentId) -> None:
        """Note that reserved content is whole on disk."""
        self._db.report(
            (
                (
                    "UPDATE content SET state = 'present', owner = NULL, prefetch = 0, "
                    f"cancel = 0, refused = 0 {HERE}"
                ),
                content,
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
                f"UPDATE content SET owner = NULL, prefetch = 0, cancel = 0, empty = ? {HERE}",
                (empty, *content),
            ),
            (FORGET_EMPTY, ()),
        )

    def disowned(self, content: ContentId) -> None:
        """Forget content that turned out not to be this library's; it stays on disk."""
        self._db.report((f"DELETE FROM content {HERE}", content))

    def dropped(self, content: ContentId) -> int:
        """Note that the disk does not have it any more; return the bytes that came free."""
        delete = f"DELETE FROM content {HERE} AND state = 'dropping' RETURNING size_bytes"
        found = self._db.report((delete, content))
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
                    f"UPDATE content SET state = ?, owner = NULL, refused = ? {HERE} "
                    "AND state = 'dropping'"
                ),
                ("present" if whole else "reserved", refused, *content),
            )
        )

    def unfinished(self) -> list[ContentRow]:
        """Return what was being fetched or dropped when its owner died."""
        found = self._db.read(f"{ROWS} WHERE owner IS NULL AND state <> 'present'")
        return [ContentRow.read(values) for values in found]

    # What is known

    def rows(self, contents: Iterable[ContentId] | None = None) -> dict[ContentId, ContentRow]:
        """Return what the ledger has of this content, or of all."""
        if contents is not None:
            with self._db.reading() as db:
                return Transaction(db, self.owner_id).rows(contents)
        found = [ContentRow.read(values) for values in self._db.read(ROWS)]
        return {row.content: row for row in found}

    def cancelled(self, content: ContentId) -> bool:
        """Return whether somebody needs the room of this prefetch."""
        found = self._db.read(f"SELECT cancel FROM content {HERE}", content)
        return not found or bool(found[0][0])

    def needed_by_others(self, content: ContentId, unit: str) -> bool:
        """Return whether a unit of another name is known to use it next."""
        query = f"SELECT 1 FROM upcoming {HERE} AND unit <> ? LIMIT 1"
        return bool(self._db.read(query, (*content, unit)))

    def holdings(self) -> Holdings:
        """Return what is held, and by whom."""
        with self._db.reading() as db:
            return Holdings(
                db.execute(BUDGET).fetchone()[0],
                db.execute(USED).fetchone()[0],
                db.execute(PEAK).fetchone()[0],
                db.execute(LEASED_BYTES).fetchone()[0],
                tuple(row[0] for row in db.execute(LEASE_PIDS)),
                tuple(row[0] for row in db.execute(FETCH_PIDS)),
            )

    def binding(self) -> tuple[int, str]:
        """Return the budget that binds; and who states it since when, unless this owner does."""
        self.reap()
        owner = min(self.other_owners(), key=lambda owner: owner.budget_bytes, default=None)
        if owner is None or owner.budget_bytes >= self.budget_bytes:
            return self.budget_bytes, ""
        since_s = owner.created_s
        with suppress(OSError):  # It has left just now.
            since_s = self._lock_path(owner.owner_id).stat().st_mtime
        who = f"{owner.pid} (this one)" if owner.pid == os.getpid() else owner.pid
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since_s))
        return owner.budget_bytes, f", stated by process {who} since {since}"

    def remember_clone(self, path: str, remotes: Sequence[str]) -> None:
        """Keep which remotes a clone's content comes from, for whoever evicts it."""
        with self._db.writing() as db:
            db.execute("REPLACE INTO clone VALUES (?, ?)", (path, json.dumps(list(remotes))))

    def forget_clone(self, path: str) -> None:
        """Forget a clone, and what is left of it: that is the user's from now on."""
        for content in [content for content in self.rows() if content.clone == path]:
            self.disowned(content)
        self._db.report(("DELETE FROM clone WHERE path = ?", (path,)))

    def clones(self) -> dict[str, tuple[str, ...]]:
        """Return the clones ever used, with their remotes."""
        return {
            path: tuple(json.loads(text)) for path, text in self._db.read("SELECT * FROM clone")
        }

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
