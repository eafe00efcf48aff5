"""From an accession, URL or path to a clone at a commit.

Owns the clones under the root: made once, through DataLad, shared by every process, reused
offline, and fetched only for a version that they do not have. Clones of the user's are used where
they are, and nothing is written there. Fetches no content.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import filelock

from tio_openneuro.annex import (
    AnnexRepo,
    CommandError,
    branch_tips,
    git_folder,
    is_tuned,
    object_facts,
    run,
)
from tio_openneuro.errors import NotAnAnnexError, TioOpenNeuroError
from tio_openneuro.roots import refuse_root
from tio_openneuro.sources.clones import clone_into, fetch, hide_password, remove
from tio_openneuro.sources.remotes import enable, usable

_LOG = logging.getLogger(__name__)

_ACCESSION = re.compile(r"ds\d{6}")
# A dataset of OpenNeuro as people name it, with or without a version: its id (zeros left out), its
# page's or repository's address, its DOI, or DataLad's name for it.
_NAMED = re.compile(
    r"(?i)(?:(?:https?://)?(?:www\.)?(openneuro\.org/datasets/|github\.com/OpenNeuroDatasets/)|"
    r"OpenNeuroDatasets/|///openneuro/|(?:https?://doi\.org/|doi:)?10\.18112/openneuro\.)?"
    r"ds(\d{6}|[1-9]\d{0,4})(?:\.git)?(?:(?:@|/versions/|/tree/|\.v(?=\d))([^\s/?#]+))?"
    r"(?(1)(?:[/?#].*)?|)"
)
_ACCESSION_URL = "https://github.com/OpenNeuroDatasets/{}.git"
_URL = re.compile(r"(https?|ssh|git|file)://.+|[\w.-]+@[\w.-]+:.+")
_LOCK_TIMEOUT_S = 3600.0
_TAG_FORMAT = "%(creatordate:unix) %(refname:short)"
_OLD_S = 30 * 86400.0
_SNAPSHOT = re.compile(r"\d+(\.\d+)+")


@dataclass(frozen=True)
class InstalledDataset:
    """A clone, and the version of it that is wanted.

    Attributes:
        dataset_id: Accession, or the name of the repository or folder.
        path: The clone's folder.
        commit: The commit, 40 hex digits.
        version: Tag or branch that led to it; the commit where neither did.
        remotes: Annex remotes that may be used, in order.
        uuids: Their ids, of those that are perhaps not enabled in a clone of the user's.
    """

    dataset_id: str
    path: Path
    commit: str
    version: str
    remotes: tuple[str, ...]
    uuids: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Forgotten:
    """What became of a clone that was to be forgotten.

    Attributes:
        clone: Its folder.
        dropped_bytes: Bytes of content dropped.
        removed: Whether it was removed.
        kept: What of the user's it holds, for which it stays.
    """

    clone: Path
    dropped_bytes: int
    removed: bool
    kept: tuple[str, ...] = ()


def install(
    source: str | Path,
    root: Path,
    *,
    version: str | None = None,
    remotes: tuple[str, ...] | None = None,
) -> InstalledDataset:
    """Make sure that a clone with the wanted version is there, and describe it.

    Killed at any point, it leaves a whole clone or none; what is left is cleared by the next
    call. Without network it works where the version is in the clone.

    Args:
        source: Accession, git URL (https, http, ssh, git, file), git bundle, or path of a clone.
            Where no such path exists, also what :func:`identify` takes for an accession.
        root: Folder under which clones are kept.
        version: Tag, branch or commit; None: the one that the source names, else the newest
            snapshot tag in the clone, else the default branch.
        remotes: Names of further annex remotes to trust.

    Raises:
        NotAnAnnexError: The source is no git-annex dataset.
        RemoteUnavailableError: It does not exist, or there is no network.
        UnsafeDatasetError: Its public remote is not what it should be.
        TioOpenNeuroError: There is no such version or remote.
    """
    names = tuple(remotes or ())
    clones = Path(root).expanduser().absolute() / "clones"
    found, version = identify(source, version)
    if isinstance(found, _Origin):
        return _install_own(found, clones, version, names)
    if found.is_dir():
        return _use_where_it_is(found.resolve(), version, names)
    if found.is_file():
        return _install_own(_Origin.of_url(str(found.resolve())), clones, version, names)
    raise NotAnAnnexError(f"Cannot use {str(source)!r} as a dataset: {_nowhere(source, found)}")


def identify(source: str | Path, version: str | None = None) -> tuple[_Origin | Path, str | None]:
    """Return where a dataset comes from, or its path; and the version that is wanted.

    An id of OpenNeuro may lack zeros or be written large, follow the address of its page or
    repository or stand in a DOI, and name a version (``ds004199@1.0.6``). What exists as a path
    is that path, unless it is an accession as it should be.

    Raises:
        TioOpenNeuroError: It names another version than the one that is wanted.
    """
    folder, text = local_path(source), str(source).strip()
    if isinstance(source, Path) or (os.path.lexists(folder) and not _ACCESSION.fullmatch(source)):
        return folder, version
    named = _NAMED.fullmatch(text)
    if named is None:
        return (_Origin.of_url(text) if _URL.fullmatch(text) else folder), version
    accession, within = f"ds{int(named[2]):06}", named[3]
    if within and version not in {None, within}:
        message = f"Cannot use {text!r} with version={version!r}: these are two versions."
        raise TioOpenNeuroError(f"{message} Leave one out.")
    return _Origin(accession, accession, _ACCESSION_URL.format(accession)), within or version


def local_path(source: str | Path) -> Path:
    """Return a source as a path, whether or not it is one; an empty one is not where we are."""
    return Path(os.path.expanduser(source or "''"))  # noqa: PTH111 - Path's raises at ~nobody


def _nowhere(source: str | Path, folder: Path) -> str:
    """Say what a source is not, and what to type instead."""
    number = re.search(r"(?i)(?:ds[-_ ]?|^(?=\d+\s*$))(\d{1,6})(?!\d)", str(source))
    accession = f" For OpenNeuro's own give {f'ds{int(number[1]):06}'!r} alone." if number else ""
    if isinstance(source, Path) or re.search(r"[/\\]|^[.~]", source):
        path = folder.absolute()
        there = next(parent for parent in path.parents if os.path.lexists(parent))
        return f"there is no {path}; of it {there} exists. Look at the path.{accession}"
    what = "it is no accession (like 'ds004199'), no git URL (https, ssh, file) and no path"
    return f"{what} that exists. Look at the spelling.{accession}"


def _install_own(
    origin: _Origin, clones: Path, version: str | None, names: tuple[str, ...]
) -> InstalledDataset:
    clone = clones / origin.folder_name
    title = origin.dataset_id
    with _locked(clones / f".{origin.folder_name}.lock", clone, title):
        if clone.exists() and git_folder(clone) is None:
            raise NotAnAnnexError(
                f"Cannot use the clone of {title} in {clone}: it is damaged. Delete the folder, "
                f"and it is cloned again."
            )
        if not clone.exists():
            clone_into(origin.url, clone, title=title)
        found = _resolve(clone, version)
        if found is None:
            try:
                fetch(clone, title=title, version=version or "")
            except TioOpenNeuroError as error:
                known = ", ".join(_tags(clone)[:12]) or "no tags"
                message = f"{error} Its clone in {clone} has {known}, and works without."
                raise type(error)(message) from error
            found = _resolve(clone, version)
        elif re.fullmatch(r"[0-9a-f]+", found[1]) is None:
            _warn_of_age(clone, title, found[1])
        enabled = enable(clone, names)
    return _described(title, clone, found, version, enabled)


def _use_where_it_is(folder: Path, version: str | None, names: tuple[str, ...]) -> InstalledDataset:
    if git_folder(folder) is None:
        raise NotAnAnnexError(
            f"Cannot use {folder}: it is not the root of a git repository. Give the root of a "
            f"clone, an accession, or a BIDS folder."
        )
    try:
        refs = branch_tips(folder)
    except CommandError as error:
        message = f"Cannot use {folder}: git cannot read it. git said: {error.stderr[:500]}"
        raise NotAnAnnexError(message) from error
    if not refs:
        raise NotAnAnnexError(
            f"Cannot use {folder}: it is a git repository without a git-annex branch, so that "
            f"nothing in it is annexed. Give a clone of a DataLad or git-annex dataset."
        )
    uuids = usable(folder, names)
    found = _resolve(folder, version)
    return _described(folder.name, folder, found, version, tuple(uuids), uuids)


def _warn_of_age(clone: Path, title: str, version: str) -> None:
    """Say that what is used may be old, where its clone did not ask for a long time."""
    files = [clone / ".git" / name for name in ("HEAD", "FETCH_HEAD")]
    asked_s = max(file.stat().st_mtime for file in files if file.exists())
    if time.time() - asked_s > _OLD_S:
        _LOG.warning(
            "%s is used at %s, the newest that its clone knew on %s; it may be old. Name a newer "
            "one with version=, or run 'tio-openneuro forget' to have it cloned anew.",
            *(title, version, time.strftime("%Y-%m-%d", time.localtime(asked_s))),
        )


def forget(source: str | Path, root: Path, drop: Callable[[Path], int]) -> Forgotten:
    """Remove the clone of a source, unless it is the user's or holds anything of theirs.

    Args:
        source: As for :func:`install`.
        root: Folder under which clones are kept.
        drop: Drops what is held of a clone and forgets it, or raises; returns the bytes.

    Raises:
        NotAnAnnexError: There is no such clone, or it is no repository any more.
    """
    root = Path(root).expanduser().absolute()
    found, version = identify(source)
    if version is not None:
        message = f"Cannot forget {source}: one clone holds all versions. Leave the version out."
        raise TioOpenNeuroError(message)
    if isinstance(found, Path) and git_folder(found) is not None:
        dropped_bytes = drop(found.resolve())
        beside = AnnexRepo(found.resolve(), root=root).beside
        if beside is not None and beside.exists():
            remove(beside)
        return Forgotten(found.resolve(), dropped_bytes, removed=False)
    origin = found if isinstance(found, _Origin) else _Origin.of_url(str(found.resolve()))
    clone = root / "clones" / origin.folder_name
    if clone.is_dir() and git_folder(clone) is None:
        raise NotAnAnnexError(
            f"Cannot forget {source}: {clone} is no git repository any more, so that nobody can "
            f"tell what in it is yours. Look at it, move or delete it, and forget it then."
        )
    with _locked(clone.parent / f".{origin.folder_name}.lock", clone, origin.dataset_id):
        dropped_bytes = drop(clone)
        kept = _of_the_user(clone) if clone.is_dir() else []
        if not kept:
            remove(clone)
    return Forgotten(clone, dropped_bytes, removed=not kept, kept=tuple(kept))


def _of_the_user(clone: Path) -> list[str]:
    """Return what is not this library's in a clone of ours: content, files, commits."""
    stored = [each.key_name for each in AnnexRepo(clone).stored() if not each.partial]
    files = [path.name for path in clone.iterdir() if path.name != ".git"]
    # Stashes as well; without the brackets git would look for refs below that one.
    own = ["--glob=refs/stas[h]", "--not", "--remotes", "--tags", "--glob=refs/gone"]
    command = ["git", "rev-list", "--max-count=1", "--exclude=git-annex", "--branches", *own]
    return stored + files + run(command, cwd=clone).decode().split()


