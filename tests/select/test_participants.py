"""participants.tsv in the shapes that real repositories have."""

import tracemalloc
from collections.abc import Mapping, Sequence
from math import isnan

import pytest

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
    assert row(text, "sub-1", "ses-b") == {"participant_id": "sub-1", "age": 31.0, "site": "Y"}
    assert row(text, "sub-1") == {"participant_id": "sub-1", "age": 31.0, "site": "X"}
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
