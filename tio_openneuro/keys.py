"""Annex keys: the names by which git-annex knows content. Pure; imports no module of ours.

Source: https://git-annex.branchable.com/internals/key_format/ and
https://git-annex.branchable.com/internals/hashing/
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

_KEY = re.compile(
    r"(?P<backend>[A-Z0-9_]+)(?:-s(?P<size>\d+))?(?:-m\d+)?(?:-S\d+-C\d+)?--(?P<name>[^/\x00\n]+)"
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
    def text(self) -> str:
        """The key as git-annex prints and hashes it; ``name`` is escaped to be a file's name."""
        name = self.name.replace("%", "/").replace("&c", ":")
        return name.replace("&s", "%").replace("&a", "&")

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
