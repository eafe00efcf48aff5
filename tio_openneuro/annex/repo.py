"""Content by annex key in one clone, through git-annex: fetch, drop, find.

Owns the git-annex children of a clone: lockstep ``get`` coprocesses, one per thread that fetches,
and one ``drop``. Promises that what :meth:`AnnexRepo.get` returns was verified by git-annex, that
no wait is endless, and that only content which a trusted remote is recorded to give is dropped.
Never uses ``--force``, and never initialises a clone or enables a remote.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tio_openneuro.annex.branch import (
    SpecialRemote,
    branch_ref,
    configured_uuids,
    exported_keys,
    git_folder,
    keys_with_version,
    special_remotes,
)
from tio_openneuro.annex.children import AnnexChildren
from tio_openneuro.annex.messages import Failure, Retries
from tio_openneuro.annex.transfer import Outcome
from tio_openneuro.annex.tree import externals, index_tree, read_blobs, refuse_external
from tio_openneuro.content import StoredContent, TreeFile
from tio_openneuro.errors import DropRefusedError, FetchError, NotAnAnnexError
from tio_openneuro.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tio_openneuro.content import AnnexKey

__all__ = ["AnnexRepo", "TreeFile", "git_folder", "index_tree", "read_blobs"]

_LOG = logging.getLogger(__name__)

_POLL_S = 0.1
_SLOWEST_BYTES_PER_S = 50e3
_DROP_ATTEMPTS = 4
_NO_VERSION = "no S3 version id is recorded for it, so that the remote cannot give it"


class AnnexRepo:
    """Fetches, drops and finds content of one clone by annex key.

    Safe to share by threads, forked processes (which start children of their own) and, pickled,
    by spawned ones. Implements :class:`tio_openneuro.content.ContentRepo`.
    """

    def __init__(
        self,
        path: Path,
        *,
        remotes: Sequence[str] = ("s3-PUBLIC",),
        stall_timeout_s: float = 30.0,
        total_timeout_s: float = 600.0,
    ) -> None:
        """Name a clone; nothing is started.

        Args:
            path: The clone's folder.
            remotes: Annex remotes to fetch from, in this order, and trusted to keep content.
            stall_timeout_s: Seconds without progress after which a transfer is begun anew.
            total_timeout_s: Seconds for one fetch with all its retries, and as many more as
                its bytes take at 50 kB/s.

        Raises:
            NotAnAnnexError: There is no git repository.
        """
        self._path = Path(path).absolute()
        self._remotes = tuple(remotes)
        self._stall_timeout_s = stall_timeout_s
        self._total_timeout_s = total_timeout_s
        folder = git_folder(self._path)
        if folder is None:
            message = f"Cannot use {self._path} as an annex: it is not a git repository."
            raise NotAnAnnexError(message)
        self._git_folder = folder
        self._by_process: dict[int, AnnexChildren] = {}
        self._proven: set[str] = set()
        self._retries = 0
        self._counting = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        """Return what another process needs: names and numbers, no children."""
        fresh = {"_by_process": {}, "_proven": set(), "_retries": 0, "_counting": None}
        return {**self.__dict__, **fresh}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take it, with no children and nothing counted yet."""
        self.__dict__.update(state)
        self._counting = threading.Lock()

    def __repr__(self) -> str:
        """Return the path and the remotes."""
        return f"AnnexRepo({str(self._path)!r}, remotes={self._remotes!r})"

    @property
    def path(self) -> Path:
        """Absolute folder of the clone."""
        return self._path

    @property
    def remotes(self) -> tuple[str, ...]:
        """Names of the trusted remotes."""
        return self._remotes

    @property
    def retries(self) -> int:
        """How often a transfer was tried again; waits for another process's do not count."""
        return self._retries

    def locate(self, key: AnnexKey) -> Path | None:
        """Return the file that holds the whole content, or None where it is absent."""
        for relative in key.object_paths():
            path = self._git_folder / relative
            try:
                size_bytes = path.stat().st_size
            except OSError:
                continue
            if key.size_bytes is None or size_bytes == key.size_bytes:
                return path
        return None

    def get(
        self,
        key: AnnexKey,
        *,
        owner_fd: int | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Path:
        """Fetch the content, verified by its checksum, and return its file.

        Goes on where an earlier try stopped. Each class of failure has its own number of tries
        at a remote (:mod:`tio_openneuro.annex_messages`); then the next remote is asked. If the
        process is killed, the partial download stays, and git-annex ends with it or soon after.

        Args:
            key: The content wanted; present content is returned at once.
            owner_fd: Descriptor that git-annex inherits, so that the owner's lock outlives us
                for as long as git-annex does.
            cancelled: Polled ten times a second; once true, git-annex is killed.

        Raises:
            RemoteUnavailableError: The remote cannot be reached, or refuses.
            ContentMismatchError: Size or checksum were wrong, repeatedly.
            FetchError: Cancelled, disk full, no version recorded, deadline passed.
            UnsafeDatasetError: To check the key, git-annex would run a program that it names.
        """
        refuse_external(key)
        children = self._children()
        begun_s = time.monotonic()
        allowed_s = self._total_timeout_s + (key.size_bytes or 0) / _SLOWEST_BYTES_PER_S

        def stopped() -> bool:
            return children.closing.is_set() or (cancelled is not None and cancelled())

        outcome = Outcome(Failure.NOT_RECORDED, "no remote is trusted")
        remote = ""
        for remote in self._remotes:
            request = _Request(
                remote,
                keep_fds=() if owner_fd is None else (owner_fd,),
                stopped=stopped,
                deadline_s=begun_s + allowed_s,
            )
            result = self._get_from(children, key, request)
            if isinstance(result, Path):
                self._proven.add(key.name)
                return result
            outcome = result
        raise self._failed(key, remote, outcome, time.monotonic() - begun_s)

    def drop(self, key: AnnexKey) -> None:
        """Remove the content and what is left of its download; absent content is no error.

        Trusts the remotes without asking them, as their records in the git-annex branch stand:
        it works offline.

        Raises:
            DropRefusedError: No trusted remote is recorded to give it back.
        """
        children = self._children()
        said = ""
        for attempt in range(_DROP_ATTEMPTS):
            if not self._object_exists(key):
                break
            if key.name not in self._proven and (why := self.unavailable([key]).get(key)):
                said = why
                break
            if attempt:
                # Another process may hold the content's lock for the length of its own drop.
                children.closing.wait(_POLL_S * 2**attempt)
            said = children.drop(key.text)
        if self._object_exists(key):
            message = (
                f"Cannot drop {key} from {self._path}: {said or 'git-annex gave no reason'}. "
                f"Trusted remotes: {', '.join(self._remotes) or 'none'}. It stays; name a remote "
                f"that has it with remotes=."
            )
            raise DropRefusedError(message, key=key.name)
        self.discard_partial(key)

    def discard_partial(self, key: AnnexKey) -> None:
        """Remove what is left of an unfinished download of the key, if anything."""
        leftover = self._partial_path(key)
        with contextlib.suppress(FileNotFoundError):
            leftover.lstat()  # On a read-only disk unlink complains before it looks.
            try:
                leftover.unlink()
            except (IsADirectoryError, PermissionError):
                shutil.rmtree(leftover, ignore_errors=True)

    def stored(self) -> Iterator[StoredContent]:
        """Yield every object and every partial download that lies in the clone."""
        for folder in _subfolders(self._git_folder / "annex" / "objects", depth=3):
            size_bytes = _file_size(folder / folder.name)
            if size_bytes is not None:
                yield StoredContent(folder.name, size_bytes, partial=False)
        with contextlib.suppress(FileNotFoundError):
            for file in sorted((self._git_folder / "annex" / "tmp").iterdir()):
                size_bytes = _file_size(file)
                if size_bytes is not None and file.suffix != ".lck":
                    yield StoredContent(file.name, size_bytes, partial=True)

    def unavailable(self, keys: Sequence[AnnexKey]) -> dict[AnnexKey, str]:
        """Return the keys that no trusted remote can give, each with the reason.

        From the git-annex branch alone, without network: a remote that keeps versions gives
        only what it has recorded a version of, or what is in the tree that was last exported to
        it. Other remotes are taken to have everything. Unsafe keys are among them.

        Args:
            keys: Keys to look for.
        """
        unsafe = externals(keys)
        ref = branch_ref(self._path)
        remotes = self._special_remotes(ref)
        if ref is None or remotes is None or not all(remote.needs_version for remote in remotes):
            return unsafe
        living = [remote.uuid for remote in remotes if not remote.dead]
        versioned = keys_with_version(self._path, ref, keys, living)
        lacking = [key for key in keys if key not in versioned]
        exported = exported_keys(self._path, ref, living) if lacking else set()
        return {key: _NO_VERSION for key in lacking if key not in exported} | unsafe

    def close(self) -> None:
        """End every child process of this process; fetches under way raise FetchError."""
        children = self._by_process.pop(os.getpid(), None)
        if children is not None:
            children.close()

    def _children(self) -> AnnexChildren:
        """Return this process's children; a forked process begins with none."""
        pid = os.getpid()
        children = self._by_process.get(pid)
        if children is not None:
            return children
        for other in [other for other in tuple(self._by_process) if other != pid]:
            inherited = self._by_process.pop(other, None)
            if inherited is not None:
                inherited.abandon()
            # A thread that does not exist here may have held it.
            self._counting = threading.Lock()
        return self._by_process.setdefault(pid, AnnexChildren(self._path, self._remotes))

    def _get_from(
        self, children: AnnexChildren, key: AnnexKey, request: _Request
    ) -> Path | Outcome:
        """Try one remote as often as each failure's policy says."""
        retries = Retries(request.deadline_s)
        while True:
            found = self.locate(key)
            if found is not None:
                return found
            outcome = self._ask(children, key, request)
            if request.stopped():
                raise self._stopped(key)
            if outcome.failure is None:
                found = self.locate(key)
                if found is not None:
                    return found
                outcome = Outcome(Failure.CORRUPT, "git-annex said ok, but it is not there")
            if outcome.failure is Failure.NOT_RECORDED and self._object_exists(key):
                said = "an object of another size lies in its place: run 'git annex fsck'"
                return Outcome(Failure.CORRUPT, said)
            failure = outcome.failure or Failure.UNKNOWN
            pause_s = retries.pause_s(failure, self._partial_bytes(key))
            if pause_s is None:
                return outcome
            if failure is Failure.BAD_RANGE:
                self.discard_partial(key)
            if failure is not Failure.BUSY:
                with self._counting:
                    self._retries += 1
            _LOG.debug("Again in %.1f s: %s: %s", pause_s, key, outcome.said)
            self._pause(pause_s, request.stopped)

    def _ask(self, children: AnnexChildren, key: AnnexKey, request: _Request) -> Outcome:
        if request.stopped():
            raise self._stopped(key)
        return children.get(
            key.text,
            key.size_bytes,
            remote=request.remote,
            keep_fds=request.keep_fds,
            stopped=request.stopped,
            stall_timeout_s=self._stall_timeout_s,
            deadline_s=request.deadline_s,
        )

    @staticmethod
    def _pause(seconds: float, stopped: Callable[[], bool]) -> None:
        """Wait, but not when it is over."""
        until_s = time.monotonic() + seconds
        ticking = threading.Event()
        while not stopped() and (left_s := until_s - time.monotonic()) > 0:
            ticking.wait(min(left_s, _POLL_S))

    @staticmethod
    def _stopped(key: AnnexKey) -> FetchError:
        message = f"Stopped fetching {key}: it was cancelled, or the clone was closed."
        return FetchError(message, key=key.name)

    @staticmethod
    def _failed(key: AnnexKey, remote: str, outcome: Outcome, took_s: float) -> FetchError:
        failure = outcome.failure or Failure.UNKNOWN
        policy = failure.value
        size = "unknown size" if key.size_bytes is None else format_size(key.size_bytes)
        said = f" git-annex said: {outcome.said[:500]}" if outcome.said else ""
        message = (
            f"Cannot fetch {key} ({size}) from {remote or 'any remote'} after {took_s:.0f} s: "
            f"{policy.cause}.{said} {policy.advice}"
        )
        return policy.error(message, key=key.name)

    def _partial_path(self, key: AnnexKey) -> Path:
        return self._git_folder / "annex" / "tmp" / key.name

    def _partial_bytes(self, key: AnnexKey) -> int:
        return _file_size(self._partial_path(key)) or 0

    def _object_exists(self, key: AnnexKey) -> bool:
        return any((self._git_folder / path).exists() for path in key.object_paths())

    def _special_remotes(self, ref: str | None) -> list[SpecialRemote] | None:
        """Return the records of the trusted remotes, or None where one is not a special remote."""
        if ref is None:
            return None
        uuids = configured_uuids(self._path)
        known = special_remotes(self._path, ref)
        chosen: list[SpecialRemote] = []
        for name in self._remotes:
            same = [
                remote
                for remote in known
                if (remote.uuid == uuids[name] if name in uuids else remote.name == name)
            ]
            if not same:
                return None
            chosen += same
        return chosen


@dataclass(frozen=True, slots=True)
class _Request:
    """Where to fetch a key from, and until when."""

    remote: str
    keep_fds: tuple[int, ...]
    stopped: Callable[[], bool]
    deadline_s: float


def _file_size(path: Path) -> int | None:
    """Return the size of a regular file; None where there is none."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _subfolders(folder: Path, *, depth: int) -> Iterator[Path]:
    """Yield the folders that lie so many levels below a folder."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for below in sorted(folder.iterdir()):
            if depth > 1:
                yield from _subfolders(below, depth=depth - 1)
            else:
                yield below
