"""Who gets room: what one owner decides within one write transaction of the ledger.

Owns no state but what the transaction granted.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tio_openneuro.content import UNCLAIMED, ContentId
from tio_openneuro.ledger.eviction import (
    EVER,
    Resident,
    evictable,
    pick,
    pick_enough,
    prefetch_window,
    steps_to_spare,
)
from tio_openneuro.ledger.root import refuse_beside, too_large
from tio_openneuro.ledger.schema import (
    BUDGET,
    HERE,
    ID,
    ORDERS,
    ROWS,
    TURN,
    UNCLAIMED_BYTES,
    Answer,
    ContentRow,
    ContentState,
    Want,
)

OVERTAKES = 64
"""Requests without need of room that may pass the first in the queue before it blocks them."""


# Position of the next use of content in an owner's order, None without one; its unit; whose use.
Use = tuple[int | None, str, ContentId]


@dataclass
class Transaction:
    """One owner's decisions within one write transaction.

    Attributes:
        granted: The last answer that reserved something, if one did.
    """

    _db: sqlite3.Connection
    _owner: int
    granted: Answer | None = None

    def request(
        self,
        unit: str,
        wants: Sequence[Want],
        *,
        ticket: int = 0,
        avoid: frozenset[ContentId] = frozenset(),
        spare_bytes: int | None = None,
        position: int | None = None,
        following: Sequence[Use] = (),
    ) -> Answer:
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
            following: The next use of each content after that one.

        Raises:
            DiskBudgetError: The unit alone exceeds the budget.
        """
        rows = self.rows(want.content for want in wants)
        missing = [w for w in wants if w.content not in rows and not w.located]
        foreign = {w.content for w in wants if w.content not in rows and w.located}
        own = [want for want in wants if want.content not in foreign]
        budget_bytes, pid = self._db.execute(BUDGET).fetchone()
        if sum(want.size_bytes for want in own) > budget_bytes:
            sizes_bytes = [want.size_bytes for want in own]
            raise too_large(unit, sizes_bytes, budget_bytes, f", stated by process {pid}")
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
            return self._queued(unit, ticket, self._orphaned(rows), "its content is being dropped")
        short_bytes = needed_bytes - self._room(spare_bytes)
        if needed_bytes and short_bytes > 0:
            used = (row.size_bytes for row in rows.values() if row.mark == UNCLAIMED)
            needed_bytes = sum((want.size_bytes for want in own), -sum(used))
            refuse_beside(self._number(UNCLAIMED_BYTES), unit, needed_bytes, budget_bytes)
            victims = self._make_room(short_bytes, avoid.union(want.content for want in wants))
            return self._queued(unit, ticket, victims, "room")
        self._insert(missing, ContentState.RESERVED, self._owner)
        for row in rows.values():
            self._db.execute(f"UPDATE content SET prefetch = 0, cancel = 0 {HERE}", row.content)
        lease_id = self.lease(unit, [want.content for want in own])
        self._db.execute("DELETE FROM ticket WHERE number = ?", (ticket,))
        if position is not None:
            self.reach(position, following or [(None, unit, want.content) for want in own])
        fetch = frozenset(want.content for want in missing)
        return self._grant(lease_id=lease_id, fetch=fetch, foreign=frozenset(foreign))

    def request_ahead(
        self,
        wants: Sequence[Want],
        steps: int,
        *,
        ahead_bytes: int = 0,
        largest_bytes: int = 0,
        keep: frozenset[ContentId] = frozenset(),
        spare_bytes: int | None = None,
        uses: Iterable[Use] = (),
        since: int | None = None,
    ) -> Answer:
        """Reserve a unit's content without a lease, in room that nobody needs sooner.

        Args:
            wants: Its content, each key of a clone once.
            steps: How many steps ahead the unit is used; only later content gives way.
            ahead_bytes: Bytes that this owner fetched ahead and has not used; only what nobody is
                known to use again gives way for more than :func:`prefetch_window`.
            largest_bytes: Bytes of the largest unit of its order.
            keep: Content that does not give way in any case.
            spare_bytes: Free bytes of the disk above its floor, or None where none is kept.
            uses: The next use of the content that is reserved.
            since: Turn since when what was used or reserved stays; default: this owner's last.

        Returns:
            Not granted and without victims where there is no such room now.
        """
        if self._number("SELECT 1 FROM ticket"):
            return Answer()
        rows = self.rows(want.content for want in wants)
        if any(row.state is ContentState.DROPPING for row in rows.values()):
            return Answer(victims=self._orphaned(rows))
        missing = [w for w in wants if w.content not in rows and not w.located]
        needed_bytes = sum(want.size_bytes for want in missing)
        short_bytes = needed_bytes - self._room(spare_bytes)
        if missing and short_bytes > 0:
            orders = self._number(ORDERS)
            window_bytes = prefetch_window(self._number(BUDGET), largest_bytes, orders)
            spare = steps_to_spare(steps, ahead_bytes, needed_bytes, window_bytes)
            if since is None:
                # What was leased out of order since this owner's last step stays until the next
                # one: else scoring between epochs and this prefetch evict each other's content in
                # turn (one epoch of the demo fetched 23.6 MB, now 18.9, 2026-11-20).
                since = self._number("SELECT turn FROM owner WHERE id = ?", (self._owner,))
            later = evictable(self._db, since=since, steps=spare)
            return self._give_way(short_bytes, later, keep.union(want.content for want in wants))
        self._insert(missing, ContentState.RESERVED, self._owner, prefetch=True)
        resumed = [
            row.content
            for row in rows.values()
            if row.state is ContentState.RESERVED and not row.owner_id and not row.leased
        ]
        self._mark(resumed, ContentState.RESERVED, prefetch=True)
        fetch = frozenset([*resumed, *(want.content for want in missing)])
        self._note_uses(use for use in uses if use[-1] in fetch)
        return self._grant(fetch=fetch, resumed=frozenset(resumed))

    def request_prepared(
        self,
        want: Want,
        instead: frozenset[ContentId],
        *,
        steps: int | None,
        kept: frozenset[ContentId],
        spare_bytes: int | None,
    ) -> Answer:
        """Reserve room for a prepared volume, in room that nobody needs sooner.

        Args:
            want: The volume.
            instead: The files that it stands for, which are not needed once it is there.
            steps: How many steps ahead it is used: only later content, and ``instead``, gives
                way. None: nothing does.
            kept: What does not give way in any case.
            spare_bytes: Free bytes of the disk above its floor, or None where none is kept.

        Returns:
            Not granted and without victims where there is no such room now.
        """
        if self._number("SELECT 1 FROM ticket"):
            return Answer()
        for row in self.rows([want.content]).values():
            idle = not row.owner_id and not row.leased and row.content not in kept
            if idle and (row.state is ContentState.RESERVED or not want.located):
                # What a killed process left of writing it, or what somebody removed.
                self.give_up([row.content])
                return Answer(victims=(row.content,))
            return Answer(refused=True)
        short_bytes = want.size_bytes - self._room(spare_bytes)
        if short_bytes > 0:
            if steps is None:
                return Answer(refused=True)
            later = evictable(self._db, steps=steps, first=instead)
            return self._give_way(short_bytes, later, kept | {want.content})
        self._insert([want], ContentState.RESERVED, self._owner)
        return self._grant(fetch=frozenset({want.content}))

    def try_lease(self, unit: str, content: ContentId) -> int:
        """Lease content that is present, and return the lease; zero where it is not."""
        row = self.rows([content]).get(content)
        present = row is not None and row.state is ContentState.PRESENT
        return self.lease(unit, [content]) if present else 0

    def request_adoption(self, kept: frozenset[ContentId], want: Want, since: int) -> Answer:
        """Charge what was on disk before, making room for it.

        Args:
            kept: What does not give way.
            want: The content.
            since: Turn since when what was used or adopted stays, where no use of it is known.
        """
        if want.content in self.rows([want.content]) or self.adopt(want):
            return Answer(granted=True)
        return self.make_room(want.size_bytes, kept, since)

    def adopt(self, want: Want) -> bool:
        """Charge what was on disk before, whole or partial; return whether it fits."""
        if self._room(None) < want.size_bytes:
            return False
        self._insert([want], "present" if want.located else "reserved", None)
        return True

    def claim(self, content: ContentId, *, absent: bool) -> bool:
        """Take over the fetch of reserved content that nobody fetches.

        Args:
            content: Content under a lease of the caller.
            absent: Whether the disk lacks what the ledger has as present, so is fetched again.
        """
        cursor = self._db.execute(
            "UPDATE content SET state = 'reserved', owner = ?, prefetch = 0, cancel = 0, "
            f"empty = 0 {HERE} AND owner IS NULL AND (state = 'reserved' OR "
            "(state = 'present' AND ?))",
            (self._owner, *content, absent),
        )
        return cursor.rowcount == 1

    def make_room(
        self, needed_bytes: int, spared: frozenset[ContentId] = frozenset(), since: int = EVER
    ) -> Answer:
        """Answer whether that many bytes are free, and what the caller must drop for them."""
        short_bytes = needed_bytes - self._room(None)
        if not needed_bytes:  # What nobody may drop is no reason not to open.
            short_bytes = min(short_bytes, self._sum("used_bytes") - self._number(UNCLAIMED_BYTES))
        victims = self._make_room(short_bytes, spared, since) if short_bytes > 0 else []
        return Answer(granted=short_bytes <= 0, victims=tuple(victims), short_bytes=short_bytes)

    def _grant(self, **what: Any) -> Answer:  # noqa: ANN401 - fields of an answer
        self.granted = Answer(granted=True, **what)
        return self.granted

    def _orphaned(self, rows: Mapping[ContentId, ContentRow]) -> tuple[ContentId, ...]:
        """Take over the drops that dead owners began; return what is to be dropped."""
        found = [r for r in rows.values() if r.state is ContentState.DROPPING and not r.owner_id]
        self._mark([row.content for row in found], ContentState.DROPPING)
        return tuple(row.content for row in found)

    def _give_way(
        self, short_bytes: int, later: Iterator[Resident], spared: frozenset[ContentId]
    ) -> Answer:
        """Mark what may give way and is not being fetched, if that frees enough."""
        short_bytes -= self._sum("pending_bytes")
        victims = pick_enough(later, short_bytes, spared)
        if victims is None:
            return Answer(refused=True)
        self._mark([victim.content for victim in victims], ContentState.DROPPING)
        return Answer(victims=tuple(victim.content for victim in victims))

    def _queued(
        self,
        unit: str,
        ticket: int,
        victims: Sequence[ContentId] = (),
        why: str = "",
    ) -> Answer:
        """Answer that the request waits, with a ticket if it has none."""
        if not ticket:
            ticket = self._number(
                "INSERT INTO ticket (owner, unit) VALUES (?,?) RETURNING number",
                (self._owner, unit),
            )
        head, used_bytes = self._number("SELECT MIN(number) FROM ticket"), self._sum("used_bytes")
        last = self._db.execute("SELECT COALESCE(MAX(id), 0), COUNT(*) FROM lease").fetchone()
        progress = (head, used_bytes, *last)
        return Answer(ticket=ticket, victims=tuple(victims), progress=progress, why=why)

    def _room(self, spare_bytes: int | None) -> int:
        room_bytes = self._number(BUDGET) - self._sum("used_bytes")
        if spare_bytes is not None:
            # What is reserved may still have to be written, so it is not free.
            room_bytes = min(room_bytes, spare_bytes - self._sum("reserved_bytes"))
        return room_bytes

    def _sum(self, name: str) -> int:
        return self._number(f"SELECT {name} FROM sums")

    def _number(self, query: str, values: Sequence[Any] = ()) -> int:
        """Return the first value of a query; zero where there is none."""
        row = self._db.execute(query, values).fetchone()
        return int(row[0] or 0) if row else 0

    def _make_room(
        self, short_bytes: int, spared: frozenset[ContentId], since: int = EVER
    ) -> list[ContentId]:
        """Mark what gives way; return what is to be dropped, prefetches are told to end."""
        short_bytes -= self._sum("pending_bytes")
        victims = pick(evictable(self._db, since=since), short_bytes, spared)
        ending = [victim.content for victim in victims if victim.fetching]
        self._db.executemany(f"UPDATE content SET cancel = 1 {HERE}", ending)
        drop = [victim.content for victim in victims if not victim.fetching]
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
            f"UPDATE content SET state = ?, owner = ?, prefetch = ?, cancel = 0, empty = 0 {HERE}",
            [(state, self._owner, prefetch, *content) for content in contents],
        )

    def _insert(
        self, wants: Sequence[Want], state: str, owner: int | None, *, prefetch: bool = False
    ) -> None:
        clones = {(want.content.clone,) for want in wants}
        self._db.executemany("INSERT OR IGNORE INTO clone (path) VALUES (?)", clones)
        self._db.executemany(
            "INSERT OR IGNORE INTO content "
            "(clone, key, size_bytes, state, owner, prefetch, last_use) "
            f"SELECT id, ?, ?, ?, ?, ?, {TURN} FROM clone WHERE path = ?",
            [(w.content.key, w.size_bytes, state, owner, prefetch, w.content.clone) for w in wants],
        )

    def lease(self, unit: str, contents: Iterable[ContentId]) -> int:
        """Lease what the ledger has of this content, and return the lease."""
        lease_id = self._number(
            "INSERT INTO lease (owner, unit) VALUES (?,?) RETURNING id", (self._owner, unit)
        )
        rows = [(lease_id, *content) for content in contents]
        self._db.executemany(f"INSERT OR IGNORE INTO leased SELECT ?, id FROM content {HERE}", rows)
        return lease_id

    def set_order(
        self, uses: Iterable[Use], *, replace: bool, reached: int, ordered: bool = True
    ) -> None:
        """Publish when this owner uses the content that is held next.

        Args:
            uses: Of each content; of several the nearest counts.
            replace: Whether they replace what was published before, or add to it.
            reached: Position that this owner has come to.
            ordered: Whether it knows an order.
        """
        if replace:
            self._db.execute("DELETE FROM upcoming WHERE owner = ?", (self._owner,))
        values = (reached, ordered, self._owner)
        self._db.execute("UPDATE owner SET position = ?, ordered = ? WHERE id = ?", values)
        self._note_uses(uses)

    def reach(self, position: int, following: Iterable[Use] = ()) -> None:
        """Note how far this owner has come in its order.

        Args:
            position: Where it is.
            following: The next use of each content that it uses there.
        """
        self._db.execute(
            f"UPDATE owner SET position = MAX(position, ?), turn = {TURN} WHERE id = ?",
            (position, self._owner),
        )
        self._note_uses(following)

    def _note_uses(self, uses: Iterable[Use]) -> None:
        """Record the next use of what is held."""
        # The nearest comes last, and stays.
        for position, unit, content in sorted(uses, key=lambda use: use[0] or 0, reverse=True):
            if position is None:
                self._db.execute(
                    f"DELETE FROM upcoming WHERE owner = ? AND content = {ID}",
                    (self._owner, *content),
                )
            else:
                self._db.execute(
                    "INSERT INTO upcoming (content, owner, position, unit) "
                    f"SELECT id, ?, ?, ? FROM content {HERE} ON CONFLICT DO UPDATE "
                    "SET position = excluded.position, unit = excluded.unit",
                    (self._owner, position, unit, *content),
                )

    def give_up(self, contents: Iterable[ContentId]) -> list[ContentRow]:
        """Mark for the caller to drop what of this is there and leased by nobody."""
        rows = self.rows(contents).values()
        idle = [
            row
            for row in rows
            if not row.leased and (not row.owner_id or row.state is ContentState.PRESENT)
            if row.mark != UNCLAIMED
        ]
        self._mark([row.content for row in idle], ContentState.DROPPING)
        return idle

    def rows(self, contents: Iterable[ContentId]) -> dict[ContentId, ContentRow]:
        """Return what the ledger has of this content."""
        found = {}
        for content in contents:
            for row in self._db.execute(f"{ROWS} {HERE}", content):
                found[content] = ContentRow.read(row)
        return found
