"""The clones on disk, as the ledger's hands: fetch what was reserved, drop what was chosen.

Owns the list of clones that one process works on. Disk first, ledger second: content is
PRESENT once it is whole, and ABSENT once it is gone. The only caller of ``ContentRepo.get``.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tio_openneuro.annex import CommandError, configured_uuids, git_folder
from tio_openneuro.content import (
    UNCLAIMED,
    AnnexKey,
    ContentFile,
    ContentId,
    ContentRepo,
    ContentUnit,
    is_same_file,
    mark_of,
)
from tio_openneuro.disk.statistics import DiskCounters
from tio_openneuro.errors import (
    ContentMismatchError,
    DropRefusedError,
    FetchError,
    LedgerError,
    NotAnAnnexError,
    TioOpenNeuroError,
)
from tio_openneuro.forks import close_apart
from tio_openneuro.ledger import (
    Changes,
    ContentRow,
    ContentState,
    Ledger,
    Want,
    free_bytes,
    hold_folder,
)
from tio_openneuro.sizes import format_size

_LOGGER = logging.getLogger(__name__)
_CANCEL_POLL_S = 0.1
# An owner shows that it lives as often as it asks whether to go on.
_LAST_SIGN_NS = int(_CANCEL_POLL_S * 1e9)
_DYING_NS = 10_000_000_000

UNSEEN = (
    "the clone {} cannot be seen: it was moved, deleted or not mounted, or permission lacks. What "
    "it holds stays charged"
)

FOLDER = "prepared"

OpenRepo = Callable[[Path, tuple[str, ...]], ContentRepo]


@dataclass(eq=False, slots=True)
class Fetch:
    """One fetch, from its reservation to its end.

    Attributes:
        content: Whose content it is.
        file: Clone, key and path.
        unit: Name of the unit, for messages.
        ahead: Whether nobody in this process waits for it.
        started: Whether a thread carries it out.
        cancel: Set to end it soon.
        done: Set when it has ended, and the ledger knows.
        path: Where the content lies, once it has arrived.
        error: Why it failed.
    """

    content: ContentId
    file: ContentFile
    unit: str
    ahead: bool = False
    started: bool = False
    cancel: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    path: Path | None = None
    error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether it ended with an error that is not its being cancelled."""
        return self.done.is_set() and self.error is not None and not self.cancel.is_set()


