"""The one place of disk accounting, shared by every process under a root.

Owns ``root/ledger``: an SQLite database in WAL mode and one locked file per owner. Promises that
the bytes of all rows stay within the smallest budget of the live owners at every commit, that a
reservation is on disk before its fetch begins, and that what a killed process held is counted
until somebody has cleared it away. Never touches content: callers drop and fetch, and report.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from tio_openneuro.content import UNCLAIMED, ContentId
from tio_openneuro.errors import LedgerError
from tio_openneuro.forks import close_apart
from tio_openneuro.ledger.database import LedgerDatabase, make_database, why_lost
from tio_openneuro.ledger.owners import OwnerLock, OwnerRecord, runs, take_if_dead, this_process
from tio_openneuro.ledger.root import (
    automatic_budget,
    free_bytes,
    hold_root,
    prepare_ledger_folder,
)
from tio_openneuro.ledger.schema import (
    BUDGET,
    COUNTED,
    FETCH_PIDS,
    FORGET_EMPTY,
    HELD,
    HELD_AFTER,
    HERE,
    ID,
    LEASE_PIDS,
    RECOUNT,
    ROWS,
    SCHEMA_VERSION,
    SUMS,
    TABLES,
    UNCLAIMED_BYTES,
    ContentRow,
    Holdings,
    Want,
)
from tio_openneuro.ledger.transaction import Transaction

_OWNERS = "SELECT name, pid, created_s, budget_bytes FROM owner WHERE name <> ?"
_NO_BUDGET_BYTES = 10**18
# Beside the folder of the ledger: that there was one.
_WITNESS = ".ledger"
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
        path = folder / "ledger.sqlite"
        try:
            self._root = hold_root(
                folder, lambda: why_lost(path, SCHEMA_VERSION), lambda: self._begin_anew(path)
            )
            self._db = LedgerDatabase(path, SCHEMA_VERSION)
            # Not before there is a ledger: a process killed in between would have lost none.
            (folder.parent / _WITNESS).touch()
        except (sqlite3.Error, OSError) as error:
            message = f"Cannot use the ledger {path}: {error}. May you read and write it?"
            raise LedgerError(message) from error
        self.changes = self._db.changes
        self.owner_id = uuid.uuid4().hex
        self.reap()
        with self._db.writing() as db:
            self.budget_bytes = self.shared_budget(free) if budget_bytes is None else budget_bytes
            self._enter(db, auto=budget_bytes is None)

    @staticmethod
    def _begin_anew(path: Path) -> None:
        """Make a ledger where there is none, or none any more: what lies there is counted next."""
        lost = (path.parent.parent / _WITNESS).exists() or any(path.parent.glob(f"{path.name}*"))
        tables = (*TABLES, *["INSERT INTO loss VALUES (1)"][:lost])
        make_database(path, tables, SCHEMA_VERSION)

    def is_lost(self) -> bool:
        """Return whether an earlier ledger was lost, and what it charged is not counted yet."""
        return bool(self._db.read("SELECT * FROM loss"))

    def count_again(self, found: Iterable[tuple[Want, str]]) -> None:
        """Charge what lies in clones of ours after a loss, whatever the budget, marked."""
        with self._db.writing() as db:
            for want, mark in found:
                row = (want.content.clone, want.content.key, want.size_bytes)
                state = "present" if want.located else "reserved"
                db.execute(
                    "INSERT OR IGNORE INTO content (clone, key, size_bytes, state, refused, mark) "
                    "VALUES ((SELECT id FROM clone WHERE path = ?),?,?,?,?,?)",
                    (*row, state, mark == UNCLAIMED, mark),
                )
            db.execute("DELETE FROM loss")

    def unclaimed_bytes(self) -> int:
        """Return the bytes of content of which nobody knows whose it is."""
        return int(self._db.read(UNCLAIMED_BYTES)[0][0] or 0)

    def abandon(self) -> None:
        """Let go of the locks, as if this process had died."""
        self.lock.let_go()
        close_apart(self._root)
        self._root = -1

    def _enter(self, db: sqlite3.Connection, *, auto: bool) -> None:
        """Enter the owner, in a transaction: nobody who reaps sees the file before it is locked."""
        self.lock = OwnerLock.create(self._lock_path(self.owner_id))
        row = (self.owner_id, *this_process(), self.budget_bytes, auto)
        cursor = db.execute(
            "INSERT INTO owner (name, pid, created_s, budget_bytes, auto) VALUES (?,?,?,?,?)", row
        )
        self._number = cursor.lastrowid or 0

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
        used_bytes = self._db.read(SUMS)[0][0]
        return int(found[0][0]) if found else automatic_budget(free, used_bytes)

    def _lock_path(self, owner_id: str) -> Path:
        return self.folder / "owners" / f"{owner_id}.lock"

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Decide within one write transaction, which happens whole or not at all.

        What it reserved outlives a power failure once the block has ended; else it is taken back.
        """
        with self._db.writing() as db:
            transaction = Transaction(db, self._number)
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
                    "UPDATE content SET last_use = ? "
                    "WHERE id IN (SELECT content FROM leased WHERE lease = ?)"
                ),
                (lease_id, lease_id),
            ),
            ("DELETE FROM lease WHERE id = ?", (lease_id,)),
            (FORGET_EMPTY, ()),
        )

    # What became of content

    def arrived(self, content: ContentId, mark: str = "") -> None:
        """Note that content is whole on disk, and which file it is."""
        self._db.report(
            (
                (
                    "UPDATE content SET state = 'present', owner = NULL, prefetch = 0, "
                    f"cancel = 0, refused = ?, mark = ? {HERE}"
                ),
                (mark == UNCLAIMED, mark, *content),
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
                return Transaction(db, self._number).rows(contents)
        found = [ContentRow.read(values) for values in self._db.read(ROWS)]
        return {row.content: row for row in found}

    def cancelled(self, content: ContentId) -> bool:
        """Return whether somebody needs the room of this prefetch."""
        found = self._db.read(f"SELECT cancel FROM content {HERE}", content)
        return not found or bool(found[0][0])

    def needed_by_others(self, content: ContentId, unit: str) -> bool:
        """Return whether a unit of another name is known to use it next."""
        query = f"SELECT 1 FROM upcoming WHERE content = {ID} AND unit <> ? LIMIT 1"
        return bool(self._db.read(query, (*content, unit)))

    def held_after(self, number: int, most: int) -> list[tuple[int, ContentId, int | None]]:
        """Return what is held, in the order in which it came, with this owner's next use of it.

        Args:
            number: Of the last one that is known.
            most: How many to return at most.
        """
        found = self._db.read(HELD_AFTER, (self._number, number, most))
        return [(each, ContentId(clone, key), use) for each, clone, key, use in found]

    def holdings(self) -> Holdings:
        """Return what is held, and by whom."""
        with self._db.reading() as db:
            used_bytes, _, _, leased_bytes, peak_bytes = db.execute(SUMS).fetchone()
            return Holdings(
                db.execute(BUDGET).fetchone()[0],
                used_bytes,
                peak_bytes,
                leased_bytes,
                tuple(row[0] for row in db.execute(LEASE_PIDS)),
                tuple(row[0] for row in db.execute(FETCH_PIDS)),
            )

    def held_by_clone(self) -> dict[str, int]:
        """Return the bytes charged, by clone."""
        return dict.fromkeys(self.clones(), 0) | dict(self._db.read(HELD))

    def size_bytes(self) -> int:
        """Return the bytes of the database's own files."""
        return sum(path.stat().st_size for path in self.folder.glob("ledger.sqlite*"))

    def miscounted(self, *, repair: bool) -> list[str]:
        """Return whether the sums differ from those of the rows; count them anew if asked."""
        with self._db.writing() as db:
            for statement in RECOUNT if repair else ():
                db.execute(statement)
            *kept, _ = db.execute(SUMS).fetchone()
            counted = [*db.execute(COUNTED).fetchone()]
        says = "the ledger's sums of bytes charged, reserved, about to come free and leased"
        return [] if kept == counted else [f"{says} are {kept}, those of its rows {counted}"]

    def binding(self) -> tuple[int, str]:
        """Return the budget that binds; and who states it since when, unless this owner does."""
        owner = min(self.other_owners(), key=lambda owner: owner.budget_bytes, default=None)
        if owner is None or owner.budget_bytes >= self.budget_bytes:
            return self.budget_bytes, ""
        if self.reap([owner]):
            return self.binding()
        since_s = owner.created_s
        with suppress(OSError):  # It has left just now.
            since_s = self._lock_path(owner.owner_id).stat().st_mtime
        who = f"{owner.pid} (this one)" if owner.pid == os.getpid() else owner.pid
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since_s))
        return owner.budget_bytes, f", stated by process {who} since {since}"

    def remember_clone(self, path: str, remotes: Sequence[str], place: str = "") -> None:
        """Keep which remotes a clone's content comes from, for whoever evicts it.

        Args:
            path: From the root, or absolute where it lies elsewhere.
            remotes: Their names.
            place: Device and inode of its git folder: what was known under another path is it.
        """
        with self._db.writing() as db:
            moved = "UPDATE OR IGNORE clone SET path = ? WHERE place = ? AND place <> ''"
            db.execute(moved, (path, place))
            db.execute(
                "INSERT INTO clone (path, remotes, place) VALUES (?, ?, ?) ON CONFLICT "
                "DO UPDATE SET remotes = excluded.remotes, place = excluded.place",
                (path, json.dumps(list(remotes)), place),
            )

    def forget_clone(self, path: str) -> None:
        """Forget a clone, and what is left of it: that is the user's from now on."""
        for content in [content for content in self.rows() if content.clone == path]:
            self.disowned(content)
        self._db.report(("DELETE FROM clone WHERE path = ?", (path,)))

    def clones(self) -> dict[str, tuple[str, ...]]:
        """Return the clones ever used, with their remotes."""
        found = self._db.read("SELECT path, remotes FROM clone")
        return {path: tuple(json.loads(text)) for path, text in found}

    # Owners

    def other_owners(self) -> list[OwnerRecord]:
        """Return the other owners."""
        return [OwnerRecord(*row) for row in self._db.read(_OWNERS, (self.owner_id,))]

    def reap(self, among: Iterable[OwnerRecord] | None = None) -> list[OwnerRecord]:
        """Forget dead owners, their orphans ended; their content stays counted.

        Args:
            among: Whom to look at; default: all others.
        """
        suspects = [o for o in (self.other_owners() if among is None else among) if not runs(o)]
        if not suspects:
            return []
        locks: list[OwnerLock] = []
        dead = []
        with self._db.writing() as db:
            for owner in suspects:
                lock = take_if_dead(self._lock_path(owner.owner_id), owner)
                if lock is not None:
                    locks.append(lock)
                    db.execute(
                        "UPDATE content SET mark = ? WHERE state = 'reserved' AND "
                        "owner = (SELECT id FROM owner WHERE name = ?)",
                        (str(lock.lived_until_ns()), owner.owner_id),
                    )
                    forget = db.execute("DELETE FROM owner WHERE name = ?", (owner.owner_id,))
                    # Else somebody else has forgotten it meanwhile.
                    dead += [owner] * forget.rowcount
            db.execute(FORGET_EMPTY)
        for lock in locks:
            lock.remove()
        return dead

    def dead(self) -> list[OwnerRecord]:
        """Return the owners that ended without leaving: who leaves does so before it ends."""
        ended = [owner for owner in self.other_owners() if not runs(owner)]
        return [owner for owner in self.other_owners() if owner in ended] if ended else []

    def stray_locks(self, *, remove: bool) -> list[str]:
        """Return files of owners that nobody holds and the ledger does not know; or remove them.

        Who leaves, or forgets a dead one, holds the file until it is removed.
        """
        stray = []
        with self._db.writing() as db:
            known = {row[0] for row in db.execute("SELECT name FROM owner")}
            for path in (self.folder / "owners").glob("*.lock"):
                with suppress(FileNotFoundError):
                    lock = None if path.stem in known else OwnerLock.try_take(path)
                    if lock is not None:
                        stray += [path.name] * path.exists()
                        (lock.remove if remove else lock.let_go)()
        return stray

    def close(self) -> None:
        """End this owner and its leases; what it reserved stays counted, to be resumed."""
        if self.lock.descriptor < 0:
            return
        settled = False
        with suppress(LedgerError):  # It was lost meanwhile, and the next one is begun anew.
            self._db.report(
                ("DELETE FROM owner WHERE name = ?", (self.owner_id,)), (FORGET_EMPTY, ())
            )
            settled = self._db.settle()
        if settled:
            self._db.shrink()
            self.lock.remove()
        else:
            # The next owner finds the lock free, once this process has ended, and forgets us.
            self.lock.let_go()
        self._db.close()
        self.abandon()
