"""What the ledger records: its tables, its states, and the records that cross its seam.

Pure; the SQL is here as text and run in this room alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tio_openneuro.content import ContentId

SCHEMA_VERSION = 1


class ContentState(StrEnum):
    """State of one key's content in one clone; absent content has no row.

    Bytes count in every state that has a row, so from RESERVED until the drop has finished.

        ABSENT ──► RESERVED   room was there, all of a unit's bytes at once
        RESERVED ─► PRESENT   the content arrived and has the right size
        RESERVED ─► ABSENT    the fetch failed and its partial download is gone
        RESERVED ─► DROPPING  a dead owner's partial download is given up
        PRESENT ──► RESERVED  somebody else deleted the file; it is fetched again
        PRESENT ──► DROPPING  chosen for eviction, leased by nobody
        DROPPING ─► ABSENT    the disk has it no more
        DROPPING ─► PRESENT   the drop was refused
    """

    RESERVED = "reserved"
    PRESENT = "present"
    DROPPING = "dropping"


@dataclass(frozen=True, slots=True)
class Want:
    """Content that a request needs.

    Attributes:
        content: Clone and key.
        size_bytes: Bytes that the key states, charged exactly.
        located: Whether the disk had the whole content just before the request.
    """

    content: ContentId
    size_bytes: int
    located: bool


@dataclass(frozen=True, slots=True)
class ContentRow:
    """One key's content as the ledger has it.

    Attributes:
        content: Clone and key.
        size_bytes: Bytes charged.
        state: Its state.
        owner_id: Who fetches or drops it, or an empty string.
        leased: Whether anybody leases it.
    """

    content: ContentId
    size_bytes: int
    state: ContentState
    owner_id: str
    leased: bool

    @classmethod
    def read(cls, values: tuple[Any, ...]) -> ContentRow:
        """Return the row that a query of :data:`ROWS` gave."""
        clone, key, size_bytes, state, owner_id, leased = values
        return cls(
            ContentId(clone, key), size_bytes, ContentState(state), owner_id, leased=bool(leased)
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer to a request for room.

    Attributes:
        granted: Whether the room is ours and, for a lease, the lease.
        refused: Whether no waiting is meant: there is no room that is worth less.
        lease_id: Number of the lease, or zero.
        ticket: Number in the queue, or zero.
        fetch: Content reserved just now, for the caller to fetch.
        resumed: Those of them whose partial download may be there.
        foreign: Content that is there and does not belong to the ledger.
        victims: Content that the caller must drop now, and report as dropped.
        short_bytes: Bytes that were lacking; zero or less where it was granted.
        progress: Changes whenever somebody gets ahead; a wait without change is a stall.
        why: What the request waits for, for the message of a stall.
    """

    granted: bool = False
    refused: bool = False
    lease_id: int = 0
    ticket: int = 0
    fetch: frozenset[ContentId] = frozenset()
    resumed: frozenset[ContentId] = frozenset()
    foreign: frozenset[ContentId] = frozenset()
    victims: tuple[ContentId, ...] = ()
    short_bytes: int = 0
    progress: tuple[int, ...] = ()
    why: str = ""


@dataclass(frozen=True, slots=True)
class Holdings:
    """What is held under the root now.

    Attributes:
        budget_bytes: The smallest budget of the live owners.
        used_bytes: Bytes charged.
        peak_bytes: Most bytes ever charged at once.
        leased_bytes: Bytes of content under a lease.
        lease_pids: Processes that hold leases.
        fetch_pids: Processes that fetch or drop.
    """

    budget_bytes: int
    used_bytes: int
    peak_bytes: int
    leased_bytes: int
    lease_pids: tuple[int, ...]
    fetch_pids: tuple[int, ...]


