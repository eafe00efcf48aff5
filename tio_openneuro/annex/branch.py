"""What a clone says without git-annex: its git folder, its remotes, S3 versions of its keys.

Reads git's configuration and the ``git-annex`` branch, with git alone: all of the latter was
written by others, and is read before git-annex acts on it.

Source: https://git-annex.branchable.com/internals/ (remote.log, trust.log, export.log, rmet logs).
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import posixpath
import re
import sys
import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from tio_openneuro.annex.processes import CommandError, run
from tio_openneuro.annex.tree import index_tree, list_files, object_facts, read_blobs
from tio_openneuro.bounds import LOG_BYTES, refuse_above
from tio_openneuro.content import AnnexKey

_LOG = logging.getLogger(__name__)

_BRANCHES = ("refs/heads/git-annex", "refs/remotes/*/git-annex")
_ESCAPED = re.compile(r"&(\d{1,7});")
_DEAD = "X"
_RMET = ".log.rmet"
_FEW_KEYS = 50
_FEW_LOOKUPS = 10
_EXPORT_WORDS = 3
_MOST_EXPORTS = 32
# What changes where git-annex puts content, in which mode, how it gets or removes it, or whether
# it does; of the remote, too.
_SETTINGS = re.compile(
    r"annex\.(tune\..*|(freezecontent|thawcontent|secure-erase|http-headers)-command|http-headers"
    r"|crippledfilesystem|securehashesonly|web-options|bwlimit.*|pidlock|direct|trashbin"
    r"|security\.allowed-url-schemes)|core\.sharedrepository"
    r"|REMOTE\.annex-(ignore.*|bwlimit.*|(start|stop)-command|web-options|trashbin)"
)
_OFF = frozenset({"", "false", "no", "off", "0", "umask"})
_VERSION_ID = re.compile(r"[\w.-]+", re.ASCII)
_VERSIONS = frozenset({"8", "9", "10"})
_AMAZON = re.compile(r"([a-z0-9.-]+\.)?s3([.-][a-z0-9-]+)*\.amazonaws\.com")


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

    @property
    def public_url(self) -> str:
        """Where anybody may read its objects as they are; empty where that is not on record."""
        url = self.fields.get("publicurl", "")
        plain = self.fields.get("encryption") == "none" and "chunk" not in self.fields
        sound = re.fullmatch(r"https?://[^@?#\\\s]+", url) is not None
        return url if self.needs_version and not self.dead and plain and sound else ""


def is_amazon(host: str) -> bool:
    """Return whether a host is one of Amazon's S3, where OpenNeuro's bucket is."""
    return _AMAZON.fullmatch(host) is not None


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


def branch_tips(clone: Path) -> list[str]:
    """Return the commits of the clone's git-annex branch and its remotes', no one twice.

    What was fetched is not in the clone's own branch before git-annex merges it; so both are read,
    and what they say is united, as git-annex would.
    """
    command = ["git", "for-each-ref", "--format=%(objectname)", *_BRANCHES]
    found = dict.fromkeys(run(command, cwd=clone).decode().split())
    if len(found) > 1:
        command = ["git", "merge-base", "--independent", *found]
        return run(command, cwd=clone).decode().split()
    return list(found)


def refuse_bombs(clone: Path) -> None:
    """Raise where git-annex, which reads its branch as it is, would read more than is believed.

    Raises:
        UnsafeDatasetError: The branch, or HEAD, has more files than a dataset's, or longer ones.
    """
    with contextlib.suppress(CommandError):  # Not every clone has one; git-annex lists its files.
        deque(list_files(clone, "HEAD"), maxlen=0)
    for tip in branch_tips(clone):
        files = {blob: path for _, blob, path in list_files(clone, tip, 2)}
        sizes = (int(fact or 0) for fact in object_facts(clone, "objectsize", list(files)))
        longest = max(zip(sizes, files.values(), strict=True), default=(0, ""))
        refuse_above(LOG_BYTES, longest[0], f"{longest[1]!r} of git-annex's in {clone}", "bytes")


def is_tuned(clone: Path) -> bool:
    """Return whether the annex was made with a layout of its own, where we would not look."""
    (log,) = _read(clone, branch_tips(clone), "difference.log")
    return bool(log or git_config(clone, r"^annex\.tune\."))


def special_remotes(clone: Path, tips: Sequence[str]) -> list[SpecialRemote]:
    """Return the special remotes that the git-annex branch records, the dead ones too.

    Args:
        clone: The clone's folder.
        tips: The branch, of :func:`branch_tips`.
    """
    remote_log, trust_log = (
        _newest(
            (words[-1].removeprefix("timestamp="), uuid, words[:-1])
            for uuid, *words in _lines(log)
            if words and words[-1].startswith("timestamp=")
        )
        for log in _read(clone, tips, "remote.log", "trust.log")
    )
    remotes = []
    for uuid, words in remote_log.items():
        fields = dict(_assignment(word) for word in words if "=" in word)
        dead = trust_log.get(uuid, [])[:1] == [_DEAD]
        remotes.append(SpecialRemote(uuid, fields.get("name", ""), dead, fields))
    return remotes


def version_logs(
    clone: Path, tips: Sequence[str], keys: Collection[AnnexKey] | None
) -> dict[str, bytes]:
    """Return what the git-annex branch records of remotes' versions of keys, by the keys' names.

    Args:
        clone: The clone's folder.
        tips: The branch, of :func:`branch_tips`.
        keys: Keys to look for; None: all that have such a log.
    """
    found: dict[str, bytes] = {}
    for tip in tips:
        if keys is not None and len(keys) <= _FEW_KEYS:
            blobs = {key.name: f"{tip}:{_log_path(key)}" for key in keys}
        else:
            # git finds one path after another in 0.6 ms each; the whole branch takes it 20 ms.
            listed = {
                path: blob for _, blob, path in list_files(clone, tip, 2) if path.endswith(_RMET)
            }
            wanted = listed if keys is None else listed.keys() & map(_log_path, keys)
            blobs = {posixpath.basename(path).removesuffix(_RMET): listed[path] for path in wanted}
        logs = read_blobs(clone, list(blobs.values()))
        for name, log in zip(blobs, logs, strict=True):
            if log is not None:
                found[name] = found[name] + b"\n" + log if name in found else log
    return found


def recorded_versions(log: bytes, uuids: Collection[str]) -> list[str]:
    """Return the S3 versions that a log leaves any of the remotes with, the newest first.

    A line is ``TIMESTAMP FIELD +VALUE … -VALUE … FIELD …``; ``+`` sets a value, ``-`` takes it
    away. A value in base64 begins with ``!``.

    Args:
        log: One of :func:`version_logs`.
        uuids: Ids of the remotes.

    Returns:
        Each as ``ID#PATH``, the path from the bucket's root.
    """
    fields = {f"{uuid}:V".encode() for uuid in uuids}
    lines = [line.split(b" ") for line in log.splitlines()]
    lines.sort(key=lambda words: _timestamp(words[0].decode(errors="replace")))
    values: dict[bytes, None] = {}
    for words in lines:
        name = b""
        for word in words[1:]:
            if word[:1] not in {b"+", b"-"}:
                name = word
            elif name in fields and len(word) > 1:
                values.pop(word[1:], None)
                if word[:1] == b"+":
                    values[word[1:]] = None
    return [_decoded(value) for value in reversed(values)]


def exported_keys(clone: Path, tips: Sequence[str], uuids: Collection[str]) -> set[AnnexKey]:
    """Return the keys of the trees that were last exported to the remotes.

    Without a version git-annex asks for them by their path, and so gets what is there now.

    Args:
        clone: The clone's folder.
        tips: The branch, of :func:`branch_tips`.
        uuids: Ids of the remotes.
    """
    exports = _newest(
        (words[0], words[1], words[2:])
        for log in _read(clone, tips, "export.log")
        for words in _lines(log)
        if len(words) >= _EXPORT_WORDS and words[1].partition(":")[2] in uuids
    )
    keys: set[AnnexKey] = set()
    refuse_above(_MOST_EXPORTS, len(exports), clone, "exported trees")
    for tree, *_ in exports.values():
        with contextlib.suppress(CommandError):
            keys.update(file.key for file in index_tree(clone, tree) if file.key is not None)
    return keys


def git_config(clone: Path, pattern: str, *scope: str) -> dict[str, str]:
    """Return the settings of git whose names match.

    Args:
        clone: The clone's folder.
        pattern: A regular expression, as git reads it.
        scope: ``"--local"`` for those of the clone itself; default: the user's and system's too.
    """
    listed = _found(clone, "config", *scope, "-z", "--get-regexp", pattern)
    entries = (entry.partition("\n") for entry in listed.decode(errors="replace").split("\0"))
    return {name: value if equals else "true" for name, equals, value in entries if name}


def _found(clone: Path, *arguments: str) -> bytes:
    """Return what git finds; nothing where it says that nothing matches."""
    try:
        return run(["git", *arguments], cwd=clone)
    except CommandError as error:
        if error.returncode == 1:
            return b""
        raise


def _why_git_annex(
    clone: Path, tips: Sequence[str], config: Mapping[str, str], remote: str, url: str
) -> Iterator[str]:
    """Yield why content is git-annex's to put into a clone; nothing where it may just be put there.

    Args:
        clone: The clone's folder.
        tips: The git-annex branch, of :func:`branch_tips`.
        config: Its settings, of :func:`git_config`.
        remote: Name of the remote that it comes from.
        url: The remote's public URL.
    """
    if sys.platform == "win32" or os.environ.get("TIO_OPENNEURO_FETCH") == "git-annex":
        yield "it is asked for"
    folder = git_folder(clone) or clone.parent
    if folder not in {clone, clone / ".git"}:
        yield "it is a linked work tree, or a submodule"
    verified = folder / "annex" / "verified-remote.log"
    if not url or (verified.exists() and f" publicurl={url} " not in verified.read_text()):
        yield "the remote has no public URL, or none that was verified"
    for name, value in config.items():
        known = _SETTINGS.fullmatch(name.replace(f"remote.{remote}.", "REMOTE.", 1))
        if known and value not in _OFF:
            yield f"{name} is set"
    poor = "annex.uuid" not in config and config.get("core.symlinks") == "false"
    if poor or config.get("annex.version", "10") not in _VERSIONS:
        yield "its annex is of another version, or its file system has no links"
    if (folder / "HEAD").read_text().startswith("ref: refs/heads/adjusted/"):
        yield "it is on an adjusted branch"
    settings, difference = _read(clone, tips, "config.log", "difference.log")
    if b"annex.securehashesonly" in settings or difference:
        yield "its git-annex branch sets where or what content may be"
    indexed = (folder / "index").exists()
    if indexed and _found(clone, "grep", "--cached", "-l", "-E", "^/annex/objects/"):
        yield "it has unlocked files"


class PublicUrls:
    """Which keys of a clone may be fetched over HTTP, and from where. Safe to share by threads.

    Of a remote that keeps versions, it is what git-annex itself would ask for: the public URL,
    the path under which a version of the key was recorded, and the version.

    Attributes:
        config: git's settings in the clone.
    """

    def __init__(
        self, clone: Path, logs: dict[str, bytes], uuids: Mapping[str, str] | None = None
    ) -> None:
        """Read nothing yet.

        Args:
            clone: The clone's folder.
            logs: What is known of :func:`version_logs`; more is added.
            uuids: Ids of remotes that are trusted, and not enabled in the clone.
        """
        self._uuids = uuids or {}
        self.config: Mapping[str, str] = {}
        self._clone = clone
        self._tips: list[str] = []
        self._lock = threading.Lock()
        self._bases: dict[str, tuple[str, str]] = {}
        self._logs = logs
        self._all_logs = False

    def of(self, key: AnnexKey, remote: str) -> list[str]:
        """Return the URLs of a key's versions, the newest first; none where git-annex is to fetch.

        Args:
            key: The content wanted.
            remote: Name of the remote that it comes from.
        """
        with self._lock:
            if remote not in self._bases:
                self._bases[remote] = self._find(remote)
            uuid, base = self._bases[remote]
            checked = base and key.checksum is not None
            versions = recorded_versions(self._log(key), [uuid]) if checked else []
        found = [value.partition("#") for value in versions]
        return [
            f"{base}/{quote(path)}?versionId={version}"
            for version, _, path in found
            if path and not path.startswith("/") and _VERSION_ID.fullmatch(version)
        ]

    def _find(self, remote: str) -> tuple[str, str]:
        """Return a remote's id, and its public URL if content may be fetched from there."""
        self.config = git_config(self._clone, ".")
        uuid = self.config.get(f"remote.{remote}.annex-uuid") or self._uuids.get(remote, "")
        self._tips = branch_tips(self._clone)
        known = special_remotes(self._clone, self._tips)
        url = next((each.public_url for each in known if each.uuid == uuid), "")
        why = next(_why_git_annex(self._clone, self._tips, self.config, remote, url), "")
        how = f"through git-annex: {why}" if why else f"over HTTP, from {url}"
        _LOG.info("Content of %s comes from %s %s", self._clone, remote, how)
        return uuid, "" if why else url.rstrip("/")

    def _log(self, key: AnnexKey) -> bytes:
        """Return what is recorded of a key, looked up alone at first, then together with all."""
        if key.name not in self._logs and not self._all_logs:
            self._all_logs = len(self._logs) >= _FEW_LOOKUPS
            keys = None if self._all_logs else [key]
            self._logs.update(version_logs(self._clone, self._tips, keys))
        return self._logs.setdefault(key.name, b"")


