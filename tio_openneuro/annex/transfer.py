"""One ``git annex get`` coprocess, asked for one key at a time and watched while it answers.

Owns the watchdog: a child that stands still, stands because the disk is full, or is sent more than
the key states (looked at ten times a second: so much may come meanwhile), is killed with its
process group; what it downloaded stays as a partial, which the next one resumes. Never
retries: that is :mod:`tio_openneuro.annex.repo`'s.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tio_openneuro.annex.branch import branch_tips, git_config, git_folder, refuse_bombs
from tio_openneuro.annex.environment import annex_environment
from tio_openneuro.annex.messages import Failure, complaints, parse_answer
from tio_openneuro.annex.processes import CommandError, Coprocess, run
from tio_openneuro.content import AnnexKey, StoredContent
from tio_openneuro.errors import NotAnAnnexError

POLL_S = 0.1
# Before the key's name in that of an unfinished download of ours: git-annex takes it for no key.
OWN_PREFIX = ".tio-openneuro."
_SPACE_CHECK_S = 1.0
_SPACE_LEFT_BYTES = 1 << 20
_SMALL_FILES_BYTES = 1 << 20
_HASHED_BYTES_PER_S = 1e8
_CRAWL_BYTES_PER_S = 1024.0
# Of a file that may be there all the same.
_UNSEEN = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
_REMOTE_URL = re.compile(r"remote\.(.*)\.url", re.DOTALL)
_ABSOLUTE = re.compile(r"/|[^/]*:")


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
        begun: Whether it was ended while it had the content in hand: what is there now is its own.
    """

    why: Failure
    said: str = ""
    program: str = "git-annex"
    begun: bool = False


class NotOverHttpError(Exception):
    """Content cannot come over HTTP here: it is git-annex's to fetch."""


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where git-annex works on a clone: in it, or beside it where it is the user's.

    Beside it is a repository of ours, which has the clone's content, settings and what it fetched
    of the git-annex branch for its own. What git-annex writes but content, it writes there.
    Rejected: in the clone with ``-c annex.private=true`` and more, git-annex 10.20261026 writes
    ``config``, its branch, an index, a journal and databases all the same.

    Attributes:
        clone: The clone.
        folder: Where git-annex is started.
        options: What git is told before the command.
    """

    clone: Path
    folder: Path
    options: tuple[str, ...] = ()

    @classmethod
    def beside(
        cls, clone: Path, folder: Path, tmp: Path, uuids: Mapping[str, str], trusted: Sequence[str]
    ) -> Workplace:
        """Make or renew the repository beside a clone of the user's; 45 ms.

        Args:
            clone: The clone.
            folder: Where the repository is, or comes to be.
            tmp: Where unfinished downloads lie, on the clone's disk.
            uuids: Ids of remotes that are trusted and perhaps not enabled in the clone.
            trusted: Names of the remotes that git-annex may use.
        """
        refuse_bombs(clone)
        theirs = (git_folder(clone) or clone).absolute()
        config = git_config(clone, ".")
        bare = config.get("core.bare") == "true"
        run(["git", "init", "--quiet", "--template=", *["--bare"][:bare], str(folder)])
        own = folder if bare else folder / ".git"
        (own / "objects" / "info").mkdir(exist_ok=True)
        (own / "objects" / "info" / "alternates").write_text(f"{theirs / 'objects'}\n")
        (own / "annex").mkdir(exist_ok=True)
        for name, target in (("objects", None), ("tmp", tmp), ("creds", None)):
            with contextlib.suppress(FileExistsError):
                (own / "annex" / name).symlink_to(target or theirs / "annex" / name)
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(theirs / "annex" / "verified-remote.log", own / "annex")
        for number, tip in enumerate(branch_tips(clone)):
            ref = f"refs/remotes/{number}/git-annex" if number else "refs/heads/git-annex"
            run(["git", "update-ref", ref, tip], cwd=folder)
        own_uuid = config.get("annex.uuid", str(uuid.uuid5(uuid.NAMESPACE_URL, str(own))))
        text = f"""
            [include]
                path = {_quoted(theirs / "config")}
            [core]
                repositoryformatversion = 0
                bare = {str(bare).lower()}
            [annex]
                dbdir = {_quoted(own / "annex")}
                private = true
                merge-annex-branches = true
                version = {config.get("annex.version", "10")}
                uuid = {own_uuid}
            """
        text += "" if bare else f"[core]\nworktree = {_quoted(folder)}\n"
        for name, value in uuids.items():
            if value and f"remote.{name}.annex-uuid" not in config:
                text += f"[remote {_quoted(name)}]\nannex-uuid = {value}\nannex-s3 = true\n"
        options: list[str] = []
        for name in {match[1] for each in config if (match := _REMOTE_URL.fullmatch(each))}:
            url = config[f"remote.{name}.url"]
            if name not in trusted:
                options += ["-c", f"remote.{name}.annex-ignore=true"]
            elif not _ABSOLUTE.match(url):
                text += f"[remote {_quoted(name)}]\nurl = {_quoted(clone / url)}\n"
        # In a file: what is told by options, git-annex tells the remotes on this machine too.
        with tempfile.NamedTemporaryFile(dir=own, delete=False) as file:
            file.write(text.encode(errors="surrogateescape"))
        Path(file.name).replace(own / "config")
        return cls(clone, folder, tuple(options))

    def merge(self) -> None:
        """Have git-annex merge what was fetched of its branch: ``drop --batch-keys`` does not."""
        command = ["git", "for-each-ref", "--format=%(objectname)", "refs/heads/git-annex"]
        if run(command, cwd=self.folder).decode().split() != branch_tips(self.folder):
            run(["git", *self.options, "annex", "merge", "--quiet"], cwd=self.folder)


def _quoted(text: str | Path) -> str:
    """Return a name or value as git's configuration has it."""
    return json.dumps(str(text), ensure_ascii=False)