def _described(
    dataset_id: str,
    clone: Path,
    found: tuple[str, str] | None,
    version: str | None,
    remotes: tuple[str, ...],
    uuids: Mapping[str, str] | None = None,
) -> InstalledDataset:
    if is_tuned(clone):
        raise NotAnAnnexError(
            f"Cannot use {dataset_id}: its annex keeps content in a layout of its own "
            f"(annex.tune), where what {clone} holds could not be counted. Use a clone of it that "
            f"was made without, or another dataset."
        )
    if found is None:
        tags = _tags(clone)
        known = f"its tags are {', '.join(tags[:12])}" if tags else "it has no tags"
        how = "or a commit" if uuids is None else f"a commit, or run 'git fetch --tags' in {clone}"
        raise TioOpenNeuroError(
            f"Cannot find version {version!r} of {dataset_id}: {known}. Give one of them, {how}."
        )
    return InstalledDataset(dataset_id, clone, *found, remotes, uuids or {})


def _resolve(clone: Path, version: str | None) -> tuple[str, str] | None:
    """Return commit and name of a version; None where the clone does not have it."""
    if version is not None:
        if "\n" in version:
            return None
        kinds = ("tags", "remotes/origin", "heads", "gone")
        refs = [f"refs/{kind}/{version}" for kind in kinds]
        names = [(ref, version) for ref in refs]
        if re.fullmatch(r"[0-9a-fA-F]{4,64}", version):
            names.append((version, ""))
    else:
        names = [(f"refs/tags/{tag}", tag) for tag in _tags(clone)[:1]]
        default = _default_branch(clone)
        names += [(ref, ref.removeprefix("refs/").partition("/")[2]) for ref in default]
    asked = [f"{ref}^{{commit}}" for ref, _ in names]
    for commit, (ref, name) in zip(object_facts(clone, "objectname", asked), names, strict=True):
        if commit is not None:
            if ref.startswith("refs/gone/"):
                _LOG.warning("%s of %s was withdrawn by its owners.", name, clone)
            return commit.decode(), name.removeprefix("origin/") or commit.decode()
    return None


