"""participants.tsv in the shapes that real repositories have."""

import tracemalloc
from collections.abc import Mapping, Sequence
from math import isnan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tio_openneuro.errors import UnsafeDatasetError
from tio_openneuro.select.participants import Participants, normalise_id


def parse(text: str | bytes) -> Participants:
    """Return what a dataset's participants.tsv says."""
    content = text if isinstance(text, bytes) else text.encode()
    return Participants.read(lambda *_: {"participants.tsv": content})


def row(text: str | bytes, subject: str, session: str = "") -> dict[str, float | str]:
    """Return a subject's row of a table."""
    return parse(text).row(subject, session)


def test_columns_are_typed_by_all_their_values() -> None:
    """A column is numeric where all values given are numbers; missing ones are nan or empty."""
    text = "participant_id\tage\tgroup\tcode\nsub-1\t30\tn/a\t1\nsub-2\tn/a\tHC\tx\nsub-3\t\t\t\n"
    table = parse(text)
    assert table.columns == ("participant_id", "age", "group", "code")
    assert table.numeric == {"age"}
    first, second, third = (table.row(f"sub-{n}") for n in (1, 2, 3))
    assert first == {"participant_id": "sub-1", "age": 30.0, "group": "", "code": "1"}
    assert isnan(float(second.pop("age")))
    assert second == {"participant_id": "sub-2", "group": "HC", "code": "x"}
    assert isnan(float(third.pop("age")))
    assert third == {"participant_id": "sub-3", "group": "", "code": ""}


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfparticipant_id\tage\tsex\r\nsub-01\t4\tM\r\n",
        b"participant_id\tage\tsex\nsub-01\t4\tM",
        b"participant_id\tage\tsex\rsub-01\t4\tM\r",
        b"participant_id\t age\t sex \n\nsub-01\t 4\tM \n\n",
        b"participant_id,age,sex\nsub-01,4,M\n",
        b'"participant_id"\t"age"\t"sex"\n"01"\t"4"\t"M"\n',
        b"Participant ID\tage\tsex\n01\t4\tM\n",
        b"age\tparticipant_id\tsex\n4\t1\tM\n",
        "participant_id\tage\tsex\nsub-01\t4\tM\n".encode("utf-16"),
        b"participant_id\tage\tsex\nsub-01\t4\tM\tmore\n",
    ],
)
def test_table_is_read_in_any_dress(content: bytes) -> None:
    """Marks, line ends, spaces, quotes, commas and ids without prefix or zeros change nothing."""
    values = row(content, "sub-01")
    assert {"age": 4.0, "sex": "M"}.items() <= values.items()
    assert "sub-01" in values.values()


def test_headers_may_be_repeated_empty_or_not_ascii() -> None:
    """Each column keeps a name of its own, in the order of the table."""
    text = "participant_id\tscore\tscore\t\tgr\u00f6\u00dfe\nsub-1\t1\t2\t3\t4\n"
    assert row(text, "1") == {
        "participant_id": "sub-1",
        "score": 1.0,
        "score_2": 2.0,
        "column_4": 3.0,
        "gr\u00f6\u00dfe": 4.0,
    }


def test_text_that_is_not_utf8_is_taken_as_western() -> None:
    """A table saved by a spreadsheet of old is read, not refused."""
    assert (
        row("participant_id\tsite\nsub-1\tZ\u00fcrich\n".encode("cp1252"), "1")["site"]
        == "Z\u00fcrich"
    )


def test_line_separators_inside_a_cell_do_not_end_the_row() -> None:
    """Only CR and LF end lines, though Unicode knows others."""
    assert row("participant_id\tnote\tage\nsub-1\ta\u2028b\x0bc\t3\n", "1")["age"] == 3.0


def test_ids_repeated_per_session_have_a_row_each() -> None:
    """A session gets its own values; the subject as a whole the first given."""
    text = (
        "participant_id\tsession_id\tage\tsite\n"
        "sub-1\tses-a\t\tX\nsub-1\tses-b\t31\tY\nsub-2\ta\t40\tX\n"
    )
    second = {"participant_id": "sub-1", "session_id": "ses-b", "age": 31.0, "site": "Y"}
    assert row(text, "sub-1", "ses-b") == second
    assert row(text, "sub-1") == second | {"session_id": "ses-a", "site": "X"}
    assert row(text, "sub-2", "ses-a")["age"] == 40.0


