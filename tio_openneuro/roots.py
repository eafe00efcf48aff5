"""Whether a folder can be a root of clones and ledger, told before anything is made there. Pure.

Reads the mount table and folder entries; makes and changes nothing.
"""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

import psutil

from tio_openneuro.errors import LedgerError

# SQLite takes paths of 512 bytes; a clone's own files lie 300 bytes deeper, in limits of 4096.
_LONGEST_BYTES = 450
_LONGEST_NAME_BYTES = 255
# Also as programs mount them, with "fuse." before it.
_NETWORK_TYPES = re.compile(
    r"(fuse\.)?(9p|afs|beegfs|blobfuse2?|ceph(-fuse)?|cifs|cvmfs2|drvfs|gcsfuse|glusterfs|goofys|"
    r"gpfs|juicefs|lustre|mount-s3|ncpfs|nfs4?|orangefs|panfs|prl_fs|pvfs2|rclone|s3fs|smb[23]?|smbfs|"
    r"sshfs|vboxsf|virtiofs|vmhgfs(-fuse)?|wekafs)"
)


def network_type(path: Path, mounts: list[tuple[str, str]] | None = None) -> tuple[str, str] | None:
    """Return mount point and type of the network file system that holds the path, if one does.

    Args:
        path: Absolute; need not exist.
        mounts: Mount points with their types; default: this machine's.
    """
    if mounts is None:
        mounts = [(part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)]
    real = Path(os.path.realpath(path))
    holding = [(point, kind) for point, kind in mounts if real.is_relative_to(point)]
    if not holding:
        return None
    # Of several mounts on one point the last is the one that is seen.
    longest = max(len(point) for point, _ in holding)
    point, kind = [mount for mount in holding if len(mount[0]) == longest][-1]
    return (point, kind) if _NETWORK_TYPES.fullmatch(kind.lower()) else None


def refuse_root(root: Path) -> None:
    """Refuse a root that cannot hold clones and ledger; make nothing.

    Args:
        root: Absolute; need not exist.

    Raises:
        LedgerError: It cannot, and why.
    """
    if why := _complaint(root):
        # Of a long path the end; as Python writes it, in one line whatever is in it.
        shown = str(root) if len(str(root)) <= _LONGEST_NAME_BYTES else f"…{str(root)[-80:]}"
        raise LedgerError(
            f"Cannot use {shown!r} as the root: {why}. Give another with --root, root= or "
            f"TIO_OPENNEURO_ROOT."
        )


def _complaint(root: Path) -> str:
    """Return why a root cannot be used; empty where it can."""
    text, real = str(root), os.path.realpath(root)
    if any(unicodedata.category(letter) in {"Cc", "Cs"} for letter in text + real):
        return "its path has control characters, or is not UTF-8, which git-annex does not bear"
    longest, name = (max(len(os.fsencode(p)) for p in ps) for ps in ((text, real), root.parts))
    if longest > _LONGEST_BYTES or name > _LONGEST_NAME_BYTES:
        most = f"{_LONGEST_BYTES}, {_LONGEST_NAME_BYTES} in one name"
        return f"its path has {longest} bytes, and a root may have {most}"
    there = next(path for path in (root, *root.parents) if os.path.lexists(path))
    if not os.path.isdir(there):  # noqa: PTH112 - of a loop of links pathlib raises
        return (
            f"{there} is {'a link to no folder' if there.is_symlink() else 'no folder but a file'}"
        )
    if network := network_type(root):
        return (
            f"{network[0]} is a network file system ({network[1]}), where machines cannot share a "
            f"ledger. On a cluster $SLURM_TMPDIR or another disk of the node can, or /dev/shm (RAM)"
        )
    for folder in (there, *[root / name for name in ("clones", "ledger") if there == root]):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            return f"you may not write in {folder}, or its file system is read-only"
    return ""
