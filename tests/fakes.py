"""A clone without git-annex.

``FakeRepo`` keeps real files where git-annex would, so that ``AnnexRepo`` can look at the same
folder, and makes content up from the key's name. It stands in for the remote alone: partial
downloads, locks, drops and sizes are on a real disk and shared by processes.
"""

import fcntl
import hashlib
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from tio_openneuro.content import AnnexKey, ContentFile, ContentUnit, StoredContent
from tio_openneuro.errors import (
    ContentMismatchError,
    DropRefusedError,
    FetchError,
    RemoteUnavailableError,
)
from tio_openneuro.ledger import Ledger

CHUNKS = 4


def decide(ledger: Ledger) -> Any:
    """Return what has each of a transaction's decisions made in a transaction of its own."""

    class Alone:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            def act(*arguments: Any, **named: Any) -> Any:
                with ledger.transaction() as transaction:
                    return getattr(transaction, name)(*arguments, **named)

            return act

    return Alone()


def make_key(name: str, size_bytes: int) -> AnnexKey:
    """Return a key of that size whose content is made up from its name."""
    digest = hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()
    key = AnnexKey.parse(f"MD5E-s{size_bytes}--{digest}.nii.gz")
    assert key is not None
    return key


def content_of(key: AnnexKey) -> bytes:
    """Return what the fake remote has for a key."""
    block = hashlib.sha256(key.name.encode()).digest()
    size_bytes = key.size_bytes or 0
    return (block * (size_bytes // len(block) + 1))[:size_bytes]


class FakeRepo:
    """A clone whose remote is arithmetic. Implements ``ContentRepo``; can be pickled."""

    def __init__(self, path: Path, *, chunk_pause_s: float = 0.0) -> None:
        """Use a folder, made where it is missing.

        Args:
            path: Folder of the clone.
            chunk_pause_s: Seconds that a quarter of any file takes.
        """
        self._path = path
        self.chunk_pause_s = chunk_pause_s
        self.remotes = ("fake",)
        self.counts: Counter[str] = Counter()
        self._flying: dict[tuple[int, str], object] = {}
        self.undroppable: set[str] = set()
        self.lost: dict[AnnexKey, str] = {}
        self.corrupt: set[str] = set()
        self.hiccups = 0
        self.gate: threading.Event | None = None
        self.halfway = threading.Event()
        self.closed = 0
        for folder in ("objects", "annex/objects", "annex/tmp"):
            (path / ".git" / folder).mkdir(parents=True, exist_ok=True)
        (path / ".git" / "HEAD").write_text("ref: refs/heads/main\n")

    @classmethod
    def reopen(cls, path: Path, remotes: tuple[str, ...]) -> "FakeRepo":
        """Open it as the ledger does, to evict from it."""
        assert remotes == ("fake",)
        return cls(path)

    def __getstate__(self) -> dict[str, object]:
        """Return what another process needs."""
        return {**self.__dict__, "gate": None, "halfway": None, "_flying": {}}

    @property
    def path(self) -> Path:
        """Folder of the clone."""
        return self._path

    def object_path(self, key: AnnexKey) -> Path:
        """Return where whole content lies."""
        return self._path / ".git" / key.object_paths()[0]

    def partial_path(self, key: AnnexKey) -> Path:
        """Return where an unfinished download lies."""
        return self._path / ".git" / "annex" / "tmp" / key.name

    def locate(self, key: AnnexKey) -> Path | None:
        """Return the file of whole content, or None."""
        path = self.object_path(key)
        try:
            return path if path.stat().st_size == key.size_bytes else None
        except FileNotFoundError:
            return None

    def get(
        self,
        key: AnnexKey,
        *,
        owner_fd: int | None = None,
        cancelled: Callable[[], bool] | None = None,
        made: Callable[[Path], object] | None = None,
    ) -> Path:
        """Write the content in quarters, going on after a partial download."""
        if owner_fd is None:
            self.note("violations", f"fetch of {key} without an owner")
        else:
            os.fstat(owner_fd)
        stopped = self._stopped(cancelled)
        pause = threading.Event()
        with self._alone(key, stopped):
            present = self.locate(key)
            if present is not None:
                self.note("violations", f"fetch of present {key}")
                return present
            while self.hiccups:
                self.hiccups -= 1
                self.counts["retries"] += 1
            self.before(key)
            content = content_of(key)
            partial = self.partial_path(key)
            with partial.open("ab") as file:
                begun = file.tell() * CHUNKS // max(len(content), 1)
                for chunk in range(begun, CHUNKS):
                    ends = len(content) * (chunk + 1) // CHUNKS
                    file.write(content[file.tell() : ends])
                    file.flush()
                    gate = self.gate
                    if chunk == CHUNKS // 2 and gate is not None:
                        self.halfway.set()
                        while not stopped() and not gate.wait(0.01):
                            pass
                    if self.chunk_pause_s:
                        pause.wait(self.chunk_pause_s)
                    if stopped():
                        message = f"Cancelled: {key}."
                        raise FetchError(message, key=key.name)
            if key.name in self.corrupt:
                partial.unlink()
                message = f"What arrived for {key} has another checksum."
                raise ContentMismatchError(message, key=key.name)
            self.object_path(key).parent.mkdir(parents=True, exist_ok=True)
            partial.rename(self.object_path(key))
            self.note("fetches", key.name)
            (made or Path)(self.object_path(key))
            return self.object_path(key)

    def _stopped(self, cancelled: Callable[[], bool] | None) -> Callable[[], bool]:
        """Return whether a fetch that begins now is to end: cancelled, or the clone was closed."""
        closed = self.closed
        return lambda: self.closed != closed or (cancelled is not None and cancelled())

    @contextmanager
    def _alone(self, key: AnnexKey, stopped: Callable[[], bool]) -> Iterator[None]:
        """Wait where a key is fetched twice at once, by threads or processes, and note it."""
        flying = (os.getpid(), key.name)
        pause = threading.Event()
        with (self._path / f"{key.name}.lock").open("wb") as lock:
            noted = False
            while not self._take(lock, flying):
                if not noted:
                    self.note("violations", f"two fetches of {key} at once")
                    noted = True
                if stopped():
                    message = f"Cancelled: {key}."
                    raise FetchError(message, key=key.name)
                pause.wait(0.01)
            try:
                yield
            finally:
                self._flying.pop(flying, None)

    def _take(self, lock: BinaryIO, flying: tuple[int, str]) -> bool:
        """Try to be the one who fetches a key."""
        token = object()
        if self._flying.setdefault(flying, token) is not token:
            return False
        try:
            # This kind of lock is not inherited by a fork, nor does it part threads.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            del self._flying[flying]
            return False
        return True

    def before(self, key: AnnexKey) -> None:
        """Fail here, in subclasses."""

    def drop(self, key: AnnexKey) -> None:
        """Remove whole and partial content."""
        if key.name in self.undroppable and self.object_path(key).exists():
            message = f"No remote has {key}."
            raise DropRefusedError(message, key=key.name)
        self.object_path(key).unlink(missing_ok=True)
        self.discard_partial(key)

    def discard_partial(self, key: AnnexKey) -> None:
        """Remove partial content."""
        self.partial_path(key).unlink(missing_ok=True)

    def stored(self) -> Iterator[StoredContent]:
        """Yield what lies in the clone."""
        annex = self._path / ".git" / "annex"
        for path in (*(annex / "objects").rglob("*.nii.gz"), *(annex / "tmp").iterdir()):
            # Others fetch and drop meanwhile.
            with suppress(FileNotFoundError):
                if path.is_file():
                    partial = path.parent.name == "tmp"
                    yield StoredContent(path.name, path.stat().st_size, partial=partial)

    def unavailable(self, keys: Sequence[AnnexKey]) -> dict[AnnexKey, str]:
        """Return the keys that the remote has lost."""
        return {key: self.lost[key] for key in keys if key in self.lost}

    gone = unavailable

    def discard_spoilt(self, key: AnnexKey, *, everywhere: bool = False) -> None:
        """Remove an object of another size."""
        if self.locate(key) is None:
            self.object_path(key).unlink(missing_ok=True)

    def close(self) -> None:
        """Count how often it was closed; fetches under way end."""
        self.closed += 1

    def note(self, log: str, line: str) -> None:
        """Append a line to a log that all processes share."""
        with (self._path / log).open("a") as file:
            file.write(line + "\n")

    def noted(self, log: str) -> list[str]:
        """Return the lines of such a log."""
        path = self._path / log
        return path.read_text().splitlines() if path.exists() else []

    def fetches(self) -> Counter[str]:
        """Return how often each key arrived, in any process."""
        return Counter(self.noted("fetches"))

    def place(self, key: AnnexKey) -> None:
        """Put content there as a user would who fetches it himself."""
        path = self.object_path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content_of(key))

    def held_bytes(self) -> int:
        """Return bytes of content, whole and partial, that were certainly held at one instant."""
        first, second = self._sizes(), self._sizes()
        # What both scans saw was there at once in between, and a download only grows.
        return sum(min(size, second[inode]) for inode, size in first.items() if inode in second)

    def _sizes(self) -> dict[int, int]:
        annex = self._path / ".git" / "annex"
        found = {}
        for path in (*(annex / "objects").rglob("*.nii.gz"), *(annex / "tmp").iterdir()):
            with suppress(FileNotFoundError):
                info = path.stat()
                if path.is_file():
                    found[info.st_ino] = info.st_size
        return found


class FailingRepo(FakeRepo):
    """A clone whose remote fails a share of the fetches, as a seed has it."""

    def __init__(
        self, path: Path, *, share: float, seed: int = 0, chunk_pause_s: float = 0
    ) -> None:
        """Fail that share of all fetches; 1.0 fails every one."""
        super().__init__(path, chunk_pause_s=chunk_pause_s)
        self.share = share
        self._random = random.Random(seed)
        self._mutex = threading.Lock()

    def before(self, key: AnnexKey) -> None:
        """Fail now and then, with some of the download left behind."""
        with self._mutex:
            fails = self._random.random() < self.share
        if fails:
            with self.partial_path(key).open("ab") as file:
                if not file.tell():
                    file.write(content_of(key)[: (key.size_bytes or 0) // 3])
            message = f"The remote refused {key}: 503."
            raise RemoteUnavailableError(message, key=key.name)

    def __getstate__(self) -> dict[str, object]:
        """Return what another process needs."""
        return {**super().__getstate__(), "_mutex": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take it."""
        self.__dict__.update(state)
        self._mutex = threading.Lock()


def make_unit(repo: FakeRepo, name: str, *sizes: int) -> ContentUnit:
    """Return a unit with one file of each size, its keys named after it."""
    files = [
        ContentFile(repo, make_key(f"{name}-{place}-{size}", size), f"{name}/anat/{place}.nii.gz")
        for place, size in enumerate(sizes)
    ]
    return ContentUnit(name, tuple(files))
