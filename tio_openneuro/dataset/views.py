"""What a dataset offers for training and validation: parts, folds, balancing weights.

Owns no state; the arithmetic is in :mod:`~tio_openneuro.dataset.splits`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torchio as tio

from tio_openneuro.dataset.rows import SubjectRow
from tio_openneuro.dataset.splits import SplitUnit, k_fold, read_split, save_split, split
from tio_openneuro.errors import SelectionError, SplitError

Transform = Callable[[tio.Subject], tio.Subject]


class SplitViews:
    """The part of a dataset that splits it into views; needs rows and a way to view them."""

    dataset_id: str
    version: str
    _rows: list[SubjectRow]

    if TYPE_CHECKING:  # what the dataset brings

        def _view(self, indices: Sequence[int]) -> Self: ...

        def set_transform(self, transform: Transform | None) -> None:
            """Set the random transform of this view."""

    def weights(self, column: str) -> list[float]:
        """Return a weight for each unit that balances the values of a column.

        For ``torch.utils.data.WeightedRandomSampler``: each value is then drawn equally often.

        Args:
            column: A column of participants.tsv.

        Raises:
            SelectionError: There is no such column.
        """
        values = ["" if value != value else value for value in self._column(column)]  # noqa: PLR0124 - nan
        counts = Counter(values)
        return [1 / (len(counts) * counts[value]) for value in values]

    def _column(self, column: str) -> list[Any]:
        try:
            return [row.subject[column] for row in self._rows]
        except KeyError as error:
            images = self._rows[0].subject.get_images_names()
            known = sorted(name for name in self._rows[0].subject if name not in images)
            raise SelectionError(
                f"Cannot read column {column!r} of {self.dataset_id}: its {len(self._rows)} units "
                f"carry {', '.join(known)}. Check the spelling in participants.tsv."
            ) from error

    def split(
        self,
        parts: Mapping[str, float],
        *,
        stratify: str | None = None,
        group: str | None = None,
        seed: int = 0,
        transforms: Mapping[str, Transform | None] | None = None,
    ) -> dict[str, Self]:
        """Divide the units into named views; no participant falls on two sides.

        Args:
            parts: Name and share of each part; the shares sum to 1.
            stratify: Column whose proportions each part keeps.
            group: Column whose values are not divided either.
            seed: Decides the draw, the same on every machine.
            transforms: Transform of each named part; without it a view inherits this one's.

        Raises:
            SplitError: The units cannot be divided so.
        """
        strata = self._values(stratify)
        indices = split(self._split_units(group), parts, stratify=strata, seed=seed)
        return self._named_views(indices, transforms)

    def save_split(self, path: str | os.PathLike[str], parts: Mapping[str, SplitViews]) -> None:
        """Write which units are in which part, as JSON with the dataset's commit.

        Args:
            path: The file; written whole or not at all.
            parts: What :meth:`split` returned.
        """
        names = {name: [row.content.name for row in view._rows] for name, view in parts.items()}  # noqa: SLF001 - itself
        save_split(path, names, commit=self.version)

    def read_split(
        self,
        path: str | os.PathLike[str],
        *,
        transforms: Mapping[str, Transform | None] | None = None,
    ) -> dict[str, Self]:
        """Return the views of a split that was saved.

        Raises:
            SplitError: The file is no split, or one of another commit or selection.
        """
        names = [row.content.name for row in self._rows]
        return self._named_views(read_split(path, names, commit=self.version), transforms)

    def k_fold(
        self,
        folds: int,
        *,
        stratify: str | None = None,
        group: str | None = None,
        seed: int = 0,
        transforms: Mapping[str, Transform | None] | None = None,
    ) -> list[tuple[Self, Self]]:
        """Return ``folds`` pairs of views, ``(train, val)``; see :meth:`split`.

        Raises:
            SplitError: The units cannot be divided so.
        """
        strata = self._values(stratify)
        found = k_fold(self._split_units(group), folds, stratify=strata, seed=seed)
        views = (self._named_views({"train": own, "val": held}, transforms) for own, held in found)
        return [(view["train"], view["val"]) for view in views]

    def _named_views(
        self, parts: Mapping[str, Sequence[int]], transforms: Mapping[str, Transform | None] | None
    ) -> dict[str, Self]:
        unknown = set(transforms or ()) - set(parts)
        if unknown:
            raise SplitError(
                f"Cannot give a transform to {', '.join(sorted(unknown))}: the parts are "
                f"{', '.join(parts)}."
            )
        views = {name: self._view(indices) for name, indices in parts.items()}
        for name, transform in (transforms or {}).items():
            views[name].set_transform(transform)
        return views

    def _split_units(self, group: str | None) -> list[SplitUnit]:
        groups = self._values(group) or [None] * len(self._rows)
        return [
            SplitUnit(f"{row.subject['dataset_id']}/{row.subject['subject_id']}", row.keys, value)
            for row, value in zip(self._rows, groups, strict=True)
        ]

    def _values(self, column: str | None) -> list[Any] | None:
        return None if column is None else self._column(column)


def to_index(index: Any) -> int:  # noqa: ANN401 - as in TorchIO, whatever becomes an int
    """Return the number that an index names.

    Raises:
        ValueError: It is nothing that becomes an int.
    """
    try:
        return int(index)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"Cannot take subject {index!r}: an index is an int, a slice, a list of ints or a "
            f"boolean mask, not {type(index).__name__}."
        ) from error


def to_indices(index: Any, length: int) -> list[int]:  # noqa: ANN401 - list, array or tensor
    """Return the indices that a list, an array, a tensor or a boolean mask selects.

    Raises:
        IndexError: One is out of range, or a mask has another length.
        ValueError: Something in it is no number.
    """
    values = index.tolist() if hasattr(index, "tolist") else list(index)
    if values and all(isinstance(value, bool) for value in values):
        if len(values) != length:
            raise IndexError(
                f"Cannot apply a mask of {len(values)} values to {length} subjects: give one "
                f"value for each."
            )
        return [number for number, kept in enumerate(values) if kept]
    return [range(length)[to_index(value)] for value in values]
