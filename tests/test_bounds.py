"""Words of ours about what others wrote."""

import pytest

from tio_openneuro import bounds
from tio_openneuro.errors import SelectionError, UnsafeDatasetError


def test_message_holds_nothing_that_a_terminal_obeys() -> None:
    """Escapes, returns, overwriting and turned text of a name are shown as such."""
    name = "sub-01\x1b[2J\r\x07\u202e\udc80é.nii"
    shown = str(SelectionError(f"Cannot use {name}.\nLook at it."))
    assert shown == "Cannot use sub-01\\x1b[2J\\r\\x07\\u202e\\udc80é.nii.\nLook at it."
    shown.encode()


def test_bound_itself_is_allowed() -> None:
    """One more is not, and the error says both numbers."""
    bounds.refuse_above(3, 3, "ds1", "files")
    with pytest.raises(UnsafeDatasetError, match="ds1: it has 4 files or more, and 3 is the most"):
        bounds.refuse_above(3, 4, "ds1", "files")
