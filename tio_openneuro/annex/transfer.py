"""One ``git annex get`` coprocess, asked for one key at a time and watched while it answers.

Owns the watchdog: a child that stands still, or stands because the disk is full, is killed with
its process group; what it downloaded stays as a partial, which the next one resumes. Never
retries: that is :mod:`tio_openneuro.annex.repo`'s.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tio_openneuro.annex.branch import git_folder
from tio_openneuro.annex.environment import annex_environment
from tio_openneuro.annex.messages import Failure, complaints, parse_answer
from tio_openneuro.annex.processes import CommandError, Coprocess
from tio_openneuro.content import AnnexKey, StoredContent
from tio_openneuro.errors import FetchError, NotAnAnnexError

POLL_S = 0.1
# Before the key's name in that of an unfinished download of ours: git-annex takes it for no key.
OWN_PREFIX = ".tio-openneuro."
_SPACE_CHECK_S = 1.0
_SPACE_LEFT_BYTES = 1 << 20
_HASHED_BYTES_PER_S = 1e8
_CRAWL_BYTES_PER_S = 1024.0
# Of a file that may be there all the same.
_UNSEEN = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)


@dataclass(frozen=True, slots=True)
class TransferRequest:
    """What to fetch, from where, and until when.

    Attributes:
        key: The content wanted.
        remote: Name of the annex remote.
        keep_fds: Descriptors that git-annex inherits.
        stopped: Polled; once true, the fetch ends.
        stall_timeout_s: Seconds in which something must arrive.
        deadline_s: When to give up, in ``time.monotonic()``'s seconds.
    """

    key: AnnexKey
    remote: str
    keep_fds: tuple[int, ...]
    stopped: Callable[[], bool]
    stall_timeout_s: float
    deadline_s: float


@dataclass(eq=False)
class TransferError(Exception):
    """Why one request for content brought none.

    Attributes:
        why: The class of failure.
        said: Words of whoever failed.
        program: Who failed.
    """

    why: Failure
    said: str = ""
    program: str = "git-annex"


class NotOverHttpError(Exception):
    """Content cannot come over HTTP here: it is git-annex's to fetch."""


class Transfer(Coprocess):
    """A coprocess that gets keys from one remote. Used by one thread at a time."""

    def __init__(self, clone: Path, remote: str, keep_fds: tuple[int, ...]) -> None:
        """Start the child.

        Args:
            clone: The clone's folder.
            remote: Name of the annex remote.
            keep_fds: Descriptors that the child inherits.

        Raises:
            FetchError: The clone cannot be written to.
        """
        self._clone = clone
        own = (git_folder(clone) or clone) / "annex" / "tio-openneuro"
        try:
            own.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"Cannot fetch into {clone}: it cannot be written to ({error})."
            raise FetchError(message) from error
        super().__init__(
            [
                "git",
                # With an index and databases of our own git-annex knows of no unlocked file in
                # the work tree, and does not put a second copy of the content there.
                *("-c", f"annex.dbdir={own}"),
                *("-c", "annex.verify=true", "-c", f"remote.{remote}.annex-verify=true"),
                # The floor of free space is the engine's; git-annex's own reserve is 100 MB.
                *("-c", "annex.diskreserve=0"),
                # In a user's clone: no commit of ours, none in the middle of an epoch.
                *("-c", "annex.alwayscommit=false"),
                # It leaves an orphan that holds the transfer lock: the watchdog is here.
                *("-c", "annex.stalldetection=false"),
                *("annex", "get", "--batch-keys", "--from", remote),
                *("--json", "--json-progress", "--json-error-messages"),
            ],
            cwd=clone,
            environment=annex_environment({"GIT_INDEX_FILE": str(own / "index")}),
            keep_fds=keep_fds,
        )

    def get(self, request: TransferRequest) -> TransferError | None:
        """Ask for one key and wait for the end; None where git-annex says that it is there.

        After a failure to answer the child is dead.
        """
        try:
            self.write_line(request.key.text.encode(errors="surrogateescape"))
        except CommandError:
            return self._died()
        watch = Watch(self._clone, request)
        while True:
            try:
                line = self.read_line(POLL_S)
            except TimeoutError:
                line = b"{}"
            if line is None:
                return self._died()
            if not line:
                return TransferError(Failure.NOT_RECORDED)
            answer = parse_answer(line)
            if "success" in answer:
                return self._finished(answer, request.key.text)
            failed = watch.complaint(answer.get("byte-progress"))
            if failed is not None:
                self.kill()
                return failed

    def _died(self) -> TransferError:
        self.kill()
        return TransferError(Failure.of(self.stderr, Failure.DIED), self.stderr)

    def _finished(self, answer: dict[str, Any], key_text: str) -> TransferError | None:
        if answer.get("key") not in {None, key_text}:
            self.kill()
            return TransferError(Failure.DIED, f"it answered for {answer.get('key')} instead")
        if answer["success"]:
            return None
        said = complaints(answer)
        return TransferError(Failure.of(said, Failure.UNKNOWN), said)


