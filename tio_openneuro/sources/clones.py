"""Clone a dataset through DataLad: without checkout, private, and with no remote enabled.

DataLad runs in a process of its own: its loggers and import stay out of ours, its chatter is
kept for error messages, and a clone that hangs is ended. Nothing of the dataset is executed, no
hook, filter, procedure or submodule, and git-annex sees the clone only once that is settled.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path

from tio_openneuro.annex import CommandError, MissingProgramError, branch_ref, run
from tio_openneuro.errors import NotAnAnnexError, RemoteUnavailableError, TioOpenNeuroError

_CLONE_TIMEOUT_S = 3600.0
_INIT_TIMEOUT_S = 300.0
_PARTIAL_PREFIX = ".partial-"
_DATALAD = """
import logging, sys
logging.disable(logging.CRITICAL)
from datalad.support.exceptions import CommandError
from datalad.support.gitrepo import GitRepo
try:
    GitRepo.clone(sys.argv[1], sys.argv[2], clone_options=sys.argv[3:])
except CommandError as error:
    sys.exit(error.stderr or str(error))
"""
_NO_CHECKOUT = (
    "--no-checkout",
    "--no-recurse-submodules",
    "--template=",
    "--config=annex.private=true",
    "--config=remote.origin.annex-ignore=true",
)
_UNKNOWN = re.compile(
    r"not found|could not read Username|Authentication failed|does not exist|"
    r"returned error: 40[134]|[Pp]ermission denied",
)
_NETWORK = re.compile(
    r"[Cc]ould not resolve|[Ff]ailed to connect|Connection|timed out|unable to access|"
    r"[Cc]ould not read from remote|returned error: 5\d\d|early EOF|hung up",
)
_NO_REPOSITORY = re.compile(r"not appear to be a git repository|not valid: is this a git repo")


def hide_password(url: str) -> str:
    """Return a URL for messages, without what may stand before ``@``."""
    return re.sub(r"(?<=://)[^/@]+@", "", url)


def clone_into(url: str, target: Path, *, title: str) -> None:
    """Clone and initialise into a folder that is there wholly or not at all.

    Works in a sibling, which is renamed at the end and removed when anything fails; what a kill
    leaves is removed by the next call. The caller keeps others away from the target.

    Args:
        url: What git is to clone.
        target: The clone's folder, not there yet.
        title: How messages name the dataset.

    Raises:
        RemoteUnavailableError: There is no such dataset, or no network.
        NotAnAnnexError: It is no git repository, or has no git-annex branch.
        MissingProgramError: git, git-annex or DataLad is not installed.
    """
    prefix = f"{_PARTIAL_PREFIX}{target.name}-"
    for stale in target.parent.glob(f"{prefix}*"):
        _remove(stale)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        clone = work / "clone"
        _clone(url, clone, title)
        if branch_ref(clone) is None:
            message = (
                f"Cannot use {title}: the repository at {hide_password(url)} has no git-annex "
                f"branch, so that its content is nowhere on record. Choose another dataset."
            )
            raise NotAnAnnexError(message)
        initialise(clone)
        run(["git", "config", "tio-openneuro.url", hide_password(url)], cwd=clone)
        clone.rename(target)
    finally:
        _remove(work)


def initialise(clone: Path) -> None:
    """Make a clone of ours an annex, enabling no remote."""
    try:
        run(
            ["git", "annex", "init", "--quiet", "--no-autoenable", "tio-openneuro"],
            cwd=clone,
            timeout_s=_INIT_TIMEOUT_S,
        )
    except CommandError as error:
        if "is not a git command" in error.stderr:
            message = (
                "Cannot run git-annex: it is not installed, or not on the path. Install it with "
                "'pip install git-annex' or your system's packages."
            )
            raise MissingProgramError(message) from error
        raise


def fetch(clone: Path, *, title: str) -> None:
    """Fetch new commits and tags into a clone of ours, and let git-annex take them in.

    Raises:
        RemoteUnavailableError: The dataset cannot be reached.
    """
    command = ["git", "fetch", "--quiet", "--tags", "--no-recurse-submodules", "origin"]
    try:
        run(command, cwd=clone, timeout_s=_CLONE_TIMEOUT_S)
    except CommandError as error:
        raise _explained(error, title, "fetch new versions of", "") from error


def _clone(url: str, clone: Path, title: str) -> None:
    command = [sys.executable, "-c", _DATALAD, url, str(clone), *_NO_CHECKOUT]
    run(["git", "--version"])
    try:
        run(command, cwd=clone.parent, timeout_s=_CLONE_TIMEOUT_S)
    except CommandError as error:
        if "No module named 'datalad'" in error.stderr:
            message = "Cannot clone: DataLad is not installed. Run 'pip install datalad'."
            raise MissingProgramError(message) from error
        raise _explained(error, title, "clone", url) from error


def _explained(error: CommandError, title: str, what: str, url: str) -> TioOpenNeuroError:
    """Return the error that git's words mean."""
    said = hide_password(error.stderr or str(error)).strip()
    lines = [line for line in said.splitlines() if "fatal" in line or "error" in line.lower()]
    short = " ".join(lines or said.splitlines()[-3:])[:500]
    place = f" ({hide_password(url)})" if url else ""
    if _NO_REPOSITORY.search(said):
        message = (
            f"Cannot {what} {title}{place}: there is no git repository. Give an accession like "
            f"'ds004199', a git URL, or the path of a clone. git said: {short}"
        )
        return NotAnAnnexError(message)
    if _NETWORK.search(said) and not _UNKNOWN.search(said):
        message = (
            f"Cannot {what} {title}{place}: the server cannot be reached. Look at the network, "
            f"and try again; a dataset that was cloned before works without. git said: {short}"
        )
        return RemoteUnavailableError(message)
    if _UNKNOWN.search(said):
        message = (
            f"Cannot {what} {title}{place}: there is no such dataset, or it is not public (404). "
            f"Look at the accession on openneuro.org. git said: {short}"
        )
        return RemoteUnavailableError(message)
    message = f"Cannot {what} {title}{place}: {short or error}"
    return RemoteUnavailableError(message)


def _remove(folder: Path) -> None:
    """Remove a folder with git-annex's write-protected ones in it, as far as it goes."""
    for inside in (folder, *folder.rglob("*")):
        if inside.is_dir() and not inside.is_symlink():
            inside.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
