"""Watch from outside how many bytes a root holds. A program of its own: standard library only.

Run as ``python observer.py ROOT INTERVAL_S``. It writes a line ``TIME BYTES`` for each sample and
ends when a line comes on its standard input, or when that ends, as with its parent. It shares
nothing with the code that it watches, neither modules nor the turns of one interpreter.
"""

import contextlib
import os
import sys
import threading
import time

# Below a clone's .git: whole content, downloads under way, what failed its checksum. The rest of
# .git is git's own metadata.
_CONTENT_FOLDERS = ("objects", "tmp", "bad")
_LEDGER = "ledger"


def held_bytes(root: str) -> int:
    """Return a lower bound of the bytes that the root holds at one instant of the call.

    Everything under the root counts but git's own metadata and the ledger. Each file is looked
    at twice, and counts if it is there both times, with its first size: whatever is dropped
    meanwhile cannot be added to what comes after it, so that a sample above the budget is proof.

    Args:
        root: Folder of clones and ledger; may not exist yet.
    """
    found: dict[tuple[int, int], tuple[str, int]] = {}  # by inode: a renamed file counts once
    _collect(root, found, skipped=_LEDGER)
    total_bytes = 0
    for inode, (path, size_bytes) in found.items():
        still_there = _inode(path) == inode
        total_bytes += size_bytes if still_there else 0
    return total_bytes


def _collect(
    folder: str, found: dict[tuple[int, int], tuple[str, int]], *, skipped: str = ""
) -> None:
    """Put every file below a folder into ``found``."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name == skipped:
                continue
            if entry.name == ".git":
                for name in _CONTENT_FOLDERS:
                    _collect(os.path.join(entry.path, "annex", name), found)  # noqa: PTH118
            elif entry.is_dir(follow_symlinks=False):
                _collect(entry.path, found)
            else:
                with contextlib.suppress(FileNotFoundError):
                    status = os.lstat(entry.path)
                    found[status.st_dev, status.st_ino] = (entry.path, status.st_size)


def _inode(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def main(root: str, interval_s: float) -> None:
    """Sample until standard input says a line, or ends."""
    ended = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.buffer.readline()  # a line, or the end of the parent
        ended.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    while True:
        last = ended.is_set()  # one more sample after the end was asked for
        sys.stdout.write(f"{time.time():.6f} {held_bytes(root)}\n")
        sys.stdout.flush()
        if last:
            return
        ended.wait(interval_s)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
