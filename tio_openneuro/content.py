"""What the engine holds: content by annex key, the clones that give it, and units of both.

Owns no state. :class:`ContentRepo` is the seam between the engine and git-annex: one contract
suite runs on the real :class:`~tio_openneuro.annex.AnnexRepo` and on the tests' fake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tio_openneuro.keys import AnnexKey


@dataclass(frozen=True, slots=True)
class StoredContent:
    """One file of content that lies in a clone.

    Attributes:
        key_name: Name of its annex key.
        size_bytes: Bytes that it has on disk now.
        partial: Whether it is a download that is not complete.
    """

    key_name: str
    size_bytes: int
    partial: bool


class ContentRepo(Protocol):
    """Fetch, drop and find content by annex key, in one clone. Safe to share by threads."""

    @property
    def path(self) -> Path:
        """Absolute folder of the clone; it names the clone in the ledger."""

    @property
    def remotes(self) -> tuple[str, ...]:
        """Names of the remotes that are trusted to keep content."""

    @property
    def retries(self) -> int:
        """How often a transfer was tried again; never falls in one process."""

    def locate(self, key: AnnexKey) -> Path | None:
        """Return the file that holds the whole content, or None where it is absent."""

    def get(
        self,
        key: AnnexKey,
        *,
        owner_fd: int | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Path:
        """Fetch the content, verified by its checksum, and return its file.

        Retries what can pass, with backoff; every wait inside is bounded. A partial download may
        stay when it raises, and is resumed by the next call.

        Args:
            key: Key whose content is absent.
            owner_fd: Descriptor of the owner's lock, for the child processes to inherit.
            cancelled: Polled between steps; once true, FetchError is raised soon.

        Raises:
            RemoteUnavailableError: The remote cannot be reached, or refuses.
            ContentMismatchError: Size or checksum are wrong, repeatedly.
            FetchError: Anything else: disk full, cancelled, no version recorded.
        """

    def drop(self, key: AnnexKey) -> None:
        """Remove the content and what is left of its download; absent content is no error.

        Raises:
            DropRefusedError: No trusted remote is recorded to have it.
        """

    def discard_partial(self, key: AnnexKey) -> None:
        """Remove what is left of an unfinished download of the key, if anything."""

    def stored(self) -> Iterator[StoredContent]:
        """Yield every object and every partial download that lies in the clone."""

    def unavailable(self, keys: Sequence[AnnexKey]) -> dict[AnnexKey, str]:
        """Return the keys known to have no remote that can give them, each with the reason."""

    def close(self) -> None:
        """End every child process of this process; the next call starts them again."""


@dataclass(frozen=True, slots=True)
class ContentFile:
    """One file's content in one clone.

    Attributes:
        repo: The clone.
        key: The annex key; its size is known.
        path: Where the dataset has it, for messages; posix, from the dataset's root.
    """

    repo: ContentRepo
    key: AnnexKey
    path: str


@dataclass(frozen=True, slots=True)
class ContentUnit:
    """The files that are reserved, fetched and leased together.

    Attributes:
        name: As in messages, ``"sub-07"``.
        files: The unit's files; two may share a key, which then counts once.
        prepared: What is made of them; while it is present, they are not needed. Never fetched.
    """

    name: str
    files: tuple[ContentFile, ...]
    prepared: ContentFile | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of content, each key of a clone counted once."""
        distinct = {(file.repo.path, file.key) for file in self.files}
        return sum(key.size_bytes or 0 for _, key in distinct)
