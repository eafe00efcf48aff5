"""Which units a dataset's index selects: numbers, lists of them, boolean masks. Pure."""

from __future__ import annotations

from typing import Any


def as_position(index: Any) -> int:  # noqa: ANN401 - as in TorchIO, whatever becomes an int
    """Return the position that an index names.

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


def positions_of(index: Any, length: int) -> list[int]:  # noqa: ANN401 - list, array or tensor
    """Return the positions that a list, an array, a tensor or a boolean mask selects.

    Raises:
        IndexError: A position is out of range, or a mask has another length.
        ValueError: Something in it is no number.
    """
    values = index.tolist() if hasattr(index, "tolist") else list(index)
    if values and all(isinstance(value, bool) for value in values):
        if len(values) != length:
            raise IndexError(
                f"Cannot apply a mask of {len(values)} values to {length} subjects: give one "
                f"value for each."
            )
        return [position for position, kept in enumerate(values) if kept]
    return [range(length)[as_position(value)] for value in values]
