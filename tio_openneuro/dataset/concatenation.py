"""Several datasets as one, under one root and one budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torchio as tio

from tio_openneuro.dataset.dataset import DataladSubjectsDataset
from tio_openneuro.dataset.rows import Origin, SubjectRow
from tio_openneuro.disk import Engine
from tio_openneuro.errors import SelectionError
from tio_openneuro.torchio_seams import identify, transform_of


def concat(datasets: Sequence[DataladSubjectsDataset]) -> DataladSubjectsDataset:
    """Return one dataset over several; each subject's ``dataset_id`` tells where it is from.

    The first one's engine serves all, so its budget is the one that holds. A column that only
    some of the datasets have is filled with ``nan`` or ``""`` in the others, for batches to
    collate. The datasets given stay usable; a table or sidecar is read from the one that has it.

    Args:
        datasets: One or more, of one root, with the same image names and kinds, and equal
            ``preprocess`` and ``transform``: of the same class and parameters.

    Raises:
        SelectionError: They differ in what a batch, or the budget, needs to be common.

    Example:
        >>> import tio_openneuro as tno
        >>> images = {"t1": tno.Scalar(suffix="T1w")}
        >>> first = tno.DataladSubjectsDataset("ds000001", images, disk_budget="2 GB")
        >>> second = tno.DataladSubjectsDataset("ds004199", images, disk_budget="2 GB")
        >>> both = tno.concat([first, second])
        >>> len(both) == len(first) + len(second)
        True
        >>> both[0]["dataset_id"], both[-1]["dataset_id"]
        ('ds000001', 'ds004199')
        >>> first.close(), second.close()
        (None, None)
    """
    if not datasets:
        raise SelectionError("Cannot concatenate nothing: give at least one dataset.")
    first = datasets[0]
    for other in datasets[1:]:
        _check_alike(first, other)
    parts: dict[tuple[str, str], Origin] = {}
    for origin in (origin for dataset in datasets for origin in dataset.parts):
        same = parts.setdefault((origin.dataset_id, origin.commit), origin)
        if same.folder != origin.folder and not origin.commit:
            raise SelectionError(
                f"Cannot concatenate {same.folder} and {origin.folder}: their units would bear the "
                f"same names, since both are {origin.dataset_id!r} and have no commit. Rename one."
            )
    engine = next((one._engine for one in datasets if one._engine is not None), None)  # noqa: SLF001
    rows = [row for dataset in datasets for row in dataset._rows]  # noqa: SLF001
    missing = _missing_values(rows)
    own = {id(row.origin): row.origin for row in rows}
    origins = {known: _joined(origin, engine, missing) for known, origin in own.items()}
    adapted = [_adapted(row, origins[id(row.origin)], missing) for row in rows]
    result = first._with_rows(adapted)  # noqa: SLF001
    result._engine = engine  # noqa: SLF001
    result.skipped = [skip for dataset in datasets for skip in dataset.skipped]
    result.parts = tuple(parts.values())
    result.dataset_id = "+".join(dict.fromkeys(origin.dataset_id for origin in result.parts))
    result.version = "+".join(dict.fromkeys(origin.commit for origin in result.parts))
    return result


def _check_alike(first: DataladSubjectsDataset, other: DataladSubjectsDataset) -> None:
    names = f"{first.dataset_id} and {other.dataset_id}"
    kinds = [
        {name: isinstance(image, tio.LabelMap) for name, image in _images(dataset).items()}
        for dataset in (first, other)
    ]
    if kinds[0] != kinds[1]:
        raise SelectionError(
            f"Cannot concatenate {names}: their images are {', '.join(kinds[0])} and "
            f"{', '.join(kinds[1])}, so a batch could not be collated. Select the same names and "
            f"kinds in both."
        )
    if first._root != other._root:  # noqa: SLF001
        raise SelectionError(
            f"Cannot concatenate {names}: their roots are {first._root} and {other._root}, and "  # noqa: SLF001
            f"one budget covers one root. Open both with the same root."
        )
    made = [identify([one.preprocess, transform_of(one)]) for one in (first, other)]
    if made[0] != made[1]:
        raise SelectionError(
            f"Cannot concatenate {names}: they have different preprocess or transform, in class "
            f"or parameters. Give both equal ones, or set the transform on the result."
        )


def _images(dataset: DataladSubjectsDataset) -> dict[str, tio.Image]:
    return dict(dataset.dry_iter()[0].get_images_dict(intensity_only=False))


def _missing_values(rows: Sequence[SubjectRow]) -> dict[str, Any]:
    """Return what stands for a missing value, by column."""
    missing: dict[str, Any] = {}
    for row in rows:
        for name, value in row.attributes.items():
            is_text = isinstance(value, str) or missing.get(name) == ""
            missing[name] = "" if is_text else math.nan
    return missing


def _joined(origin: Origin, engine: Engine | None, missing: dict[str, Any]) -> Origin:
    """Return a dataset's origin with every column, and with that engine if it needs one."""
    columns = dict.fromkeys((*origin.columns, *missing))
    others = tuple(
        name for name in columns if name not in {"subject_id", "session_id", "dataset_id"}
    )
    return replace(origin, engine=origin.engine and engine, columns=others)


def _adapted(row: SubjectRow, origin: Origin, missing: dict[str, Any]) -> SubjectRow:
    """Return a row of that origin, with text where any dataset has text."""
    given = row.attributes
    values = [given.get(name, missing[name]) for name in origin.columns]
    for number, name in enumerate(origin.columns):
        value = values[number]
        if missing[name] == "" and not isinstance(value, str):
            values[number] = "" if value != value else f"{value:.15g}"  # noqa: PLR0124 - nan
    return replace(row, origin=origin, values=tuple(values))
