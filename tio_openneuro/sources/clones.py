"""Clone a dataset through DataLad: without checkout, private, and with no remote enabled.

DataLad runs in a process of its own: its loggers and import stay out of ours, its chatter is
kept for error messages, and a clone that hangs is ended. Nothing of the dataset is executed, no
hook, filter, procedure or submodule, and git-annex sees the clone only once that is settled.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import sys
import tempfile
from pathlib import Path

from tio_openneuro.annex import CommandError, branch_tips, clone_error, refuse_bombs, run
from tio_openneuro.errors import NotAnAnnexError

_LOG = logging.getLogger(__name__)

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
        # Another source's name may begin with this one's; mkdtemp adds no hyphen.
        if "-" not in stale.name.removeprefix(prefix):
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
        refuse_bombs(clone)
        command = ["git", "annex", "init", "--quiet", "--no-autoenable", "tio-openneuro"]
        run(command, cwd=clone, timeout_s=_INIT_TIMEOUT_S)
        run(["git", "config", "tio-openneuro.url", hide_password(url)], cwd=clone)
        clone.rename(target)
    finally:
        _remove(work)


def fetch(clone: Path, *, title: str, version: str) -> None:
    """Make a clone of ours what a new one would be, and say what is not as it was.

    Nothing is lost: what moved stays as a commit, what is gone under its name in ``refs/gone``.

    Args:
        clone: The clone's folder.
        title: How messages name the dataset.
        version: What is wanted; a commit is also asked for alone, as no tag may lead to it.

    Raises:
        RemoteUnavailableError: The dataset cannot be reached.
    """
    before = _refs(clone)
    asked = ["git", "-c", "gc.auto=0", "fetch", "--quiet", "--no-recurse-submodules"]
    refs = ("+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*")
    act = f"fetch new versions of {title}"
    _reach(["git", "ls-remote", "origin"], clone, act)
    _reach([*asked, "--prune", "origin", *refs], clone, act)
    refuse_bombs(clone)
    now = _refs(clone)
    for ref, old in before.items():
        new, name = now.get(ref, ""), ref.split("/")[-1]
        if old == new or (new and "/tags/" not in ref and _contains(clone, new, old)):
            continue
        run(["git", "update-ref", f"refs/gone/{old if new else name}", old], cwd=clone)
        _LOG.warning(
            "%s was changed by its owners: %s, which was %s, %s. Give version=%r for what it was.",
            *(title, name, old, f"is {new} now" if new else "is not there any more"),
            old if new else name,
        )
    if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", version):
        with contextlib.suppress(CommandError):
            run([*asked, "origin", version], cwd=clone, timeout_s=_CLONE_TIMEOUT_S)


def _refs(clone: Path) -> dict[str, str]:
    """Return the commits of what was fetched, by the refs' names."""
    command = ["git", "for-each-ref", "--format=%(refname) %(objectname) %(*objectname)"]
    listed = run([*command, "refs/tags", "refs/remotes/origin"], cwd=clone).decode()
    words = [line.split() for line in listed.splitlines() if "/origin/HEAD " not in line]
    return {name: commits[-1] for name, *commits in words}


def _contains(clone: Path, new: str, old: str) -> bool:
    with contextlib.suppress(CommandError):
        run(["git", "merge-base", "--is-ancestor", old, new], cwd=clone)
        return True
    return False


def remove(clone: Path) -> None:
    """Remove a folder of ours at once, as far as others can see; what a kill leaves, later."""
    prefix = f"{_PARTIAL_PREFIX}{clone.name}-"
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=clone.parent))
    with contextlib.suppress(FileNotFoundError):
        clone.rename(work / "clone")
    _remove(work)


def _clone(url: str, clone: Path, title: str) -> None:
    act = f"clone {title} ({hide_password(url)})"
    # A million tags cost git 1.4 GB to clone; listed first, they end at the bound on output.
    _reach(["git", "ls-remote", "--", url], clone.parent, act)
    _reach([sys.executable, "-c", _DATALAD, url, str(clone), *_NO_CHECKOUT], clone.parent, act)


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
