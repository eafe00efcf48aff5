"""The simulated link of the loopback server: its rate, its latency, and what went over it."""

from __future__ import annotations

import threading
from dataclasses import dataclass

_BURST_S = 0.02
_CHUNK_S = 0.02
_LARGEST_CHUNK_BYTES = 1 << 17


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """How fast the link is.

    Attributes:
        rate_bytes_per_s: Rate that all connections share; None: not limited.
        connection_rate_bytes_per_s: Rate of each connection; None: not limited.
        latency_s: Seconds from a request to its answer's first byte.
    """

    rate_bytes_per_s: float | None = None
    connection_rate_bytes_per_s: float | None = None
    latency_s: float = 0.0

    @property
    def chunk_bytes(self) -> int:
        """Bytes sent at once: so few that a change of the rate is felt soon."""
        rates = [
            rate
            for rate in (self.rate_bytes_per_s, self.connection_rate_bytes_per_s)
            if rate is not None
        ]
        if not rates:
            return _LARGEST_CHUNK_BYTES
        return max(1, min(_LARGEST_CHUNK_BYTES, int(min(rates) * _CHUNK_S)))


class TokenBucket:
    """Say when bytes may go, so that a rate holds; a thread that waited too long catches up.

    First come, first served; safe to share by threads. Never sleeps itself.
    """

    def __init__(self) -> None:
        """Begin without credit."""
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    def begin(self, now_s: float) -> None:
        """Take back the credit of the time in which nobody sent; called before each answer."""
        with self._lock:
            self._free_at_s = max(self._free_at_s, now_s)

    def reserve(self, size_bytes: int, rate_bytes_per_s: float, now_s: float) -> float:
        """Return the moment at which these bytes may be sent, not before ``now_s``.

        Over any time T, no more than ``rate * (T + 0.02 s)`` bytes are let go.

        Args:
            size_bytes: Bytes to send.
            rate_bytes_per_s: Rate of the bucket at this moment.
            now_s: Now, on the clock that the answer is on.
        """
        with self._lock:
            begin_s = max(self._free_at_s, now_s - _BURST_S)
            self._free_at_s = begin_s + size_bytes / rate_bytes_per_s
            return max(self._free_at_s, now_s)


@dataclass(frozen=True, slots=True)
class PathCount:
    """What was asked of one path.

    Attributes:
        requests: Requests of any kind, refused ones and HEAD included.
        bytes: Bytes of bodies that were handed to the network.
    """

    requests: int = 0
    bytes: int = 0

    def __add__(self, other: PathCount) -> PathCount:
        """Return the sum of both."""
        return PathCount(self.requests + other.requests, self.bytes + other.bytes)


class Counters:
    """Requests and bytes by area and path; safe to share by threads."""

    def __init__(self) -> None:
        """Begin at nothing."""
        self._lock = threading.Lock()
        self._counts: dict[str, dict[str, PathCount]] = {}

    def add(self, area: str, name: str, count: PathCount) -> None:
        """Count something; called before the client can see the bytes, never after."""
        with self._lock:
            counts = self._counts.setdefault(area, {})
            counts[name] = counts.get(name, PathCount()) + count

    def reset(self) -> None:
        """Begin again at nothing."""
        with self._lock:
            self._counts.clear()

    def as_json(self) -> dict[str, dict[str, list[int]]]:
        """Return area → path → requests and bytes."""
        with self._lock:
            return {
                area: {name: [count.requests, count.bytes] for name, count in counts.items()}
                for area, counts in self._counts.items()
            }
