"""The folder of prepared volumes, as the ledger's hands know a clone: find, drop, never fetch.

Owns ``root/prepared``. What lies there can be made again, so it may always be dropped. A file is
written under another name and moved into place, so that what a kill leaves is told from what is
whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tio_openneuro.content import AnnexKey, ContentFile, StoredContent
from tio_openneuro.errors import FetchError

FOLDER = "prepared"
_SUFFIX = ".part"


def key_of(digest: str) -> AnnexKey:
    """Return the key of the prepared volume that has this digest as its name."""
    return AnnexKey(f"PREPARED--{digest}", None)


class PreparedRepo:
    """A :class:`~tio_openneuro.content.ContentRepo` of files that this library makes itself."""

    remotes: tuple[str, ...] = ()
    retries = 0

    def __init__(self, root: Path) -> None:
        """Make the folder, for this user alone.

        Args:
            root: Folder of clones and ledger.
        """
        self.path = Path(os.path.realpath(root)) / FOLDER
        self.path.mkdir(mode=0o700, exist_ok=True)

    def file(self, digest: str) -> ContentFile:
        """Return the name of a prepared volume, as the engine wants it."""
        return ContentFile(self, key_of(digest), f"prepared volume {digest}")

    def place(self, key: AnnexKey) -> Path:
        """Return where the file lies, if it does."""
        return self.path / key.name.rpartition("-")[2][:2] / key.name

    def locate(self, key: AnnexKey) -> Path | None:
        """Return the whole file, or None where it is absent."""
        path = self.place(key)
        return path if path.is_file() else None

    def write(self, key: AnnexKey, data: bytes) -> None:
        """Write a file whole, or leave what :meth:`discard_partial` removes."""
        path = self.place(key)
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
    ) -> Path:
        """Raise: nobody gives a prepared volume but who prepares it.

        Raises:
            FetchError: Always.
        """
        message = f"Cannot fetch {key}: a prepared volume is made anew, not fetched."
        raise FetchError(message, key=key.name)

    def drop(self, key: AnnexKey) -> None:
        """Remove the file, and what is left of writing it."""
        self.place(key).unlink(missing_ok=True)
        self.discard_partial(key)

    def discard_partial(self, key: AnnexKey) -> None:
        """Remove what a kill left of writing the file, if anything."""
        path = self.place(key)
        path.with_name(path.name + _SUFFIX).unlink(missing_ok=True)

    def stored(self) -> Iterator[StoredContent]:
        """Yield every file, whole and partial."""
        for path in sorted(self.path.glob("*/PREPARED--*")):
            partial = path.suffix == _SUFFIX
            name = path.name.removesuffix(_SUFFIX)
            try:
                yield StoredContent(name, path.stat().st_size, partial)
            except FileNotFoundError:
                continue

    def unavailable(self, keys: Sequence[AnnexKey]) -> dict[AnnexKey, str]:
        """Return why no key can be adopted or fetched: there is no remote."""
        return dict.fromkeys(keys, "a prepared volume has no remote")

    def close(self) -> None:
        """Do nothing: no child serves the folder."""
