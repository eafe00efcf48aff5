"""Small servers that stand before a loopback OpenNeuro, or in its place, and rewritten branches.

``TlsFront`` ends TLS under a local authority's certificate, ``Proxy`` is an HTTP proxy, and
``Scripted`` answers as it is told. All on 127.0.0.1, in threads of the test's process.
"""

import contextlib
import os
import re
import select
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from tio_openneuro.annex.processes import run

_AUTHORITY = "[req]\ndistinguished_name=dn\n[dn]\n[v3_ca]\nbasicConstraints=critical,CA:true\n"
_LEAF = "subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage=serverAuth\n"


@dataclass(frozen=True)
class Authority:
    """A certificate authority, and a certificate of its for 127.0.0.1.

    Attributes:
        certificate: PEM file of the authority.
        server: PEM file of the server's certificate and key.
    """

    certificate: Path
    server: Path

    @classmethod
    def make(cls, folder: Path) -> "Authority":
        """Make both with openssl."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ca.cnf").write_text(_AUTHORITY)
        (folder / "leaf.cnf").write_text(_LEAF)

        def openssl(*arguments: str) -> None:
            subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        openssl(
            *("req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-days", "30"),
            *("-subj", "/CN=tests", "-config", "ca.cnf", "-extensions", "v3_ca"),
        )
        openssl("req", *curve, "-keyout", "leaf.key", "-out", "leaf.csr", "-subj", "/CN=127.0.0.1")
        openssl(
            *("x509", "-req", "-in", "leaf.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-days"),
            *("30", "-CAcreateserial", "-extfile", "leaf.cnf", "-out", "leaf.pem"),
        )
        server = folder / "server.pem"
        server.write_bytes((folder / "leaf.pem").read_bytes() + (folder / "leaf.key").read_bytes())
        return cls(folder / "ca.pem", server)


@contextmanager
def tls_front(authority: Authority, port: int) -> Iterator[int]:
    """Pass what comes in over TLS on to a port; yield the port to connect to."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.server)

    def serve(plain: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),
            context.wrap_socket(plain, server_side=True) as tls,
            socket.create_connection(("127.0.0.1", port)) as behind,
        ):
            pass_on(tls, behind)

    with listening(serve) as own_port:
        yield own_port


@contextmanager
def listening(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """Serve each connection in a thread of its own; yield the port."""
    threads: list[threading.Thread] = []
    connections: list[socket.socket] = []

    def accept(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                # A duplicate, to end it by: TLS takes the descriptor over.
                connections.append(connection.dup())
                threads.append(threading.Thread(target=serve, args=(connection,), daemon=True))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads.append(threading.Thread(target=accept, args=(listener,), daemon=True))
        threads[0].start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            threads[0].join(5)
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                connection.close()
            for thread in threads:
                thread.join(5)


def pass_on(one: socket.socket, other: socket.socket) -> None:
    """Pass bytes both ways until one side has ended."""
    while True:
        waiting = isinstance(one, ssl.SSLSocket) and one.pending()
        readable = [one] if waiting else select.select([one, other], [], [])[0]
        for source in readable:
            block = source.recv(1 << 16)
            if not block:
                return
            (other if source is one else one).sendall(block)


@dataclass
class Proxy:
    """An HTTP proxy, without and with CONNECT.

    Attributes:
        asked: First line of each request.
        port: Where it listens.
    """

    asked: list[str] = field(default_factory=list)
    port: int = 0

    @contextmanager
    def serving(self) -> Iterator["Proxy"]:
        """Serve."""
        with listening(self._serve) as self.port:
            yield self

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(1 << 16)
            line, _, rest = head.partition(b"\r\n")
            self.asked.append(line.decode())
            method, target, version = line.split(b" ")
            if method == b"CONNECT":
                host, _, port = target.decode().partition(":")
            else:
                url = urlsplit(target.decode())
                host, port = url.hostname or "", str(url.port or 80)
                rest = b"Connection: close\r\n" + rest
            with socket.create_connection((host, int(port))) as behind:
                if method == b"CONNECT":
                    client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                else:
                    path = target.decode().partition(f"//{url.netloc}")[2].encode()
                    behind.sendall(b" ".join((method, path, version)) + b"\r\n" + rest)
                pass_on(client, behind)


@dataclass(frozen=True)
class Answer:
    """What a scripted server says."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    chunked: bool = False


@dataclass
class Scripted:
    """A server that answers each query with what the test says.

    Attributes:
        answers: By a part of the path with its query; the first that is in it counts.
        asked: Path and headers of each request.
        port: Where it listens.
    """

    answers: dict[str, Answer] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    port: int = 0

    @contextmanager
    def serving(self) -> Iterator["Scripted"]:
        """Serve."""
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 1.0

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                script.asked.append((self.path, dict(self.headers.items())))
                known = (a for part, a in script.answers.items() if part in self.path)
                answer = next(known, Answer(404))
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                body = answer.body
                if answer.chunked:
                    self.send_header("Transfer-Encoding", "chunked")
                    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
                else:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads = True
            self.port = server.server_port
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            try:
                yield self
            finally:
                server.shutdown()


def rewrite_branch(clone: Path, files: Mapping[str, bytes | None]) -> None:
    """Put files into a clone's git-annex branch, or take them out where they are None."""
    environment = {**os.environ, "GIT_INDEX_FILE": str(clone / "rewritten-index")}
    environment |= {f"GIT_{who}_NAME": "t" for who in ("COMMITTER", "AUTHOR")}
    environment |= {f"GIT_{who}_EMAIL": "t@t" for who in ("COMMITTER", "AUTHOR")}

    def plumb(*arguments: str, stdin: bytes = b"") -> str:
        command = ["git", *arguments]
        return run(command, cwd=clone, environment=environment, stdin=stdin).decode().strip()

    plumb("read-tree", "refs/heads/git-annex")
    for path, content in files.items():
        if content is None:
            plumb("update-index", "--force-remove", path)
        else:
            blob = plumb("hash-object", "-w", "--stdin", stdin=content)
            plumb("update-index", "--add", "--cacheinfo", f"100644,{blob},{path}")
    commit = plumb("commit-tree", plumb("write-tree"), "-p", "git-annex", "-m", "update")
    plumb("update-ref", "refs/heads/git-annex", commit)
    (clone / "rewritten-index").unlink()
    (clone / ".git/annex/index").unlink(missing_ok=True)


def set_public_url(clone: Path, url: str) -> None:
    """Have the public bucket be somewhere else, as recorded and verified."""
    new = b"publicurl=" + url.encode()
    log = run(["git", "show", "git-annex:remote.log"], cwd=clone)
    rewrite_branch(clone, {"remote.log": re.sub(rb"publicurl=\S+", new, log)})
    verified = clone / ".git/annex/verified-remote.log"
    verified.write_bytes(re.sub(rb"publicurl=\S+", new, verified.read_bytes()))
