"""Which content to give up for room. Owns no state and touches no disk, but reads the ledger."""

from __future__ import annotations

import heapq
import itertools
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tio_openneuro.content import ContentId
from tio_openneuro.ledger.schema import EVICTABLE, FARTHEST, ID, UNUSED, USED_LAST

# A turn after all others.
EVER = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Resident:
    """Content that may be given up: nobody leases it.

    Attributes:
        content: Whose content it is.
        size_bytes: Bytes that it is charged.
        last_use: Rises with every use; the smallest was used longest ago.
        fetching: Whether it is being fetched ahead.
        steps: How many steps ahead it is used next; None where that is not known.
    """

    content: ContentId
    size_bytes: int
    last_use: int
    fetching: bool = False
    steps: int | None = None


_WINDOW_UNITS = 2
_WINDOW_SHARE = 20


def prefetch_window(budget_bytes: int, largest_bytes: int, orders: int) -> int:
    """Return how many bytes one process may fetch ahead where content has to give way for them.

    Each byte that waits for its use is one that is not kept from one epoch to the next. Without
    this bound 85 % of each epoch were fetched again at a budget of half of the dataset, as with
    eviction of the longest unused; with it 53 %, where 50 % is the floor (2026-11-21).

    Args:
        budget_bytes: The disk budget.
        largest_bytes: Bytes of the largest unit of the order.
        orders: Processes under the root that know an order; they share the window.

    Example:
        >>> prefetch_window(10_000, 100, 1), prefetch_window(10_000, 400, 2)
        (500, 400)
    """
    window_bytes = max(_WINDOW_UNITS * largest_bytes, budget_bytes // _WINDOW_SHARE)
    return window_bytes // max(orders, 1)


def steps_to_spare(
    steps: int, ahead_bytes: int, needed_bytes: int, window_bytes: int
) -> int | None:
    """Return how late the next use of content must be for it to give way to a prefetch.

    One unit may always come ahead, or a small share of the window would end prefetching.

    Args:
        steps: How many steps ahead the unit is used that is to be fetched.
        ahead_bytes: Bytes that its owner fetched ahead and has not used.
        needed_bytes: Bytes of the unit that are absent.
        window_bytes: From :func:`prefetch_window`.

    Returns:
        Only what is used later than that may go; None where only that of which no use is known.
    """
    return None if ahead_bytes > 0 and ahead_bytes + needed_bytes > window_bytes else steps


def victim_order(next_use: int | None, last_use: int) -> tuple[bool, int, int]:
    """Return by what content is ordered that may give way, the first to go first.

    Args:
        next_use: When it is used next, None where that is not known.
        last_use: When it was used last.
    """
    return next_use is not None, -(next_use or 0), last_use


def choose_victims(
    resident: Sequence[Resident], needed_bytes: int, next_use: Mapping[ContentId, int]
) -> list[Resident]:
    """Return what to give up so that at least that many bytes come free.

    Farthest next use first, which no other order of eviction beats when the future is known;
    content without a known next use counts as farthest, the longest unused first. What turns out
    not to be needed, since a later victim is large, is spared again, nearest next use first.

    Args:
        resident: Everything that may be given up.
        needed_bytes: Bytes that must come free; zero or less asks for nothing.
        next_use: How many steps ahead content is used next, where that is known.

    Returns:
        The victims, first to be given up first. All of ``resident`` where even that frees less
        than is needed: the caller compares.

    Source:
        L. A. Belady, "A study of replacement algorithms", IBM Systems Journal 5(2), 1966.

    Example:
        >>> soon, late = ContentId("/c", "soon"), ContentId("/c", "late")
        >>> resident = [Resident(soon, 5, 1), Resident(late, 5, 2)]
        >>> [victim.content.key for victim in choose_victims(resident, 3, {soon: 1, late: 9})]
        ['late']
    """
    if needed_bytes <= 0:
        return []

    def order(item: Resident) -> tuple[bool, int, int, str, str]:
        return (*victim_order(next_use.get(item.content), item.last_use), *item.content)

    chosen: list[Resident] = []
    freed_bytes = 0
    for item in sorted(resident, key=order):
        if freed_bytes >= needed_bytes:
            break
        chosen.append(item)
        freed_bytes += item.size_bytes
    spare_bytes = freed_bytes - needed_bytes
    for item in reversed(chosen[:-1]):
        if item.size_bytes <= spare_bytes:
            chosen.remove(item)
            spare_bytes -= item.size_bytes
    return chosen


def pick_enough(
    found: Iterator[Resident], needed_bytes: int, spared: Collection[ContentId]
) -> list[Resident] | None:
    """Choose as :func:`pick` does among what is not being fetched; None where it frees too little.

    Args:
        found: What may be given up, the first to go first.
        needed_bytes: Bytes that must come free.
        spared: What is not given up in any case.
    """
    victims = pick((item for item in found if not item.fetching), needed_bytes, spared)
    freed_bytes = sum(victim.size_bytes for victim in victims)
    return victims if freed_bytes >= needed_bytes else None


def pick(
    found: Iterator[Resident], needed_bytes: int, spared: Collection[ContentId]
) -> list[Resident]:
    """Choose victims from what :func:`evictable` yields, read no further than that takes.

    Args:
        found: What may be given up, the first to go first.
        needed_bytes: Bytes that must come free.
        spared: What is not given up in any case.
    """
    enough: list[Resident] = []
    left_bytes = needed_bytes
    while left_bytes > 0 and (item := next(found, None)) is not None:
        if item.content not in spared:
            enough.append(item)
            left_bytes -= item.size_bytes
    next_use = {item.content: item.steps for item in enough if item.steps is not None}
    return choose_victims(enough, needed_bytes, next_use)


def evictable(
    db: sqlite3.Connection,
    *,
    since: int = EVER,
    steps: int | None = -EVER,
    first: Iterable[ContentId] = (),
) -> Iterator[Resident]:
    """Yield what may be given up, in the order in which it is; each one costs one row.

    Args:
        db: The ledger.
        since: Turn since when what was used stays, where no next use is known.
        steps: Of what is known to be used only what is used later than that; None: nothing.
        first: What goes as if no use of it were known.
    """
    chosen = set()
    for content in first:
        for row in db.execute(f"{EVICTABLE} content.id = {ID}", content):
            chosen.add(content)
            yield _resident(row)
    rest = _by_next_use(db, since, steps)
    yield from (item for item in rest if item.content not in chosen)


def _by_next_use(db: sqlite3.Connection, since: int, steps: int | None) -> Iterator[Resident]:
    yield from (_resident(row) for row in db.execute(UNUSED, (since,)))
    # The farthest use of each owner; its others are read once it is the farthest of all.
    farthest = [] if steps is None else db.execute(FARTHEST).fetchall()
    heap: list[tuple[int, int, Resident | None]] = [
        (reached - last, owner, None) for owner, reached, last in farthest if last is not None
    ]
    heapq.heapify(heap)
    positions = {owner: reached for owner, reached, _ in farthest}
    uses: dict[int, Iterator[Resident]] = {}
    while heap and steps is not None and -heap[0][0] > steps:
        _, owner, item = heapq.heappop(heap)
        if item is None:
            rows = db.execute(USED_LAST, (owner,))
            uses[owner] = map(_resident, rows, itertools.repeat(positions[owner]))
            item = next(uses[owner])
        yield item
        item = next(uses[owner], None)
        if item is not None:
            heapq.heappush(heap, (-(item.steps or 0), owner, item))


def _resident(row: tuple[Any, ...], reached: int | None = None) -> Resident:
    """Return what a query gave; ``reached`` is the position of the owner that uses it next."""
    clone, key, size_bytes, last_use, fetching, position = row
    steps = None if reached is None else position - reached
    return Resident(ContentId(clone, key), size_bytes, last_use, bool(fetching), steps)


def is_worth_room(raw_bytes: int, prepared_bytes: int, *, fetch_s: float, prepare_s: float) -> bool:
    """Return whether a prepared volume is worth more room than the files that it is made of.

    Raw and prepared copies compete for the same bytes by the time that each byte saves: a raw
    copy saves its fetch, a prepared one the fetch and the preparing. Where the prepared copy is
    worth more it takes its unit's next use over, so that the raw files, of which nobody then
    knows a use, are the first to go; else it is kept in room that is free, and is the first.

    Args:
        raw_bytes: Bytes of the unit's files.
        prepared_bytes: Bytes of the prepared volume.
        fetch_s: Seconds that the files take to be fetched.
        prepare_s: Seconds that they take to be loaded and preprocessed.

    Example:
        >>> is_worth_room(7, 12, fetch_s=0.1, prepare_s=0.3), is_worth_room(
        ...     7, 12, fetch_s=5.0, prepare_s=0.3
        ... )
        (True, False)
    """
    return (fetch_s + prepare_s) * raw_bytes > fetch_s * prepared_bytes or fetch_s <= 0