def configured_uuids(clone: Path) -> dict[str, str]:
    """Return the annex ids of the remotes in the clone's git configuration, by name."""
    found = git_config(clone, r"^remote\..*\.annex-uuid$", "--local")
    return {name[len("remote.") : -len(".annex-uuid")]: value for name, value in found.items()}


def _log_path(key: AnnexKey) -> str:
    """Return where the branch has a key's remote metadata, ``"f9f/b63/KEY.log.rmet"``."""
    folders = key.object_paths()[1].removeprefix("annex/objects/")[:8]
    return f"{folders}{key.name}{_RMET}"


def journal_name(key: AnnexKey) -> str:
    """Return the name under which git-annex's journal has where a key's content is."""
    return _log_path(key).removesuffix(".rmet").replace("_", "__").replace("/", "_")


def _read(clone: Path, tips: Sequence[str], *paths: str) -> list[bytes]:
    """Return files of the git-annex branch, each united over all that was fetched of it."""
    logs = list(read_blobs(clone, [f"{tip}:{path}" for tip in tips for path in paths]))
    return [b"\n".join(filter(None, logs[n :: len(paths)])) for n in range(len(paths))]


def _lines(log: bytes) -> list[list[str]]:
    """Return the words of each line of a log."""
    return [line.split(" ") for line in log.decode(errors="replace").splitlines()]


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


def _decoded(value: bytes) -> str:
    """Return a value of a metadata log as text; an empty one where it cannot be read."""
    with contextlib.suppress(ValueError):
        plain = base64.b64decode(value[1:], validate=True) if value[:1] == b"!" else value
        return plain.decode()
    return ""
