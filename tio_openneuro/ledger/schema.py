"""What the ledger records: its tables, its states, and the records that cross its seam.

Pure; the SQL is here as text and run in this room alone. What one step costs depends on its own
keys, on neither the rows nor the order: ids are integers, rows are found by clone and key, sums
are kept by triggers in the transaction that changes a row, and who gives way is read from an index
that holds the content that may, in the order in which it does. Of an owner's known order only
the next use of each content that is held is kept (``upcoming``); the order itself stays in the
owner's memory. Each content names the nearest of these uses, which a trigger chooses anew when
one of them changes. A new fact about a file or a clone is a column of ``content`` or ``clone``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tio_openneuro.content import ContentId

SCHEMA_VERSION = 2


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
        mark: Of the file that is charged, :func:`~tio_openneuro.content.mark_of`, or
            :data:`~tio_openneuro.content.UNCLAIMED`. Of what a process fetched when it died, until
            when it is known to have lived, in nanoseconds.
    """

    content: ContentId
    size_bytes: int
    state: ContentState
    owner_id: str
    leased: bool
    mark: str

    @classmethod
    def read(cls, values: tuple[Any, ...]) -> ContentRow:
        """Return the row that a query of :data:`ROWS` gave."""
        clone, key, size_bytes, state, owner_id, leased, mark = values
        content = ContentId(clone, key)
        return cls(content, size_bytes, ContentState(state), owner_id, bool(leased), mark)


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