def test_ids_repeated_without_a_session_give_the_first_value() -> None:
    """Repeated rows never lead to a list or to an error."""
    text = "participant_id\tage\tsex\nsub-1\tn/a\tF\nsub-1\t31\tM\n"
    assert row(text, "sub-1", "ses-9") == {"participant_id": "sub-1", "age": 31.0, "sex": "F"}


def test_subject_without_a_row_has_missing_values() -> None:
    """A folder without a row collates with the others."""
    values = row("participant_id\tage\tsex\nsub-1\t30\tF\n", "sub-9")
    assert isnan(float(values.pop("age")))
    assert values == {"participant_id": "sub-9", "sex": ""}


def test_leading_zeros_are_matched_only_where_that_is_clear() -> None:
    """A spreadsheet's ``1`` is sub-01, unless both sub-1 and sub-01 have rows."""
    assert row("participant_id\tage\n1\t30\n", "sub-001")["age"] == 30.0
    text = "participant_id\tage\nsub-1\t30\nsub-01\t40\n"
    assert row(text, "sub-01")["age"] == 40.0
    assert isnan(float(row(text, "sub-001")["age"]))


def test_word_none_in_lower_case_is_a_value() -> None:
    """Controls of ds001226 have the tumour type "none", which is not a missing one."""
    text = "participant_id\ttumor\nsub-1\tnone\nsub-2\tNone\n"
    assert (row(text, "sub-1")["tumor"], row(text, "sub-2")["tumor"]) == ("none", "")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"participant_id\n", b"\xef\xbb\xbf"])
def test_table_without_rows_gives_no_values(content: bytes) -> None:
    """An empty table is no error."""
    assert set(row(content, "sub-1").values()) <= {"sub-1"}


def test_sessions_are_joined_and_typed_across_subjects() -> None:
    """One subject's odd value makes a column text for all, so that batches collate."""
    files = {
        "participants.tsv": b"participant_id\tsex\nsub-1\tF\nsub-2\tM\n",
        "sub-1/sub-1_sessions.tsv": b"session_id\tage\tscore\nses-a\t30\t1\nses-b\t31\t2\n",
        "sub-2/sub-2_sessions.tsv": b"session_id\tage\tscore\na\t40\thigh\n",
    }

    def read(paths: Sequence[str], *_: int) -> Mapping[str, bytes]:
        return {path: files[path] for path in paths if path in files}

    table = Participants.read(read, [*files, "sub-1/anat/sub-1_T1w.nii.gz"])
    assert table.numeric == {"age"}
    expected = {"participant_id": "sub-1", "sex": "F", "age": 31.0, "score": "2"}
    assert table.row("sub-1", "ses-b") == expected
    assert table.row("sub-2", "ses-a")["score"] == "high"
    missing = table.row("sub-2", "ses-z")
    assert isnan(float(missing.pop("age")))
    assert missing == {"participant_id": "sub-2", "sex": "M", "score": ""}


def tables(**files: bytes) -> Participants:
    """Return what the tables of a dataset say, by their paths with a space for each slash."""
    named = {path.replace(" ", "/") + ".tsv": content for path, content in files.items()}

    def read(paths: Sequence[str], *_: int) -> Mapping[str, bytes]:
        return {path: named[path] for path in paths if path in named}

    return Participants.read(read, [*named, "sub-01/anat/sub-01_T1w.nii.gz"])


@pytest.mark.parametrize("place", ["sub-01 sub-01_sessions", "sub-01 sessions", "sub-01_sessions"])
@pytest.mark.parametrize("header", ["subject_id", "participant_id", "age"])
def test_place_of_a_table_is_believed_before_ids_in_it(place: str, header: str) -> None:
    """Whatever a sessions' table calls its subject, its rows are those of its folder or name."""
    own = f"{header}\tsession_id\tscore\nA7\tses-1\t5\nA7\tses-2\t6\n".encode()
    found = tables(**{"participants": b"participant_id\tsex\nsub-01\tF\n", place: own})
    values = found.row("sub-01", "ses-2")
    assert values["participant_id"] == "sub-01"
    assert (values["sex"], values["score"]) == ("F", 6.0)
    name = "participant_id_2" if header == "participant_id" else header
    assert values[name] == "A7"
    assert found.files[name] == place.replace(" ", "/") + ".tsv"


