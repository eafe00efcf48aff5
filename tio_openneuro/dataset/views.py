"""What a dataset offers for training and validation: views, parts, folds, balancing weights.

Owns no state; the arithmetic is in :mod:`~tio_openneuro.dataset.splits`.
"""

from __future__ import annotations

import operator
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Self

import torchio as tio

from tio_openneuro.dataset.rows import Rows, SubjectRow
from tio_openneuro.dataset.splits import SplitUnit, k_fold, read_split, save_split, split
from tio_openneuro.errors import SelectionError, SplitError

Transform = Callable[[tio.Subject], tio.Subject]

_MOST_COMPARED = 2000


class SplitViews:
    """The part of a dataset that splits it into views; needs rows and a way to view them."""

    dataset_id: str
    version: str
    _rows: Rows

    if TYPE_CHECKING:  # what the dataset brings

        def _view(self, indices: Sequence[int]) -> Self: ...

        def set_transform(self, transform: Transform | None) -> None:
            """Set the random transform of this view."""

    def weights(self, column: str) -> list[float]:
        """Return a weight for each unit that balances the values of a column.

        For ``torch.utils.data.WeightedRandomSampler``: each value is then drawn equally often, and
        a unit whose value is missing never.

        Args:
            column: A column of participants.tsv.

        Raises:
            SelectionError: There is no such column, or no unit has a value in it.
        """
        values = self._column(column)
        counts = Counter(value for value in values if value != "" and value == value)  # noqa: PLR0124 - nan
        if not counts:
            raise SelectionError(f"Cannot balance {column!r}: no unit has a value in it.")
        return [1 / (len(counts) * counts[value]) if counts[value] else 0.0 for value in values]

    def _column(self, column: str) -> list[Any]:
        """Return each unit's value; refuse what is no column, such as an image or a list."""
        for row in self._rows:
            if column not in (known := sorted(row.attributes)):
                raise SelectionError(
                    f"Cannot read column {column!r} of {self.dataset_id}: its {len(self._rows)} "
                    f"units carry {', '.join(known)}. Give the name of one of them."
                )
        return [row.attributes[column] for row in self._rows]

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
        """Write which units are in which part, as JSON, each with its dataset and commit.

        Args:
            path: The file; written whole or not at all.
            parts: What :meth:`split` returned.
        """
        save_split(path, {name: view._unit_names() for name, view in parts.items()})  # noqa: SLF001 - itself

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
        return self._named_views(read_split(path, self._unit_names()), transforms)

    def _unit_names(self) -> list[str]:
        """Return names that no other unit bears, also in a concatenation."""
        return [f"{r.origin.dataset_id}@{r.origin.commit}/{r.content.name}" for r in self._rows]

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
            SplitUnit(f"{row.origin.dataset_id}/{row.subject_id}", row.keys, value)
            for row, value in zip(self._rows, groups, strict=True)
        ]

    def _values(self, column: str | None) -> list[Any] | None:
        return None if column is None else self._column(column)


def find_rows(index: Any, rows: Sequence[SubjectRow]) -> int | list[int]:  # noqa: ANN401 - any
    """Return the number of the row that an index means, or the numbers of the rows of a view.

    Args:
        index: An integer of any kind, a name, a slice, a mask, or a list, array or tensor of
            integers and names.
        rows: The rows to choose from.

    Raises:
        IndexError: It is out of range, or a mask of another length.
        KeyError: No row bears the name.
        ValueError: It is nothing of that.
    """
    if isinstance(index, slice):
        return list(range(len(rows))[index])
    plain = _plain(index)
    is_view = hasattr(plain, "__len__") and not isinstance(plain, str)
    values = [_plain(value) for value in plain] if is_view else [plain]
    if is_view and values and all(isinstance(value, bool) for value in values):
        if len(values) != len(rows):
            raise IndexError(
                f"Cannot apply a mask of {len(values)} values to {len(rows)} subjects: give one "
                f"value for each."
            )
        return [number for number, kept in enumerate(values) if kept]
    found = [number for value in values for number in _find(value, rows)]
    return found if is_view or len(found) > 1 else found[0]


def _plain(value: Any) -> Any:  # noqa: ANN401 - whatever somebody takes for an index
    """Return an array or tensor, also one without dimension, as Python's own lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def _find(value: Any, rows: Sequence[SubjectRow]) -> list[int]:  # noqa: ANN401 - as above
    """Return the number of the row that an integer means, or of those that bear a name."""
    count = len(rows)
    if isinstance(value, str):
        names = [_names_of(row) for row in rows]
        same = value.replace("_", " ")
        found = [n for n in range(count) if same in {each.replace("_", " ") for each in names[n]}]
        if not found:
            near = get_close_matches(value, sorted(set().union(*names))[:_MOST_COMPARED], cutoff=0)
            raise KeyError(
                f"Cannot take subject {value!r}: none of {count} subjects bears that name. Near: "
                f"{', '.join(near) or 'none'}."
            )
        return found
    try:
        # What is no index is refused as a truth value is, which would be one.
        number = operator.index(None if isinstance(value, bool) else value)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(
            f"Cannot take subject {value!r}: an index is an integer, a name, a slice, a list of "
            f"them or a boolean mask, not {type(value).__name__}."
        ) from error
    if not -count <= number < count:
        raise IndexError(
            f"Cannot take subject {number} of {count}: indices go from {-count} to {count - 1}."
        )
    return [number % count]


def _names_of(row: SubjectRow) -> set[Any]:
    return {row.content.name, row.subject_id, f"{row.subject_id} {row.session_id}".strip()}
