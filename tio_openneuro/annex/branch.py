"""What a clone says without git-annex: its git folder, its remotes, S3 versions of its keys.

Reads git's configuration and the ``git-annex`` branch, with git alone: all of the latter was
written by others, and is read before git-annex acts on it.

Source: https://git-annex.branchable.com/internals/ (remote.log, trust.log, export.log, rmet logs).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tio_openneuro.annex.processes import CommandError, run
from tio_openneuro.annex.tree import index_tree, list_files, read_blobs_if_present
from tio_openneuro.content import AnnexKey

_BRANCH_REFS = ("refs/heads/git-annex", "refs/remotes/origin/git-annex")
_ESCAPED = re.compile(r"&(\d{1,7});")
_DEAD = "X"
_RMET = ".log.rmet"
_FEW_KEYS = 50
_EXPORT_WORDS = 3


@dataclass(frozen=True, slots=True)
class SpecialRemote:
    """One special remote as ``remote.log`` records it.

    Attributes:
        uuid: git-annex's id of it.
        name: Its name.
        dead: Whether ``trust.log`` says that it is gone.
        fields: All of its configuration: ``type``, ``publicurl``, ``versioning``, …
    """

    uuid: str
    name: str
    dead: bool
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def needs_version(self) -> bool:
        """Whether it gives only keys of which it has recorded an S3 version."""
        return self.fields.get("type") == "S3" and all(
            self.fields.get(name) == "yes" for name in ("versioning", "exporttree")
        )


def git_folder(clone: Path) -> Path | None:
    """Return the git folder of a clone, the common one of linked worktrees; None without one.

    Args:
        clone: A work tree's root, with ``.git`` a folder or a file, or a bare repository.
    """
    folder = clone / ".git"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if folder.is_file():
            text = folder.read_text().strip()
            folder = (clone / text.removeprefix("gitdir:").strip()).resolve()
        elif not folder.is_dir():
            folder = clone
        common = folder / "commondir"
        if common.is_file():
            folder = (folder / common.read_text().strip()).resolve()
        return folder if (folder / "HEAD").exists() and (folder / "objects").is_dir() else None
    return None


def branch_refs(clone: Path) -> list[str]:
    """Return the refs of the clone's git-annex branch and of its origin's, as far as there."""
    command = ["git", "for-each-ref", "--format=%(refname)", *_BRANCH_REFS]
    found = run(command, cwd=clone).decode().split()
    return [ref for ref in _BRANCH_REFS if ref in found]


def special_remotes(clone: Path, ref: str) -> list[SpecialRemote]:
    """Return the special remotes that a git-annex branch records, the dead ones too.

    Args:
        clone: The clone's folder.
        ref: The branch, of :func:`branch_refs`.
    """
    logs = read_blobs_if_present(clone, [f"{ref}:remote.log", f"{ref}:trust.log"])
    remote_log, trust_log = (
        _newest(
            (words[-1].removeprefix("timestamp="), uuid, words[:-1])
            for uuid, *words in _lines(log)
            if words and words[-1].startswith("timestamp=")
        )
        for log in logs
    )
    remotes = []
    for uuid, words in remote_log.items():
        fields = dict(_assignment(word) for word in words if "=" in word)
        dead = trust_log.get(uuid, [])[:1] == [_DEAD]
        remotes.append(SpecialRemote(uuid, fields.get("name", ""), dead, fields))
    return remotes


def keys_with_version(
    clone: Path, ref: str, keys: Sequence[AnnexKey], uuids: Collection[str]
) -> set[AnnexKey]:
    """Return those of the keys of which one of the remotes has recorded an S3 version.

    Args:
        clone: The clone's folder.
        ref: The branch, of :func:`branch_refs`.
        keys: Keys to look for.
        uuids: Ids of the remotes.
    """
    if len(keys) <= _FEW_KEYS:
        blobs = {key: f"{ref}:{_log_path(key)}" for key in keys}
    else:
        # git finds one path after another in 0.6 ms each; the whole branch takes it 20 ms.
        listed = {path: blob for _, blob, path in list_files(clone, ref) if path.endswith(_RMET)}
        blobs = {key: listed[path] for key in keys if (path := _log_path(key)) in listed}
    logs = read_blobs_if_present(clone, list(blobs.values()))
    fields = {f"{uuid}:V".encode() for uuid in uuids}
    return {
        key
        for key, log in zip(blobs, logs, strict=True)
        if log is not None and _has_value(log, fields)
    }


def exported_keys(clone: Path, ref: str, uuids: Collection[str]) -> set[AnnexKey]:
    """Return the keys of the trees that were last exported to the remotes.

    Without a version git-annex asks for them by their path, and so gets what is there now.

    Args:
        clone: The clone's folder.
        ref: The branch, of :func:`branch_refs`.
        uuids: Ids of the remotes.
    """
    (log,) = read_blobs_if_present(clone, [f"{ref}:export.log"])
    exports = _newest(
        (words[0], words[1], words[2:])
        for words in _lines(log)
        if len(words) >= _EXPORT_WORDS and words[1].partition(":")[2] in uuids
    )
    keys: set[AnnexKey] = set()
    for tree, *_ in exports.values():
        with contextlib.suppress(CommandError):
            keys.update(file.key for file in index_tree(clone, tree) if file.key is not None)
    return keys


def git_config(clone: Path, pattern: str) -> dict[str, str]:
    """Return the settings of the clone's own git configuration whose names match.

    Args:
        clone: The clone's folder.
        pattern: A regular expression, as git reads it.
    """
    command = ["git", "config", "--local", "-z", "--get-regexp", pattern]
    try:
        listed = run(command, cwd=clone).decode(errors="replace")
    except CommandError as error:
        if error.returncode == 1:  # git's way to say that nothing matches
            return {}
        raise
    return dict(entry.split("\n", 1) for entry in listed.split("\0") if "\n" in entry)


def configured_uuids(clone: Path) -> dict[str, str]:
    """Return the annex ids of the remotes in the clone's git configuration, by name."""
    found = git_config(clone, r"^remote\..*\.annex-uuid$")
    return {name[len("remote.") : -len(".annex-uuid")]: value for name, value in found.items()}