class Watch:
    """Tells a transfer that goes on from one that stands."""

    def __init__(self, folder: Path, request: TransferRequest) -> None:
        """Begin to watch; what arrives lies in that folder."""
        self._folder = folder
        self._request = request
        # Before a resumed download, and after any, all of it is hashed in silence.
        size_bytes = request.key.size_bytes or 0
        self._stall_s = request.stall_timeout_s + size_bytes / _HASHED_BYTES_PER_S
        self._bytes = 0
        self._since_s = time.monotonic()
        self._window_bytes = 0
        self._space_checked_s = self._since_s

    def complaint(self, progress: object) -> TransferError | None:
        """Return why to give up, or None.

        Args:
            progress: How many bytes have come, if it is known.
        """
        if self._request.stopped():
            return TransferError(Failure.STALLED)
        if isinstance(progress, int):
            self._bytes = max(self._bytes, progress)
        now_s = time.monotonic()
        # A crawl is as good as a stall: each window must bring a little.
        if self._bytes - self._window_bytes >= _CRAWL_BYTES_PER_S * self._stall_s:
            self._window_bytes = self._bytes
            self._since_s = now_s
        if now_s - max(self._since_s, self._space_checked_s) >= _SPACE_CHECK_S:
            self._space_checked_s = now_s
            # git-annex hangs on a full disk and says nothing.
            with contextlib.suppress(OSError):
                free_bytes = shutil.disk_usage(self._folder).free
                if free_bytes < _SPACE_LEFT_BYTES:
                    return TransferError(Failure.DISK_FULL, f"{free_bytes} bytes are free")
        if now_s - self._since_s >= self._stall_s:
            silent_s = now_s - self._since_s
            got_bytes = self._bytes - self._window_bytes
            return TransferError(Failure.STALLED, f"{got_bytes} bytes in {silent_s:.0f} s")
        if now_s >= self._request.deadline_s:
            return TransferError(Failure.STALLED, "it is past its deadline")
        return None


# What transfers left in a clone


def find_whole(git_folder: Path, key: AnnexKey) -> Path | None:
    """Return the file that holds the whole content of a key, or None where it is absent."""
    for relative in key.object_paths():
        path = git_folder / relative
        size_bytes = file_size(path)
        if size_bytes is not None and key.size_bytes in {None, size_bytes}:
            return path
    return None


def find_spoilt(git_folder: Path, key: AnnexKey) -> Iterator[Path]:
    """Yield the files under a key that are not its content: cut, rotten, renamed, a second one."""
    whole = find_whole(git_folder, key)
    for relative in key.object_paths():
        folder = (git_folder / relative).parent
        with contextlib.suppress(FileNotFoundError):
            for file in folder.iterdir():
                size_bytes = file_size(file)
                # It may have come just now.
                right = file.name == key.name and size_bytes == key.size_bytes
                odd = file.suffix != ".lck" and size_bytes is not None
                if odd and file != whole and (whole is not None or not right):
                    yield file
    bad = git_folder / "annex" / "bad" / key.name
    if bad.exists():
        yield bad


def find_stored(git_folder: Path) -> Iterator[StoredContent]:
    """Yield every object and every partial download that lies in a clone."""
    annex = git_folder / "annex"
    # Path.glob raises where another process removes a folder meanwhile.
    folders = sorted(glob.iglob("objects/*/*/*", root_dir=annex))  # noqa: PTH207
    names = [Path(folder).name for folder in folders]
    with contextlib.suppress(FileNotFoundError):
        names += [file.name for file in (annex / "bad").iterdir()]
    for name in dict.fromkeys(names):
        key = AnnexKey.parse(name) or AnnexKey(name, None)
        whole = find_whole(git_folder, key)
        size_bytes = None if whole is None else file_size(whole)
        if size_bytes is not None:
            yield StoredContent(name, size_bytes, partial=False)
        for file in find_spoilt(git_folder, key):
            if size_bytes := file_size(file):
                yield StoredContent(name, size_bytes, partial=True)
    with contextlib.suppress(FileNotFoundError):
        for file in sorted((annex / "tmp").iterdir()):
            size_bytes = file_size(file)
            if size_bytes is not None and file.suffix != ".lck":
                yield StoredContent(file.name.removeprefix(OWN_PREFIX), size_bytes, partial=True)


def file_size(path: Path) -> int | None:
    """Return the size of a regular file; None where there is none.

    Raises:
        NotAnAnnexError: It cannot be told: permission lacks, or the disk fails.
    """
    try:
        found = path.stat()
    except OSError as error:
        if error.errno in _UNSEEN:
            message = f"Cannot look at {path}: {error.strerror}. What lies there stays charged."
            raise NotAnAnnexError(message) from error
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None