def test_column_of_both_tables_is_there_twice() -> None:
    """A session's own value goes first, and that of participants.tsv is kept beside it."""
    found = tables(
        **{
            "participants": b"participant_id\tage\tparticipant_age\nsub-01\t30\told\nsub-02\t4\t\n",
            "sub-01 sub-01_sessions": b"session_id\tage\nses-1\t31\nses-2\t32\n",
        }
    )
    assert found.row("sub-01", "ses-2") == {
        "participant_id": "sub-01",
        "age": 32.0,
        "participant_age": "old",
        "participant_age_2": 30.0,
    }
    assert found.row("sub-01")["age"] == 30.0
    assert found.row("sub-02", "ses-1")["age"] == 4.0


def test_only_row_of_a_subject_is_that_of_all_its_sessions() -> None:
    """A session that participants.tsv does not name has the row of the one that it names."""
    text = "participant_id\tsession\tage\nsub-1\t1\t30\nsub-2\tses-1\t40\nsub-2\tses-02\t41\n"
    assert row(text, "sub-1", "ses-pre") == {"participant_id": "sub-1", "session": "1", "age": 30.0}
    assert row(text, "sub-2", "ses-2")["age"] == 41.0
    assert isnan(float(row(text, "sub-2", "ses-3")["age"]))


def test_ids_without_zeros_reach_the_rows_of_their_folder() -> None:
    """A spreadsheet's ``1`` is sub-01 also where that has a sessions' table, and never sub-1."""
    own = b"session_id\tscore\nses-1\t5\n"
    found = tables(**{"participants": b"participant_id\tage\n1\t30\n", "sub-01 sessions": own})
    expected = {"participant_id": "sub-01", "age": 30.0, "score": 5.0}
    assert found.row("sub-01", "ses-1") == expected
    both = tables(**{"participants": b"participant_id\tage\n1\t30\n", "sub-1 sessions": own})
    assert both.row("sub-1")["age"] == 30.0
    assert isnan(float(both.row("sub-01")["age"]))


def test_cells_may_be_quoted_and_more_than_headers() -> None:
    """A comma within quotes parts no cells, a lone quote is text, and no cell is cut off."""
    text = 'participant_id,name,note\nsub-1,"Smith, ""J""",5" tall\nsub-2,"x,y,more\n'
    assert row(text, "1") == {
        "participant_id": "sub-1",
        "name": 'Smith, "J"',
        "note": '5" tall',
        "column_4": "",
    }
    assert row(text, "2")["name"] == '"x'
    assert (row(text, "2")["note"], row(text, "2")["column_4"]) == ("y", "more")
    more = row("participant_id\tage\nsub-1\t3\t\tlast\n", "1")
    assert more == {"participant_id": "sub-1", "age": 3.0, "column_4": "last"}


def test_number_that_a_float_does_not_hold_stays_text() -> None:
    """A serial number of 18 digits keeps each of them."""
    assert row("participant_id\tserial\nsub-1\t123456789012345678\n", "1")["serial"] == (
        "123456789012345678"
    )


# -- any tables at all -----------------------------------------------------------------------

HEADERS = st.sampled_from(
    [
        *("age", "age ", " sex", "", "session", "session_id", "subject_id", "column_2", "a.b"),
        *("age_2", "participant_age", "participant_participant_age", "participant_id", '"q"'),
        "gr\u00f6\u00dfe",
    ]
)
# Each takes a number that no other cell of the example has.
CELLS = st.sampled_from(
    [
        "",
        "n/a",
        " ",
        "{}",
        "{}.5",
        "-{}e2",
        "0{}",
        "1234567890{}",
        "v{}",
        "v {}.x",
        '"q{}"',
        "\u00e9{}",
    ]
)
FOLDERS = ("sub-01", "sub-2", "sub-1.5")
VISITS = ("ses-1", "ses-02", "ses-pre.1")


