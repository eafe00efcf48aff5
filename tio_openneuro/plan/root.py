"""What a root holds while a training is played. Pure: no disk, no clock, no database.

Owns rows and orders. Which content gives way, and how far ahead is fetched, the ledger's own
decisions say.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

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

_ANY = 1 << 62
Files = tuple[ContentId, ...]


@dataclass(eq=False, slots=True)
class _Row:
    """One key's content: reserved or present.

    Attributes:
        size_bytes: Bytes charged.
        last_use: Number of the lease that was the last one when it was used or reserved.
        present: Whether it has arrived.
        ahead: Whether it was reserved ahead, and nobody has leased it since.
        leases: How many hold it.
    """

    size_bytes: int
    last_use: int
    present: bool
    ahead: bool
    leases: int = 0

    @property
    def evictable(self) -> bool:
        return not self.leases and (self.present or self.ahead)


class Order:
    """The known uses of one process, and how far they are fetched."""

    def __init__(self, sizes: dict[ContentId, int]) -> None:
        """Know none.

        Args:
            sizes: Bytes of each content.
        """
        self.turns: list[Files] = []
        self.reached = -1
        self.largest_bytes = 0
        self.ahead_bytes = 0
        self.blocked = -1
        self._sizes = sizes
        self._fetched: dict[int, int] = {}
        self._unready: list[int] = []

    def extend(self, turns: Sequence[Files]) -> range:
        """Know more uses after the others; return their positions."""
        added = range(len(self.turns), len(self.turns) + len(turns))
        self.turns += turns
        self._unready += added
        totals = (sum(self._sizes[content] for content in files) for files in turns)
        self.largest_bytes = max(self.largest_bytes, *totals)
        return added

    def take(self, position: int) -> None:
        """Begin a use."""
        self.reached = max(self.reached, position)
        self.lost(position)

    def lost(self, position: int) -> None:
        """Look at a use again: what was fetched for it is used, or gone."""
        self.ahead_bytes -= self._fetched.pop(position, 0)
        if position > self.reached:
            heapq.heappush(self._unready, position)

    def first_unready(self) -> int | None:
        """Return the first use that may lack something."""
        while self._unready and self._unready[0] <= self.reached:
            heapq.heappop(self._unready)
        return self._unready[0] if self._unready else None

    def ready(self, position: int, fetched_bytes: int) -> None:
        """Note that the first use that lacked something has it, or that it is on its way."""
        heapq.heappop(self._unready)
        if fetched_bytes:
            self._fetched[position] = self._fetched.get(position, 0) + fetched_bytes
            self.ahead_bytes += fetched_bytes


class PlayedRoot:
    """The content of one root, of which processes share the budget."""

    def __init__(
        self,
        units: Sequence[Files],
        sizes: dict[ContentId, int],
        budget_bytes: int,
        cancel: Callable[[ContentId], None],
    ) -> None:
        """Hold nothing.

        Args:
            units: All of the dataset, in its order.
            sizes: Bytes of each content.
            budget_bytes: The disk budget.
            cancel: Told what gives way while it is fetched.
        """
        self.budget_bytes = budget_bytes
        self.used_bytes = self.peak_bytes = 0
        self.orders: list[Order] = []
        self.waits = False
        self._sizes = sizes
        self._cancel = cancel
        self._leases = self._moment = 0
        self._lease_of: dict[tuple[int, int], int] = {}
        self._rows: dict[ContentId, _Row] = {}
        self._uses: dict[ContentId, list[tuple[int, int]]] = {c: [] for c in sizes}
        # After its known uses each process expects any of them again, in the dataset's order.
        self._expected: dict[ContentId, int] = {}
        for index, files in enumerate(units):
            for content in files:
                self._expected.setdefault(content, EXPECTED + index)
        self._heap: list[tuple[tuple[bool, int, int], ContentId]] = []

    def extend(self, owner: int, turns: Sequence[Files]) -> None:
        """Let a process know more of its uses."""
        for position in self.orders[owner].extend(turns):
            for content in self.orders[owner].turns[position]:
                insort(self._uses[content], (position, owner))
                self._rank(content)

    def has(self, content: ContentId) -> bool:
        """Tell whether content has arrived."""
        row = self._rows.get(content)
        return row is not None and row.present

    def lease(self, owner: int, position: int) -> list[ContentId] | None:
        """Lease what a use needs; return what is to be fetched, or None where room lacks."""
        order = self.orders[owner]
        files = order.turns[position]
        missing = [content for content in files if content not in self._rows]
        short_bytes = self._short(missing)
        if missing and short_bytes > 0:
            with closing(self._evictable(order)) as found:
                victims = pick(found, short_bytes, files)
            self._drop(victims)
            if self._short(missing) > 0:
                return None
        self._reserve(missing, ahead=False)
        self._leases += 1
        self._moment += 1
        self._lease_of[owner, position] = self._leases
        order.take(position)
        for content in files:
            row = self._rows[content]
            row.leases, row.ahead = row.leases + 1, False
            self._uses[content].remove((position, owner))
        return missing

    def end_lease(self, owner: int, position: int) -> None:
        """End it; what it held may give way."""
        number = self._lease_of.pop((owner, position))
        for content in self.orders[owner].turns[position]:
            row = self._rows[content]
            row.leases, row.last_use = row.leases - 1, number
            self._rank(content)

    def prefetch(self, owner: int) -> list[ContentId] | None:
        """Reserve what the next use lacks; return it, or None where nothing is to be done now."""
        order = self.orders[owner]
        position = order.first_unready()
        if position is None or self.waits or order.blocked == self._moment:
            return None
        files = order.turns[position]
        missing = [content for content in files if content not in self._rows]
        needed_bytes = sum(self._sizes[content] for content in missing)
        short_bytes = self._short(missing)
        if missing and short_bytes > 0:
            window_bytes = prefetch_window(
                self.budget_bytes, order.largest_bytes, len(self.orders)
            )
            spare = steps_to_spare(
                position - order.reached,
                ahead_bytes=order.ahead_bytes,
                needed_bytes=needed_bytes,
                window_bytes=window_bytes,
            )
            with closing(self._evictable(order, spare)) as found:
                victims = pick_enough(found, short_bytes, files)
            if victims is None:
                order.blocked = self._moment
                return None
            self._drop(victims)
        self._reserve(missing, ahead=True)
        order.ready(position, needed_bytes)
        return missing

    def arrived(self, content: ContentId) -> None:
        """Note that content is whole."""
        self._rows[content].present = True
        self._rank(content)

    def _short(self, missing: Sequence[ContentId]) -> int:
        needed_bytes = sum(self._sizes[content] for content in missing)
        return self.used_bytes + needed_bytes - self.budget_bytes

    def _reserve(self, missing: Sequence[ContentId], *, ahead: bool) -> None:
        for content in missing:
            row = _Row(self._sizes[content], self._leases, present=False, ahead=ahead)
            self._rows[content] = row
            self.used_bytes += row.size_bytes
            self._rank(content)
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def _drop(self, victims: Sequence[Resident]) -> None:
        for victim in victims:
            row = self._rows.pop(victim.content)
            self.used_bytes -= row.size_bytes
            if not row.present:
                self._cancel(victim.content)
            for position, owner in self._uses[victim.content]:
                self.orders[owner].lost(position)

    def _order_of(self, content: ContentId) -> tuple[bool, int, int]:
        uses = self._uses[content]
        position = uses[0][0] if uses else self._expected[content]
        return victim_order(position, self._rows[content].last_use)

    def _rank(self, content: ContentId) -> None:
        """Have content among what may give way, at its present place, if it may."""
        row = self._rows.get(content)
        self._moment += 1
        if row is not None and row.evictable:
            heapq.heappush(self._heap, (self._order_of(content), content))

    def _evictable(
        self, order: Order, steps: int | None = -_ANY
    ) -> Iterator[Resident]:
        """Yield what may give way, the first to go first, as the ledger's own query does."""
        seen: dict[ContentId, tuple[bool, int, int]] = {}
        try:
            while self._heap:
                place, content = heapq.heappop(self._heap)
                row = self._rows.get(content)
                if content in seen or row is None or not row.evictable:
                    continue
                if place != self._order_of(content):
                    continue
                seen[content] = place
                ahead = -place[1] - order.reached
                if steps is None or ahead <= steps:
                    return
                yield Resident(content, row.size_bytes, row.last_use, not row.present, ahead)
        finally:
            for content, place in seen.items():
                heapq.heappush(self._heap, (place, content))
