"""Downloads over HTTP, put where git-annex has its content and accepts it.

Owns connections and unfinished downloads, which lie under names of our own, locked by who writes
them. Promises that nothing is put in place before size and checksum are the key's, that no byte
beyond the key's size is written, and that each wait ends as its :class:`Watch` says: sockets wait
in steps, between which it is asked. Reads and sends no credentials. Never retries, but goes on
where an earlier download stopped. Imports urllib3: imported itself when something is fetched.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import ipaddress
import os
import socket
import ssl
import stat
import sys
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import certifi
import urllib3
from urllib3.exceptions import HTTPError, NewConnectionError, ProxyError, SSLError
from urllib3.util.wait import wait_for_write

from tio_openneuro.annex.branch import is_amazon
from tio_openneuro.annex.messages import Failure
from tio_openneuro.annex.transfer import (
    POLL_S,
    FailedTransfer,
    NotOverHttpError,
    TransferRequest,
    Watch,
)
from tio_openneuro.content import AnnexKey

if sys.platform != "win32":
    import fcntl

_BLOCK_BYTES = 1 << 16
_CONNECT_S = 5.0
_MOST_REDIRECTS = 4
_PLACING_TRIES = 5
_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "tio-openneuro"}
# What another version of the same content may do better.
_NEXT = frozenset({Failure.NOT_FOUND, Failure.FORBIDDEN, Failure.CORRUPT})


class _FailedError(Exception):
    """Ends a download; from inside a socket, too."""

    def __init__(self, why: Failure, said: str = "") -> None:
        super().__init__(said)
        self.failed = FailedTransfer(why, said, "the download")


class Downloads:
    """What one process downloads into one clone. Safe to share by its threads."""

    def __init__(self, folder: Path, config: Mapping[str, str]) -> None:
        """Connect to nothing yet.

        Args:
            folder: The clone's git folder.
            config: git's settings in the clone.
        """
        self._folder = folder
        self._config = config
        # Each is used by one download at a time: a process that is forked meanwhile finds those
        # that are idle with no lock of urllib3's held.
        self._idle: list[_Connections] = []
        self._brought: set[str] = set()

    def get(
        self, request: TransferRequest, urls: Sequence[str], partial_path: Path
    ) -> FailedTransfer | None:
        """Download a key from the first URL that gives it; None where it is in place.

        Args:
            request: What to fetch.
            urls: Where recorded versions of it are.
            partial_path: Where to keep what has arrived.

        Raises:
            NotOverHttpError: TLS or the proxy failed, or the address is not allowed.
        """
        allowed = self._config.get("annex.security.allowed-ip-addresses", "")
        _STEPS.set(_Steps(Watch(self._folder, request), allowed.split()))
        try:
            connections = self._idle.pop()
        except IndexError:
            connections = _Connections(self)
        failed: FailedTransfer | None = None
        for url in urls:
            try:
                with contextlib.closing(_Partial(partial_path, request.key)) as partial:
                    connections.fill(partial, url)
                    self._place(partial)
                failed = None
                break
            except _FailedError as error:
                failed = error.failed
            except OSError as error:
                failed = FailedTransfer(Failure.of(str(error), Failure.UNKNOWN), str(error), "it")
            if failed.why not in _NEXT:
                break
        self._idle.append(connections)
        return failed

    def drop(self, key: AnnexKey) -> bool:
        """Remove what came by :meth:`get` into a clone of ours; return whether it is gone.

        As git-annex would: not what somebody keeps locked. It has no record of it that would
        then be wrong.
        """
        if key.name not in self._brought or "tio-openneuro.url" not in self._config:
            return False
        path = self._path_of(key)
        lock_path = path.with_name(f"{path.name}.lck")
        with contextlib.suppress(OSError):
            path.parent.chmod(0o755)
            with lock_path.open("wb") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                lock_path.unlink()
            for folder in path.parents[:3]:
                folder.rmdir()
        return not path.exists()

    @functools.cached_property
    def tls(self) -> ssl.SSLContext:
        """What is trusted: what git is told to trust, else certifi's authorities."""
        given = os.environ.get("GIT_SSL_CAINFO") or self._config.get("http.sslcainfo")
        file = given or os.environ.get("SSL_CERT_FILE") or certifi.where()
        try:
            context = ssl.create_default_context(cafile=str(Path(file).expanduser()))
        except OSError as error:
            raise NotOverHttpError(f"{file}: {error}") from error
        context.sslsocket_class = _TlsSocket
        return context

    def _path_of(self, key: AnnexKey) -> Path:
        return self._folder / key.object_paths()[self._config.get("core.bare") == "true"]

    def _place(self, partial: _Partial) -> None:
        """Move whole content to where git-annex has it, unless it is there by now."""
        path = self._path_of(partial.key)
        self._brought.add(partial.key.name)
        partial.path.chmod(stat.S_IMODE(partial.path.stat().st_mode) & 0o555)
        for left in reversed(range(_PLACING_TRIES)):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.exists():
                    partial.path.unlink()
                    if path.stat().st_size != partial.stated_bytes:
                        said = "an object of another size lies there: run 'git annex fsck'"
                        raise _FailedError(Failure.CORRUPT, said)
                    return
                path.parent.chmod(0o755)
                partial.path.rename(path)
                path.parent.chmod(0o555)
            except (FileNotFoundError, PermissionError):
                # Somebody put the same content there, or dropped it with its folders, in between.
                if not left or not partial.path.exists():
                    raise
            else:
                return


