"""Splits as JSON files: named parts of units, bound to the commit that they were made of."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tio_openneuro.errors import SplitError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

_FORMAT = 1


def save_split(
    path: str | os.PathLike[str], parts: Mapping[str, Sequence[str]], *, commit: str
) -> None:
    """Write a split as JSON, whole or not at all.

    Args:
        path: The file.
        parts: Names of the units of each part.
        commit: The dataset's commit; with several datasets, all of them as one text.
    """
    content = {"format": _FORMAT, "commit": commit, "parts": {n: list(u) for n, u in parts.items()}}
    target = Path(path)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=target.parent, prefix=target.name, suffix=".tmp", delete=False
    ) as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
    Path(file.name).replace(target)


def read_split(
    path: str | os.PathLike[str], units: Sequence[str], *, commit: str
) -> dict[str, tuple[int, ...]]:
    """Read a split that was saved.

    Args:
        path: The file.
        units: Names of the dataset's units.
        commit: The dataset's commit, which must be the split's.

    Returns:
        Indices of units by part, in the order saved.

    Raises:
        SplitError: The file is no split, is of another commit, or names units that are not there.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        saved, parts = content["commit"], dict(content["parts"])
    except (ValueError, KeyError, TypeError) as error:
        message = f"{path} holds no split: {error}. Save one with save_split."
        raise SplitError(message) from error
    if saved != commit:
        message = (
            f"Cannot use the split in {path}: it was made of commit {saved}, the dataset is at"
            f" {commit}. Open the dataset with version={saved!r}, or make a new split."
        )
        raise SplitError(message)
    index = {name: number for number, name in enumerate(units)}
    unknown = [name for names in parts.values() for name in names if name not in index]
    if unknown:
        message = (
            f"Cannot use the split in {path}: {len(unknown)} of its units are not selected, the"
            f" first {unknown[0]}. Select the images that it was made with."
        )
        raise SplitError(message)
    return {part: tuple(index[name] for name in names) for part, names in parts.items()}
