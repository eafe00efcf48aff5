"""How much is believed of what a dataset states: bounds far above what datasets have.

A dataset is a stranger's. What it states is counted before it is read, or while it comes, and what
passes a bound raises :class:`~tio_openneuro.errors.UnsafeDatasetError` with the dataset, the number
and the bound. Owns the bounds and the words; the counting is done where things are read. Beside
each stands the most that ten datasets of OpenNeuro have (2026-11-30).
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tio_openneuro.errors import UnsafeDatasetError

# Files, links and folders of a tree: 6,330. Twice as many of the git-annex branch: 9,671.
ENTRIES = 500_000
# Bytes in which git lists them, 53 and the path each: 1 MB. Bytes of one path: 131.
LISTING_BYTES = 64 << 20
PATH_BYTES = 1024
# Bytes of a link: 217.
LINK_BYTES = 4096
# Bytes of a log of the git-annex branch: 48,594. Of all that are read at once: 2 MB.
LOG_BYTES = 1 << 20
LOGS_BYTES = 128 << 20
# Bytes of a sidecar: 334,530. Of all that are read at once, equal ones counted once.
TEXT_BYTES = 4 << 20
TEXTS_BYTES = 200 << 20
# Bytes of any other text that git holds: 3,121,901. Of an image that it holds: none.
FILE_BYTES = 64 << 20
IMAGE_BYTES = 1 << 30
# Bytes of participants.tsv and all tables of sessions: 16,041. Their rows times columns: 1,700;
# a cell takes 190 bytes of RAM. As many values may all units have together.
TABLES_BYTES = 16 << 20
CELLS = 1_500_000
# Bytes of whatever else git says at once, such as 400,000 tags.
OUTPUT_BYTES = 16 << 20
# Bytes that git may ask for at a time, for what it cannot stream: commits, tags, deltas.
MEMORY_BYTES = 160 << 20


def refuse_above(most: int, found: int, where: object, what: str) -> None:
    """Raise where there is more of something than is believed.

    Args:
        most: The bound.
        found: How much there is, or has come so far.
        where: What states it: the dataset, its clone, a file.
        what: Of what, ``"bytes in the link sub-01"``.

    Raises:
        UnsafeDatasetError: It is more.
    """
    if found > most:
        raise UnsafeDatasetError(
            f"Refused to read {where}: it has {found} {what} or more, and {most} is the most that "
            f"is read. No dataset needs that: do not use it, or use a version without."
        )


def parse_json(text: str, where: object) -> Any:  # noqa: ANN401 - JSON holds anything
    """Return what a JSON text holds.

    Args:
        text: The text.
        where: Whose it is, for messages.

    Raises:
        ValueError: It is none.
        UnsafeDatasetError: It nests deeper than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError:
        most, found = sys.getrecursionlimit(), text.count("[") + text.count("{")
        refuse_above(0, found, where, f"lists and objects, nested about {most} deep")
