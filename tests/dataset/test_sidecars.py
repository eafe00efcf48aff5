"""Sidecars as a stranger might write them, and how they are kept."""

import copy
import pickle
from pathlib import Path

import pytest

import tio_openneuro as tno
from tio_openneuro.content import TreeFile
from tio_openneuro.errors import UnsafeDatasetError
from tio_openneuro.torchio_seams import Metadata, ReadSidecars

T1 = {"t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz")}
IMAGE = "sub-01/anat/sub-01_T1w.nii.gz"


def open_with(folder: Path, files: dict[str, bytes]) -> tno.DataladSubjectsDataset:
    """Open a plain folder that has these files."""
    for path, content in {"dataset_description.json": b"{}", IMAGE: b"x" * 600, **files}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return tno.DataladSubjectsDataset(folder, T1)


@pytest.mark.parametrize(
    "text",
    [b'{"a":' * 100_000, b'{"a": [' + b"[" * (1 << 20), b'{"a": "' + b"x" * (5 << 20) + b'"}'],
    ids=["objects", "lists", "bytes"],
)
def test_bomb_is_refused_with_path_and_number(text: bytes, tmp_path: Path) -> None:
    """Depth and length have bounds, and Python's own words do not come through."""
    folder = tmp_path / "ds900660"
    folder.mkdir()
    refused = pytest.raises(UnsafeDatasetError, match=r"T1w\.json of ds900660.*\d{6}.* is the most")
    with open_with(folder, {"T1w.json": text}) as dataset, refused:
        dict(dataset.dry_iter()[0].t1["metadata"])


def test_fields_of_all_levels_are_there_and_shared_by_copies(tmp_path: Path) -> None:
    """Nearer ones go over general ones; a copy reads them again, or shares them."""
    near = IMAGE.replace(".nii.gz", ".json")
    files = {"T1w.json": b'{"a": 1, "b": [1, 2]}', near: b'\xef\xbb\xbf{"a": 2, "c": null}'}
    with open_with(tmp_path, files) as dataset:
        (subject,) = dataset.dry_iter()
        metadata = subject.t1["metadata"]
        assert dict(metadata) == {"a": 2, "b": [1, 2], "c": None}
        assert list(metadata) == ["a", "b", "c"]
        for twin in (copy.deepcopy(metadata), pickle.loads(pickle.dumps(metadata))):
            assert twin == metadata


def test_what_is_given_goes_over_the_texts(tmp_path: Path) -> None:
    """Events are no sidecar's to name."""
    (tmp_path / "x.json").write_text('{"events": "b", "x": 1}')
    files = (tmp_path, (TreeFile("x.json", "", None, 23),), ReadSidecars())
    assert dict(Metadata({"events": "a"}, files)) == {"events": "a", "x": 1}
