"""Byte counts: read from text, and shown to people."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tio_openneuro.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("10 GB", 10_000_000_000),
        ("10gb", 10_000_000_000),
        ("1.5 KiB", 1536),
        ("2 TiB", 2 * 1024**4),
        ("512", 512),
        ("1_000 B", 1000),
        (7, 7),
    ],
)
def test_size_is_read_from_text_as_people_write_it(text: str | int, size_bytes: int) -> None:
    """Decimal and binary units in any case, with or without a blank, and plain numbers."""
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "ten GB", "10 XB", "-3 GB", "0", 0, -1, True, "1.2.3 GB", 2.5]
)
def test_size_that_is_none_is_refused_by_name(text: object) -> None:
    """What is not a positive number of bytes raises ValueError, and the message shows it."""
    with pytest.raises(ValueError, match="size") as refusal:
        parse_size(text)
    assert repr(text) in str(refusal.value)


@given(st.integers(min_value=1, max_value=10**15))
def test_shown_size_reads_back_within_its_rounding(size_bytes: int) -> None:
    """One decimal is shown, so reading it back is off by at most a twentieth of a unit."""
    shown = format_size(size_bytes).replace("Bytes", "B").replace("Byte", "B")
    assert parse_size(shown) == pytest.approx(size_bytes, rel=0.051)
