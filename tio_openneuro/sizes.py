"""Byte counts: read from text, and shown to people. Pure; imports no module of ours."""

from __future__ import annotations

import re

import humanize

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000**n for n, p in enumerate("KMGTP", start=1)},
    **{f"{p}IB": 1024**n for n, p in enumerate("KMGTP", start=1)},
}
# Not even the header of an image.
_LEAST_BUDGET_BYTES = 1000
_SIZE = re.compile(r"\s*(\d[\d_]*(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(size: int | str) -> int:
    """Return a byte count given as a number or as text like ``"10 GB"``.

    Args:
        size: Bytes, or a number with a unit: ``B``, decimal ``kB`` to ``PB``, binary ``KiB`` to
            ``PiB``, in any case. A fraction of a byte is cut off.

    Raises:
        ValueError: The text is not a size, or the size is not positive.

    Example:
        >>> parse_size("10 GB"), parse_size("1.5 KiB"), parse_size(7)
        (10000000000, 1536, 7)
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        message = f"Cannot read {size!r} as a size: give bytes as an int, or text like '10 GB'."
        raise ValueError(message)  # noqa: TRY004 - a bad size is a bad value, whatever its type
    if isinstance(size, int):
        size_bytes = size
    else:
        match = _SIZE.fullmatch(size)
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(
                f"Cannot read {size!r} as a size: give a number and one of B, kB, MB, GB, TB, "
                f"KiB, MiB, GiB, TiB, as in '10 GB'."
            )
        size_bytes = int(float(match[1].replace("_", "")) * _UNITS[match[2].upper()])
    if size_bytes <= 0:
        raise ValueError(f"Cannot use {size!r} as a size: it must be at least one byte.")
    return size_bytes


def ask_unit(budget_bytes: int) -> str:
    """Return a question to end a message with, where a budget is so small that its unit lacks.

    Args:
        budget_bytes: The budget, as it was understood.

    Example:
        >>> ask_unit(4), ask_unit(4000)
        (' Was "4 GB" meant?', '')
    """
    return f' Was "{budget_bytes} GB" meant?' if budget_bytes < _LEAST_BUDGET_BYTES else ""


def format_size(size_bytes: float) -> str:
    """Return a byte count as people read it, in decimal units with three digits at most.

    Args:
        size_bytes: Bytes; may be zero.

    Example:
        >>> format_size(412_345_678), format_size(0)
        ('412.3 MB', '0 Bytes')
    """
    return humanize.naturalsize(size_bytes, format="%.1f")
