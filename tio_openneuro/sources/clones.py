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

from tio_openneuro.annex import CommandError, branch_tips, clone_error, run
from tio_openneuro.errors import NotAnAnnexError

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


def hide_password(url: str) -> str:
    """Return a URL, or words with one, without name and password before ``@``."""
    return re.sub(r"(?<=://)[^/@]+@|\b[^\s/@:]+:[^\s/@]+@", "", url)


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
        if not branch_tips(clone):
            raise NotAnAnnexError(
                f"Cannot use {title}: the repository at {hide_password(url)} has no git-annex "
                f"branch, so that its content is nowhere on record. Choose another dataset."
            )
        initialise(clone)
        run(["git", "config", "tio-openneuro.url", hide_password(url)], cwd=clone)
        clone.rename(target)
    finally:
        _remove(work)


def initialise(clone: Path) -> None:
    """Make a clone an annex, enabling no remote."""
    command = ["git", "annex", "init", "--quiet", "--no-autoenable", "tio-openneuro"]
    run(command, cwd=clone, timeout_s=_INIT_TIMEOUT_S)


def fetch(clone: Path, *, title: str) -> None:
    """Fetch new commits and tags into a clone of ours, and let git-annex take them in.

    Raises:
        RemoteUnavailableError: The dataset cannot be reached.
    """
    command = ["git", "fetch", "--quiet", "--tags", "--no-recurse-submodules", "origin"]
    _reach(command, clone, f"fetch new versions of {title}")


def _clone(url: str, clone: Path, title: str) -> None:
    run(["git", "--version"])
    command = [sys.executable, "-c", _DATALAD, url, str(clone), *_NO_CHECKOUT]
    _reach(command, clone.parent, f"clone {title} ({hide_password(url)})")


def _reach(command: list[str], folder: Path, act: str) -> None:
    """Run what needs the network, and raise what git's words mean."""
    try:
        run(command, cwd=folder, timeout_s=_CLONE_TIMEOUT_S)
    except CommandError as error:
        raise clone_error(act, hide_password(error.stderr or str(error))) from error


def _remove(folder: Path) -> None:
    """Remove a folder with git-annex's write-protected ones in it, as far as it goes."""
    for inside in (folder, *folder.rglob("*")):
        if inside.is_dir() and not inside.is_symlink():
            inside.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
