"""Downloads over HTTP, put where git-annex has its content and accepts it.

Owns connections and unfinished downloads, which lie under names of our own, locked by who writes
them. Promises that nothing is put in place before size and checksum are the key's, that no byte
beyond the key's size is written, and that each wait but the resolver's ends as its
:class:`~tio_openneuro.annex.transfer.Watch` says: sockets wait in steps, between which it is asked.
Reads and sends no credentials. Never retries, but goes on where an earlier download stopped.
Imports urllib3: imported itself when something is fetched.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import http.client
import ipaddress
import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import certifi
import urllib3
from urllib3.exceptions import HTTPError, NewConnectionError, ProxyError, SSLError
from urllib3.util.wait import wait_for_write

from tio_openneuro.annex.branch import is_amazon, journal_name
from tio_openneuro.annex.messages import Failure
from tio_openneuro.annex.transfer import POLL_S, NotOverHttpError, TransferError, Watch
from tio_openneuro.content import AnnexKey
from tio_openneuro.forks import close_apart, open_apart

if sys.platform != "win32":
    import fcntl

_BLOCK_BYTES = 1 << 16
_CONNECT_S = 5.0
# TLS brings 16 kB at a time: to ask after each takes 1 ms a file of 7 MB.
_ASK_S = 0.02
_MOST_REDIRECTS = 4
_WRITE_BITS = 0o222
# AT_FDCWD and RENAME_NOREPLACE.
_HERE = -100
_NO_REPLACE = 1
_DOWNLOAD = "the download"
_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "tio-openneuro"}
_HOW: dict[str, Any] = {"redirect": False, "retries": False, "timeout": POLL_S}
_HOW |= {"preload_content": False, "decode_content": False}
# What another version of the same content may do better.
_NEXT = frozenset({Failure.NOT_FOUND, Failure.FORBIDDEN, Failure.CORRUPT})


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
        # Each thread has its own connections: no lock of urllib3's is ever waited for.
        self._own = threading.local()
        self._brought: set[str] = set()

    def get(
        self, key: AnnexKey, urls: Sequence[str], partial_path: Path, watch: Watch
    ) -> TransferError | None:
        """Download a key from the first URL that gives it; None where it is in place.

        Args:
            key: What to fetch.
            urls: Where recorded versions of it are.
            partial_path: Where to keep what has arrived.
            watch: Asked whether to go on.

        Raises:
            NotOverHttpError: TLS or the proxy failed, or the address is not allowed.
        """
        allowed = self._config.get("annex.security.allowed-ip-addresses", "")
        before = _STEPS.set(_Steps(watch, allowed.split()))
        failed: TransferError | None = None
        try:
            for url in urls:
                failed = self._get(key, url, partial_path)
                if failed is None or failed.why not in _NEXT:
                    break
        finally:
            _STEPS.reset(before)
        return failed

    def head(self, url: str, size_bytes: int, watch: Watch) -> bytes:
        """Return the first bytes of what a URL gives; none where it gives none."""
        allowed = self._config.get("annex.security.allowed-ip-addresses", "")
        before = _STEPS.set(_Steps(watch, allowed.split()))
        try:
            with contextlib.closing(self._ask(url, f"0-{size_bytes - 1}")) as found:
                return found.read(size_bytes) if found.headers.get("Content-Range") else b""
        except (HTTPError, OSError, TransferError):
            return b""
        finally:
            _STEPS.reset(before)

    def drop(self, key: AnnexKey) -> bool:
        """Remove what came by :meth:`get` into a clone of ours; return whether it is gone.

        As git-annex would: not what somebody keeps locked. What git-annex has recorded to be here
        (in clones of ours beside the branch) is its own to drop, or its records would be wrong.
        """
        path = self._path_of(key)
        lock_path = path.with_name(f"{path.name}.lck")
        record = self._folder / "annex" / "journal-private" / journal_name(key)
        ours = {"tio-openneuro.url", "annex.private"} <= self._config.keys()
        here = f" 1 {self._config.get('annex.uuid')}"
        recorded = record.exists() and here in record.read_text()
        if not ours or key.name not in self._brought or recorded:
            return False
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
    def _tls(self) -> ssl.SSLContext:
        """What is trusted: what git is told to trust, else certifi's authorities."""
        given = os.environ.get("GIT_SSL_CAINFO") or self._config.get("http.sslcainfo")
        file = given or os.environ.get("SSL_CERT_FILE") or certifi.where()
        try:
            context = ssl.create_default_context(cafile=str(Path(file).expanduser()))
        except OSError as error:
            raise NotOverHttpError(f"{file}: {error}") from error
        context.sslsocket_class = _TlsSocket
        return context

    def _get(self, key: AnnexKey, url: str, partial_path: Path) -> TransferError | None:
        """Download a key from one URL, after what has arrived of it."""
        try:
            with contextlib.closing(_Partial(partial_path, key)) as partial:
                if partial.size_bytes < partial.stated_bytes:
                    self._receive(partial, url)
                partial.check()
                self._place(partial)
        except TransferError as error:
            return error
        except HTTPError as error:
            broken = isinstance(error.args[0], ssl.SSLEOFError | ssl.SSLZeroReturnError)
            if isinstance(error, SSLError | ProxyError) and not broken:
                raise NotOverHttpError(str(error)) from error
            return TransferError(Failure.CONNECTION, str(error), _DOWNLOAD)
        except OSError as error:
            return TransferError(Failure.of(str(error), Failure.UNKNOWN), str(error), _DOWNLOAD)
        return None

    def _receive(self, partial: _Partial, url: str) -> None:
        begins = f"bytes {partial.size_bytes}-"
        wanted = f"{partial.size_bytes}-" if partial.size_bytes else ""
        with contextlib.closing(self._ask(url, wanted)) as response:
            if response.status == http.client.OK:
                partial.restart()
            elif response.status != http.client.PARTIAL_CONTENT:
                # Not the server's own words, which may be anything.
                said = f"{response.status} {http.client.responses.get(response.status, '')}"
                raise TransferError(Failure.of(said, Failure.UNKNOWN), said, _DOWNLOAD)
            elif not response.headers.get("Content-Range", "").startswith(begins):
                raise TransferError(Failure.BAD_RANGE)
            while block := response.read(_BLOCK_BYTES):
                partial.add(block)

    def _ask(self, url: str, wanted: str) -> urllib3.BaseHTTPResponse:
        """Return the answer to a request, after redirects to OpenNeuro's own hosts."""
        headers = {**_HEADERS, **({"Range": f"bytes={wanted}"} if wanted else {})}
        with contextlib.suppress(ValueError):  # of an URL that is none
            for _ in range(_MOST_REDIRECTS):
                response = self._manager(url).urlopen("GET", url, headers=headers, **_HOW)
                location = response.get_redirect_location()
                if not location:
                    return response
                response.close()
                before, url = urlsplit(url), urljoin(url, location)
                after = urlsplit(url)
                known = after.netloc == before.netloc or is_amazon(after.netloc)
                if not known or after.scheme not in {before.scheme, "https"}:
                    break
        raise TransferError(Failure.REDIRECTED, f"go to {url!r}", _DOWNLOAD)

    def _manager(self, url: str) -> urllib3.PoolManager:
        """Return what connects to a URL, through the proxy that the environment names for it."""
        parts = urlsplit(url)
        proxy = "" if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme, "")
        proxy = f"http://{proxy}" if proxy and "://" not in proxy else proxy
        if proxy and ("@" in proxy or not proxy.startswith("http://")):
            raise NotOverHttpError("the proxy wants TLS, a password or SOCKS")
        managers: dict[str, urllib3.PoolManager] = vars(self._own)
        slot = f"{parts.scheme} {proxy}"
        if slot not in managers:
            more: dict[str, Any] = {"ssl_context": self._tls} if parts.scheme == "https" else {}
            make = (
                functools.partial(urllib3.proxy_from_url, proxy) if proxy else urllib3.PoolManager
            )
            managers[slot] = make(num_pools=2, maxsize=1, **more)
        pool: Any = managers[slot].connection_from_url(url)
        pool.ConnectionCls = _HttpsConnection if pool.scheme == "https" else _HttpConnection
        return managers[slot]

    def _path_of(self, key: AnnexKey) -> Path:
        return self._folder / key.object_paths()[self._config.get("core.bare") == "true"]

    def _place(self, partial: _Partial) -> None:
        """Move whole content to where git-annex has it, unless it is there by now."""
        path = self._path_of(partial.key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            mode = path.parent.stat().st_mode & 0o777
            path.parent.chmod(mode | 0o200)
            _move(partial.path, path)
            # Not before: a process killed in between would leave a partial that cannot be opened.
            path.chmod(path.stat().st_mode & 0o777 & ~_WRITE_BITS)
            path.parent.chmod(mode & ~_WRITE_BITS)
        except (FileNotFoundError, FileExistsError, PermissionError) as error:
            # Somebody put the same content there, or dropped it with its folders, in between.
            if path.exists():
                partial.path.unlink(missing_ok=True)
                path.parent.chmod(path.parent.stat().st_mode & 0o777 & ~_WRITE_BITS)
            elif isinstance(error, PermissionError):
                raise
            raise TransferError(Failure.BUSY) from error
        self._brought.add(partial.key.name)


def _move(file: Path, target: Path) -> None:
    """Rename a file, but not over what somebody put there meanwhile.

    Rejected: a second link, after which the first is removed. Killed in between, it leaves two.

    Source: renameat2(2); file systems without its flag say so, and others than Linux lack it.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        names = os.fsencode(file), os.fsencode(target)
        if not rename(_HERE, names[0], _HERE, names[1], _NO_REPLACE):
            return
        code = ctypes.get_errno()
        if code not in {errno.ENOSYS, errno.EINVAL}:
            raise OSError(code, os.strerror(code), str(target))
    if target.exists():
        raise FileExistsError(target)
    file.rename(target)


class _Partial:
    """An unfinished download: its file, locked by whoever writes it, and the checksum so far."""

    def __init__(self, path: Path, key: AnnexKey) -> None:
        """Go on with what is there, if anything is."""
        self.path = path
        self.key = key
        self.stated_bytes = key.size_bytes or 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = open_apart(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        self._file = os.fdopen(self._descriptor, "a+b", buffering=0, closefd=False)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise TransferError(Failure.BUSY) from None
        self._begin()
        if self.size_bytes > self.stated_bytes:
            self.restart()

    def restart(self) -> None:
        """Forget what has arrived."""
        self._file.truncate(0)
        self._begin()

    def add(self, block: bytes) -> None:
        """Write what has arrived, unless it is more than the key states."""
        if self.size_bytes + len(block) > self.stated_bytes:
            self._refuse(f"incorrect size: more than {self.stated_bytes} bytes")
        rest = memoryview(block)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._hash.update(block)
        self.size_bytes += len(block)

    def check(self) -> None:
        """Refuse what is not the key's content."""
        if self.size_bytes != self.stated_bytes:
            self._refuse(f"incorrect size: {self.size_bytes} bytes")
        if self._hash.hexdigest() != self._digest:
            self._refuse("another checksum than the key's")

    def close(self) -> None:
        """Let others write it."""
        self._file.close()
        close_apart(self._descriptor)

    def _begin(self) -> None:
        """Take the checksum of what is there."""
        name, self._digest = self.key.checksum or ("md5", "")
        self._file.seek(0)
        self._hash = hashlib.file_digest(
            self._file, functools.partial(hashlib.new, name, usedforsecurity=False)
        )
        self.size_bytes = self._file.tell()

    def _refuse(self, said: str) -> NoReturn:
        self.restart()
        raise TransferError(Failure.CORRUPT, said, _DOWNLOAD)


class _Steps:
    """What the sockets of one download ask at each step: whether to go on, and with whom."""

    def __init__(self, watch: Watch, allowed: Sequence[str]) -> None:
        self._watch = watch
        self._allowed = allowed
        self._bytes = 0
        self._asked_s = 0.0

    def step(self, waiting: socket.socket, size_bytes: int = 0) -> None:
        """Note bytes that came; close and raise where no more is to come."""
        self._bytes += size_bytes
        now_s = time.monotonic()
        if now_s - self._asked_s < _ASK_S:
            return
        self._asked_s = now_s
        if failed := self._watch.complaint(self._bytes):
            waiting.close()
            failed.program = _DOWNLOAD
            raise failed

    def refuse_local(self, address: str, port: int) -> None:
        """Raise where an address is not public, and the user's settings do not allow it."""
        public = ipaddress.ip_address(address.partition("%")[0]).is_global
        if not public and {"all", address, f"[{address}]:{port}"}.isdisjoint(self._allowed):
            raise NotOverHttpError(f"{address} is no public address")


_STEPS: ContextVar[_Steps] = ContextVar("steps")


class _PlainSocket(socket.socket):
    """A socket that waits in steps."""

    def recv_into(self, *arguments: Any) -> int:  # noqa: ANN401
        while True:
            try:
                size_bytes = super().recv_into(*arguments)
            except TimeoutError:
                _STEPS.get().step(self)
            else:
                _STEPS.get().step(self, size_bytes)
                return size_bytes


class _TlsSocket(_PlainSocket, ssl.SSLSocket):
    """The same for TLS."""

    def do_handshake(self, *arguments: Any) -> None:  # noqa: ANN401
        while True:
            with contextlib.suppress(TimeoutError):
                return super().do_handshake(*arguments)
            _STEPS.get().step(self)


class _HttpConnection(urllib3.connection.HTTPConnection):
    """A connection to an address that was looked at, made in steps."""

    def _new_conn(self) -> socket.socket:
        steps = _STEPS.get()
        code = errno.EHOSTUNREACH
        hosts = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        for family, kind, number, _, address in hosts:
            steps.refuse_local(str(address[0]), self.port)
            made = _PlainSocket(family, kind, number)
            made.settimeout(0.0)
            code = made.connect_ex(address)
            until_s = time.monotonic() + _CONNECT_S
            while code == errno.EINPROGRESS:
                steps.step(made)
                if wait_for_write(made, POLL_S):
                    code = made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                elif time.monotonic() >= until_s:
                    code = errno.ETIMEDOUT
            if not code:
                made.settimeout(POLL_S)
                return made
            made.close()
        raise NewConnectionError(self, f"Connection to {self.host} failed: {os.strerror(code)}")


class _HttpsConnection(_HttpConnection, urllib3.connection.HTTPSConnection):
    pass