def _log_path(key: AnnexKey) -> str:
    """Return where the branch has a key's remote metadata, ``"f9f/b63/KEY.log.rmet"``."""
    folders = key.object_paths()[1].removeprefix("annex/objects/")[:8]
    return f"{folders}{key.name}{_RMET}"


def _lines(log: bytes | None) -> list[list[str]]:
    """Return the words of each line of a log that may not be there."""
    return [line.split(" ") for line in (log or b"").decode(errors="replace").splitlines()]


def _newest(entries: Iterable[tuple[str, str, list[str]]]) -> dict[str, list[str]]:
    """Return the words of each id's newest entry: a union merge leaves several."""
    in_time = sorted(entries, key=lambda entry: _timestamp(entry[0]))
    return {name: words for _, name, words in in_time}


def _timestamp(text: str) -> float:
    try:
        return float(text.rstrip("s"))
    except ValueError:
        return 0.0


def _assignment(word: str) -> tuple[str, str]:
    """Split ``name=value``, taking back the escapes of spaces and the like."""
    name, _, value = word.partition("=")
    return name, _ESCAPED.sub(lambda match: chr(min(int(match[1]), 0x10FFFF)), value)


def _has_value(log: bytes, fields: Collection[bytes]) -> bool:
    """Return whether a metadata log leaves any of the fields with a value.

    A line is ``TIMESTAMP FIELD +VALUE … -VALUE … FIELD …``; ``+`` sets a value, ``-`` takes it
    away. A value in base64 begins with ``!``.
    """
    # Without a removal, and that is nearly always, any value that was set is still there.
    lines = [line.split(b" ") for line in log.splitlines()]
    if any(b" -" in line for line in log.splitlines()):
        lines.sort(key=lambda words: _timestamp(words[0].decode(errors="replace")))
    values: set[tuple[bytes, bytes]] = set()
    for words in lines:
        name = b""
        for word in words[1:]:
            if word[:1] == b"+":
                if name in fields and len(word) > 1:
                    values.add((name, word[1:]))
            elif word[:1] == b"-":
                values.discard((name, word[1:]))
            else:
                name = word
    return bool(values)