HERE = "WHERE clone = (SELECT id FROM clone WHERE path = ?) AND key = ?"
ID = f"(SELECT id FROM content {HERE})"
_TABLES = """
CREATE TABLE sums (
    used_bytes DEFAULT 0, reserved_bytes DEFAULT 0, pending_bytes DEFAULT 0,
    leased_bytes DEFAULT 0, peak_bytes DEFAULT 0
);
INSERT INTO sums DEFAULT VALUES;
CREATE TABLE loss (noted);
CREATE TABLE clone (
    id INTEGER PRIMARY KEY,
    path TEXT NOT NULL UNIQUE,
    remotes TEXT NOT NULL DEFAULT '[]',
    place TEXT NOT NULL DEFAULT ''
);
CREATE TABLE owner (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    pid INTEGER NOT NULL, created_s REAL NOT NULL,
    budget_bytes INTEGER NOT NULL, auto INTEGER NOT NULL,
    ordered INTEGER NOT NULL DEFAULT 0,
    position INTEGER NOT NULL DEFAULT 0,
    turn INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE content (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    clone INTEGER NOT NULL REFERENCES clone (id),
    key TEXT NOT NULL,
    size_bytes INTEGER NOT NULL CHECK (size_bytes >= 0),
    state TEXT NOT NULL CHECK (state IN ('reserved', 'present', 'dropping')),
    owner INTEGER REFERENCES owner (id) ON DELETE SET NULL,
    prefetch INTEGER NOT NULL DEFAULT 0, cancel INTEGER NOT NULL DEFAULT 0,
    empty INTEGER NOT NULL DEFAULT 0, refused INTEGER NOT NULL DEFAULT 0,
    last_use INTEGER NOT NULL DEFAULT 0,
    leases INTEGER NOT NULL DEFAULT 0,
    next_owner INTEGER, next_position INTEGER,
    mark TEXT NOT NULL DEFAULT '',
    used_bytes AS (size_bytes),
    reserved_bytes AS (size_bytes * (state = 'reserved')),
    pending_bytes AS (size_bytes * (
        owner IS NOT NULL AND (state = 'dropping' OR (state = 'reserved' AND cancel))
    )),
    leased_bytes AS (size_bytes * (leases > 0)),
    fetching AS (owner IS NOT NULL AND state = 'reserved'),
    evictable AS (NOT refused AND leases = 0 AND (
        state = 'present' OR owner IS NULL OR (state = 'reserved' AND prefetch AND NOT cancel)
    )),
    UNIQUE (clone, key)
);
CREATE INDEX content_owner ON content (owner) WHERE owner IS NOT NULL;
CREATE INDEX content_unfinished ON content (id) WHERE state <> 'present';
CREATE INDEX content_unclaimed ON content (mark, size_bytes) WHERE mark = '?';
CREATE INDEX content_empty ON content (id) WHERE empty;
CREATE INDEX content_victim ON content (next_owner, next_position DESC, last_use) WHERE evictable;
CREATE TABLE lease (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    owner INTEGER NOT NULL REFERENCES owner (id) ON DELETE CASCADE,
    unit TEXT NOT NULL
);
CREATE INDEX lease_owner ON lease (owner);
CREATE TABLE leased (
    lease INTEGER NOT NULL REFERENCES lease (id) ON DELETE CASCADE,
    content INTEGER NOT NULL REFERENCES content (id) ON DELETE CASCADE,
    PRIMARY KEY (lease, content)
) WITHOUT ROWID;
CREATE INDEX leased_content ON leased (content);
CREATE TABLE ticket (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    owner INTEGER NOT NULL REFERENCES owner (id) ON DELETE CASCADE,
    unit TEXT NOT NULL,
    overtaken INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE upcoming (
    content INTEGER NOT NULL REFERENCES content (id) ON DELETE CASCADE,
    owner INTEGER NOT NULL REFERENCES owner (id) ON DELETE CASCADE,
    position INTEGER NOT NULL, unit TEXT NOT NULL,
    PRIMARY KEY (content, owner)
) WITHOUT ROWID;
CREATE INDEX upcoming_owner ON upcoming (owner)
"""
_SUMS = ("used_bytes", "reserved_bytes", "pending_bytes", "leased_bytes")
_ADD, _TAKE = (
    "UPDATE sums SET " + ", ".join(f"{name} = {name} {sign} {row}.{name}" for name in _SUMS)
    for sign, row in (("+", "NEW"), ("-", "OLD"))
)
_RECORD_PEAK = "UPDATE sums SET peak_bytes = used_bytes WHERE used_bytes > peak_bytes"
_LEASES = "UPDATE content SET leases = leases {} 1 WHERE id = {}.content"
_NEXT_USE = """
UPDATE content SET (next_owner, next_position) = (
    SELECT owner.id, upcoming.position FROM upcoming JOIN owner ON owner.id = upcoming.owner
    WHERE upcoming.content = content.id ORDER BY upcoming.position - owner.position LIMIT 1
) WHERE id = {}.content
"""
_NEXT_OWNER = "(SELECT next_owner FROM content WHERE id = OLD.content)"
_TRIGGERS = {
    "INSERT ON content": (_ADD, _RECORD_PEAK),
    "UPDATE OF size_bytes, state, owner, cancel, leases ON content": (_TAKE, _ADD, _RECORD_PEAK),
    "DELETE ON content": (_TAKE,),
    "INSERT ON leased": (_LEASES.format("+", "NEW"),),
    "DELETE ON leased": (_LEASES.format("-", "OLD"),),
    "INSERT ON upcoming": (_NEXT_USE.format("NEW"),),
    "UPDATE ON upcoming": (_NEXT_USE.format("NEW"),),
    # With its owner or by itself; not with the content, whose uses can be many.
    f"DELETE ON upcoming WHEN OLD.owner = {_NEXT_OWNER}": (_NEXT_USE.format("OLD"),),
}
TABLES = (
    *_TABLES.split(";"),
    *(
        f"CREATE TRIGGER trigger_{number} AFTER {event} BEGIN {'; '.join(acts)}; END"
        for number, (event, acts) in enumerate(_TRIGGERS.items())
    ),
)
BUDGET = "SELECT budget_bytes, pid FROM owner ORDER BY budget_bytes LIMIT 1"
SUMS = "SELECT used_bytes, reserved_bytes, pending_bytes, leased_bytes, peak_bytes FROM sums"
COUNTED = f"SELECT {', '.join(f'COALESCE(SUM({name}), 0)' for name in _SUMS)} FROM content"
RECOUNT = (
    "UPDATE content SET leases = (SELECT COUNT(*) FROM leased WHERE content = content.id)",
    f"UPDATE sums SET ({', '.join(_SUMS)}) = ({COUNTED})",
)
HELD = "SELECT path, SUM(size_bytes) FROM content JOIN clone ON clone.id = clone GROUP BY path"
# The number of the last lease: what was used or reserved since then has a higher one.
TURN = "COALESCE((SELECT seq FROM sqlite_sequence WHERE name = 'lease'), 0)"
EVICTABLE = """
SELECT path, key, size_bytes, last_use, fetching, next_position
FROM content CROSS JOIN clone ON clone.id = content.clone WHERE evictable AND
"""
UNUSED = (
    f"{EVICTABLE} next_owner IS NULL AND next_position IS NULL AND last_use <= ? ORDER BY last_use"
)
USED_LAST = f"{EVICTABLE} next_owner = ? ORDER BY next_position DESC"
FARTHEST = """
SELECT id, position, (
    SELECT MAX(next_position) FROM content WHERE evictable AND next_owner = owner.id
) FROM owner
"""
ORDERS = "SELECT COUNT(*) FROM owner WHERE ordered"
ROWS = """
SELECT path, key, size_bytes, state,
    COALESCE((SELECT name FROM owner WHERE owner.id = content.owner), ''), leases > 0, mark
FROM content CROSS JOIN clone ON clone.id = content.clone
"""
HELD_AFTER = """
SELECT content.id, path, key, position FROM content CROSS JOIN clone ON clone.id = content.clone
LEFT JOIN upcoming ON upcoming.content = content.id AND upcoming.owner = ?
WHERE content.id > ? ORDER BY content.id LIMIT ?
"""
UNCLAIMED_BYTES = "SELECT SUM(size_bytes) FROM content WHERE mark = '?'"
FORGET_EMPTY = (
    "DELETE FROM content WHERE empty AND state = 'reserved' AND owner IS NULL AND leases = 0"
)
LEASE_PIDS = "SELECT DISTINCT pid FROM owner JOIN lease ON lease.owner = owner.id ORDER BY pid"
FETCH_PIDS = (
    "SELECT DISTINCT pid FROM owner "
    "WHERE EXISTS (SELECT 1 FROM content WHERE owner = owner.id) ORDER BY pid"
)