class Transfer(Coprocess):
    """A coprocess that gets keys from one remote. Used by one thread at a time."""

    def __init__(self, place: Workplace, remote: str, keep_fds: tuple[int, ...]) -> None:
        """Start the child.

        Args:
            place: Where git-annex works.
            remote: Name of the annex remote.
            keep_fds: Descriptors that the child inherits.
        """
        self._clone = place.clone
        self._index = (git_folder(place.folder) or place.folder) / "annex" / "index"
        options, environment = list(place.options), annex_environment()
        if place.folder == place.clone:
            # With an index and databases of our own git-annex knows of no unlocked file in the
            # work tree, and does not put a second copy of the content there.
            own = (git_folder(place.clone) or place.clone) / "annex" / "tio-openneuro"
            own.mkdir(exist_ok=True)
            options += ["-c", f"annex.dbdir={own}"]
            environment["GIT_INDEX_FILE"] = str(own / "index")
        super().__init__(
            [
                *("git", *options),
                *("-c", "annex.verify=true", "-c", f"remote.{remote}.annex-verify=true"),
                # The floor of free space is the engine's; git-annex's own reserve is 100 MB.
                *("-c", "annex.diskreserve=0"),
                # No commit in the middle of an epoch.
                *("-c", "annex.alwayscommit=false"),
                # It leaves an orphan that holds the transfer lock: the watchdog is here.
                *("-c", "annex.stalldetection=false"),
                *("annex", "get", "--batch-keys", "--from", remote),
                *("--json", "--json-progress", "--json-error-messages"),
            ],
            cwd=place.folder,
            environment=environment,
            keep_fds=keep_fds,
        )

    def get(self, request: TransferRequest) -> TransferError | None:
        """Ask for one key and wait for the end; None where git-annex says that it is there.

        After a failure to answer the child is dead. It tells of progress before it puts content in
        place, tiny ones too, and of none where somebody else transfers the same.
        """
        try:
            self.write_line(request.key.text.encode(errors="surrogateescape"))
        except CommandError:
            return self._ended_by(TransferError(Failure.DIED, self.stderr))
        watch = Watch(self._clone, request)
        begun = False
        self._bound(request.key.size_bytes)
        while True:
            try:
                line = self.read_line(POLL_S)
            except TimeoutError:
                line = b"{}"
            if line is None:
                died = TransferError(Failure.of(self.stderr, Failure.DIED), self.stderr)
                return self._ended_by(died, begun=begun)
            if not line:
                return TransferError(Failure.NOT_RECORDED)
            answer = parse_answer(line)
            if "success" in answer:
                return self._finished(answer, request.key.text)
            begun = begun or "byte-progress" in answer
            failed = watch.complaint(come_bytes := answer.get("byte-progress"))
            if come_bytes and request.key.size_bytes and come_bytes > request.key.size_bytes:
                # git-annex would go on to the end, and compare then.
                said = f"incorrect size: more than {request.key.size_bytes} bytes"
                failed = TransferError(Failure.CORRUPT, said)
            if failed is not None:
                return self._ended_by(failed, begun=begun)

    def _bound(self, size_bytes: int | None) -> None:
        """Have the kernel end a download that is longer than its key states.

        Beside content git-annex writes small files, and an index of its branch.
        """
        if sys.platform == "linux" and size_bytes is not None:
            most = max(size_bytes + 1, 2 * (file_size(self._index) or 0) + _SMALL_FILES_BYTES)
            # git first: what it starts from then on inherits the limit. Passed, signal 25 is sent.
            with contextlib.suppress(psutil.Error):
                for each in [git := psutil.Process(self.pid), *git.children(recursive=True)]:
                    each.rlimit(psutil.RLIMIT_FSIZE, (most, psutil.RLIM_INFINITY))

    def _ended_by(self, failed: TransferError, *, begun: bool = False) -> TransferError:
        self.kill()
        failed.begun = begun or any(b"byte-progress" in line for line in self.unread())
        return failed

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