def _default_branch(clone: Path) -> tuple[str, ...]:
    """Return the refs that may be the default branch, the likeliest first."""
    command = ["git", "for-each-ref", "--format=%(symref)", "refs/remotes/origin/HEAD"]
    head = run(command, cwd=clone).decode().strip()
    named = [
        f"refs/{kind}/{name}" for kind in ("remotes/origin", "heads") for name in ("main", "master")
    ]
    return tuple(filter(None, (head, *named, "HEAD")))


def _tags(clone: Path) -> list[str]:
    """Return the tags, the newest first; the higher snapshot first among those of one time."""
    listed = run(["git", "for-each-ref", f"--format={_TAG_FORMAT}", "refs/tags"], cwd=clone)
    dated = []
    for line in listed.decode(errors="replace").splitlines():
        date, _, tag = line.partition(" ")
        if date.isdigit():
            numbers = tuple(map(int, tag.split("."))) if _SNAPSHOT.fullmatch(tag) else ()
            dated.append((int(date), numbers, tag))
    return [tag for _, _, tag in sorted(dated, reverse=True)]


@dataclass(frozen=True)
class _Origin:
    """Where a clone of ours comes from: its id, the name of its folder, and what git clones."""

    dataset_id: str
    folder_name: str
    url: str

    @classmethod
    def of_url(cls, url: str) -> _Origin:
        """Name the dataset after the URL's last part; no two URLs share a folder."""
        last = re.split(r"[/:\\]", url.rstrip("/\\"))[-1]
        name = re.sub(r"\.(git|bundle)$", "", last)
        name = re.sub(r"[^\w.-]", "_", name).lstrip(".-") or "dataset"
        digest = hashlib.sha256(hide_password(url).encode()).hexdigest()
        return cls(name, f"{name[:60]}-{digest[:10]}", url)


@contextlib.contextmanager
def _locked(path: Path, clone: Path, title: str) -> Iterator[None]:
    """Hold the lock of one clone, among all processes; no lock stays where no clone came to be.

    Nor does a folder that was not there before; one that was there is the user's.
    """
    refuse_root(path.parent.parent)
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = filelock.FileLock(path, timeout=_LOCK_TIMEOUT_S)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise TioOpenNeuroError(
            f"Cannot clone {title}: another process has held {path} for {_LOCK_TIMEOUT_S:.0f} s. "
            f"Look what it does."
        ) from error
    try:
        yield
    finally:
        if not clone.exists():
            # Who waits for this lock sees that its file is gone, and makes a new one.
            with contextlib.suppress(OSError):
                path.unlink()
                for folder in made:
                    folder.rmdir()
        lock.release()
