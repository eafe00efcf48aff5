"""The ledger's SQLite database: opened, locked, and carried safely over a fork.

Owns one connection, shared by the threads of one process. Promises that a transaction happens
whole or not at all, and that no connection is open while the process forks: SQLite keeps its
locks in memory that a child would inherit without holding them.
"""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from tio_openneuro.errors import LedgerError
from tio_openneuro.forks import at_fork
from tio_openneuro.ledger.owners import holding_pids

_LOCKED_TIMEOUT_S = 60.0
_LATER_TIMEOUT_S = 0.5
# More than any connection sees of others' writes.
_OF_CONNECTION = 1 << 40
_FIRST_PAUSE_S = 0.0003
_LONGEST_PAUSE_S = 0.003
_NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)

_MOST_FREED_PAGES = 20_000

Statement = tuple[str, Sequence[Any]]


class LedgerDatabase:
    """One process's connection to the ledger; safe to share by threads, not by processes."""

    def __init__(self, path: Path, version: int) -> None:
        """Open the database.

        Args:
            path: File on a local disk.
            version: Of the tables; another version is refused.

        Raises:
            LedgerError: The database cannot be opened, or is of another version.
        """
        self._path = path
        self._version = version
        self._mutex = threading.RLock()
        self._closed = False
        self._owed: list[Statement] = []
        self._settled = 0
        self._late = False
        self._db: sqlite3.Connection | None = self._open()
        at_fork(
            "ledger",
            self,
            before=LedgerDatabase._pause,
            in_parent=LedgerDatabase._go_on,
            in_child=LedgerDatabase._go_on,
        )

    def _pause(self) -> None:
        """Close the connection until the fork is over; keep other threads from opening it."""
        self._mutex.acquire()
        self._disconnect()

    def _go_on(self) -> None:
        self._mutex.release()

    def _open(self) -> sqlite3.Connection:
        try:
            # Never a new one: that is made where nobody else can have another.
            self._inode = self._path.stat().st_ino
            uri = f"{self._path.absolute().as_uri()}?mode=rw"
            db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise self._broken(error) from error
        try:
            # Switching to WAL fails at once, without waiting, while another process does it.
            self._insist(db, "PRAGMA journal_mode = WAL")
            db.execute("PRAGMA foreign_keys = ON")
            # The log is synced before it goes into the database, and by make_durable().
            db.execute("PRAGMA synchronous = NORMAL")
            self._insist(db, "BEGIN IMMEDIATE")
            found = db.execute("PRAGMA user_version").fetchone()[0]
            db.execute("COMMIT")
            if found != self._version:
                raise self._broken(f"it is of version {found}, this library's is {self._version}")
        except (sqlite3.Error, LedgerError) as error:
            db.close()
            if isinstance(error, LedgerError):
                raise
            raise self._broken(error) from error
        # What was seen of another connection's versions tells nothing of this one's.
        self._settled += _OF_CONNECTION
        return db

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _connected(self) -> sqlite3.Connection:
        if self._closed:
            message = f"Cannot use the ledger {self._path}: it was closed meanwhile."
            raise LedgerError(message)
        if self._db is None:
            self._db = self._open()
        try:
            same = self._path.stat().st_ino == self._inode
        except OSError as error:
            raise self._broken(error) from error
        if not same:
            raise self._broken("another file took its place")
        return self._db

    def _broken(self, why: object) -> LedgerError:
        return LedgerError(
            f"Cannot use the ledger {self._path}: {why}. Likely the disk is full, the permission "
            f"to write there lacks, or something else deleted or changed it. End the processes "
            f"that use the root, then run `tio-openneuro doctor --repair`: a ledger that was lost "
            f"is begun anew, with all that lies in the clones of this library."
        )

    def _insist(self, db: sqlite3.Connection, statement: str) -> None:
        """Execute what waits for others, in short steps.

        SQLite's own waits grow to 0.1 s, where a transaction takes less than a thousandth: with
        eight processes some would wait for seconds. Who has waited in vain waits no such time
        again, until it has written once: other threads, and what an error leads to, would add up.

        Raises:
            LedgerError: Another process keeps the ledger to itself.
        """
        timeout_s = _LATER_TIMEOUT_S if self._late else _LOCKED_TIMEOUT_S
        deadline_s = time.monotonic() + timeout_s
        pause = threading.Event()
        # Not the generator of the module, which is the user's.
        chance = random.SystemRandom()
        pause_s = _FIRST_PAUSE_S
        db.execute("PRAGMA busy_timeout = 0")
        try:
            while True:
                try:
                    db.execute(statement)
                except sqlite3.OperationalError as error:
                    if "locked" not in str(error):
                        raise
                    if time.monotonic() > deadline_s:
                        self._late = True
                        raise held(self._path) from error
                    pause.wait(pause_s * chance.uniform(0.5, 1.5))
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                else:
                    return
        finally:
            db.execute(f"PRAGMA busy_timeout = {int(1000 * _LOCKED_TIMEOUT_S)}")

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Run one write transaction, rolled back whole where it fails.

        Once it ends it outlives this process, but no power failure before
        :meth:`make_durable`.

        Yields:
            The connection; with it go all cursors that are not read to their end.
        """
        with self._mutex:
            db = self._connected()
            try:
                self._insist(db, "BEGIN IMMEDIATE")
                self._late = False
                try:
                    for sql, values in self._owed:
                        db.execute(sql, values)
                    yield db
                    db.execute("COMMIT")
                    self._settled += len(self._owed)
                    self._owed.clear()
                except BaseException:
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise self._broken(error) from error

    def make_durable(self) -> None:
        """Have all transactions so far outlive a power failure.

        Reservations must, since they precede the bytes; all others only make the ledger count
        too much when they are lost. What a full sync would do inside the transaction is done
        after it, so that other processes write meanwhile.
        """
        try:
            # SQLite holds no lock on this file, which closing it would give up.
            log = os.open(f"{self._path}-wal", os.O_RDWR)
            try:
                os.fsync(log)
            finally:
                os.close(log)
        except FileNotFoundError:
            # Another thread forks: the connection was closed, and the log went into the database.
            return
        except OSError as error:
            message = f"Cannot write the ledger {self._path} to the disk: {error}. Is it full?"
            raise LedgerError(message) from error

    def report(self, *statements: Statement) -> list[Any]:
        """Write what has happened, at once or, where the disk is full, before anything else.

        Until then the ledger counts too much. Who reports need not fail for it.

        Returns:
            The rows of the last statement; none where they are still owed.
        """
        with self._mutex:
            try:
                with self.writing() as db:
                    found = [db.execute(sql, values).fetchall() for sql, values in statements]
            except LedgerError as error:
                if not _is_full(error.__cause__):
                    raise
                self._owed += statements
                return []
            return found[-1] if found else []

    def settle(self) -> bool:
        """Write what is owed, if the disk has room again; return whether nothing is."""
        with self._mutex:
            if self._owed and not self._closed:
                self.report()
            return not self._owed

    def changes(self) -> int:
        """Return a number that differs once another process has written, or we what was owed.

        SQLite's own is of one connection, and begins at the same number in each, also in the one
        that takes its place after a fork.
        """
        with self._mutex:
            if self._owed:
                self.settle()
            try:
                version = self._connected().execute("PRAGMA data_version").fetchone()[0]
            except sqlite3.Error as error:
                raise self._broken(error) from error
            return int(version) + self._settled

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Keep other threads, and forks, away while several queries are read to their end."""
        with self._mutex:
            try:
                yield self._connected()
            except sqlite3.Error as error:
                raise self._broken(error) from error

    def read(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """Return the rows of one query."""
        with self.reading() as db:
            return db.execute(query, values).fetchall()

    def shrink(self) -> None:
        """Give back to the disk what deleted rows took, or a bounded part of it."""
        with self._mutex, suppress(sqlite3.Error):
            # Run to its end, where execute() would free a single page.
            self._connected().executescript(f"PRAGMA incremental_vacuum({_MOST_FREED_PAGES})")

    def close(self) -> None:
        """Close the connection for good."""
        with self._mutex:
            self._closed = True
            self._disconnect()


def held(path: Path) -> LedgerError:
    """Return the error for a database that another process keeps to itself, naming it."""
    files = [*path.parent.glob(f"{path.name}*")]
    pids = ", ".join(map(str, holding_pids(files, {"POSIX", "WRITE"}))) or "none that is seen here"
    return LedgerError(
        f"Cannot write to the ledger {path}: for {_LOCKED_TIMEOUT_S:.0f} s another process has "
        f"been in the middle of a transaction (process {pids}). Likely it is stopped, or in a "
        f"debugger. Let it go on (`kill -CONT`), or end it (`kill -9`): nothing is lost by that."
    )


def why_lost(path: Path, version: int) -> str:
    """Return why a file is no ledger of that version; empty where it is one.

    Raises:
        sqlite3.Error: It cannot be looked at.
    """
    if not path.exists() or not path.stat().st_size:
        return "it is not there, or empty"
    with closing(sqlite3.connect(path, timeout=_LOCKED_TIMEOUT_S)) as db:
        try:
            (found,) = db.execute("PRAGMA user_version").fetchone()
            (damage,) = db.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
                raise held(path) from error
            if error.sqlite_errorcode not in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
                raise
            return str(error)
    if found != version:
        return f"it is of version {found}"
    return "" if damage == "ok" else str(damage)


def make_database(path: Path, tables: Sequence[str], version: int) -> None:
    """Make a database, wholly or not at all, in the place of one that was lost.

    The caller keeps others away. What was there is kept beside it.

    Args:
        path: File on a local disk.
        tables: Statements that make the tables.
        version: Of the tables.
    """
    new = path.with_name(f"new-{path.name}")
    for stale in path.parent.glob(f"{new.name}*"):
        stale.unlink()
    with closing(sqlite3.connect(new, isolation_level=None)) as db:
        # A step changes a few bytes of each of many pages, which go whole to the log (4.1 MB with
        # the usual 4096); what is deleted can be given back.
        db.execute("PRAGMA page_size = 1024")
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        db.execute("PRAGMA journal_mode = WAL")
        for statement in ("BEGIN", *tables, f"PRAGMA user_version = {version}", "COMMIT"):
            db.execute(statement)
    for old in path.parent.glob(f"{path.name}*"):
        old.replace(old.with_name(f"lost-{old.name}"))
    new.replace(path)


def _is_full(error: BaseException | None) -> bool:
    """Return whether SQLite could not write for want of space."""
    return isinstance(error, sqlite3.Error) and error.sqlite_errorcode & 0xFF in _NO_ROOM
