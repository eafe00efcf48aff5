"""From an accession, URL or path to a clone at a commit.

Owns the clones under the root: made once, through DataLad, shared by every process, reused
offline, and fetched only for a version that they do not have. Clones of the user's are used where
they are, and not changed, but that one which plain git made becomes an annex. Fetches no content.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock

from tio_openneuro.annex import CommandError, branch_tips, git_config, git_folder, object_facts, run
from tio_openneuro.errors import NotAnAnnexError, TioOpenNeuroError
from tio_openneuro.sources.clones import clone_into, fetch, hide_password, initialise
from tio_openneuro.sources.remotes import already_enabled, enable

_LOG = logging.getLogger(__name__)

_ACCESSION = re.compile(r"ds\d{6}")
_ACCESSION_URL = "https://github.com/OpenNeuroDatasets/{}.git"
_URL = re.compile(r"(https?|ssh|git|file)://.+|[\w.-]+@[\w.-]+:.+")
_LOCK_TIMEOUT_S = 3600.0
_TAG_FORMAT = "%(creatordate:unix) %(refname:short)"
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
    """

    dataset_id: str
    path: Path
    commit: str
    version: str
    remotes: tuple[str, ...]


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
        root: Folder under which clones are kept.
        version: Tag, branch or commit; None: the newest snapshot tag in the clone, else the
            default branch.
        remotes: Names of further annex remotes to trust.

    Raises:
        NotAnAnnexError: The source is no git-annex dataset.
        RemoteUnavailableError: It does not exist, or there is no network.
        UnsafeDatasetError: Its public remote is not what it should be.
        TioOpenNeuroError: There is no such version or remote.
    """
    names = tuple(remotes or ())
    clones = Path(root).expanduser().absolute() / "clones"
    folder = Path(source).expanduser()
    if isinstance(source, str) and _ACCESSION.fullmatch(source):
        origin = _Origin(source, source, _ACCESSION_URL.format(source))
        return _install_own(origin, clones, version, names)
    if isinstance(source, str) and _URL.fullmatch(source):
        return _install_own(_Origin.of_url(source), clones, version, names)
    if folder.is_dir():
        return _use_where_it_is(folder.resolve(), clones, version, names)
    if folder.is_file():
        return _install_own(_Origin.of_url(str(folder.resolve())), clones, version, names)
    raise NotAnAnnexError(
        f"Cannot use {str(source)!r} as a dataset: it is no accession (like 'ds004199'), no git "
        f"URL (https, ssh, file), and no such path exists. Look at the spelling."
    )


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
            fetch(clone, title=title)
            found = _resolve(clone, version)
        usable = enable(clone, names)
    return _described(title, clone, found, version, usable)


def _use_where_it_is(
    folder: Path, clones: Path, version: str | None, names: tuple[str, ...]
) -> InstalledDataset:
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
    if not _is_annex(folder):
        _begin_annex(folder, clones, names)
    usable = already_enabled(folder, names)
    return _described(folder.name, folder, _resolve(folder, version), version, usable)


def _is_annex(folder: Path) -> bool:
    return bool(git_config(folder, r"^annex\.uuid$", "--local"))


def _begin_annex(folder: Path, clones: Path, names: tuple[str, ...]) -> None:
    """Initialise a clone that plain git made, as git-annex would at its first use there.

    Unlike git-annex we enable no remote but those that may be used, and record nothing of the
    clone in its git-annex branch.
    """
    digest = hashlib.sha256(str(folder).encode()).hexdigest()
    with _locked(clones / f".{digest[:16]}.lock", folder, folder.name):
        if _is_annex(folder):
            return
        try:
            run(["git", "config", "annex.private", "true"], cwd=folder)
            initialise(folder)
        except CommandError as error:
            raise NotAnAnnexError(
                f"Cannot use {folder}: git-annex was never initialised there, and 'git annex "
                f"init' fails: {error.stderr[:500] or error}. Look whether you may write there, "
                f"or give the accession or URL instead."
            ) from error
        enable(folder, names)
        _LOG.info("Initialised git-annex in %s, for its first use there", folder)


def _described(
    dataset_id: str,
    clone: Path,
    found: tuple[str, str] | None,
    version: str | None,
    remotes: tuple[str, ...],
) -> InstalledDataset:
    if found is None:
        tags = _tags(clone)
        known = f"its tags are {', '.join(tags[:12])}" if tags else "it has no tags"
        raise TioOpenNeuroError(
            f"Cannot find version {version!r} of {dataset_id}: {known}. Give one of them, or a "
            f"commit."
        )
    return InstalledDataset(dataset_id, clone, *found, remotes)


def _resolve(clone: Path, version: str | None) -> tuple[str, str] | None:
    """Return commit and name of a version; None where the clone does not have it."""
    if version is not None:
        if "\n" in version:
            return None
        refs = (f"refs/tags/{version}", f"refs/remotes/origin/{version}", f"refs/heads/{version}")
        names = [(ref, version) for ref in refs]
        if re.fullmatch(r"[0-9a-fA-F]{4,64}", version):
            names.append((version, ""))
    else:
        names = [(f"refs/tags/{tag}", tag) for tag in _tags(clone)[:1]]
        default = _default_branch(clone)
        names += [(ref, ref.removeprefix("refs/").partition("/")[2]) for ref in default]
    asked = [f"{ref}^{{commit}}" for ref, _ in names]
    for commit, (_, name) in zip(object_facts(clone, "objectname", asked), names, strict=True):
        if commit is not None:
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
    """Hold the lock of one clone, among all processes; no lock stays where no clone came to be."""
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
                clone.parent.rmdir()
                clone.parent.parent.rmdir()
        lock.release()
