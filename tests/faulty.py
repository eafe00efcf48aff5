"""The loopback OpenNeuro with faults, counters and more knobs; also its server's own program.

``LoopbackOpenNeuro`` here is the package's, which starts this file as its server: the real one,
which counts by path what it sends, and spoils what a fault strikes. Which request is struck
follows from the seed, the path and how often that path was asked for, not from threads or time.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from tio_openneuro import loopback
from tio_openneuro.loopback.link import Link
from tio_openneuro.loopback.message import FileSlice, HttpRequest, HttpResponse, s3_error
from tio_openneuro.loopback.server import Connection, LoopbackServer, main

_DRAWS = 1 << 64
_ERROR_CODES = {503: "SlowDown", 404: "NoSuchKey", 403: "AccessDenied", 416: "InvalidRange"}
_RESET_ON_CLOSE = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)


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
        self._lock = threading.Lock()
        self.set(())

    def set(self, faults: Iterable[Fault]) -> None:
        """Put these in the place of all others, and forget what struck before."""
        with self._lock:
            self._faults = tuple(faults)
            self._struck = [0] * len(self._faults)
            self._asked: dict[tuple[int, str], int] = {}

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
        return PathCount(self.requests + other.requests, self.bytes + other.bytes)


class Counters:
    """Requests and bytes by area and path; safe to share by threads."""

    def __init__(self) -> None:
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


class FaultyConnection(Connection):
    """A connection that counts what it sends, at a rate of its own, unless a fault strikes."""

    server: FaultyServer

    def setup(self) -> None:
        super().setup()
        self._link = Link()
        self._answered = 0

    @property
    def _own_link(self) -> Link:
        self._link.rate_bytes_per_s = self.server.connection_rate_bytes_per_s
        return self._link

    @property
    def chunk_bytes(self) -> int:
        return min(super().chunk_bytes, self._own_link.chunk_bytes)

    def pass_link(self, request: HttpRequest, size_bytes: int) -> None:
        super().pass_link(request, size_bytes)
        self._own_link.wait(size_bytes)
        self.server.counters.add(request.area, _name(request), PathCount(bytes=size_bytes))

    def send(self, request: HttpRequest, response: HttpResponse) -> None:
        self._answered += 1
        if not request.area:
            super().send(request, response)
            return
        self._link.begin(time.monotonic())
        self.server.counters.add(request.area, _name(request), PathCount(requests=1))
        fault = self.server.faults.strike(
            request.area,
            _name(request),
            body=request.method == "GET" and response.size_bytes > 0,
            reused=self._answered > 1,
        )
        if fault is None:
            super().send(request, response)
        elif fault.kind is FaultKind.RESET_REUSED:
            self._reset()
        elif fault.kind.status is not None:
            super().send(request, _refusal(response, fault.kind.status))
        else:
            self._send_spoiled(request, response, fault)

    def _send_spoiled(self, request: HttpRequest, response: HttpResponse, fault: Fault) -> None:
        """Send an answer whose body a fault spoils from some byte on."""
        size_bytes = response.size_bytes
        begin = min(int(size_bytes * fault.at), size_bytes - 1)
        if fault.kind is FaultKind.FLIP:
            body = bytearray(response.part(0, size_bytes))
            body[begin] ^= 1
            super().send(request, replace(response, body=bytes(body)))
            return
        if fault.kind is FaultKind.HANG and begin == 0:
            time.sleep(fault.seconds)
        self.send_head(response)
        self.send_body(request, response, 0, begin)
        if fault.kind is FaultKind.TRUNCATE:
            self.close_connection = True
        elif fault.kind is FaultKind.RESET:
            self._reset()
        elif fault.kind is FaultKind.HANG:
            time.sleep(fault.seconds if begin else 0.0)
            self.send_body(request, response, begin, size_bytes)
        else:
            for offset in range(begin, size_bytes):
                time.sleep(fault.seconds)
                self.send_body(request, response, offset, offset + 1)

    def _reset(self) -> None:
        """Close the connection with RST instead of FIN."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        # Closed here, down to the descriptor: socketserver would send FIN before.
        self.rfile.close()
        self.connection.close()


def _name(request: HttpRequest) -> str:
    """Return the path that a request counts under: the object's key, or git's in a repository."""
    rest = request.path.partition("/")[2]
    if request.area == "s3":
        return rest
    repository, _, service = rest.partition("/")
    return f"{repository.removesuffix('.git')}/{service}"


