"""Records as text: JSON for programs, tables for people. Of a dataset's words none is believed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tio_openneuro.sizes import format_size

# What tables say where a name says too little.
_LABELS = {"total_bytes": "size", "present_bytes": "on disk", "units_bytes": "size of units"}


def print_json(record: dict[str, Any]) -> None:
    """Print a record as one JSON object."""
    Console(soft_wrap=True).print_json(json.dumps(record, default=str))


def report(title: str, record: dict[str, Any], *, as_json: bool) -> None:
    """Print a record under a title, as JSON or as a table."""
    if as_json:
        print_json(record)
        return
    table = Table(title=Text(_plain(title)), show_header=False, title_justify="left")
    table.add_column(overflow="fold")
    table.add_column(justify="right", overflow="fold")
    for name, value in record.items():
        for label, shown in _rows(name, value):
            table.add_row(Text(_plain(label)), Text(_plain(shown)))
    Console().print(table)


def _rows(name: str, value: object) -> Iterator[tuple[str, str]]:
    """Yield what a table says of one thing, in words and with its unit."""
    unit = next((end for end in ("_bytes", "_s") if name.endswith(end)), "")
    words = name.removesuffix(unit).replace("_", " ").replace("pids", "processes")
    for key, cell in value.items() if isinstance(value, dict) else [("", value)]:
        shown = ", ".join(map(str, cell if isinstance(cell, tuple) else [cell]))
        if isinstance(cell, int) and (unit == "_bytes" or name == "clones"):
            shown = format_size(cell) + " per second" * (name == "rate_bytes")
        label = f"{words}: {key}" if key else _LABELS.get(name, words)
        yield label, ("none" if cell in (None, "", ()) else shown) + " s" * (unit == "_s")


def _plain(text: str) -> str:
    """Return a text without what a stranger's could have a terminal do."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
