"""A node's link while a training is played: equal shares for all connections. Pure."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from math import inf

from tio_openneuro.content import ContentId


_ROUNDING_BYTES = 0.5


@dataclass(frozen=True, slots=True)
class Link:
    """What connects one node to the remote.

    Attributes:
        rate: Bytes per second of all its connections together.
        connection_rate: Bytes per second of one connection at most.
        latency_s: Seconds from a request to its first byte.
        jobs: Fetches at once, of each process.
    """

    rate: float
    connection_rate: float = inf
    latency_s: float = 0.0
    jobs: int = 8


class PlayedLink:
    """The fetches that are under way on one link.

    Attributes:
        fetched_bytes: Bytes that arrived.
        busy_s: Seconds in which anything was under way.
    """

    def __init__(self, link: Link) -> None:
        """Fetch nothing."""
        self.fetched_bytes = 0
        self.busy_s = 0.0
        self._link = link
        self._now_s = 0.0
        # Bytes that each connection was given since the beginning: all are given the same.
        self._given = 0.0
        self._asked: list[tuple[float, ContentId, int]] = []
        self._coming: list[tuple[float, ContentId, int]] = []

    def begin(self, content: ContentId, size_bytes: int) -> None:
        """Ask for content."""
        heapq.heappush(self._asked, (self._now_s + self._link.latency_s, content, size_bytes))

    def cancel(self, content: ContentId) -> bool:
        """End a fetch; return whether it was under way."""
        for under_way in (self._asked, self._coming):
            for item in under_way:
                if item[1] == content:
                    under_way.remove(item)
                    heapq.heapify(under_way)
                    return True
        return False

    def next_s(self) -> float:
        """Return when the next thing happens on it."""
        asked_s = self._asked[0][0] if self._asked else inf
        if not self._coming:
            return asked_s
        return min(asked_s, self._now_s + max(self._coming[0][0] - self._given, 0) / self._rate())

    def advance(self, now_s: float) -> list[ContentId]:
        """Go on, no further than to what happens next; return what has arrived whole."""
        if self._asked or self._coming:
            self.busy_s += now_s - self._now_s
        if self._coming:
            self._given += (now_s - self._now_s) * self._rate()
        self._now_s = now_s
        arrived = []
        while self._coming and self._coming[0][0] <= self._given + _ROUNDING_BYTES:
            _, content, size_bytes = heapq.heappop(self._coming)
            self.fetched_bytes += size_bytes
            arrived.append(content)
        while self._asked and self._asked[0][0] <= now_s:
            _, content, size_bytes = heapq.heappop(self._asked)
            heapq.heappush(self._coming, (self._given + size_bytes, content, size_bytes))
        return arrived

    def _rate(self) -> float:
        return min(self._link.connection_rate, self._link.rate / len(self._coming))