def as_number(value: object) -> object:
    """Return a value as the number that it is, if it is one."""
    try:
        return float(str(value))
    except ValueError:
        return value


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    line_end=st.sampled_from(["\n", "\r\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "cp1252", "utf-16"]),
)
def test_no_value_of_a_table_is_lost_or_moved(
    data: st.DataObject, line_end: str, encoding: str
) -> None:
    """What a session carries are the values of its two rows: all of them, and no others."""
    numbers = iter(range(1000, 9000))

    def cells(most: int) -> list[str]:
        drawn = data.draw(st.lists(CELLS, max_size=most))
        return [cell.format(next(numbers)) for cell in drawn]

    def write(rows: list[list[str]]) -> bytes:
        return line_end.join("\t".join(row) for row in rows).encode(encoding)

    def given_of(row: Sequence[str]) -> set[object]:
        texts = {text.strip().strip('"') for text in row[1:]}
        return {as_number(text) for text in texts - {"", "n/a"}}

    header = ["participant_id", *data.draw(st.lists(HEADERS, max_size=4))]
    people = {folder: [folder, *cells(6)] for folder in FOLDERS}
    files = {"participants.tsv": write([header, *people.values()])}
    visits: dict[str, dict[str, list[str]]] = {folder: {} for folder in FOLDERS}
    for folder in data.draw(st.sets(st.sampled_from(FOLDERS))):
        chosen = data.draw(st.lists(st.sampled_from(VISITS), unique=True))
        visits[folder] = {session: [session, *cells(5)] for session in chosen}
        own = ["session_id", *data.draw(st.lists(HEADERS, max_size=3))]
        path = f"{folder}/{folder}_sessions.tsv"
        files[path] = write([own, *visits[folder].values()])
    table = Participants.read(
        lambda paths, *_: {path: files[path] for path in paths if path in files},
        [*files, *(f"{folder}/anat/{folder}_T1w.nii" for folder in FOLDERS)],
    )
    for folder in FOLDERS:
        for session in VISITS:
            values = table.row(folder, session)
            assert tuple(values) == table.columns
            assert {type(values[n]) for n in table.columns if n in table.numeric} <= {float}
            assert {type(values[n]) for n in table.columns if n not in table.numeric} <= {str}
            assert values.pop("participant_id") == folder
            expected = given_of(people[folder]) | given_of(visits[folder].get(session, []))
            carried = {as_number(v) for v in values.values() if v != "" and v == v}  # noqa: PLR0124
            assert carried == expected


def test_dataset_without_tables_has_no_columns() -> None:
    """participants.tsv may be absent."""
    table = Participants.read(lambda *_: {})
    assert table.row("sub-1") == {}


@pytest.mark.parametrize("text", ["01", "sub-01", " sub-01 ", "Sub-01", "sub_01"])
def test_id_has_its_prefix_once(text: str) -> None:
    """However the table spells it, the id is the folder's name."""
    assert normalise_id(text) == "sub-01"


class TestBombs:
    """Small files that would be large once they are taken apart."""

    @pytest.mark.parametrize(
        "content",
        [
            b"participant_id\n" + b"\n" * (12 << 20),
            b"participant_id\r" * (1 << 20),
            b"participant_id" + b"\t" * (12 << 20),
            b"participant_id\tage\nsub-1" + b"\t" * (12 << 20),
            b"a\t" * 20_000 + b"\n" + b"s\n" * 20_000,
            "participant_id\tsex\n".encode("utf-16") + "\n".encode("utf-16-le") * (6 << 20),
        ],
        ids=["lines", "returns", "columns", "cells", "rows times columns", "utf-16"],
    )
    def test_more_cells_than_tables_have_are_refused_unsplit(self, content: bytes) -> None:
        """The error names table, dataset and numbers."""
        tracemalloc.start()
        with pytest.raises(
            UnsafeDatasetError, match=r"participants\.tsv of ds1: .* cells, in \d+ r"
        ):
            Participants.read(lambda *_: {"participants.tsv": content}, (), "ds1")
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 6 * len(content)

    def test_tables_of_sessions_count_together(self) -> None:
        """Ten thousand small tables are as many cells as one large one."""
        table = b"session_id\tage\n" + b"ses-1\t1\n" * 100
        files = {f"sub-{n}/sub-{n}_sessions.tsv": table for n in range(2000)}
        with pytest.raises(UnsafeDatasetError, match=r"sub-\d+_sessions\.tsv of ds1"):
            Participants.read(lambda *_: files, files, "ds1")

    def test_table_of_a_thousand_columns_is_read(self) -> None:
        """What datasets have is far below."""
        header = "participant_id\t" + "\t".join(f"c{n}" for n in range(999))
        text = header + "\n" + "\n".join(f"sub-{n}" + "\t1" * 999 for n in range(1000))
        assert row(text.encode(), "sub-999")["c998"] == 1.0

    def test_equal_headers_and_long_numbers_take_no_time(self) -> None:
        """Neither is compared with all that came before; both took hours."""
        text = "participant_id" + "\tx" * 50_000 + "\nsub-1\t" + "1" * (1 << 20) + "y"
        values = row(text.encode(), "sub-1")
        assert len(values) == 50_001
        assert "x_50000" in values
