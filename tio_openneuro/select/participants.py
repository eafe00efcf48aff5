"""participants.tsv and sessions.tsv, as they are found in practice, to typed rows. Pure.

Read are: a byte order mark, CRLF or CR, no final newline, text that is not UTF-8, spaces around
headers, empty and repeated headers, ragged and empty lines, commas in place of tabs, ids with and
without their prefix or leading zeros, ids repeated for each session, rows without a folder and
folders without a row. What holds more than tables do (:mod:`~tio_openneuro.bounds`) is refused
before it is taken apart. A column is numeric where every value given is a number. What is missing
is ``nan`` in numeric columns and ``""`` in others, never None, so that rows collate. Lines and
cells are split here: to the standard library's ``csv``, and to pandas, a quote that somebody forgot
holds all cells and lines up to the next one.

Source: BIDS 1.10, "Participants file" and "Sessions file".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from tio_openneuro.bounds import CELLS, TABLES_BYTES, refuse_above

Value = float | str
_Row = tuple[str, str, dict[str, str]]

_MAIN = "participants.tsv"
_MISSING = frozenset({"", "n/a", "N/A", "NA", "na", "nan", "NaN", "None", "null", "NULL", "#N/A"})
# Of whole numbers those that a float holds.
_NUMBER = re.compile(r"[+-]?(?:\d{1,15}|\d+\.\d*|\.\d+)(?:[eE][+-]?\d{1,2})?", re.ASCII)
# Each row costs as much as so many cells.
_LEAST_COLUMNS = 8
_DELIMITERS = "\t,;"
_LINES = re.compile(r"\r\n|\r|\n")
_SESSIONS = re.compile(r"(?:(sub-[^/_]+)/)?(?:(sub-[^/_]+)_)?sessions\.tsv")
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
        columns: Names of the columns, less the ids by which rows of sessions' tables are found.
        numeric: Those whose values are floats.
        rows: Values given, by subject, then by session, both with their prefix; the session is
            empty where a row has none. Missing values are left out.
        id_column: The column of the subjects' ids, one of ``columns``; empty without a table.
        files: The first table that has each column.
    """

    columns: tuple[str, ...] = ()
    numeric: frozenset[str] = frozenset()
    rows: Mapping[str, Mapping[str, Mapping[str, Value]]] = field(default_factory=dict)
    id_column: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
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
        paths = tuple(paths)
        found = {path: match for path in paths if (match := _SESSIONS.fullmatch(path))}
        contents = read([_MAIN, *found], TABLES_BYTES, TABLES_BYTES)
        _refuse_cells(contents, dataset_id)
        main = _read_table(contents.get(_MAIN, b""))
        others = {
            path: _read_table(contents[path], match[1] or match[2] or "", main.id_column)
            for path, match in found.items()
            if path in contents
        }
        folders = {path.partition("/")[0] for path in paths}
        main = main.beside(others.values(), {name for name in folders if name[:4] == "sub-"})
        ordered = [(_MAIN, main), *others.items()]
        files = {name: path for path, table in reversed(ordered) for name in table.columns}
        columns = tuple(dict.fromkeys(name for _, table in ordered for name in table.columns))
        texts: dict[str, dict[str, dict[str, str]]] = {}
        for table in (*others.values(), main):
            for subject, session, values in table.rows:
                sessions = texts.setdefault(subject, {})
                sessions[session] = values | sessions.get(session, {})
        every = [row for sessions in texts.values() for row in sessions.values()]
        given = {name: [row[name] for row in every if name in row] for name in columns}
        numeric = frozenset(
            name for name, all_of in given.items() if all_of and all(map(_NUMBER.fullmatch, all_of))
        )

        def typed(row: Mapping[str, str]) -> dict[str, Value]:
            return {name: float(text) if name in numeric else text for name, text in row.items()}

        rows = {
            subject: {session: typed(row) for session, row in sessions.items()}
            for subject, sessions in texts.items()
        }
        return cls(columns, numeric, rows, main.id_column, files, _by_number({*rows, *folders}))

    def row(self, subject_id: str, session_id: str = "") -> dict[str, Value]:
        """Return the values of every column for a subject, or for one of its sessions.

        A session's own row goes before the subject's. The only row that participants.tsv has of a
        subject is that of all its sessions. Where the subject has rows for several sessions and
        none is asked for, each column has its first value given, the subject's own before theirs.

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
        if wanted not in sessions:
            wanted = _by_number(sessions).get(_strip_zeros(wanted), wanted)
        own = sessions.get("", {})
        chosen = [sessions.get(wanted, {}), own] if wanted else [own, *sessions.values()]
        row: dict[str, Value] = {
            name: float("nan") if name in self.numeric else "" for name in self.columns
        }
        for values in reversed(chosen):
            row.update(values)
        if self.id_column:
            row[self.id_column] = asked
        return row


def _strip_zeros(name: str) -> str:
    """Return an id whose number has lost its leading zeros, as spreadsheets make it."""
    prefix, _, value = name.partition("-")
    return f"{prefix}-{value.lstrip('0') or '0'}" if value.isdecimal() else name


def _by_number(ids: Iterable[str]) -> dict[str, str]:
    """Return ids by what they are without leading zeros, where no two are that."""
    short = {name: _strip_zeros(name) for name in ids}
    count = Counter(short.values())
    return {number: name for name, number in short.items() if count[number] == 1}


@dataclass(frozen=True, slots=True)
class _Table:
    """One table: its columns, and its rows as (subject, session, values given)."""

    columns: Sequence[str]
    rows: Sequence[_Row]
    id_column: str = ""

    def beside(self, others: Collection[Self], folders: Iterable[str]) -> Self:
        """Return participants.tsv as it is read beside the sessions' tables and folders.

        Ids are spelt as their folders, a subject's only row is that of all its sessions, and a
        column that sessions' tables have too stands under a second name as well.
        """
        theirs = {name for table in others for name in table.columns}
        both = [name for name in self.columns if name in theirs and name != self.id_column]
        seconds = unique_headers([f"participant_{n}" for n in both], theirs | set(self.columns))
        twice = dict(zip(both, seconds, strict=True))
        count = Counter(subject for subject, _, _ in self.rows)
        known, own = _by_number(folders), _by_number(count)
        spelt = {own[number]: known[number] for number in own.keys() & known.keys()}
        rows = [
            (
                spelt.get(subject, subject),
                session if count[subject] > 1 else "",
                values | {twice[name]: values[name] for name in twice.keys() & values.keys()},
            )
            for subject, session, values in self.rows
        ]
        return replace(self, columns=[*self.columns, *seconds], rows=rows)


def _refuse_cells(contents: Mapping[str, bytes], dataset_id: str) -> None:
    """Raise where tables have more cells than are read, all of them together."""
    cells = 0
    for path, content in contents.items():
        text = decode_text(content)
        header = _LINES.split(text.lstrip(), maxsplit=1)[0]
        rows = max(text.count("\n"), text.count("\r")) + 1
        columns = _LEAST_COLUMNS + max(map(header.count, _DELIMITERS))
        cells += max(rows * columns, *map(text.count, _DELIMITERS))
        refuse_above(CELLS, cells, f"{path} of {dataset_id}", f"cells, in {rows} rows,")


def _read_table(content: bytes, place: str | None = None, taken: str = "") -> _Table:
    """Split a table into columns and rows.

    Args:
        content: The file's bytes.
        place: The subject whose sessions it tells of; empty where it tells of those of several,
            None where it is participants.tsv.
        taken: A header that another table has.
    """
    lines = [line for line in _LINES.split(decode_text(content)) if line.strip()]
    if not lines:
        return _Table((), ())
    delimiter = next((mark for mark in _DELIMITERS if mark in lines[0]), "\t")
    header, *body = (_cells(line, delimiter) for line in lines)
    own = {n for cells in [header, *body] for n, cell in enumerate(cells) if _given(cell)}
    when = _position(header, _SESSION_HEADERS)
    whose = -1 if place else max(_position(header, _SUBJECT_HEADERS), 0)
    shown = [*header, *[""] * (max(own, default=0) + 1 - len(header))]
    headers = unique_headers([h or f"column_{n}" for n, h in enumerate(shown, start=1)], {taken})
    kept = {n: headers[n] for n in sorted(own - {whose} - ({when} if place is not None else set()))}
    rows: list[_Row] = []
    for cells in body:
        given = dict(enumerate(map(_given, cells)))
        subject = place or normalise_id(given.get(whose, ""))
        session = normalise_id(given.get(when, ""), "ses-")
        if subject:
            values = {name: given[n] for n, name in kept.items() if given.get(n)}
            rows.append((subject, session, values))
    ids = [headers[whose]] if place is None else []
    return _Table([*ids, *kept.values()], rows, *ids)


def decode_text(content: bytes) -> str:
    """Decode UTF-8 or UTF-16 with its mark, else Western European text."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def _cells(line: str, delimiter: str) -> list[str]:
    """Split a line; spaces and quotes around a cell are not part of it."""
    cell = rf' *(?:"((?:[^"\t]|"")*)" *|([^{delimiter}]*)){delimiter}'
    found = re.findall(cell, line + delimiter)
    return [(quoted.replace('""', '"') or plain).strip() for quoted, plain in found]


def unique_headers(headers: Sequence[str], taken: Collection[str]) -> list[str]:
    """Number headers that come again, or are taken."""
    names = dict.fromkeys(taken)
    repetitions: Counter[str] = Counter()
    for header in headers:
        name = header
        while name in names:
            repetitions[header] += 1
            name = f"{header}_{repetitions[header] + 1}"
        names[name] = None
    return list(names)[len(taken) :]


def _position(headers: Sequence[str], known: Sequence[str]) -> int:
    """Return which header is one of those known, the best known first; -1 where none is."""
    lowered = [header.lower().replace(" ", "_") for header in headers]
    return next((lowered.index(name) for name in known if name in lowered), -1)


def _given(text: str) -> str:
    """Return a cell's text, empty where it says that there is no value."""
    return "" if text in _MISSING else text
