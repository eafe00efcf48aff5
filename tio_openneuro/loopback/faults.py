"""Faults that the loopback server can show: which requests they strike, and how. Sends nothing.

Which request is struck follows from the seed, the path and how often that path was asked for,
not from threads or time.
"""

from __future__ import annotations

import fnmatch
import hashlib
import threading
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_DRAWS = 1 << 64


class FaultKind(StrEnum):
    """What goes wrong.

    Attributes:
        UNAVAILABLE: 503, as S3 says "SlowDown".
        NOT_FOUND: 404.
        FORBIDDEN: 403.
        BAD_RANGE: 416, whatever range was asked for.
        TRUNCATE: The right Content-Length, and the connection closed before the end.
        RESET: The connection reset (RST) in the middle of the body.
        RESET_REUSED: The connection reset instead of an answer, where it answered before.
        FLIP: One bit of the body turned over.
        HANG: A pause of ``seconds`` in the middle of the body, which then goes on.
        SLOW: From the middle of the body on a byte at a time, ``seconds`` apart.
    """

    UNAVAILABLE = "503"
    NOT_FOUND = "404"
    FORBIDDEN = "403"
    BAD_RANGE = "416"
    TRUNCATE = "truncate"
    RESET = "reset"
    RESET_REUSED = "reset-reused"
    FLIP = "flip"
    HANG = "hang"
    SLOW = "slow"

    @property
    def status(self) -> int | None:
        """The HTTP status that takes the answer's place, or None where it is another fault."""
        return int(self.value) if self.value.isdigit() else None

    @property
    def spoils_body(self) -> bool:
        """Whether it needs an answer that has a body."""
        return self.status is None and self is not FaultKind.RESET_REUSED


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault, and whom it strikes.

    Attributes:
        kind: What goes wrong.
        pattern: Shell pattern over ``accession/path`` of an object, ``*`` crossing folders; one
            that begins with ``git/`` is over requests for git instead, ``git/ACCESSION/…``.
        probability: Share of matching requests that it strikes.
        count: Requests that it strikes at most; None: no end.
        seed: Seed of the draw.
        seconds: Length of a hang, or pause between the bytes of SLOW.
        at: Where in the body it begins, as a fraction; 0: before the answer's first byte (HANG)
            or the body's.
    """

    kind: FaultKind
    pattern: str = "*"
    probability: float = 1.0
    count: int | None = None
    seed: int = 0
    seconds: float = 60.0
    at: float = 0.5

    def as_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Fault:
        """Return the fault that :meth:`as_json` gave."""
        return cls(**{**fields, "kind": FaultKind(fields["kind"])})

    def matches(self, area: str, name: str) -> bool:
        """Say whether requests of that path can be struck."""
        over_git = self.pattern.startswith("git/")
        if over_git != (area == "git"):
            return False
        return fnmatch.fnmatchcase(f"git/{name}" if over_git else name, self.pattern)

    def drawn(self, name: str, request_number: int) -> bool:
        """Say whether the n-th request of that path is among those drawn."""
        text = f"{self.seed}\n{self.kind}\n{name}\n{request_number}".encode()
        draw = int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
        return draw < self.probability * _DRAWS


class FaultPlan:
    """The faults in force and how often each struck; safe to share by threads."""

    def __init__(self) -> None:
        """Begin with none."""
        self._lock = threading.Lock()
        self._faults: tuple[Fault, ...] = ()
        self._struck: list[int] = []
        self._asked: dict[tuple[int, str], int] = {}

    def set(self, faults: Sequence[Fault]) -> None:
        """Put these in the place of all others, and forget what struck before."""
        with self._lock:
            self._faults = tuple(faults)
            self._struck = [0] * len(self._faults)
            self._asked.clear()

    def strike(self, area: str, name: str, *, body: bool, reused: bool) -> Fault | None:
        """Return the first fault that strikes this request, or None.

        Args:
            area: ``"s3"`` or ``"git"``.
            name: Path of the request.
            body: Whether the answer has a body that a fault can spoil.
            reused: Whether the connection answered a request before.
        """
        with self._lock:
            for number, fault in enumerate(self._faults):
                if not fault.matches(area, name):
                    continue
                if fault.kind is FaultKind.RESET_REUSED and not reused:
                    continue
                if fault.kind.spoils_body and not body:
                    continue
                asked = self._asked.get((number, name), 0)
                self._asked[number, name] = asked + 1
                exhausted = fault.count is not None and self._struck[number] >= fault.count
                if not exhausted and fault.drawn(name, asked):
                    self._struck[number] += 1
                    return fault
        return None

    def struck(self) -> list[int]:
        """Return how often each fault struck, in the order in which they were set."""
        with self._lock:
            return list(self._struck)
