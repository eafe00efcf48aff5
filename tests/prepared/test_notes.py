"""What a prepared volume says of its subject: values of a few kinds, and nothing that runs."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tio_openneuro.disk import PreparedRepo
from tio_openneuro.errors import LedgerError
from tio_openneuro.prepared.file import DamagedVolumeError
from tio_openneuro.prepared.notes import ImageNote, Same, SubjectNote, read_note, write_note


def note_of(value: object) -> SubjectNote:
    """Return a note that holds a value in each of its places."""
    items = {"x": value, "y": Same()}
    image = ImageNote("ScalarImage", "t1", np.eye(4), items, {"a": value}, sourced=True)
    history = {"applied_transforms": [("Clamp", {"v": value})]}
    return SubjectNote("P", "Subject", {"v": value, "t1": image}, history)


VALUES: dict[str, Any] = {
    "nothing": None,
    "numbers": [1, -0.1, float("inf"), True, 10**30],
    "text": 'é\n"\udc80',
    "tuple": ((1, 2), ("a",), ()),
    "dictionary": {1: "a", (2, 3): {"b": [None]}},
    "path": Path("a/b"),
    "array": np.arange(6, dtype=">i2").reshape(2, 3)[:, ::2],
    "empty array": np.zeros((0, 3)),
    "NumPy's number": np.float32(0.1),
    "tensor": torch.arange(4).reshape(2, 2),
}


@pytest.mark.parametrize("name", VALUES)
def test_note_is_what_was_noted(name: str) -> None:
    """Kinds, types and bits are the same."""
    value = VALUES[name]
    found = read_note(write_note(note_of(value), []), [])
    assert repr(found) == repr(note_of(value))
    assert type(found.items["v"]) is type(value)
    if isinstance(value, np.ndarray | np.generic):
        assert found.items["v"].dtype == value.dtype


def test_part_of_the_transform_is_the_part_itself() -> None:
    """A function is named by its number; whoever reads has it."""
    parts = [object(), len, torch.float16]
    found = read_note(write_note(note_of(len), parts), parts)
    assert found.items["v"] is len
    assert found.attributes["applied_transforms"][0][1]["v"] is len


@pytest.mark.parametrize("value", [object(), len, np.array([object()]), {1, 2}, b"bytes"])
def test_other_kinds_cannot_be_noted(value: object) -> None:
    """They say so, and the volume is not kept."""
    with pytest.raises((KeyError, TypeError)):
        write_note(note_of(value), [])


class _Mark:
    """Leaves a file when it is read from a pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_runs_when_a_note_is_read(tmp_path: Path) -> None:
    """A pickle, code, unknown words and deep nests are damage."""
    mark = tmp_path / "mark"
    texts = [pickle.dumps(_Mark(mark)), b'["eval", "1"]', b'["part", 3]', b"[" * 99_999, b"[[]]"]
    for text in texts:
        with pytest.raises(DamagedVolumeError):
            read_note(text, [len])
    assert not mark.exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root gives files away")
def test_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    """Nor one that a link leads to; one's own is for oneself alone, whatever it was before."""
    folder = tmp_path / "prepared"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    assert PreparedRepo(tmp_path).path.stat().st_mode & 0o777 == 0o700
    os.chown(folder, 12345, 12345)
    with pytest.raises(LedgerError, match="another user's"):
        PreparedRepo(tmp_path)
    folder.rmdir()
    (tmp_path / "mine").mkdir()
    folder.symlink_to(tmp_path / "mine")
    with pytest.raises(LedgerError, match="a link"):
        PreparedRepo(tmp_path)