class _Partial:
    """An unfinished download: its file, locked by whoever writes it, and the checksum so far."""

    def __init__(self, path: Path, key: AnnexKey) -> None:
        """Go on with what is there, if anything is."""
        self.path = path
        self.key = key
        self.stated_bytes = key.size_bytes or 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise _FailedError(Failure.BUSY) from None
        self._begin()
        self._file.seek(0)
        while block := self._file.read(_BLOCK_BYTES):
            self._take_in(block)
        if self.size_bytes > self.stated_bytes:
            self.restart()

    def restart(self) -> None:
        """Forget what has arrived."""
        self._file.truncate(0)
        self._begin()

    def add(self, block: bytes) -> None:
        """Write what has arrived, unless it is more than the key states."""
        if self.size_bytes + len(block) > self.stated_bytes:
            self.refuse(f"incorrect size: more than {self.stated_bytes} bytes")
        rest = memoryview(block)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._take_in(block)

    def check(self) -> None:
        """Refuse what is not the key's content."""
        if self.size_bytes != self.stated_bytes:
            self.refuse(f"incorrect size: {self.size_bytes} bytes")
        if self._hash.hexdigest() != self._digest:
            self.refuse("another checksum than the key's")

    def refuse(self, said: str) -> None:
        """Forget what has arrived, and raise."""
        self.restart()
        raise _FailedError(Failure.CORRUPT, said)

    def close(self) -> None:
        """Let others write it."""
        # A process forked meanwhile has the file open, and would keep it locked.
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()

    def _begin(self) -> None:
        name, self._digest = self.key.checksum or ("md5", "")
        self._hash = hashlib.new(name, usedforsecurity=False)
        self.size_bytes = 0

    def _take_in(self, block: bytes) -> None:
        self._hash.update(block)
        self.size_bytes += len(block)


