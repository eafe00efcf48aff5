"""participants.tsv and sessions.tsv, as they are found in practice, to typed rows. Pure.

Read are: a byte order mark, CRLF or CR, no final newline, text that is not UTF-8, spaces around
headers, empty and repeated headers, ragged and empty lines, commas in place of tabs, ids with and
without their prefix or leading zeros, ids repeated for each session, rows without a folder and
folders without a row. What holds more than tables do (:mod:`~tio_openneuro.bounds`) is refused
before it is taken apart. A column is numeric where every value given is a number. What is missing
is ``nan`` in numeric columns and ``""`` in others, never None, so that rows collate.

Source: BIDS 1.10, "Participants file" and "Sessions file".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tio_openneuro.bounds import CELLS, TABLES_BYTES, refuse_above

Value = float | str

_MISSING = frozenset({"", "n/a", "N/A", "NA", "na", "nan", "NaN", "None", "null", "NULL", "#N/A"})
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_LINES = re.compile(r"\r\n|\r|\n")
_SESSIONS = re.compile(r"(?:(sub-[^/_]+)/)?(?:sub-[^/_]+_)?sessions\.tsv")
# Each row costs as much as so many cells.
_LEAST_COLUMNS = 8
_DELIMITERS = "\t,;"
_SUBJECT_HEADERS = ("participant_id", "participantid", "participant", "subject_id", "subject")
_SESSION_HEADERS = ("session_id", "session", "ses", "ses_id")


def normalise_id(text: str, prefix: str = "sub-") -> str:
    """Return an id with its prefix, given with or without; empty text stays empty.

    Example:
        >>> normalise_id(" 01 "), normalise_id("Sub-01"), normalise_id("pre", "ses-")
        ('sub-01', 'sub-01', 'ses-pre')
    """
    text = text.strip()
    if text.lower().startswith((prefix, f"{prefix[:-1]}_")):
        text = text[len(prefix) :]
    return prefix + text if text else ""


@dataclass(frozen=True, slots=True)
class Participants:
    """The columns of participants.tsv and of the sessions' tables, by subject and session.

    Attributes:
        columns: Names of the columns, less the session's id.
        numeric: Those whose values are floats.
        rows: Values given, by subject, then by session, both with their prefix; the session is
            empty where a row has none. Missing values are left out.
        id_column: The column of the subjects' ids, one of ``columns``; empty without a table.
    """

    columns: tuple[str, ...] = ()
    numeric: frozenset[str] = frozenset()
    rows: Mapping[str, Mapping[str, Mapping[str, Value]]] = field(default_factory=dict)
    id_column: str = ""
    _without_zeros: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def read(
        cls,
        read: Callable[[Sequence[str], int, int], Mapping[str, bytes]],
        paths: Iterable[str] = (),
        dataset_id: str = "the dataset",
    ) -> Participants:
        """Read a dataset's tables: participants.tsv, and those of the sessions.

        Args:
            read: Returns the bytes of those of the paths that exist; told how many bytes one may
                have, and how many all.
            paths: The dataset's paths, among which tables of sessions are looked for.
            dataset_id: For messages.

        Raises:
            UnsafeDatasetError: They have more bytes, or cells, than tables do.
        """
        of_sessions = [path for path in paths if _SESSIONS.fullmatch(path)]
        tables = []
        asked = ["participants.tsv", *of_sessions]
        cells = 0
        for path, content in read(asked, TABLES_BYTES, TABLES_BYTES).items():
            text = _decode(content)
            header = _LINES.split(text.lstrip(), maxsplit=1)[0]
            rows = max(text.count("\n"), text.count("\r")) + 1
            columns = _LEAST_COLUMNS + max(map(header.count, _DELIMITERS))
            cells += max(rows * columns, *map(text.count, _DELIMITERS))
            refuse_above(CELLS, cells, f"{path} of {dataset_id}", f"cells, in {rows} rows,")
            found = _SESSIONS.fullmatch(path)
            tables.append(_read_table(text, (found[1] or "") if found else ""))
        names = tuple(dict.fromkeys(name for table in tables for name in table.columns))
        id_column = next((table.id_column for table in tables if table.id_column), "")
        found_rows: dict[str, dict[str, dict[str, Value]]] = {}
        for table in tables:
            for subject, session, values in table.rows:
                before = found_rows.setdefault(subject, {}).setdefault(session, values)
                if before is not values:
                    found_rows[subject][session] = {**values, **before}
        every = [row for sessions in found_rows.values() for row in sessions.values()]
        numeric: set[str] = set()
        for name in names:
            having = [row for row in every if name in row]
            if having and all(_NUMBER.fullmatch(str(row[name])) for row in having):
                numeric.add(name)
                for row in having:
                    row[name] = float(row[name])
        short = Counter(map(_strip_zeros, found_rows))
        aliases = {_strip_zeros(s): s for s in found_rows if short[_strip_zeros(s)] == 1}
        return cls(names, frozenset(numeric), found_rows, id_column, aliases)

    def row(self, subject_id: str, session_id: str = "") -> dict[str, Value]:
        """Return the values of every column for a subject, or for one of its sessions.

        A session's own row goes before the subject's. Where the subject has rows for several
        sessions and none is asked for, each column has its first value given.

        Args:
            subject_id: With or without its prefix, with or without leading zeros.
            session_id: Likewise, or empty.

        Returns:
            One value per column, ``nan`` or ``""`` where it is missing.
        """
        asked = normalise_id(subject_id)
        subject = asked
        if subject not in self.rows:
            subject = self._without_zeros.get(_strip_zeros(subject), subject)
        sessions = self.rows.get(subject, {})
        wanted = normalise_id(session_id, "ses-")
        chosen = [sessions.get(wanted, {}), sessions.get("", {})] if wanted else sessions.values()
        row: dict[str, Value] = {
            name: float("nan") if name in self.numeric else "" for name in self.columns
        }
        for values in reversed(list(chosen)):
            row.update(values)
        if self.id_column:
            row[self.id_column] = asked
        return row


def _strip_zeros(subject: str) -> str:
    """Return an id whose number has lost its leading zeros, as spreadsheets make it."""
    value = subject.removeprefix("sub-")
    return (value.lstrip("0") or "0") if value.isdecimal() else value


@dataclass(frozen=True, slots=True)
class _Table:
    """One table: its columns, and its rows as (subject, session, values given)."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, str, dict[str, Value]], ...]
    id_column: str = ""


