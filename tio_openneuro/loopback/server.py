"""The loopback server's own process: HTTP/1.1 on 127.0.0.1, and commands on standard input.

A process of its own, so that serving does not take turns with what is measured in the parent.
It ends when its standard input does, and starts nothing that outlives it. Objects are answered
by :mod:`s3 <tio_openneuro.loopback.s3>`, ``/git/`` by
:mod:`git_http <tio_openneuro.loopback.git_http>`; this module sends the answers, at the link's
speed. The tests' server derives from both classes, and spoils and counts what they send.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tio_openneuro.loopback import git_http, s3
from tio_openneuro.loopback.link import Link
from tio_openneuro.loopback.message import HttpRequest, HttpResponse


class Connection(BaseHTTPRequestHandler):
    """One client connection: requests one after the other, kept alive."""

    protocol_version = "HTTP/1.1"
    server_version = "loopback"
    sys_version = ""
    disable_nagle_algorithm = True
    server: LoopbackServer

    def log_message(self, *_: object) -> None:
        """Keep silent."""

    def do_GET(self) -> None:
        """Answer a request of any method."""
        upload = self.command == "PUT"
        size_bytes = 0 if upload else int(self.headers.get("Content-Length", "0"))
        if hasattr(socket, "TCP_QUICKACK"):
            # The client holds a small body back until its headers are acknowledged: 43 ms each.
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        body = self.rfile.read(size_bytes)
        request = HttpRequest.parse(self.command, self.path, dict(self.headers.items()), body)
        if request.area == "git":
            response = git_http.answer(self.server.repositories, request)
        else:
            response = s3.answer(self.server.store, request, self.rfile)
        if upload and response.status >= HTTPStatus.BAD_REQUEST:
            self.close_connection = True  # the body is still in the pipe
        if request.area:
            time.sleep(self.server.latency_s)
            self.server.link.begin(time.monotonic())
        self.send(request, response)

    do_DELETE = do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def send(self, request: HttpRequest, response: HttpResponse) -> None:
        """Send an answer, at the link's rate."""
        self.send_head(response)
        self.send_body(request, response, 0, response.size_bytes)

    def send_head(self, response: HttpResponse) -> None:
        """Send status and headers."""
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        if response.status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", str(response.size_bytes))
        self.end_headers()

    def send_body(
        self, request: HttpRequest, response: HttpResponse, start: int, stop: int
    ) -> None:
        """Send the bytes of the body from ``start`` to before ``stop``, if it is not for HEAD."""
        while start < stop and request.method != "HEAD":
            block = response.part(start, min(stop, start + self.chunk_bytes))
            if request.area:
                self.pass_link(request, len(block))
            self.wfile.write(block)
            start += len(block)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a body to send at once."""
        return self.server.link.chunk_bytes

    def pass_link(self, request: HttpRequest, size_bytes: int) -> None:
        """Wait until bytes of a body may go, and count them before the client can see them."""
        self.server.link.wait(size_bytes)
        if request.area == "s3":
            self.server.count_content(size_bytes)


class LoopbackServer(ThreadingHTTPServer):
    """What all connections share: the stores, the link, and the bytes that went over it."""

    daemon_threads = True
    request_queue_size = 128
    connection = Connection

    def __init__(self, folder: Path) -> None:
        """Listen on a free port of 127.0.0.1.

        Args:
            folder: Where published datasets lie, in ``s3`` and ``git``.
        """
        super().__init__(("127.0.0.1", 0), self.connection)
        self.store = s3.ObjectStore(folder / "s3")
        self.repositories = folder / "git"
        self.link = Link()
        self.latency_s = 0.0
        self._content_bytes = 0
        self._lock = threading.Lock()

    def count_content(self, size_bytes: int) -> None:
        """Count bytes of objects that go to readers."""
        with self._lock:
            self._content_bytes += size_bytes

    def obey(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command of the parent's and return the answer."""
        if "latency_s" in command:
            self.latency_s = command["latency_s"]
        if "rate_bytes_per_s" in command:
            self.link.rate_bytes_per_s = command["rate_bytes_per_s"]
        return {"content_bytes": self._content_bytes}

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """Leave out what a client that went away causes; report the rest on standard error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def main(server_class: type[LoopbackServer] = LoopbackServer) -> None:
    """Serve the folder that the command line names until standard input ends.

    The first line of output is ``{"port": N}``; then each line of input, a command in JSON, gets
    one line.

    Args:
        server_class: What serves.
    """
    with server_class(Path(sys.argv[1])) as server:
        # Never shut down, but ended with the process: so it need not look up every half second.
        threading.Thread(target=server.serve_forever, args=(3600.0,), daemon=True).start()
        sys.stdout.write(json.dumps({"port": server.server_port}) + "\n")
        sys.stdout.flush()
        for line in sys.stdin:
            sys.stdout.write(json.dumps(server.obey(json.loads(line))) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
