"""Prepared volumes within the budget: their folder, and keeping one where there is room.

Owns ``root/prepared``, which the ledger knows as it knows a clone: found, dropped, never fetched.
What lies there can be made again, so it may always be dropped. Keeping one only ever tries to
reserve, evicts nothing that is used sooner or that saves more time for its bytes, and never
waits. It stands here and not with those who prepare, since ``status`` and ``evict`` need no torch.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tio_openneuro.content import AnnexKey, ContentFile, ContentId, ContentUnit, StoredContent
from tio_openneuro.disk.leases import Leases
from tio_openneuro.disk.store import FOLDER
from tio_openneuro.errors import FetchError, LedgerError
from tio_openneuro.ledger import Answer, Transaction, Want, is_worth_room
from tio_openneuro.sizes import format_size

_LOGGER = logging.getLogger(__name__)
_LATEST = 1 << 60
_SUFFIX = ".part"


def key_of(digest: str) -> AnnexKey:
    """Return the key of the prepared volume that has this digest as its name."""
    return AnnexKey(f"PREPARED--{digest}", None)


class PreparedRepo:
    """A :class:`~tio_openneuro.content.ContentRepo` of files that this library makes itself."""

    remotes: tuple[str, ...] = ()

    def __init__(self, root: Path) -> None:
        """Make the folder, for this user alone.

        Args:
            root: Folder of clones and ledger.

        Raises:
            LedgerError: It is another user's, or no folder.
        """
        self.path = Path(os.path.realpath(root)) / FOLDER
        with suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        user = os.geteuid() if sys.platform != "win32" else 0
        if self.path.lstat().st_uid != user or not _is_folder(self.path):
            message = f"Cannot keep volumes in {self.path}: another user's, a link or a file."
            raise LedgerError(f"{message} Give a root of your own.")
        self.path.chmod(0o700)
        self.counts: Counter[str] = Counter()

    def file(self, digest: str) -> ContentFile:
        """Return the name of a prepared volume, as the engine wants it."""
        return ContentFile(self, key_of(digest), f"prepared volume {digest}")

    def place(self, key: AnnexKey) -> Path:
        """Return where the file lies, if it does."""
        return self.path / key.name.rpartition("-")[2][:2] / key.name

    def locate(self, key: AnnexKey) -> Path | None:
        """Return the whole file, or None where it is absent."""
        path = self.place(key)
        return path if _is_file(path) else None

    def write(self, key: AnnexKey, data: bytes) -> None:
        """Write a file whole, or leave what :meth:`discard_partial` removes."""
        path = self.place(key)
        if not path.parent.is_dir():
            _remove(path.parent)
            path.parent.mkdir(mode=0o700, exist_ok=True)
        partial = path.with_name(path.name + _SUFFIX)
        partial.write_bytes(data)
        # Not synced, which would cost more than to prepare anew: what a power failure tears, its
        # size and its checksums tell.
        partial.replace(path)

    def get(
        self,
        key: AnnexKey,
        *,
        owner_fd: int | None = None,  # noqa: ARG002 - the seam's
        cancelled: Callable[[], bool] | None = None,  # noqa: ARG002 - the seam's
        made: Callable[[Path], object] | None = None,  # noqa: ARG002 - the seam's
    ) -> Path:
        """Raise: nobody gives a prepared volume but who prepares it.

        Raises:
            FetchError: Always.
        """
        message = f"Cannot fetch {key}: a prepared volume is made anew, not fetched."
        raise FetchError(message, key=key.name)

    def drop(self, key: AnnexKey) -> None:
        """Remove the file, and what is left of writing it."""
        _remove(self.place(key))
        self.discard_partial(key)

    def discard_partial(self, key: AnnexKey) -> None:
        """Remove what a kill left of writing the file, if anything."""
        path = self.place(key)
        _remove(path.with_name(path.name + _SUFFIX))

    def stored(self) -> Iterator[StoredContent]:
        """Yield every file, whole and partial, and what lies in the place of one."""
        for path in sorted(self.path.glob("*/PREPARED--*")):
            partial = path.suffix == _SUFFIX or not _is_file(path)
            name = path.name.removesuffix(_SUFFIX)
            try:
                yield StoredContent(name, path.lstat().st_size, partial)
            except FileNotFoundError:
                continue

    def unavailable(self, keys: Sequence[AnnexKey]) -> dict[AnnexKey, str]:
        """Return why no key can be adopted or fetched: there is no remote."""
        return dict.fromkeys(keys, "a prepared volume has no remote")

    gone = unavailable

    def discard_spoilt(self, key: AnnexKey, *, everywhere: bool = False) -> None:  # noqa: ARG002 - the seam's
        """Remove a folder or link that lies in the place of the file."""
        if self.locate(key) is None:
            _remove(self.place(key))

    def close(self) -> None:
        """Do nothing: no child serves the folder."""


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _remove(path: Path) -> None:
    """Remove what lies there, be it a file, a folder, a link or nothing."""
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        with suppress(NotADirectoryError):
            path.unlink(missing_ok=True)


@contextmanager
def lease(leases: Leases, unit: ContentUnit, file: ContentFile) -> Iterator[Path | None]:
    """Hold a unit's prepared volume while the block runs: see :meth:`Engine.lease_prepared`."""
    if file.repo.locate(file.key) is None:
        yield None
        return
    content = leases.store.content_of(file)
    with leases.ledger.transaction() as decide:
        lease_id = decide.try_lease(unit.name, content)
    if not lease_id:
        yield None
        return
    try:
        # Only now: a use that is not begun stays in the order, for the lease of the files.
        leases.look_ahead.begin_use(unit, leases.store.files_of(unit))
        leases.counters.add(hit_files=1)
        yield file.repo.locate(file.key)
    finally:
        leases.end_lease(lease_id)