def find_objects(git_folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield every file below the annex's objects, after the name of its key."""
    for folder, _, names in os.walk(git_folder / "annex" / "objects"):
        parent = Path(folder)
        under_key = AnnexKey.parse(parent.name) is not None
        for name in names:
            yield parent.name if under_key else name, parent / name


def find_spoilt(
    git_folder: Path, key: AnnexKey, among: Iterable[Path] | None = None
) -> Iterator[Path]:
    """Yield the files under a key that are not its content: cut, rotten, moved, a second one.

    Args:
        git_folder: The clone's.
        key: The key.
        among: Where to look; default: up and down the key's own path.
    """
    whole = find_whole(git_folder, key)
    places = [git_folder / relative for relative in key.object_paths()]
    if among is None:
        among = [folder / key.name for place in places for folder in place.parents[1:4]]
        for place in places:
            among += [Path(folder, n) for folder, _, names in os.walk(place.parent) for n in names]
    for file in among:
        size_bytes = file_size(file)
        # It may have come just now.
        right = file in places and size_bytes == key.size_bytes
        odd = file.suffix != ".lck" and size_bytes is not None
        if odd and file != whole and (whole is not None or not right):
            yield file
    bad = git_folder / "annex" / "bad" / key.name
    if bad.exists():
        yield bad


def find_stored(git_folder: Path, tmp: Path) -> Iterator[StoredContent]:
    """Yield every object in a clone, and every partial download in ``tmp``."""
    found: dict[str, list[Path]] = {}
    for name, file in find_objects(git_folder):
        found.setdefault(name, []).append(file)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        found = {file.name: [] for file in (git_folder / "annex" / "bad").iterdir()} | found
    for name, files in found.items():
        key = AnnexKey.parse(name) or AnnexKey(name, None)
        whole = find_whole(git_folder, key)
        size_bytes = None if whole is None else file_size(whole)
        if size_bytes is not None:
            yield StoredContent(name, size_bytes, partial=False)
        for file in find_spoilt(git_folder, key, files):
            if size_bytes := file_size(file):
                yield StoredContent(name, size_bytes, partial=True)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for file in sorted(tmp.iterdir()):
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
