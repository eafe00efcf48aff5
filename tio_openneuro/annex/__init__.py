"""Content of annex keys in one clone: what downloads it, and the children that do what is left.

Owns git and git-annex processes: nobody else starts one, but DataLad's clone. Promises that every
wait is bounded. Never decides what is fetched, and keeps no account.
"""

from tio_openneuro.annex.branch import (
    SpecialRemote,
    branch_tips,
    configured_uuids,
    git_config,
    git_folder,
    is_amazon,
    is_tuned,
    refuse_bombs,
    special_remotes,
)
from tio_openneuro.annex.environment import child_environment
from tio_openneuro.annex.messages import clone_error, verification
from tio_openneuro.annex.processes import CommandError, Coprocess, reading, run
from tio_openneuro.annex.repo import AnnexRepo
from tio_openneuro.annex.tree import index_tree, object_facts, read_blobs

__all__ = [
    "AnnexRepo",
    "CommandError",
    "Coprocess",
    "SpecialRemote",
    "branch_tips",
    "child_environment",
    "clone_error",
    "configured_uuids",
    "git_config",
    "git_folder",
    "index_tree",
    "is_amazon",
    "is_tuned",
    "object_facts",
    "read_blobs",
    "reading",
    "refuse_bombs",
    "run",
    "special_remotes",
    "verification",
]