def _refusal(response: HttpResponse, status: int) -> HttpResponse:
    error = s3_error(status, _ERROR_CODES[status])
    if status != 416 or not isinstance(response.body, FileSlice):
        return error
    size_bytes = response.body.path.stat().st_size
    return replace(error, headers={**error.headers, "Content-Range": f"bytes */{size_bytes}"})


class FaultyServer(LoopbackServer):
    """The real server, with what its connections share beside."""

    connection = FaultyConnection

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.connection_rate_bytes_per_s: float | None = None
        self.counters = Counters()
        self.faults = FaultPlan()

    def obey(self, command: dict[str, Any]) -> dict[str, Any]:
        if "connection_rate_bytes_per_s" in command:
            self.connection_rate_bytes_per_s = command["connection_rate_bytes_per_s"]
        if "faults" in command:
            faults = [{**fields, "kind": FaultKind(fields["kind"])} for fields in command["faults"]]
            self.faults.set(Fault(**fields) for fields in faults)
        if command.get("reset_counters"):
            self.counters.reset()
        more = {}
        if command.get("report"):
            more = {"counters": self.counters.as_json(), "struck": self.faults.struck()}
        return {**super().obey(command), **more}


class LoopbackOpenNeuro(loopback.LoopbackOpenNeuro):
    """The package's OpenNeuro, served by the server with faults."""

    program: ClassVar[Path] = Path(__file__)

    @property
    def server_pid(self) -> int:
        """Process id of the server."""
        return self.running().pid

    def object_url(self, accession: str, path: str) -> str:
        """Return the address of a file's newest version in the bucket."""
        return f"http://127.0.0.1:{self.port}/openneuro.org/{accession}/{path}"

    def publish_folder(self, accession: str, folder: Path, *, tag: str | None = "1.0.0") -> str:
        """Publish all files of a BIDS folder, ``.git`` left out, and return the git URL."""
        files = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_file() and ".git" not in path.relative_to(folder).parts
        }
        return self.publish(accession, files, tag=tag)

    def set_rate(self, rate_bytes_per_s: float | None) -> None:
        """Change the rate that all share, under way too; None: not limited."""
        self.ask({"rate_bytes_per_s": rate_bytes_per_s})

    def set_connection_rate(self, connection_rate_bytes_per_s: float | None) -> None:
        """Change the rate of each connection, under way too; None: not limited."""
        self.ask({"connection_rate_bytes_per_s": connection_rate_bytes_per_s})

    def set_latency(self, latency_s: float) -> None:
        """Change the seconds from each request to its answer's first byte."""
        self.ask({"latency_s": latency_s})

    def set_faults(self, *faults: Fault) -> None:
        """Put these faults in the place of all others, the first that applies striking."""
        self.ask({"faults": [asdict(fault) for fault in faults]})

    def clear_faults(self) -> None:
        """Let everything work again; a hang under way lasts its time."""
        self.set_faults()

    def faults_struck(self) -> Sequence[int]:
        """Return how often each fault struck, in the order in which they were set."""
        return self.ask({"report": True})["struck"]

    def counters(self, accession: str | None = None, *, area: str = "s3") -> dict[str, PathCount]:
        """Return what was asked of each path since the last reset; publishing is not counted.

        Args:
            accession: Count this dataset only, by path from its root; None: all, by
                ``accession/path``.
            area: ``"s3"`` for content, ``"git"`` for clones and fetches.
        """
        counts = self.ask({"report": True})["counters"].get(area, {})
        prefix = "" if accession is None else f"{accession}/"
        return {
            name.removeprefix(prefix): PathCount(*count)
            for name, count in counts.items()
            if name.startswith(prefix)
        }

    def total(self, accession: str | None = None, *, area: str = "s3") -> PathCount:
        """Return the sum of :meth:`counters`."""
        return sum(self.counters(accession, area=area).values(), start=PathCount())

    def reset_counters(self) -> None:
        """Begin to count from nothing."""
        self.ask({"reset_counters": True})


def _end_with(parent_pid: int) -> None:
    """End this process when the parent's does, even while its forks hold our standard input."""
    try:
        parent = os.pidfd_open(parent_pid)
    except OSError:
        os._exit(0)
    select.select([parent], [], [])
    os._exit(0)


if __name__ == "__main__":
    if hasattr(os, "pidfd_open"):
        threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    main(FaultyServer)