def _read_table(text: str, subject: str) -> _Table:
    """Split a table into columns and rows.

    Args:
        text: The file's.
        subject: Whose table it is, where it has no column for that.
    """
    lines = [line for line in _LINES.split(text) if line.strip()]
    if not lines:
        return _Table((), ())
    delimiter = next((mark for mark in _DELIMITERS if mark in lines[0]), "\t")
    headers = _unique_headers(_cells(lines[0], delimiter))
    session_at = _position(headers, _SESSION_HEADERS)
    subject_at = _position(headers, _SUBJECT_HEADERS)
    if subject_at is None and not subject:
        subject_at = 0
    kept = [n for n in range(len(headers)) if n not in {session_at, subject_at}]
    rows: list[tuple[str, str, dict[str, Value]]] = []
    for line in lines[1:]:
        cells = _cells(line, delimiter)
        cells += [""] * (len(headers) - len(cells))
        whose = subject if subject_at is None else normalise_id(cells[subject_at])
        when = "" if session_at is None else _given(cells[session_at])
        values: dict[str, Value] = {headers[n]: text for n in kept if (text := _given(cells[n]))}
        if whose:
            rows.append((whose, normalise_id(when, "ses-"), values))
    columns = tuple(header for n, header in enumerate(headers) if n != session_at)
    return _Table(columns, tuple(rows), "" if subject_at is None else headers[subject_at])


def _decode(content: bytes) -> str:
    """Decode UTF-8 or UTF-16 with its mark, else Western European text."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def _cells(line: str, delimiter: str) -> list[str]:
    """Split a line; spaces and quotes around a cell are not part of it."""
    cells = [cell.strip() for cell in line.split(delimiter)]
    return [c[1:-1].strip() if len(c) > 1 and c[0] == c[-1] == '"' else c for c in cells]


def _unique_headers(headers: Sequence[str]) -> list[str]:
    """Name empty headers by their place, and number those that come again."""
    names: dict[str, None] = {}
    repetitions: Counter[str] = Counter()
    for number, header in enumerate(headers, start=1):
        name = header or f"column_{number}"
        while name in names:
            repetitions[header] += 1
            name = f"{header}_{repetitions[header] + 1}"
        names[name] = None
    return list(names)


def _position(headers: Sequence[str], known: Sequence[str]) -> int | None:
    """Return which header is one of those known, the best known first."""
    lowered = [header.lower().replace(" ", "_") for header in headers]
    return next((lowered.index(name) for name in known if name in lowered), None)


def _given(text: str) -> str:
    """Return a cell's text, empty where it says that there is no value."""
    return "" if text in _MISSING else text
