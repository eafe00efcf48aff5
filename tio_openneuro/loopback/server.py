"""The loopback server's own process: HTTP/1.1 on 127.0.0.1, and commands on standard input.

A process of its own, so that serving does not take turns with what is measured in the parent.
It ends when its standard input does, or when its parent is gone, and starts nothing that outlives
it. Objects are answered by :mod:`s3 <tio_openneuro.loopback.s3>`, ``/git/`` by
:mod:`git_http <tio_openneuro.loopback.git_http>`; this module sends the answers, at the link's
speed, with the faults in force.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tio_openneuro.loopback import git_http, s3
from tio_openneuro.loopback.faults import Fault, FaultKind, FaultPlan
from tio_openneuro.loopback.link import Counters, LinkSpeed, PathCount, TokenBucket
from tio_openneuro.loopback.message import FileSlice, Request, Response, s3_error

if TYPE_CHECKING:
    from collections.abc import Generator

_ERROR_CODES = {
    503: "SlowDown",
    404: "NoSuchKey",
    403: "AccessDenied",
    416: "InvalidRange",
}
_RESET_ON_CLOSE = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)


class LoopbackServer(ThreadingHTTPServer):
    """What all connections share: the stores, the link, the counters, the faults."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, port: int) -> None:
        """Listen on 127.0.0.1; the folder holds ``s3`` and ``git``.

        Args:
            folder: Where published datasets lie.
            port: Port to listen on where it is free; 0, or not free: any other.
        """
        try:
            super().__init__(("127.0.0.1", port), _Connection)
        except OSError:
            super().__init__(("127.0.0.1", 0), _Connection)
        self.store = s3.ObjectStore(folder / "s3")
        self.repositories = folder / "git"
        self.speed = LinkSpeed()
        self.shared_bucket = TokenBucket()
        self.counters = Counters()
        self.faults = FaultPlan()
        self.ending = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """Leave out what a client that went away causes; report the rest on standard error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Connection(BaseHTTPRequestHandler):
    """One client connection: requests one after the other, kept alive."""

    protocol_version = "HTTP/1.1"
    server_version = "loopback"
    sys_version = ""
    disable_nagle_algorithm = True
    server: LoopbackServer

    def setup(self) -> None:
        super().setup()
        self._bucket = TokenBucket()
        self._answered = 0

    def log_message(self, *_: object) -> None:
        """Keep silent."""

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _handle(self) -> None:
        upload = self.command == "PUT"
        if hasattr(socket, "TCP_QUICKACK"):
            # The client holds a small body back until its headers are acknowledged: 43 ms each.
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        body = b"" if upload else self._read_body()
        request = Request.parse(self.command, self.path, dict(self.headers.items()), body)
        if request.path.startswith("git/"):
            response = git_http.answer(self.server.repositories, request)
        else:
            response = s3.answer(self.server.store, request, self.rfile)
        if upload and response.status >= HTTPStatus.BAD_REQUEST:
            self.close_connection = True  # the body is still in the pipe
        self._send(response)
        self._answered += 1

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        chunks = []
        while size_bytes := int(self.rfile.readline().partition(b";")[0], 16):
            chunks.append(self.rfile.read(size_bytes))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def _send(self, response: Response) -> None:
        """Send the answer at the link's speed, unless a fault says otherwise."""
        if not response.area:
            self._send_head(response)
            self._send_blocks(response, response.size_bytes)
            return
        self.server.counters.add(response.area, response.name, PathCount(requests=1))
        fault = self.server.faults.strike(
            response.area,
            response.name,
            body=self.command == "GET" and response.size_bytes > 0,
            reused=self._answered > 0,
        )
        self.server.ending.wait(self.server.speed.latency_s)
        for bucket in (self.server.shared_bucket, self._bucket):
            bucket.begin(time.monotonic())
        if fault is None:
            self._send_head(response)
            self._send_blocks(response, response.size_bytes)
        elif fault.kind is FaultKind.RESET_REUSED:
            self._reset()
        elif fault.kind.status is not None:
            refusal = self._refusal(response, fault.kind.status)
            self._send_head(refusal)
            self._send_blocks(refusal, refusal.size_bytes)
        else:
            self._send_spoiled(response, fault)

    @staticmethod
    def _refusal(response: Response, status: int) -> Response:
        error = s3_error(status, _ERROR_CODES[status], area=response.area, name=response.name)
        if status != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not isinstance(
            response.body, FileSlice
        ):
            return error
        size_bytes = response.body.path.stat().st_size
        headers = {**error.headers, "Content-Range": f"bytes */{size_bytes}"}
        return Response(status, error.body, headers, error.area, error.name)

    def _send_spoiled(self, response: Response, fault: Fault) -> None:
        """Send an answer whose body a fault spoils from some byte on."""
        begin = min(int(response.size_bytes * fault.at), response.size_bytes - 1)
        if fault.kind is FaultKind.HANG and begin == 0:
            self.server.ending.wait(fault.seconds)
        self._send_head(response)
        if fault.kind is FaultKind.FLIP:
            self._send_blocks(response, response.size_bytes, flip=begin)
            return
        self._send_blocks(response, begin)
        if fault.kind is FaultKind.TRUNCATE:
            self.close_connection = True
        elif fault.kind is FaultKind.RESET:
            self._reset()
        elif fault.kind is FaultKind.HANG:
            self.server.ending.wait(fault.seconds if begin else 0.0)
            self._send_blocks(response, response.size_bytes, start=begin)
        else:
            for offset in range(begin, response.size_bytes):
                if self.server.ending.wait(fault.seconds):
                    return
                self._send_blocks(response, offset + 1, start=offset)

    def _send_head(self, response: Response) -> None:
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        if response.status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", str(response.size_bytes))
        self.end_headers()

    def _send_blocks(
        self, response: Response, stop: int, *, start: int = 0, flip: int | None = None
    ) -> None:
        """Send a part of the body, counted before it goes, at the link's speed.

        Args:
            response: The answer.
            stop: Byte of the body to stop before.
            start: Byte of the body to begin with.
            flip: Byte of the body of which to turn over one bit.
        """
        if self.command == "HEAD":
            return
        with contextlib.closing(self._blocks(response, start, stop)) as blocks:
            offset = start
            for block in blocks:
                if flip is not None and offset <= flip < offset + len(block):
                    block[flip - offset] ^= 1
                if response.area:
                    self._wait_for_link(len(block))
                    self.server.counters.add(
                        response.area, response.name, PathCount(bytes=len(block))
                    )
                self.wfile.write(block)
                offset += len(block)

    def _blocks(self, response: Response, start: int, stop: int) -> Generator[bytearray]:
        """Yield the body in blocks of the size that suits the speed of the moment."""
        body = response.body
        if isinstance(body, bytes):
            while start < stop:
                block = bytearray(body[start : min(stop, start + self._chunk_bytes(response))])
                start += len(block)
                yield block
            return
        with body.path.open("rb") as file:
            file.seek(body.start + start)
            while start < stop:
                block = bytearray(file.read(min(stop - start, self._chunk_bytes(response))))
                start += len(block)
                yield block

    def _chunk_bytes(self, response: Response) -> int:
        return (self.server.speed if response.area else LinkSpeed()).chunk_bytes

    def _wait_for_link(self, size_bytes: int) -> None:
        speed = self.server.speed
        now_s = time.monotonic()
        at_s = now_s
        for bucket, rate in (
            (self.server.shared_bucket, speed.rate_bytes_per_s),
            (self._bucket, speed.connection_rate_bytes_per_s),
        ):
            if rate is not None:
                at_s = max(at_s, bucket.reserve(size_bytes, rate, now_s))
        if at_s > now_s:
            self.server.ending.wait(at_s - now_s)

    def _reset(self) -> None:
        """Close the connection with RST instead of FIN."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        # Closed here, down to the descriptor: socketserver would send FIN before.
        self.rfile.close()
        self.connection.close()


def _obey(server: LoopbackServer, command: dict[str, Any]) -> dict[str, Any]:
    """Carry out one command of the parent and return the answer."""
    if "speed" in command:
        server.speed = LinkSpeed(**command["speed"])
    if "faults" in command:
        server.faults.set([Fault.from_json(fields) for fields in command["faults"]])
    if command.get("reset_counters"):
        server.counters.reset()
    if command.get("report"):
        return {"counters": server.counters.as_json(), "struck": server.faults.struck()}
    return {}


def _end_with(parent_pid: int) -> None:
    """End this process when the parent's does, even while others hold our standard input."""
    try:
        parent = os.pidfd_open(parent_pid)
    except OSError:
        os._exit(0)
    select.select([parent], [], [])
    os._exit(0)


def serve(commands: IO[bytes], answers: IO[bytes], folder: Path, port: int) -> None:
    """Serve a folder until the commands end.

    The first line of answers is ``{"port": N}``; then each line of commands gets one line.

    Args:
        commands: Lines of JSON.
        answers: Lines of JSON.
        folder: Where published datasets lie.
        port: Port to listen on where it is free; 0, or not free: any other.
    """
    with LoopbackServer(folder, port) as server:
        # Never shut down, but ended with the process: so it need not look up every half second.
        threading.Thread(target=server.serve_forever, args=(3600.0,), daemon=True).start()
        answers.write(json.dumps({"port": server.server_port}).encode() + b"\n")
        answers.flush()
        for line in commands:
            answers.write(json.dumps(_obey(server, json.loads(line))).encode() + b"\n")
            answers.flush()
        server.ending.set()


def main(arguments: list[str]) -> None:
    """Serve as the child of a process: ``FOLDER PORT PARENT_PID``."""
    folder, port, parent_pid = arguments
    if hasattr(os, "pidfd_open"):
        threading.Thread(target=_end_with, args=(int(parent_pid),), daemon=True).start()
    serve(sys.stdin.buffer, sys.stdout.buffer, Path(folder), int(port))