class Store:
    """The clones that this process fetches into and evicts from."""

    def __init__(
        self,
        ledger: Ledger,
        counters: DiskCounters,
        changes: Changes,
        open_repo: OpenRepo,
        floor: int,
    ) -> None:
        """Know no clone yet.

        Args:
            ledger: Told what becomes of content.
            counters: Told what this process did.
            changes: Notified when room came free.
            open_repo: Opens a clone that only the ledger knows, to evict from it.
            floor: Free bytes of the disk that are never used, or zero.
        """
        self._ledger = ledger
        self._counters = counters
        self._changes = changes
        self._open_repo = open_repo
        self._floor_bytes = floor
        self._root = Path(os.path.realpath(ledger.folder.parent))
        self._held: list[int] = []
        self._mutex = threading.Lock()
        self._repos: dict[str, ContentRepo] = {}
        self._clones: dict[int, str] = {}
        self._used: dict[int, tuple[ContentRepo, Mapping[str, int]]] = {}

    # Which content

    def content_of(self, file: ContentFile) -> ContentId:
        """Return the ledger's name of a file's content, and remember its clone."""
        clone = self._clones.get(id(file.repo))
        if clone is None:
            clone = self._hold(file.repo)
            with self._mutex:
                self._repos.setdefault(clone, file.repo)
                # Several may stand for one clone, each with children of its own.
                self._used.setdefault(id(file.repo), (file.repo, dict(file.repo.counts)))
            here = (git_folder(file.repo.path) or file.repo.path).stat()
            place = f"{here.st_dev}:{here.st_ino}"
            self._ledger.remember_clone(clone, file.repo.remotes, place)
            self._clones[id(file.repo)] = clone
        return ContentId(clone, file.key.name)

    def _hold(self, repo: ContentRepo) -> str:
        """Return the ledger's name of a clone, which no other root may use meanwhile."""
        found = Path(os.path.realpath(git_folder(repo.path) or repo.path))
        try:
            descriptor = hold_folder(found, self._root)
        except OSError as error:
            message = f"Cannot use {repo.path}: {UNSEEN.format(self.name_of(repo.path))}."
            raise NotAnAnnexError(message) from error
        if descriptor < 0:
            message = (
                f"Cannot use the clone {repo.path} under the root {self._root}: a process that "
                f"runs uses it under another root, and two ledgers would each allow their own "
                f"budget. Give that root, or wait until the process has ended."
            )
            raise LedgerError(message)
        self._held.append(descriptor)
        return self.name_of(repo.path)

    def name_of(self, clone: Path) -> str:
        """Return the ledger's name of a clone: its path from the root, if it lies there."""
        found = Path(os.path.realpath(git_folder(clone) or clone))
        folder = found.parent if found.name == ".git" else found
        inside = folder.is_relative_to(self._root)
        return folder.relative_to(self._root).as_posix() if inside else str(folder)

    def path_of(self, clone: str) -> Path:
        """Return the folder of a clone that the ledger names."""
        return self._root / clone

    @staticmethod
    def is_own(clone: str) -> bool:
        """Return whether a clone is one that this library made."""
        return clone.partition("/")[0] in {"clones", FOLDER}

    def files_of(self, unit: ContentUnit) -> dict[ContentId, ContentFile]:
        """Return a unit's files by their content, each key of a clone once."""
        return {self.content_of(file): file for file in unit.files}

    def all_of(self, unit: ContentUnit) -> list[ContentId]:
        """Return the content of a unit, with that of its prepared volume."""
        prepared = [] if unit.prepared is None else [self.content_of(unit.prepared)]
        return [*self.files_of(unit), *prepared]

    def count_again(self) -> None:
        """Charge all that lies in clones of ours after a loss: nobody knows whose it is."""
        if not self._ledger.is_lost():
            return
        found: list[tuple[Want, str]] = []
        for folder in (*sorted(self._root.glob("clones/[!.]*")), self._root / FOLDER):
            clone = folder.relative_to(self._root).as_posix()
            ours = clone == FOLDER
            remotes: Iterable[str] = ()
            with suppress(CommandError):  # What is no repository any more is counted as well.
                remotes = () if ours or git_folder(folder) is None else configured_uuids(folder)
            self._ledger.remember_clone(clone, tuple(remotes))
            repo = self.repo_of(clone)
            sizes: Counter[str] = Counter()
            whole = set()
            for stored in repo.stored() if repo is not None else ():
                sizes[stored.key_name] += stored.size_bytes
                whole |= set() if stored.partial else {stored.key_name}
            for name, size_bytes in sizes.items():
                want = Want(ContentId(clone, name), size_bytes, located=name in whole)
                found.append((want, UNCLAIMED if want.located and not ours else ""))
        self._ledger.count_again(found)
        charged = format_size(sum(want.size_bytes for want, _ in found))
        _LOGGER.warning("The ledger in %s was lost: %s are counted again.", self._root, charged)

    def wants(self, files: Mapping[ContentId, ContentFile]) -> list[Want]:
        """Return what these files need, looking at the disk.

        Raises:
            FetchError: A key states no size, so that it cannot be charged.
        """
        found = []
        for content, file in files.items():
            if file.key.size_bytes is None:
                message = (
                    f"Cannot fetch {file.path}: its key {file.key} states no size, so it cannot "
                    f"be kept within the disk budget. Leave it out of the selection."
                )
                raise FetchError(message, key=file.key.name)
            located = file.repo.locate(file.key) is not None
            found.append(Want(content, file.key.size_bytes, located))
        return found

    def spare_bytes(self, files: Iterable[ContentFile]) -> int | None:
        """Return the free bytes above the floor where these files lie; None without a floor."""
        if not self._floor_bytes:
            return None
        folders = {file.repo.path for file in files}
        return min((free_bytes(folder) for folder in folders), default=0) - self._floor_bytes

    def repo_of(self, clone: str) -> ContentRepo | None:
        """Return the clone, opened where only the ledger knows it; None where it is gone."""
        folder = self.path_of(clone)
        if not folder.is_dir() or (clone != FOLDER and git_folder(folder) is None):
            return None
        with self._mutex:
            repo = self._repos.get(clone)
            if repo is None:
                try:
                    repo = self._open_repo(folder, self._ledger.clones().get(clone, ()))
                except NotAnAnnexError:
                    return None
                self._repos[clone] = repo
                self._used[id(repo)] = (repo, dict(repo.counts))
            return repo

    def whole(self, row: ContentRow) -> Path | None:
        """Return the file that has the content in its full size, if the disk has one."""
        repo = self.repo_of(row.content.clone)
        path = None if repo is None else repo.locate(key_of(row.content))
        return path if path is not None and path.stat().st_size == row.size_bytes else None

    def counts(self) -> Counter[str]:
        """Return what the clones count of this process's fetches."""
        total: Counter[str] = Counter()
        with self._mutex:
            for repo, before in self._used.values():
                total.update(repo.counts)
                total.subtract(before)
        return total

    def close(self) -> None:
        """End the child processes of every clone used, and leave the clones to other roots."""
        with self._mutex:
            repos = [repo for repo, _ in self._used.values()]
        for repo in repos:
            repo.close()
        while self._held:
            close_apart(self._held.pop())

    # Fetch

    def carry_out(self, fetch: Fetch) -> None:
        """Fetch reserved content; on failure clear its partial download away, then return its room.

        It is ours only where our own transfer put it there: the user may fetch it beside us.

        Raises:
            FetchError: It did not arrive; the ledger knows.
        """
        repo, key = fetch.file.repo, fetch.file.key
        marks: list[str] = []
        began_s = time.monotonic()
        try:
            if self.is_own(fetch.content.clone):
                # Cut by a power failure, or put aside by a check: it would take room twice.
                repo.discard_spoilt(key)
            with self._counters.activity.doing("fetch"):
                path = self._get(fetch, lambda file: marks.append(mark_of(file, repo.path)))
            self._verify(fetch, path)
        except TioOpenNeuroError:
            if not fetch.cancel.is_set():
                self._counters.add(failures=1)
            empty = self._discard(repo, key)
            path_now = repo.locate(key)
            if path_now is None or not empty:
                self._ledger.failed(fetch.content, empty=empty)
            else:
                self.take_in(fetch.content, path_now, *marks)
            raise
        except BaseException:
            self._counters.add(failures=1)
            self._ledger.failed(fetch.content, empty=False)
            raise
        self.take_in(fetch.content, path, *marks)
        fetch.path = path
        if marks:
            seconds, size_bytes = time.monotonic() - began_s, key.size_bytes or 0
            done = {"fetched_files": 1, "fetched_bytes": size_bytes}
            self._counters.add(**done, fetch_s=seconds, of_clones=self.counts())
            self._log("Fetched", fetch.content, size_bytes, f"for {fetch.unit}", gained=True)

    def settle(self, unfinished: Iterable[ContentRow]) -> None:
        """Record whose it is what came whole and whose owner died before it noted that."""
        for row in unfinished:
            path = self.whole(row) if row.state is ContentState.RESERVED else None
            if path is not None:
                self.take_in(row.content, path)

    def take_in(self, content: ContentId, path: Path, mark: str = "") -> None:
        """Record whose the whole file of reserved content is.

        Args:
            content: What was reserved.
            path: The file.
            mark: Its mark, where a transfer of this process made it; else it is told by what the
                ledger has noted.
        """
        row = None if mark else self._ledger.rows([content]).get(content)
        if row is None:
            ours: bool | None = bool(mark)
        elif row.mark.isdecimal():
            # Whoever fetched it died. Its children may have lived a little longer, and nobody
            # can tell what came then from what the user fetched. Rejected: to leave what came
            # right after the last sign to nobody; after a kill too little could be evicted.
            later_ns = path.stat().st_ctime_ns - int(row.mark)
            ours = True if later_ns < _LAST_SIGN_NS else False if later_ns > _DYING_NS else None
        else:
            ours = bool(row.mark) and self.is_ours(row, path)
        if not ours:
            self._discard(self._repos[content.clone], key_of(content))
        if ours is False:
            self._ledger.disowned(content)
        else:
            here = self._mark_of(content, path)
            self._ledger.arrived(content, mark or (UNCLAIMED if ours is None else here))

    def _mark_of(self, content: ContentId, path: Path) -> str:
        return mark_of(path, self._repos[content.clone].path)

    def has_owner(self, row: ContentRow | None) -> bool:
        """Return whether what the ledger has is this library's; forget what was replaced."""
        path = None if row is None else self.whole(row)
        if row is None or path is None or row.state is not ContentState.PRESENT:
            return row is not None
        if not self.is_ours(row, path):
            self._ledger.disowned(row.content)
            return False
        return row.mark != UNCLAIMED

    def is_ours(self, row: ContentRow, path: Path) -> bool:
        """Return whether a file is the one that the ledger charges, and no other in its place."""
        if row.mark in {"", UNCLAIMED} or row.mark.isdecimal():
            return True
        return is_same_file(row.mark, self._mark_of(row.content, path))

    def is_cancelled(self, fetch: Fetch) -> bool:
        """Return whether somebody, here or in another process, wants a fetch to end."""
        if fetch.ahead and not fetch.cancel.is_set() and self._ledger.cancelled(fetch.content):
            fetch.cancel.set()
        return fetch.cancel.is_set()

    def _get(self, fetch: Fetch, made: Callable[[Path], object]) -> Path:
        asked_s = time.monotonic()

        def cancelled() -> bool:
            nonlocal asked_s
            if time.monotonic() - asked_s > _CANCEL_POLL_S:
                asked_s = time.monotonic()
                self._ledger.lock.show_alive()
                return self.is_cancelled(fetch)
            return fetch.cancel.is_set()

        if cancelled():
            message = f"Did not fetch {fetch.file.path}: its room was needed, or the engine closes."
            raise FetchError(message, key=fetch.file.key.name, unit=fetch.unit)
        owner_fd = self._ledger.lock.inheritable
        return fetch.file.repo.get(
            fetch.file.key, owner_fd=owner_fd, cancelled=cancelled, made=made
        )

    def _verify(self, fetch: Fetch, path: Path) -> None:
        """Check the size, which the budget relies on; the checksum is git-annex's to check."""
        size_bytes = path.stat().st_size
        if size_bytes != fetch.file.key.size_bytes:
            fetch.file.repo.drop(fetch.file.key)
            message = (
                f"Cannot use {fetch.file.path}: {size_bytes} bytes arrived and its key "
                f"{fetch.file.key} states {fetch.file.key.size_bytes}. The copy was dropped; "
                f"likely the remote's is damaged."
            )
            raise ContentMismatchError(message, key=fetch.file.key.name, unit=fetch.unit)

    @staticmethod
    def _discard(repo: ContentRepo, key: AnnexKey) -> bool:
        """Remove a partial download; return whether nothing is left that must stay charged."""
        try:
            repo.discard_partial(key)
        except (TioOpenNeuroError, OSError) as error:
            _LOGGER.warning("Could not clear away the download of %s: %s", key, error)
            return False
        return True

    # Drop

    def drop(self, contents: Sequence[ContentId], reason: str) -> frozenset[ContentId]:
        """Drop content that the ledger marked for it; return what could not be dropped.

        If it is interrupted or killed, what is left is charged still and chosen again later.
        """
        failed = set()
        left = list(contents)
        try:
            while left:
                with self._counters.activity.doing("evict"):
                    dropped = self._drop_one(left[0], reason)
                if not dropped:
                    failed.add(left[0])
                left.pop(0)
        finally:
            for content in left:
                self._give_back(content, refused=False)
            self._changes.notify()
        return frozenset(failed)

    def _drop_one(self, content: ContentId, reason: str) -> bool:
        try:
            repo, key = self.repo_of(content.clone), key_of(content)
            if repo is None:
                raise NotAnAnnexError(UNSEEN.format(content.clone))
            row, path = self._ledger.rows([content]).get(content), repo.locate(key)
            if path is not None and (row is None or not self.is_ours(row, path)):
                _LOGGER.info("Not charged any more: %s, which somebody replaced", content.key)
                repo.discard_partial(key)
                self._ledger.disowned(content)
                return False
            if path is None:
                # What is there in another size was put there by somebody else.
                repo.discard_partial(key)
            else:
                repo.drop(key)
            if self.is_own(content.clone):
                repo.discard_spoilt(key)
        except DropRefusedError as error:
            _LOGGER.warning("Keeping %s, which stays charged: %s", content.key, error)
            self._give_back(content, refused=True)
            return False
        except (TioOpenNeuroError, OSError) as error:
            _LOGGER.warning("Could not drop %s now: %s", content.key, error)
            self._give_back(content, refused=False)
            return False
        size_bytes = self._ledger.dropped(content)
        if path is None and row is not None and row.mark:
            return False  # Somebody else removed it, so that we made no room.
        self._counters.add(evicted_files=1, evicted_bytes=size_bytes)
        self._log("Evicted", content, size_bytes, reason, gained=False)
        return True

    def _give_back(self, content: ContentId, *, refused: bool) -> None:
        repo = self.repo_of(content.clone)
        whole = repo is not None and repo.locate(key_of(content)) is not None
        self._ledger.kept(content, refused=refused, whole=whole)

    def _log(
        self, what: str, content: ContentId, size_bytes: int, reason: str, *, gained: bool
    ) -> None:
        if not _LOGGER.isEnabledFor(logging.INFO):
            return
        now = self._ledger.holdings()
        before_bytes = now.used_bytes + (0 if gained else size_bytes)
        _LOGGER.info(
            "%s %s (%s) %s; %s charged before, %s after, of %s.",
            what,
            content.key,
            format_size(size_bytes),
            reason,
            format_size(before_bytes),
            format_size(now.used_bytes),
            format_size(now.budget_bytes),
        )


@functools.lru_cache(maxsize=4096)
def key_of(content: ContentId) -> AnnexKey:
    """Return the annex key that the ledger knows by its name."""
    return AnnexKey.parse(content.key) or AnnexKey(content.key, None)
