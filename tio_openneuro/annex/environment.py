"""The environment of child processes: where git-annex is, and nothing that it must not see."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from tio_openneuro.bounds import MEMORY_BYTES

_STRIPPED = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_COMMON_DIR",
    "GIT_NAMESPACE",
)
_IDENTITY = {
    "GIT_AUTHOR_NAME": "tio-openneuro",
    "GIT_AUTHOR_EMAIL": "tio-openneuro@localhost",
    "GIT_COMMITTER_NAME": "tio-openneuro",
    "GIT_COMMITTER_EMAIL": "tio-openneuro@localhost",
}
_GIT_CONFIG = (
    ("core.hooksPath", os.devnull),
    ("core.fsmonitor", "false"),
    ("protocol.ext.allow", "never"),
    ("submodule.recurse", "false"),
    ("fetch.recurseSubmodules", "false"),
    # What is larger passes through git, and is not held by it.
    ("core.bigFileThreshold", "4m"),
)


def scripts_folder() -> str:
    """Return the folder of this environment's programs, git-annex among them."""
    return sysconfig.get_path("scripts")


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for git, git-annex and DataLad.

    This interpreter's scripts folder comes first on the path, so that git finds git-annex
    without an activated environment. AWS credentials are stripped: with them git-annex signs its
    requests and leaves the public URL. So is what git sets for a hook that this may run in. An
    identity is there where the environment gives none. No hook, file-system monitor, ``ext::``
    transport or submodule recursion is left to git, nor more memory than a dataset needs.

    Args:
        extra: Variables that go over all of these.

    Returns:
        A new mapping.
    """
    environment = dict(os.environ)
    for name in _STRIPPED:
        environment.pop(name, None)
    path = environment.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != scripts_folder():
        environment["PATH"] = os.pathsep.join((scripts_folder(), path))
    for name, value in _IDENTITY.items():
        environment.setdefault(name, value)
    environment["GIT_TERMINAL_PROMPT"] = "0"
    environment["LC_ALL"] = "C.UTF-8"
    environment["GIT_ALLOC_LIMIT"] = str(MEMORY_BYTES)
    environment.update(extra or {})
    # Beside the settings that the environment carries.
    given = environment.get("GIT_CONFIG_COUNT", "0")
    first = int(given) if given.isdigit() else 0
    for number, (name, value) in enumerate(_GIT_CONFIG, start=first):
        environment[f"GIT_CONFIG_KEY_{number}"] = name
        environment[f"GIT_CONFIG_VALUE_{number}"] = value
    environment["GIT_CONFIG_COUNT"] = str(first + len(_GIT_CONFIG))
    return environment


def annex_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a coprocess, in which git finds git-annex's binary itself.

    What the wheel puts into the scripts folder is a Python script that starts the binary. That
    start costs a coprocess as much again as git-annex's own.

    Args:
        extra: Variables that go over all others.
    """
    environment = child_environment(extra)
    found = shutil.which("git-annex", path=environment["PATH"])
    wheel = importlib.util.find_spec("git_annex")
    if found is None or wheel is None or wheel.origin is None:
        return environment
    folder = Path(wheel.origin).parent
    binary = shutil.which("git-annex", path=str(folder))
    if binary is not None and Path(found).parent == Path(scripts_folder()):
        environment["PATH"] = os.pathsep.join((str(folder), environment["PATH"]))
        # As the script does.
        if (folder / "magic.mgc").exists():
            environment["MAGIC"] = str(folder / "magic.mgc")
    return environment
