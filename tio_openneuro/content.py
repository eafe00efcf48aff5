"""What the engine holds: content by annex key, the clones that give it, and units of both.

Owns no state. :class:`ContentRepo` is the seam between the engine and git-annex: one contract
suite runs on the real :class:`~tio_openneuro.annex.repo.AnnexRepo` and on the tests' fake.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

_KEY = re.compile(
    r"(?P<backend>[A-Z0-9_]+)(?:-s(?P<size>\d{1,18}))?(?:-m\d+)?(?:-S\d+-C\d+)?--(?P<name>[^/\x00\n]+)"
)
_CHECKED = re.compile(
    r"(?P<hash>MD5|SHA1|SHA224|SHA256|SHA384|SHA512)E?-s\d+(-m\d+)?--(?P<digest>[0-9a-f]+)(\..{1,40})?"
)
_MIXED_CHARACTERS = "0123456789zqjxkmvwgpfZQJXKMVWGPF"


@dataclass(frozen=True, slots=True)
class AnnexKey:
    """Name the content of one annexed file.

    Attributes:
        name: The whole key, ``MD5E-s432013312--9f….nii.gz``; also the object's file name.
        size_bytes: Size that the key states, or None where it states none.
    """

    name: str
    size_bytes: int | None

    @classmethod
    def parse(cls, name: str) -> AnnexKey | None:
        """Return the key of that name, or None where it is not one.

        Example:
            >>> AnnexKey.parse("MD5E-s12--5a.nii.gz").size_bytes
            12
        """
        match = _KEY.fullmatch(name)
        if match is None:
            return None
        return cls(name, int(match["size"]) if match["size"] else None)

    @classmethod
    def from_pointer(cls, target: str) -> AnnexKey | None:
        """Return the key that a symlink's target or a pointer file's first line names.

        Args:
            target: As git stores it, ``../../.git/annex/objects/zK/1f/KEY/KEY`` or
                ``/annex/objects/KEY``.
        """
        first_line = target.partition("\n")[0].rstrip("\r")
        folder, _, name = first_line.replace("\\", "/").rpartition("/")
        return cls.parse(name) if "annex/objects" in folder else None

    @property
    def backend(self) -> str:
        """The key's backend, ``"MD5E"``."""
        return self.name.partition("-")[0]

    @property
    def checksum(self) -> tuple[str, str] | None:
        """Name of a hash that Python has, and its digest in hex; None where it states neither."""
        match = _CHECKED.fullmatch(self.name)
        return (match["hash"].lower(), match["digest"]) if match else None

    @property
    def text(self) -> str:
        """The key as git-annex prints and hashes it; ``name`` is escaped to be a file's name."""
        name = self.name.replace("%", "/").replace("&c", ":")
        return name.replace("&s", "%").replace("&a", "&")

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - keys are small, and known all along
    def object_paths(self) -> tuple[str, str]:
        """Return where the content may lie below ``.git``, the usual place first.

        The first is used by ordinary clones, the second by bare ones and on file systems that
        do not tell upper from lower case.
        """
        digest = hashlib.md5(self.text.encode(), usedforsecurity=False)
        word = int.from_bytes(digest.digest()[:4], "little")
        a, b, c, d = (_MIXED_CHARACTERS[word >> (6 * n) & 31] for n in range(4))
        lower = digest.hexdigest()
        return (
            f"annex/objects/{b}{a}/{d}{c}/{self.name}/{self.name}",
            f"annex/objects/{lower[:3]}/{lower[3:6]}/{self.name}/{self.name}",
        )

    def __str__(self) -> str:
        """Return the key's name."""
        return self.name


class ContentId(NamedTuple):
    """Name one annex key's content in one clone, in the engine and in the ledger alike.

    Attributes:
        clone: Real folder of the clone, from the root; absolute where it lies elsewhere. Of a
            linked work tree it is the main one's.
        key: Name of the annex key.
    """

    clone: str
    key: str


UNCLAIMED = "?"
"""Mark of content whose owner is not known: it counts and may be used, and nobody drops it."""


def mark_of(path: Path, folder: Path) -> str:
    """Return what tells a file from another that takes its place: inode, size and mtime.

    Args:
        path: The file.
        folder: The clone's folder, whose own device and inode stand before them.
    """
    home, file = folder.stat(), path.stat()
    return f"{home.st_dev}:{home.st_ino} {file.st_ino} {file.st_size} {file.st_mtime_ns}"


def is_same_file(mark: str, other: str) -> bool:
    """Return whether two marks are of one file.

    A folder that came to another device or inode, by a copy or another mount, took its files
    along: they have other inodes, and the same sizes and times.

    Example:
        >>> is_same_file("1:2 30 500 77", "1:9 31 500 77"), is_same_file("1:2 3 4 5", "1:2 6 4 5")
        (True, False)
    """
    (home, inode, *rest), (other_home, other_inode, *other_rest) = mark.split(), other.split()
    return rest == other_rest and (inode == other_inode or home != other_home)


@dataclass(frozen=True, slots=True)
class StoredContent:
    """One file of content that lies in a clone.

    Attributes:
        key_name: Name of its annex key.
        size_bytes: Bytes that it has on disk now.
        partial: Whether it is a download that is not complete, or else of no use: an object of
            another size or name, a second one of the key, one that git-annex found rotten.
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
    def counts(self) -> Mapping[str, int]:
        """``retries`` of transfers, and ``http_files``; none ever falls in one process."""

    def locate(self, key: AnnexKey) -> Path | None:
        """Return the file that holds the whole content, or None where it is absent."""

    def get(
        self,
        key: AnnexKey,
        *,
        owner_fd: int | None = None,
        cancelled: Callable[[], bool] | None = None,
        made: Callable[[Path], object] | None = None,
    ) -> Path:
        """Fetch the content, verified by its checksum, and return its file.

        Retries what can pass, with backoff; every wait inside is bounded. A partial download may
        stay when it raises, and is resumed by the next call.

        Args:
            key: Key whose content is absent.
            owner_fd: Descriptor of the owner's lock, for the child processes to inherit.
            cancelled: Polled between steps; once true, FetchError is raised soon.
            made: Called with the file once a transfer of ours put it there; never where somebody
                else did, before or meanwhile.

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

    def discard_spoilt(self, key: AnnexKey, *, everywhere: bool = False) -> None:
        """Remove what takes room under the key and is not its content; in clones of ours alone.

        Where it is looked for: up and down the key's own path, or all through the clone.
        """

    def stored(self) -> Iterator[StoredContent]:
        """Yield every object and every partial download that lies in the clone."""

    def unavailable(self, keys: Sequence[AnnexKey]) -> dict[AnnexKey, str]:
        """Return the keys known to have no remote that can give them, each with the reason."""

    def gone(self, keys: Sequence[AnnexKey]) -> dict[AnnexKey, str]:
        """Return the keys that no remote has now, each with the reason; each is asked for once."""

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


@dataclass(frozen=True, slots=True)
class TreeFile:
    """One file of a dataset.

    Attributes:
        path: Posix path from the dataset's root.
        blob: Id of its git object; empty for a file of a plain folder.
        key: Annex key of its content; None where the content is in git itself, or a plain file.
        size_bytes: Size of the content; None where the key states none, or where there is no key
            either: a link to no file of the dataset.
    """

    path: str
    blob: str
    key: AnnexKey | None
    size_bytes: int | None
