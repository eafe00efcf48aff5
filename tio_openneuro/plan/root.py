"""What a root holds while a training is played. Pure: no disk, no clock, no database.

Owns rows and orders. Which content gives way, and how far ahead is fetched, are the ledger's own
decisions.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from tio_openneuro.content import ContentId
from tio_openneuro.disk import EXPECTED
from tio_openneuro.ledger import (
    Resident,
    pick,
    pick_enough,
    prefetch_window,
    steps_to_spare,
    victim_order,
)

Files = tuple[ContentId, ...]
_ANY = -1 << 62


@dataclass(eq=False, slots=True)
class Row:
    """One key's content, reserved or present; what is not leased may give way.

    Attributes:
        number: Rises with every row.
        size_bytes: Bytes charged.
        last_use: Number of the lease that was the last one when it was used or reserved.
        present: Whether it has arrived.
        leases: How many hold it.
    """

    number: int
    size_bytes: int
    last_use: int
    present: bool = False
    leases: int = 0


@dataclass(eq=False, slots=True)
class Order:
    """The known uses of one process, and how far they are fetched.

    Attributes:
        turns: The files of each use.
        reached: Position of the last one that was begun.
        largest_bytes: Bytes of the largest.
        ahead_bytes: Fetched ahead and not used.
        fetched: Those of each use.
        unready: Positions of those that may lack something; a heap.
        blocked: The root's moment when nothing gave way for the next one.
    """

    turns: list[Files] = field(default_factory=list)
    reached: int = -1
    largest_bytes: int = 0
    ahead_bytes: int = 0
    fetched: dict[int, int] = field(default_factory=dict)
    unready: list[int] = field(default_factory=list)
    blocked: int = -1

    def look_anew(self, position: int) -> None:
        """Look at a use again: what was fetched for it is used, or gone."""
        self.ahead_bytes -= self.fetched.pop(position, 0)
        if position > self.reached:
            heapq.heappush(self.unready, position)

    def first_unready(self) -> int | None:
        """Return the first use that may lack something."""
        while self.unready and self.unready[0] <= self.reached:
            heapq.heappop(self.unready)
        return self.unready[0] if self.unready else None


class PlayedRoot:
    """The content of one root, of which the processes of a node share the budget.

    Attributes:
        rows: What is reserved or present.
        orders: Of each process.
        peak_bytes: Most that was charged.
        waits: Whether a lease waits for room.
    """

    def __init__(
        self, units: Sequence[Files], sizes: dict[ContentId, int], budget_bytes: int
    ) -> None:
        """Hold nothing.

        Args:
            units: All of the dataset, in its order.
            sizes: Bytes of each content.
            budget_bytes: The disk budget, which holds each unit.
        """
        self.rows: dict[ContentId, Row] = {}
        self.orders: list[Order] = []
        self.peak_bytes = 0
        self.waits = False
        self._used_bytes = self._leases = self._moment = 0
        self._budget_bytes = budget_bytes
        self._sizes = sizes
        self._uses: dict[ContentId, list[tuple[int, int]]] = {content: [] for content in sizes}
        # After its known uses each process expects all units again, in the dataset's order.
        last = range(len(units) - 1, -1, -1)
        self._expected = {c: EXPECTED + index for index in last for c in units[index]}
        self._heap: list[tuple[tuple[bool, int, int, int], ContentId]] = []

    def extend(self, owner: int, turns: Sequence[Files]) -> None:
        """Let a process know more of its uses."""
        order = self.orders[owner]
        for position, files in enumerate(turns, start=len(order.turns)):
            order.unready.append(position)
            size_bytes = sum(self._sizes[content] for content in files)
            order.largest_bytes = max(order.largest_bytes, size_bytes)
            for content in files:
                insort(self._uses[content], (position, owner))
                self._rank(content)
        order.turns += turns

    def lease(self, owner: int, position: int) -> list[ContentId] | None:
        """Lease what a use needs; return what is to be fetched, or None where room lacks."""
        order = self.orders[owner]
        files = order.turns[position]
        missing, needed_bytes = self._lacking(files)
        with closing(self._evictable(order)) as found:
            short_bytes = self._short_bytes(needed_bytes)
            self._drop(pick(found, short_bytes, files) if missing else ())
        self.waits = bool(missing) and self._short_bytes(needed_bytes) > 0
        if self.waits:
            return None
        self._reserve(missing)
        self._moment += 1
        self._leases += 1
        order.reached = max(order.reached, position)
        order.look_anew(position)
        for content in files:
            self._uses[content].remove((position, owner))
            self.rows[content].leases += 1
            self.rows[content].last_use = self._leases
        return missing

    def end_lease(self, files: Files) -> None:
        """Let what was held give way."""
        for content in files:
            self.rows[content].leases -= 1
            self._rank(content)

    def prefetch(self, owner: int) -> tuple[int, list[ContentId]] | None:
        """Reserve what the next use lacks; return both, or None where nothing can be done now."""
        order = self.orders[owner]
        position = order.first_unready()
        if position is None or self.waits or order.blocked == self._moment:
            return None
        files = order.turns[position]
        missing, needed_bytes = self._lacking(files)
        if missing and self._short_bytes(needed_bytes) > 0:
            shared = self._budget_bytes, order.largest_bytes, len(self.orders)
            steps, window_bytes = position - order.reached, prefetch_window(*shared)
            spare = steps_to_spare(steps, order.ahead_bytes, needed_bytes, window_bytes)
            with closing(self._evictable(order, spare)) as found:
                victims = pick_enough(found, self._short_bytes(needed_bytes), files)
            if victims is None:
                order.blocked = self._moment
                return None
            self._drop(victims)
        self._reserve(missing)
        heapq.heappop(order.unready)
        order.fetched[position] = order.fetched.get(position, 0) + needed_bytes
        order.ahead_bytes += needed_bytes
        return position, missing

    def arrived(self, content: ContentId, row: Row) -> bool:
        """Note that content is whole; return whether it is still wanted."""
        row.present = self.rows.get(content) is row
        self._moment += 1
        return row.present

    def _lacking(self, files: Files) -> tuple[list[ContentId], int]:
        missing = [content for content in files if content not in self.rows]
        return missing, sum(self._sizes[content] for content in missing)

    def _short_bytes(self, needed_bytes: int) -> int:
        return self._used_bytes + needed_bytes - self._budget_bytes

    def _reserve(self, missing: Sequence[ContentId]) -> None:
        for content in missing:
            self._moment += 1
            self.rows[content] = Row(self._moment, self._sizes[content], self._leases)
            self._used_bytes += self._sizes[content]
            self._rank(content)
        self.peak_bytes = max(self.peak_bytes, self._used_bytes)

    def _drop(self, victims: Sequence[Resident]) -> None:
        for victim in victims:
            self._used_bytes -= self.rows.pop(victim.content).size_bytes
            for position, owner in self._uses[victim.content]:
                self.orders[owner].look_anew(position)

    def _place(self, content: ContentId) -> tuple[bool, int, int, int]:
        uses, row = self._uses[content], self.rows[content]
        position = uses[0][0] if uses else self._expected[content]
        return (*victim_order(position, row.last_use), row.number)

    def _rank(self, content: ContentId) -> None:
        """Have content at its present place among what may give way."""
        self._moment += 1
        if content in self.rows and not self.rows[content].leases:
            heapq.heappush(self._heap, (self._place(content), content))

    def _evictable(self, order: Order, steps: int | None = _ANY) -> Generator[Resident, None, None]:
        """Yield what may give way, the first to go first, as the ledger's own query does."""
        seen: dict[ContentId, tuple[bool, int, int, int]] = {}
        try:
            while self._heap:
                place, content = heapq.heappop(self._heap)
                row = self.rows.get(content)
                if row is None or row.leases or content in seen or place != self._place(content):
                    continue
                seen[content] = place
                ahead = -place[1] - order.reached
                if steps is None or ahead <= steps:
                    return
                yield Resident(content, row.size_bytes, row.last_use, not row.present, ahead)
        finally:
            for content, place in seen.items():
                heapq.heappush(self._heap, (place, content))
