"""Who gets room: the decisions of the ledger, each inside one transaction of its database.

Owns no state. Written against a database handle that :mod:`tio_openneuro.ledger` opens, so that
one module alone knows SQLite.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from tio_openneuro.errors import DiskBudgetError
from tio_openneuro.ledger.eviction import ContentId, Resident, choose_victims, prefetch_window
from tio_openneuro.ledger.schema import (
    BUDGET,
    EVICTABLE,
    ORDERS,
    PENDING,
    RECORD_PEAK,
    RESERVED,
    ROWS,
    USED,
    ContentState,
    Outcome,
    Row,
    Want,
)
from tio_openneuro.sizes import format_size

OVERTAKES = 64
"""Requests without need of room that may pass the first in the queue before it blocks them."""


class Cursor(Protocol):
    """What is used of an answer of the database."""

    @property
    def rowcount(self) -> int:
        """Rows that were changed."""

    @property
    def lastrowid(self) -> int | None:
        """Number of the row that was inserted."""

    def fetchone(self) -> Any:  # noqa: ANN401 - a row is what the query makes it
        """Return the next row, or None."""

    def __iter__(self) -> Iterator[Any]:
        """Yield the rows."""


class Database(Protocol):
    """What is used of the database, inside a transaction."""

    def execute(self, sql: str, parameters: Sequence[Any] = ..., /) -> Cursor:
        """Run one statement."""

    def executemany(self, sql: str, parameters: Iterable[Sequence[Any]], /) -> Cursor:
        """Run one statement for each row of values."""


class Decision:
    """One owner's decisions within one write transaction."""

    def __init__(self, db: Database, owner_id: str) -> None:
        """Work on that database, in the name of that owner."""
        self._db = db
        self._owner_id = owner_id

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
        """Reserve and lease a unit's content, all or none, in the order of the queue.

        Where the room is not there, the request gets a ticket, what is to be dropped is marked,
        and prefetches are told to end. The caller drops, and asks again with the ticket.

        Args:
            unit: Name of the unit, for messages.
            wants: Its content, each key of a clone once.
            ticket: From an earlier answer, or zero.
            avoid: Content that could not be dropped.
            spare_bytes: Free bytes of the disk above its floor, or None where none is kept.
            position: Place of the unit in this owner's order, now reached.

        Raises:
            DiskBudgetError: The unit alone exceeds the budget.
        """
        rows = self.rows(want.content for want in wants)
        missing = [w for w in wants if w.content not in rows and not w.located]
        foreign = {w.content for w in wants if w.content not in rows and w.located}
        self._check_size(unit, [w for w in wants if w.content not in foreign])
        needed_bytes = sum(want.size_bytes for want in missing)
        dropping = [row for row in rows.values() if row.state is ContentState.DROPPING]
        head = self._db.execute("SELECT number, overtaken FROM ticket ORDER BY number").fetchone()
        if head is not None and head[0] != ticket:
            if needed_bytes or dropping or head[1] >= OVERTAKES:
                return self._queued(unit, ticket, why="earlier requests wait for room")
            self._db.execute(
                "UPDATE ticket SET overtaken = overtaken + 1 WHERE number = ?", head[:1]
            )
        if dropping:
            orphaned = [row.content for row in dropping if not row.owner_id]
            self._mark(orphaned, ContentState.DROPPING)
            return self._queued(unit, ticket, orphaned, "its content is being dropped")
        short_bytes = needed_bytes - self._room(spare_bytes)
        if needed_bytes and short_bytes > 0:
            own = {want.content for want in wants}
            victims = self._make_room(short_bytes, own | avoid)
            return self._queued(unit, ticket, victims, "room")
        self._reserve(missing, prefetch=False)
        for row in rows.values():
            self._db.execute(
                "UPDATE content SET prefetch = 0, cancel = 0 WHERE clone = ? AND key = ?",
                (row.content.clone, row.content.key),
            )
        lease_id = self._lease(unit, [w for w in wants if w.content not in foreign])
        self._db.execute("DELETE FROM ticket WHERE number = ?", (ticket,))
        if position is not None:
            self.reach(position)
        fetch = frozenset(want.content for want in missing)
        return Outcome(granted=True, lease_id=lease_id, fetch=fetch, foreign=frozenset(foreign))

    def request_prefetch(
        self,
        wants: Sequence[Want],
        steps: int,
        *,
        ahead_bytes: int = 0,
        largest_bytes: int = 0,
        keep: frozenset[ContentId] = frozenset(),
        spare_bytes: int | None = None,
    ) -> Outcome:
        """Reserve a unit's content without a lease, in room that nobody needs sooner.

        Args:
            wants: Its content, each key of a clone once.
            steps: How many steps ahead the unit is used; only later content gives way.
            ahead_bytes: Bytes that this owner fetched ahead and has not used; only what nobody is
                known to use again gives way for more than :func:`prefetch_window`.
            largest_bytes: Bytes of the largest unit of its order.
            keep: Content that does not give way in any case.
            spare_bytes: Free bytes of the disk above its floor, or None where none is kept.

        Returns:
            Not granted and without victims where there is no such room now.
        """
        if self._db.execute("SELECT 1 FROM ticket LIMIT 1").fetchone():
            return Outcome(why="queue")
        rows = self.rows(want.content for want in wants)
        dropping = [row for row in rows.values() if row.state is ContentState.DROPPING]
        if dropping:
            orphaned = [row.content for row in dropping if not row.owner_id]
            self._mark(orphaned, ContentState.DROPPING)
            return Outcome(victims=tuple(orphaned), why="drop")
        missing = [w for w in wants if w.content not in rows and not w.located]
        needed_bytes = sum(want.size_bytes for want in missing)
        short_bytes = needed_bytes - self._room(spare_bytes)
        if missing and short_bytes > 0:
            budget_bytes = int(self._db.execute(BUDGET).fetchone()[0])
            orders = int(self._db.execute(ORDERS).fetchone()[0])
            window_bytes = prefetch_window(budget_bytes, largest_bytes, orders)
            # One unit may always come ahead, or a small share of the window would end prefetching.
            full = ahead_bytes > 0 and ahead_bytes + needed_bytes > window_bytes
            short_bytes -= int(self._db.execute(PENDING).fetchone()[0])
            later, next_use = self._evictable(keep | {w.content for w in wants}, idle=True)
            turn = self._db.execute("SELECT turn FROM owner WHERE id = ?", (self._owner_id,))
            since = int(turn.fetchone()[0])
            # What was leased out of order since this owner's last step stays until the next one:
            # else scoring between epochs and this prefetch evict each other's content in turn
            # (one epoch of the demo fetched 23.6 MB, now 18.9, 2026-11-20).
            later = [r for r in later if r.content in next_use or r.last_use <= since]
            later = [r for r in later if not full or r.content not in next_use]
            later = [r for r in later if next_use.get(r.content, steps + 1) > steps]
            victims = choose_victims(later, short_bytes, next_use)
            if sum(victim.size_bytes for victim in victims) < short_bytes:
                return Outcome(why="room")
            self._mark([victim.content for victim in victims], ContentState.DROPPING)
            return Outcome(victims=tuple(v.content for v in victims), why="drop")
        self._reserve(missing, prefetch=True)
        resumed = [
            row.content
            for row in rows.values()
            if row.state is ContentState.RESERVED and not row.owner_id and not row.leased
        ]
        self._mark(resumed, ContentState.RESERVED, prefetch=True)
        again = frozenset(resumed)
        fetch = again | {want.content for want in missing}
        return Outcome(granted=True, fetch=fetch, resumed=again)

    def _check_size(self, unit: str, wants: Sequence[Want]) -> None:
        size_bytes = sum(want.size_bytes for want in wants)
        budget_bytes, pid = self._db.execute(BUDGET).fetchone()
        if size_bytes > budget_bytes:
            message = (
                f"Cannot hold {unit}: its {len(wants)} files need {size_bytes} bytes "
                f"({format_size(size_bytes)}) at once, and the disk budget is {budget_bytes} bytes "
                f"({format_size(budget_bytes)}, stated by process {pid}). Raise disk_budget to at "
                f"least {size_bytes}, or select fewer images per unit."
            )
            raise DiskBudgetError(message, unit=unit)

    def _queued(
        self,
        unit: str,
        ticket: int,
        victims: Sequence[ContentId] = (),
        why: str = "",
    ) -> Outcome:
        """Answer that the request waits, with a ticket if it has none."""
        if not ticket:
            values = (self._owner_id, unit)
            ticket = (
                self._db.execute("INSERT INTO ticket (owner, unit) VALUES (?,?)", values).lastrowid
                or 0
            )
        head = self._db.execute("SELECT MIN(number) FROM ticket").fetchone()[0]
        used_bytes = self._db.execute(USED).fetchone()[0]
        last = self._db.execute("SELECT COALESCE(MAX(id), 0), COUNT(*) FROM lease").fetchone()
        progress = (head, used_bytes, *last)
        return Outcome(ticket=ticket, victims=tuple(victims), progress=progress, why=why)

    def _room(self, spare_bytes: int | None) -> int:
        room_bytes = int(
            self._db.execute(BUDGET).fetchone()[0] - self._db.execute(USED).fetchone()[0]
        )
        if spare_bytes is not None:
            # What is reserved may still have to be written, so it is not free.
            room_bytes = min(room_bytes, spare_bytes - self._db.execute(RESERVED).fetchone()[0])
        return room_bytes

    def _evictable(
        self, spared: Iterable[ContentId], *, idle: bool
    ) -> tuple[list[Resident], dict[ContentId, int]]:
        """Return what nobody leases, and its next use; ``idle``: nor is fetching."""
        spared = set(spared)
        resident: list[Resident] = []
        next_use: dict[ContentId, int] = {}
        for clone, key, size_bytes, last_use, fetching, steps in self._db.execute(EVICTABLE):
            content = ContentId(clone, key)
            if content in spared or (idle and fetching):
                continue
            resident.append(Resident(content, size_bytes, last_use))
            if steps is not None:
                next_use[content] = steps
        return resident, next_use

    def _make_room(self, short_bytes: int, spared: Iterable[ContentId]) -> list[ContentId]:
        """Mark what gives way; return what is to be dropped, prefetches are told to end."""
        short_bytes -= int(self._db.execute(PENDING).fetchone()[0])
        resident, next_use = self._evictable(spared, idle=False)
        victims = [victim.content for victim in choose_victims(resident, short_bytes, next_use)]
        drop = []
        for victim in victims:
            cancelled = self._db.execute(
                "UPDATE content SET cancel = 1 WHERE clone = ? AND key = ? "
                "AND state = 'reserved' AND owner IS NOT NULL",
                (victim.clone, victim.key),
            )
            if not cancelled.rowcount:
                drop.append(victim)
        self._mark(drop, ContentState.DROPPING)
        return drop

    def _mark(
        self,
        contents: Iterable[ContentId],
        state: ContentState,
        *,
        prefetch: bool = False,
    ) -> None:
        """Put content into a state in which this owner acts on it."""
        self._db.executemany(
            "UPDATE content SET state = ?, owner = ?, prefetch = ?, cancel = 0, empty = 0 "
            "WHERE clone = ? AND key = ?",
            [(state, self._owner_id, prefetch, each.clone, each.key) for each in contents],
        )

    def _reserve(self, wants: Sequence[Want], *, prefetch: bool) -> None:
        self._db.executemany(
            "INSERT INTO content (clone, key, size_bytes, state, owner, prefetch) "
            "VALUES (?,?,?,'reserved',?,?)",
            [
                (w.content.clone, w.content.key, w.size_bytes, self._owner_id, prefetch)
                for w in wants
            ],
        )
        self._db.execute(RECORD_PEAK)

    def _lease(self, unit: str, wants: Sequence[Want]) -> int:
        cursor = self._db.execute(
            "INSERT INTO lease (owner, unit) VALUES (?,?)", (self._owner_id, unit)
        )
        lease_id = cursor.lastrowid or 0
        rows = [(lease_id, want.content.clone, want.content.key) for want in wants]
        self._db.executemany("INSERT INTO leased VALUES (?,?,?)", rows)
        return lease_id

    def set_order(
        self,
        entries: Iterable[tuple[int, str, ContentId]],
        *,
        replace: bool,
        reached: int,
        gone: Iterable[int],
    ) -> None:
        """Publish which content this owner uses next.

        Args:
            entries: Position, unit and content of each use.
            replace: Whether they replace what was published before, or follow it.
            reached: Position that this owner has come to.
            gone: Positions whose uses are replaced, in any case.
        """
        rows = [(self._owner_id, place, use.clone, use.key, unit) for place, unit, use in entries]
        if replace:
            self._db.execute("DELETE FROM upcoming WHERE owner = ?", (self._owner_id,))
        old = [(self._owner_id, position) for position in gone]
        self._db.executemany("DELETE FROM upcoming WHERE owner = ? AND position = ?", old)
        self._db.execute("UPDATE owner SET position = ? WHERE id = ?", (reached, self._owner_id))
        self._db.executemany("INSERT OR IGNORE INTO upcoming VALUES (?,?,?,?,?)", rows)

    def reach(self, position: int) -> None:
        """Note how far this owner has come in its order; what lies before is no future use."""
        values = (position, self._owner_id)
        self._db.execute("UPDATE owner SET position = MAX(position, ?) WHERE id = ?", values)
        self._db.execute("DELETE FROM upcoming WHERE position = ? AND owner = ?", values)
        self._db.execute(
            "UPDATE owner SET turn = COALESCE((SELECT seq FROM sqlite_sequence "
            "WHERE name = 'lease'), 0) WHERE id = ?",
            (self._owner_id,),
        )

    def make_room(
        self, needed_bytes: int, spared: Iterable[ContentId] = ()
    ) -> tuple[int, list[ContentId]]:
        """Return how many bytes are lacking, and what the caller must drop for them now."""
        short_bytes = needed_bytes - self._room(None)
        return short_bytes, self._make_room(short_bytes, spared) if short_bytes > 0 else []

    def give_up(self, contents: Iterable[ContentId]) -> list[Row]:
        """Mark for the caller to drop what of this is there and leased by nobody."""
        rows = self.rows(contents).values()
        idle = [
            row
            for row in rows
            if not row.leased and (not row.owner_id or row.state is ContentState.PRESENT)
        ]
        self._mark([row.content for row in idle], ContentState.DROPPING)
        return idle

    def rows(self, contents: Iterable[ContentId]) -> dict[ContentId, Row]:
        """Return what the ledger has of this content."""
        found = {}
        for content in contents:
            values = (content.clone, content.key)
            for row in self._db.execute(f"{ROWS} WHERE clone = ? AND key = ?", values):
                found[content] = Row.read(row)
        return found