def keep(
    leases: Leases, unit: ContentUnit, file: ContentFile, data: bytes, prepare_s: float
) -> bool:
    """Write a prepared volume if there is room for it: see :meth:`Engine.keep_prepared`."""
    repo = file.repo
    if not isinstance(repo, PreparedRepo):
        message = f"Cannot keep a prepared volume in {repo.path}: it is a clone."
        raise LedgerError(message)
    content = leases.store.content_of(file)
    fetch_s = leases.counters.seconds_per_byte() * unit.size_bytes
    worth = is_worth_room(unit.size_bytes, len(data), fetch_s=fetch_s, prepare_s=prepare_s)
    steps = (leases.look_ahead.steps_to(unit.name) or _LATEST) if worth else None
    instead = frozenset(leases.store.files_of(unit))
    with suppress(OSError):
        # Deleted by hand: what lay there is seen to be gone.
        repo.path.mkdir(mode=0o700)

    def ask(decide: Transaction, kept: frozenset[ContentId]) -> Answer:
        want = Want(content, len(data), located=repo.locate(file.key) is not None)
        spare_bytes = leases.store.spare_bytes([file])
        return decide.request_prepared(
            want, instead, steps=steps, kept=kept, spare_bytes=spare_bytes
        )

    with leases.look_ahead.held():
        answer = leases.look_ahead.make_way(ask, f"for {unit.name}, prepared", set())
        if answer.granted:
            kept = _write(leases, repo, file, data)
            if kept:
                leases.look_ahead.prepared(unit, worth=worth)
            return kept
    _LOGGER.info(
        "Not kept: %s, prepared (%s): no room in the disk budget that is worth less.",
        unit.name,
        format_size(len(data)),
    )
    return False


def _write(leases: Leases, repo: PreparedRepo, file: ContentFile, data: bytes) -> bool:
    """Write what was reserved just now; on failure clear it away, then return its room."""
    content = leases.store.content_of(file)
    try:
        # A file that no ledger knew, before it takes room beside the new one.
        repo.drop(file.key)
        repo.write(file.key, data)
    except BaseException as error:
        empty = False
        with suppress(OSError):
            repo.drop(file.key)
            empty = True
        leases.ledger.failed(content, empty=empty)
        if not isinstance(error, OSError):
            raise
        _LOGGER.warning("Could not keep %s: %s", content.key, error)
        return False
    leases.ledger.arrived(content)
    leases.changes.notify()
    _LOGGER.info("Kept %s (%s).", content.key, format_size(len(data)))
    return True