class _Connections:
    """Connections of one download at a time, kept open between."""

    def __init__(self, downloads: Downloads) -> None:
        self._downloads = downloads
        self._managers: dict[tuple[str, str], urllib3.PoolManager] = {}

    def fill(self, partial: _Partial, url: str) -> None:
        """Download the rest, and check all of it."""
        start = partial.size_bytes
        try:
            if start < partial.stated_bytes:
                self._receive(partial, url, {"Range": f"bytes={start}-"} if start else {})
        except HTTPError as error:
            broken = isinstance(error.args[0], ssl.SSLEOFError | ssl.SSLZeroReturnError)
            if isinstance(error, SSLError | ProxyError) and not broken:
                raise NotOverHttpError(str(error)) from error
            raise _FailedError(Failure.CONNECTION, str(error)) from error
        partial.check()

    def _receive(self, partial: _Partial, url: str, range_: Mapping[str, str]) -> None:
        with contextlib.closing(self._ask(url, {**_HEADERS, **range_})) as response:
            begins = f"bytes {partial.size_bytes}-"
            if response.status == HTTPStatus.OK:
                partial.restart()
            elif response.status != HTTPStatus.PARTIAL_CONTENT:
                said = f"{response.status} {response.reason}"
                raise _FailedError(Failure.of(said, Failure.UNKNOWN), said)
            elif not response.headers.get("Content-Range", "").startswith(begins):
                raise _FailedError(Failure.BAD_RANGE)
            while block := response.read(_BLOCK_BYTES):
                partial.add(block)

    def _ask(self, url: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        """Return the answer to a request, after redirects to OpenNeuro's own hosts."""
        how: dict[str, Any] = {"redirect": False, "retries": False, "preload_content": False}
        how["decode_content"] = False
        for _ in range(_MOST_REDIRECTS):
            manager = self._manager(url)
            response = manager.urlopen("GET", url, headers=headers, timeout=POLL_S, **how)
            location = response.get_redirect_location()
            if not location:
                return response
            response.close()
            before, url = urlsplit(url), urljoin(url, location)
            after = urlsplit(url)
            known = after.netloc == before.netloc or is_amazon(after.netloc)
            if not known or after.scheme not in {before.scheme, "https"}:
                break
        raise _FailedError(Failure.REDIRECTED, f"go to {url}")

    def _manager(self, url: str) -> urllib3.PoolManager:
        """Return what connects to a URL, through the proxy that the environment names for it."""
        parts = urlsplit(url)
        proxy = "" if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme, "")
        proxy = f"http://{proxy}" if proxy and "://" not in proxy else proxy
        if proxy and ("@" in proxy or not proxy.startswith("http://")):
            raise NotOverHttpError("the proxy wants TLS, a password or SOCKS")
        slot = parts.scheme, proxy
        if slot not in self._managers:
            more: dict[str, Any] = {"num_pools": 2, "maxsize": 1}
            if parts.scheme == "https":
                more["ssl_context"] = self._downloads.tls
            made = urllib3.proxy_from_url(proxy, **more) if proxy else urllib3.PoolManager(**more)
            made.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}
            self._managers[slot] = made
        return self._managers[slot]


class _Steps:
    """What the sockets of one download ask at each step: whether to go on, and with whom."""

    def __init__(self, watch: Watch, allowed: Sequence[str]) -> None:
        self._watch = watch
        self._allowed = allowed
        self._bytes = 0
        self._next_s = 0.0

    def step(self, size_bytes: int = 0) -> None:
        """Note bytes that came, and raise where no more is to come."""
        self._bytes += size_bytes
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + POLL_S
            if failed := self._watch.complaint(self._bytes):
                raise _FailedError(failed.why, failed.said)

    def refuse_local(self, address: str, port: int) -> None:
        """Raise where an address is not public, and the user's settings do not allow it."""
        known = {"all", address, f"[{address}]:{port}"}
        public = ipaddress.ip_address(address.partition("%")[0]).is_global
        if not public and known.isdisjoint(self._allowed):
            raise NotOverHttpError(f"{address} is no public address")


_STEPS: ContextVar[_Steps] = ContextVar("steps")


class _PlainSocket(socket.socket):
    """A socket that waits in steps."""

    def recv_into(self, *arguments: Any) -> int:  # noqa: ANN401
        while True:
            with contextlib.suppress(TimeoutError):
                size_bytes = super().recv_into(*arguments)
                _STEPS.get().step(size_bytes)
                return size_bytes
            _STEPS.get().step()


class _TlsSocket(_PlainSocket, ssl.SSLSocket):
    """The same for TLS."""

    def do_handshake(self, *arguments: Any) -> None:  # noqa: ANN401
        while True:
            with contextlib.suppress(TimeoutError):
                return super().do_handshake(*arguments)
            _STEPS.get().step()


class _HttpConnection(urllib3.connection.HTTPConnection):
    """A connection to an address that was looked at, made in steps."""

    def _new_conn(self) -> socket.socket:
        steps = _STEPS.get()
        code = 0
        hosts = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        for family, kind, number, _, address in hosts:
            steps.refuse_local(str(address[0]), self.port)
            found = _PlainSocket(family, kind, number)
            found.settimeout(0.0)
            found.connect_ex(address)
            until_s = time.monotonic() + _CONNECT_S
            while not (ready := wait_for_write(found, POLL_S)) and time.monotonic() < until_s:
                steps.step()
            code = found.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if ready and not code:
                found.settimeout(POLL_S)
                return found
            found.close()
        said = os.strerror(code) if code else f"no answer within {_CONNECT_S:.0f} s"
        raise NewConnectionError(self, f"Connection to {self.host} failed: {said}")


class _HttpsConnection(_HttpConnection, urllib3.connection.HTTPSConnection):
    pass


class _HttpPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _HttpConnection


class _HttpsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _HttpsConnection