HERE = "WHERE clone = ? AND key = ?"
TABLES = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT OR IGNORE INTO meta VALUES ('peak_bytes', 0);
CREATE TABLE IF NOT EXISTS clone (path TEXT PRIMARY KEY, remotes TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS owner (
    id TEXT PRIMARY KEY,
    pid INTEGER NOT NULL,
    created_s REAL NOT NULL,
    budget_bytes INTEGER NOT NULL,
    auto INTEGER NOT NULL,
    position INTEGER NOT NULL DEFAULT 0,
    turn INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS content (
    clone TEXT NOT NULL,
    key TEXT NOT NULL,
    size_bytes INTEGER NOT NULL CHECK (size_bytes >= 0),
    state TEXT NOT NULL CHECK (state IN ('reserved', 'present', 'dropping')),
    owner TEXT REFERENCES owner (id) ON DELETE SET NULL,
    prefetch INTEGER NOT NULL DEFAULT 0,
    cancel INTEGER NOT NULL DEFAULT 0,
    empty INTEGER NOT NULL DEFAULT 0,
    refused INTEGER NOT NULL DEFAULT 0,
    last_use INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (clone, key)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS content_owner ON content (owner);
CREATE TABLE IF NOT EXISTS lease (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    owner TEXT NOT NULL REFERENCES owner (id) ON DELETE CASCADE,
    unit TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS lease_owner ON lease (owner);
CREATE TABLE IF NOT EXISTS leased (
    lease INTEGER NOT NULL REFERENCES lease (id) ON DELETE CASCADE,
    clone TEXT NOT NULL,
    key TEXT NOT NULL,
    PRIMARY KEY (lease, clone, key)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS leased_content ON leased (clone, key);
CREATE TABLE IF NOT EXISTS ticket (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    owner TEXT NOT NULL REFERENCES owner (id) ON DELETE CASCADE,
    unit TEXT NOT NULL,
    overtaken INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS ticket_owner ON ticket (owner);
CREATE TABLE IF NOT EXISTS upcoming (
    owner TEXT NOT NULL REFERENCES owner (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    clone TEXT NOT NULL,
    key TEXT NOT NULL,
    unit TEXT NOT NULL,
    PRIMARY KEY (owner, position, clone, key)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS upcoming_content ON upcoming (clone, key);
"""

_LEASED = (
    "EXISTS (SELECT 1 FROM leased WHERE leased.clone = content.clone AND leased.key = content.key)"
)
USED = "SELECT COALESCE(SUM(size_bytes), 0) FROM content"
BUDGET = "SELECT budget_bytes, pid FROM owner ORDER BY budget_bytes LIMIT 1"
RESERVED = "SELECT COALESCE(SUM(size_bytes), 0) FROM content WHERE state = 'reserved'"
RECORD_PEAK = f"UPDATE meta SET value = MAX(value, ({USED})) WHERE name = 'peak_bytes'"
PENDING = (
    "SELECT COALESCE(SUM(size_bytes), 0) FROM content "
    "WHERE owner IS NOT NULL AND (state = 'dropping' OR (state = 'reserved' AND cancel))"
)
EVICTABLE = f"""
SELECT clone, key, size_bytes, last_use, state = 'reserved' AND owner IS NOT NULL, (
    SELECT MIN(upcoming.position - owner.position)
    FROM upcoming JOIN owner ON owner.id = upcoming.owner
    WHERE upcoming.clone = content.clone AND upcoming.key = content.key
) AS next_use
FROM content
WHERE NOT refused AND NOT {_LEASED} AND (
    state = 'present' OR owner IS NULL OR (state = 'reserved' AND prefetch AND NOT cancel)
)
"""
ORDERS = (
    "SELECT COUNT(*) FROM owner WHERE EXISTS "
    "(SELECT 1 FROM upcoming WHERE upcoming.owner = owner.id)"
)
ROWS = f"SELECT clone, key, size_bytes, state, COALESCE(owner, ''), {_LEASED} FROM content"
FORGET_EMPTY = (
    f"DELETE FROM content WHERE state = 'reserved' AND owner IS NULL AND empty AND NOT {_LEASED}"
)
LEASE_PIDS = "SELECT DISTINCT pid FROM owner JOIN lease ON lease.owner = owner.id ORDER BY pid"
LEASED_BYTES = f"SELECT COALESCE(SUM(size_bytes), 0) FROM content WHERE {_LEASED}"
FETCH_PIDS = "SELECT DISTINCT pid FROM owner JOIN content ON content.owner = owner.id ORDER BY pid"
PEAK = "SELECT value FROM meta WHERE name = 'peak_bytes'"
