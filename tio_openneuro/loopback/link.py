"""The rate of the loopback server's simulated link."""

from __future__ import annotations

import threading
import time

_BURST_S = 0.02
_CHUNK_S = 0.02
_LARGEST_CHUNK_BYTES = 1 << 17


class Link:
    """Say when bytes may go, so that a rate holds; a thread that waited too long catches up.

    First come, first served; safe to share by threads.

    Attributes:
        rate_bytes_per_s: Rate of all that goes over it; None: not limited. May change at any time.
    """

    def __init__(self, rate_bytes_per_s: float | None = None) -> None:
        """Begin without credit.

        Args:
            rate_bytes_per_s: Rate of all that goes over it; None: not limited.
        """
        self.rate_bytes_per_s = rate_bytes_per_s
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    @property
    def chunk_bytes(self) -> int:
        """Bytes to send at once: so few that a change of the rate is felt soon."""
        rate = self.rate_bytes_per_s
        if rate is None:
            return _LARGEST_CHUNK_BYTES
        return max(1, min(_LARGEST_CHUNK_BYTES, int(rate * _CHUNK_S)))

    def begin(self, now_s: float) -> None:
        """Take back the credit of the time in which nobody sent; called before each answer."""
        with self._lock:
            self._free_at_s = max(self._free_at_s, now_s)

    def wait(self, size_bytes: int) -> None:
        """Sleep until these bytes may be sent."""
        now_s = time.monotonic()
        at_s = self.reserve(size_bytes, now_s)
        if at_s > now_s:  # sleeping for no time costs a turn
            time.sleep(at_s - now_s)

    def reserve(self, size_bytes: int, now_s: float) -> float:
        """Return the moment at which these bytes may be sent, not before ``now_s``.

        Over any time T, no more than ``rate * (T + 0.02 s)`` bytes are let go.

        Args:
            size_bytes: Bytes to send.
            now_s: Now, on the clock that the answer is on.
        """
        rate = self.rate_bytes_per_s
        if rate is None:
            return now_s
        with self._lock:
            begin_s = max(self._free_at_s, now_s - _BURST_S)
            self._free_at_s = begin_s + size_bytes / rate
            return max(self._free_at_s, now_s)
