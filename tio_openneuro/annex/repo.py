"""Content by annex key in one clone, over HTTP or through git-annex: fetch, drop, find.

Owns a clone's downloads, and its git-annex children where those are needed: lockstep ``get``
coprocesses, one per thread that fetches, and one ``drop``. Promises that what
:meth:`AnnexRepo.get` returns was verified, that no wait is endless, and that only content which a
trusted remote is recorded to give is dropped.
Never uses ``--force``, and never initialises a clone or enables a remote.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tio_openneuro.annex.branch import (
    SpecialRemote,
    branch_tips,
    configured_uuids,
    exported_keys,
    git_folder,
    recorded_versions,
    special_remotes,
    version_logs,
)
from tio_openneuro.annex.children import AnnexChildren
from tio_openneuro.annex.messages import Failure, Retries
from tio_openneuro.annex.transfer import (
    OWN_PREFIX,
    POLL_S,
    TransferError,
    TransferRequest,
    file_size,
    find_objects,
    find_spoilt,
    find_stored,
    find_whole,
)
from tio_openneuro.content import AnnexKey, StoredContent
from tio_openneuro.errors import (
    DropRefusedError,
    FetchError,
    NotAnAnnexError,
    UnsafeDatasetError,
)
from tio_openneuro.sizes import format_size

_LOG = logging.getLogger(__name__)

_SLOWEST_BYTES_PER_S = 50e3
_DROP_ATTEMPTS = 4
_NO_REMOTE = "no remote is trusted to give it: name one that has it with remotes="
_NO_VERSION = "no S3 version id is recorded for it, so that the remote cannot give it"


class AnnexRepo:
    """Fetches, drops and finds content of one clone by annex key.

    Safe to share by threads, forked processes (which start children of their own) and, pickled,
    by spawned ones. Implements :class:`tio_openneuro.content.ContentRepo`.

    Attributes:
        path: Absolute folder of the clone.
        remotes: Names of the trusted remotes.
        beside: Folder of ours from which git-annex works on a clone of the user's; else None.
        counts: Of this process: ``retries`` of transfers, waits for another process's left out,
            and ``http_files``, those that came over HTTP.
    """

    def __init__(
        self,
        path: Path,
        *,
        remotes: Sequence[str] = ("s3-PUBLIC",),
        root: Path | None = None,
        uuids: Mapping[str, str] | None = None,
        stall_timeout_s: float = 30.0,
        total_timeout_s: float = 600.0,
    ) -> None:
        """Name a clone; nothing is started.

        Args:
            path: The clone's folder.
            remotes: Annex remotes to fetch from, in this order, and trusted to keep content.
            root: Where it is used. A clone that is not among those there is the user's: nothing
                is written into it but content.
            uuids: Ids of remotes that are perhaps not enabled in a clone of the user's.
            stall_timeout_s: Seconds without progress after which a transfer is begun anew.
            total_timeout_s: Seconds for one fetch with all its retries, and as many more as
                its bytes take at 50 kB/s.

        Raises:
            NotAnAnnexError: There is no git repository.
        """
        self.path = Path(path).absolute()
        self.remotes = tuple(remotes)
        self._stall_timeout_s = stall_timeout_s
        self._total_timeout_s = total_timeout_s
        folder = git_folder(self.path)
        if folder is None:
            message = f"Cannot use {self.path} as an annex: it is not a git repository."
            raise NotAnAnnexError(message)
        self._git_folder = folder
        self._uuids = uuids
        self._tmp = folder / "annex" / "tmp"
        self.beside: Path | None = None
        if root is not None and not folder.resolve().is_relative_to(root.resolve() / "clones"):
            digest = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
            self.beside = root.resolve() / "git-annex" / digest[:16]
            # git-annex's own is the user's, whose downloads may be under way there.
            self._tmp = folder / "annex" / "tmp.tio-openneuro"
        self._by_process: dict[int, AnnexChildren] = {}
        self._proven: set[str] = set()
        self._trusts_all: bool | None = None
        self._logs: dict[str, bytes] = {}
        self.counts: Counter[str] = Counter()
        self._counting = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        """Return what another process needs: names and numbers, no children."""
        fresh: dict[str, object] = {"_by_process": {}, "_proven": set(), "_logs": {}}
        return self.__dict__ | fresh | {"_trusts_all": None, "counts": Counter(), "_counting": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take it, with no children and nothing counted yet."""
        self.__dict__.update(state)
        self._counting = threading.Lock()

    def __repr__(self) -> str:
        """Return the path and the remotes."""
        return f"AnnexRepo({str(self.path)!r}, remotes={self.remotes!r})"

    def locate(self, key: AnnexKey) -> Path | None:
        """Return the file that holds the whole content, or None where it is absent."""
        return find_whole(self._git_folder, key)

    def get(
        self,
        key: AnnexKey,
        *,
        owner_fd: int | None = None,
        cancelled: Callable[[], bool] | None = None,
        made: Callable[[Path], object] | None = None,
    ) -> Path:
        """Fetch the content, verified by its checksum, and return its file.

        Goes on where an earlier try stopped. Each class of failure has its own number of tries
        at a remote (:mod:`tio_openneuro.annex.messages`); then the next remote is asked. If the
        process ends, in whatever way, the partial download stays, and git-annex ends with it.

        Args:
            key: The content wanted; present content is returned at once.
            owner_fd: Descriptor that git-annex inherits, so that the owner's lock outlives us
                for as long as git-annex does.
            cancelled: Polled ten times a second; once true, git-annex is killed.
            made: Called with the file once a transfer of ours put it there.

        Raises:
            RemoteUnavailableError: The remote cannot be reached, or refuses.
            ContentMismatchError: Size or checksum were wrong, repeatedly.
            FetchError: Cancelled, disk full, no version recorded, deadline passed.
            UnsafeDatasetError: To check the key, git-annex would run a program that it names.
        """
        if why := _why_unsafe(key):
            message = f"Refused to fetch {key}: {why}. Skip this file."
            raise UnsafeDatasetError(message, key=key.name)
        self._refuse_unseen()
        children = self._children()
        begun_s = time.monotonic()
        allowed_s = self._total_timeout_s + (key.size_bytes or 0) / _SLOWEST_BYTES_PER_S

        def stopped() -> bool:
            return children.closing.is_set() or (cancelled is not None and cancelled())

        failed = TransferError(Failure.NOT_RECORDED, "no remote is trusted")
        for remote in self.remotes:
            request = TransferRequest(
                key,
                remote,
                keep_fds=() if owner_fd is None else (owner_fd,),
                stopped=stopped,
                stall_timeout_s=self._stall_timeout_s,
                deadline_s=begun_s + allowed_s,
            )
            result = self._get_from(children, request, made)
            if isinstance(result, Path):
                self._proven.add(key.name)
                return result
            failed = result
        size = "unknown size" if key.size_bytes is None else format_size(key.size_bytes)
        remote = self.remotes[-1] if self.remotes else "any remote"
        act = f"fetch {key} ({size}) from {remote} after {time.monotonic() - begun_s:.0f} s"
        raise failed.why.error(act, failed.program, failed.said, key=key.name)

    def head(self, key: AnnexKey, size_bytes: int) -> bytes:
        """Return the first bytes of content from a remote, unchecked; none where none gives it."""
        return self._children().head(key, size_bytes, self._stall_timeout_s)

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
            if key.name not in self._proven and (why := self._why_lost(key)):
                said = why
                break
            if attempt:
                # Another process may hold the content's lock for the length of its own drop.
                children.closing.wait(POLL_S * 2**attempt)
            said = children.drop(key)
            place, other = (self._git_folder / path for path in key.object_paths())
            if not said and not place.exists() and other.exists():
                # Where git-annex does not look, and others may find it.
                other.parent.chmod(0o755)
                other.unlink(missing_ok=True)
        if self._object_exists(key):
            message = (
                f"Cannot drop {key} from {self.path}: {said or 'git-annex gave no reason'}. "
                f"Trusted remotes: {', '.join(self.remotes) or 'none'}. It stays; name a remote "
                f"that has it with remotes=."
            )
            raise DropRefusedError(message, key=key.name)
        self.discard_partial(key)

    def discard_partial(self, key: AnnexKey) -> None:
        """Remove what is left of an unfinished download of the key, if anything."""
        self._refuse_unseen()
        for leftover in self._partial_paths(key):
            with contextlib.suppress(FileNotFoundError):
                leftover.lstat()  # On a read-only disk unlink complains before it looks.
                try:
                    leftover.unlink()
                except (IsADirectoryError, PermissionError):
                    shutil.rmtree(leftover, ignore_errors=True)

    def discard_spoilt(self, key: AnnexKey, *, everywhere: bool = False) -> None:
        """Remove what takes room under the key and is not its content; in clones of ours alone.

        Args:
            key: The key.
            everywhere: Whether to walk through all objects, and not only up and down its path.
        """
        self._refuse_unseen()
        objects = find_objects(self._git_folder) if everywhere else ()
        named = [file for name, file in objects if name == key.name]
        for file in find_spoilt(self._git_folder, key, named or None):
            with contextlib.suppress(FileNotFoundError):
                file.parent.chmod(0o755)
                file.unlink()

    def _refuse_unseen(self) -> None:
        """Raise where the clone is not where it was: what it holds is not gone for that."""
        if not (self._git_folder / "objects").is_dir():
            message = (
                f"Cannot see the clone {self.path}: it was moved or deleted, or is not mounted. "
                f"What it holds stays charged; put it back where it was."
            )
            raise NotAnAnnexError(message)

    def stored(self) -> Iterator[StoredContent]:
        """Yield every object and every partial download that lies in the clone."""
        return find_stored(self._git_folder, self._tmp)

    def unavailable(self, keys: Sequence[AnnexKey]) -> dict[AnnexKey, str]:
        """Return the keys that no trusted remote can give, each with the reason.

        From the git-annex branch alone, without network: a remote that keeps versions gives
        only what it has recorded a version of, or what is in the tree that was last exported to
        it. Other remotes are taken to have everything. Unsafe keys are among them.

        Args:
            keys: Keys to look for.
        """
        unsafe = {key: why for key in keys if (why := _why_unsafe(key))}
        tips, living = self._versioned()
        if not tips:
            return unsafe
        logs = version_logs(self.path, tips, keys)
        self._logs.update({key.name: logs.get(key.name, b"") for key in keys})
        versioned = {name for name, log in logs.items() if recorded_versions(log, living)}
        lacking = [key for key in keys if key.name not in versioned]
        exported = exported_keys(self.path, tips, living) if lacking else set()
        why = _NO_VERSION if self.remotes else _NO_REMOTE
        return {key: why for key in lacking if key not in exported} | unsafe

    def gone(self, keys: Sequence[AnnexKey]) -> dict[AnnexKey, str]:
        """Return the keys that no trusted remote has now, each with the reason.

        Each remote is asked once for each key that it is recorded to have, and that no other one
        said to have.
        """
        lost = self.unavailable(keys)
        unsure = [key for key in keys if key not in lost]
        for remote in self.remotes:
            timeout_s = self._total_timeout_s + len(unsure)
            said = self._children().ask_remote(remote, unsure, timeout_s)
            unsure = [key for key, has in zip(unsure, said, strict=True) if not has]
        return lost | dict.fromkeys(unsure, "no remote answers that it has it")

    def _versioned(self) -> tuple[list[str], list[str]]:
        """Return the git-annex branch's tips, none where not all trusted remotes keep versions.

        Beside it, the ids of those that are not dead.
        """
        tips = branch_tips(self.path)
        remotes = self._special_remotes(tips)
        versioned = all(remote.needs_version for remote in remotes)
        return tips if versioned else [], [remote.uuid for remote in remotes if not remote.dead]

    def _why_lost(self, key: AnnexKey) -> str:
        """Return why no trusted remote gives a key; the branch is read once, for all keys."""
        if self._trusts_all is None:
            tips, living = self._versioned()
            logs = version_logs(self.path, tips, None) if tips else {}
            given = (name for name, log in logs.items() if recorded_versions(log, living))
            self._proven.update(given)
            self._trusts_all = not tips
        if self._trusts_all or key.name in self._proven:
            return _why_unsafe(key)
        return self.unavailable([key]).get(key, "")

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
        fresh = AnnexChildren(
            *(self.path, self.remotes, self._count, self._logs),
            tmp=self._tmp,
            beside=self.beside,
            uuids=self._trusted_uuids(),
        )
        return self._by_process.setdefault(pid, fresh)

    def _count(self, what: str) -> None:
        with self._counting:
            self.counts[what] += 1

    def _get_from(
        self,
        children: AnnexChildren,
        request: TransferRequest,
        made: Callable[[Path], object] | None,
    ) -> Path | TransferError:
        """Try one remote as often as each failure's policy says."""
        key = request.key
        retries = Retries(request.deadline_s)
        while True:
            if (found := self.locate(key)) is not None:
                return found
            sizes = {file_size(self._git_folder / path) for path in key.object_paths()}
            if sizes - {None, key.size_bytes}:
                return TransferError(Failure.SPOILT)
            self._refuse_stopped(request)
            failed = children.get(request)
            # After a failure it may be there all the same: git-annex was ended before it said so,
            # or has nothing to say of a key that the user fetched in that instant.
            found = self.locate(key)
            if found is not None and made is not None and (failed is None or failed.begun):
                made(found)
            self._refuse_stopped(request)
            if found is not None:
                return found
            self._refuse_unseen()  # Which is no reason of the remote's.
            failed = failed or TransferError(Failure.CORRUPT, "it is said to be there, and is not")
            arrived = [file_size(path) or 0 for path in self._partial_paths(key)]
            pause_s = retries.pause_s(failed.why, sum(arrived))
            if failed.why in {Failure.BAD_RANGE, Failure.CORRUPT}:
                self.discard_partial(key)
            if pause_s is None:
                return failed
            if failed.why is not Failure.BUSY:
                self._count("retries")
            _LOG.debug("Again in %.1f s: %s: %s", pause_s, key, failed.said)
            again_s = time.monotonic() + pause_s
            while not request.stopped() and (left_s := again_s - time.monotonic()) > 0:
                children.closing.wait(min(left_s, POLL_S))

    @staticmethod
    def _refuse_stopped(request: TransferRequest) -> None:
        if request.stopped():
            message = f"Stopped fetching {request.key}: it was cancelled, or the clone was closed."
            raise FetchError(message, key=request.key.name)

    def _partial_paths(self, key: AnnexKey) -> tuple[Path, Path]:
        """Return where an unfinished download of git-annex's may be, and one of ours."""
        return self._tmp / key.name, self._tmp / f"{OWN_PREFIX}{key.name}"

    def _object_exists(self, key: AnnexKey) -> bool:
        return any((self._git_folder / path).exists() for path in key.object_paths())

    def _trusted_uuids(self) -> Mapping[str, str]:
        """Return the ids of remotes as they were given, or as far as the branch makes them sure."""
        if self._uuids is None and self.beside is not None:
            known = special_remotes(self.path, branch_tips(self.path))
            self._uuids = {each.name: each.uuid for each in known if each.public_url}
        return self._uuids or {}

    def _special_remotes(self, tips: Sequence[str]) -> list[SpecialRemote]:
        """Return the records of the trusted remotes, an empty one where there is none."""
        uuids = {**self._trusted_uuids(), **configured_uuids(self.path)}
        known = special_remotes(self.path, tips)
        chosen: list[SpecialRemote] = []
        for name in self.remotes:
            uuid = uuids.get(name)
            same = [each for each in known if (each.uuid == uuid if uuid else each.name == name)]
            chosen += same or [SpecialRemote("", name, dead=False)]
        return chosen


def _why_unsafe(key: AnnexKey) -> str:
    """Return why a key must not be fetched; empty where it may be.

    To check a key of a backend ``X…``, git-annex starts the program ``git-annex-backend-X…``.
    """
    if not key.backend.startswith("X"):
        return ""
    return f"its backend {key.backend} is a program that git-annex would run, named by the dataset"
