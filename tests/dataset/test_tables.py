"""Tables and sidecars through a dataset: names that mean something, values, and when it is read."""

import ast
import copy
import inspect
import json
import logging
import math
import pickle
import tracemalloc
from pathlib import Path

import pytest
import torch
import torchio as tio
from test_habits import write_bids
from torch.utils.data._utils.pin_memory import pin_memory
from torchio import constants

import tio_openneuro as tno
from tio_openneuro.torchio_seams import reserved_names

T1 = {"t1": tno.Scalar(suffix="T1w")}


def volumes(count: int) -> list[str]:
    """Return the paths of that many subjects' images."""
    return [f"sub-{n:02}/anat/sub-{n:02}_T1w.nii.gz" for n in range(1, count + 1)]


def open_bids(folder: Path, unit: str = "subject") -> tno.DataladSubjectsDataset:
    """Open a plain BIDS folder."""
    return tno.DataladSubjectsDataset(folder, T1, unit=unit, root=folder.parent / "root")


def test_column_of_any_name_is_carried_and_means_nothing_else(tmp_path: Path) -> None:
    """Reserved names get a prefix, also beside a column that has that name, in one warning."""
    names = sorted(reserved_names() | {"t1", "subject_id", "session_id", "dataset_id"})
    columns = [*names, "participant_t1", "participant_name", "plain", "a.b"]
    cells = [f"v{n}" for n in range(len(columns))]
    table = "\n".join("\t".join(row) for row in (["participant_id", *columns], ["1", *cells]))
    folder = write_bids(tmp_path / "bids", volumes(1), participants=table)
    with pytest.warns(UserWarning, match=r"'t1' of participants\.tsv becomes") as caught:
        dataset = open_bids(folder)
    assert len(caught) == 1
    with dataset:
        subject = dataset[0]
        values = dict(zip(columns, cells, strict=True))
        assert (subject["plain"], subject["a.b"]) == (values["plain"], values["a.b"])
        assert subject["participant_t1"] == values["participant_t1"]
        assert subject["participant_t1_2"] == values["t1"]
        assert subject["participant_num_samples"] == values["num_samples"]
        assert {v for v in subject.values() if isinstance(v, str)} >= set(cells)
        assert isinstance(subject.t1, tio.ScalarImage)
        queue = tno.BudgetedQueue(dataset, 4, 2, tio.UniformSampler(4), num_workers=0, seed=1)
        with queue:
            patches = list(tio.SubjectsLoader(queue, batch_size=2, num_workers=0))
        assert len(patches) == 1
        assert patches[0]["location"].shape == (2, 6)
        assert patches[0]["participant_location"] == [values["location"]] * 2


def test_names_that_torchio_looks_for_are_reserved() -> None:
    """Every key of a subject that TorchIO's own code names, by its word or by a constant."""
    found = set()
    folder = Path(inspect.getfile(tio)).parent
    for path in [*folder.glob("data/**/*.py"), *folder.glob("transforms/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            key: ast.expr | None = None
            if isinstance(node, ast.Subscript) and "subject" in ast.unparse(node.value):
                key = node.slice
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"getattr", "hasattr"}:
                key = node.args[1] if ast.unparse(node.args[0]) == "subject" else None
            if isinstance(key, ast.Name) and key.id.isupper():
                found.add(getattr(constants, key.id))
            elif isinstance(key, ast.Constant) and isinstance(key.value, str):
                found.add(key.value)
    assert {"num_samples", "location"} <= found
    assert found <= reserved_names()
    assert {"self", "applied_transforms", "history", "shape", "keys", "name"} <= reserved_names()


def test_warning_names_the_table_that_has_the_column(tmp_path: Path) -> None:
    """Not participants.tsv, where a sessions' table has the name."""
    folder = write_bids(
        tmp_path / "bids",
        ["sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz"],
        participants="participant_id\tshape\nsub-01\tround\n",
    )
    own = "subject_id\tsession_id\tname\tmood\nX7\tses-1\tFirst\tgood\n"
    (folder / "sub-01" / "sub-01_sessions.tsv").write_text(own)
    with (
        pytest.warns(UserWarning, match="shape") as caught,
        open_bids(folder, "session") as dataset,
    ):
        subject = dataset.dry_iter()[0]
    (message,) = (str(warning.message) for warning in caught)
    assert "'shape' of participants.tsv becomes 'participant_shape'" in message
    assert "'name' of sub-01/sub-01_sessions.tsv becomes 'participant_name'" in message
    assert (subject["mood"], subject["participant_name"]) == ("good", "First")
    assert (subject["subject_id"], subject["participant_subject_id"]) == ("sub-01", "X7")


def test_missing_values_are_no_class_of_weights(tmp_path: Path) -> None:
    """They are never drawn, and each value given is drawn equally often."""
    rows = ["participant_id\tsex\tage\tnone", "1\tF\t3\t", "2\tn/a\t\t", "3\tM\t4\t", "4\tF\t4\t"]
    table = "\n".join(rows)
    with open_bids(write_bids(tmp_path / "bids", volumes(5), participants=table)) as dataset:
        assert dataset.weights("sex") == [0.25, 0.0, 0.5, 0.25, 0.0]
        assert dataset.weights("age") == [0.5, 0.0, 0.25, 0.25, 0.0]
        with pytest.raises(tno.SelectionError, match="'none': no unit has a value"):
            dataset.weights("none")


def test_concat_keeps_each_digit_of_a_number(tmp_path: Path) -> None:
    """A column that is text in one dataset and numbers in the other is text, and not rounded."""
    numbers = "participant_id\tcode\n1\t1234567.25\n2\t30\n"
    first = write_bids(tmp_path / "a", volumes(2), participants=numbers)
    second = write_bids(tmp_path / "b", volumes(1), participants="participant_id\tcode\n1\tx\n")
    with open_bids(first) as one, open_bids(second) as two:
        both = tno.concat([one, two])
        assert [s["code"] for s in both.dry_iter()] == ["1234567.25", "30", "x"]


# -- sidecars --------------------------------------------------------------------------------


def test_sidecars_are_read_as_tables_are_and_when_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In any encoding; one word about all those that are none, and none at construction."""
    folder = write_bids(tmp_path / "bids", volumes(5))
    site = '{"InstitutionName": "Z\u00fcrich", "EchoTime": 2}'
    stored = [site.encode("cp1252"), site.encode("utf-16"), b"\xef\xbb\xbf" + site.encode()]
    stored += [b"{no", b"[1, 2]"]
    (folder / "T1w.json").write_text('{"EchoTime": 1, "Manufacturer": "x"}')
    for path, content in zip(volumes(5), stored, strict=True):
        (folder / path.replace(".nii.gz", ".json")).write_bytes(content)
    with caplog.at_level(logging.WARNING), open_bids(folder) as dataset:
        assert caplog.messages == []
        fields = [dict(subject.t1["metadata"]) for subject in dataset]
    own = {"EchoTime": 2, "Manufacturer": "x", "InstitutionName": "Z\u00fcrich"}
    assert fields == [own] * 3 + [{"EchoTime": 1, "Manufacturer": "x"}] * 2
    (message,) = caplog.messages
    assert "sub-04/anat/sub-04_T1w.json of bids" in message


def test_sidecar_that_is_gone_is_no_missing_field(tmp_path: Path) -> None:
    """What cannot be read raises, and ``get`` does not answer with its default."""
    folder = write_bids(tmp_path / "bids", volumes(1))
    (folder / "T1w.json").write_text("{}")
    with open_bids(folder) as dataset:
        metadata = dataset.dry_iter()[0].t1["metadata"]
        (folder / "T1w.json").unlink()
        with pytest.raises(tno.SelectionError, match=r"T1w\.json of .*bids: it is gone"):
            metadata.get("EchoTime", 3)


def test_sidecars_cost_no_memory_until_they_are_asked_for(tmp_path: Path) -> None:
    """Below 2 kB a unit where each has 50 kB, held, pickled, copied, pinned; then one is there."""
    count = 40
    folder = write_bids(tmp_path / "bids", volumes(count))
    sidecar = json.dumps({"EchoTime": 1, "Slices": [n / 7 for n in range(2900)]})
    assert len(sidecar) > 50_000

    def held() -> tuple[int, int, tno.DataladSubjectsDataset]:
        open_bids(folder).close()
        tracemalloc.start()
        dataset = open_bids(folder)
        size_bytes, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return size_bytes, len(pickle.dumps([dict(s) for s in dataset.dry_iter()])), dataset

    bare_bytes, bare_pickle_bytes, bare = held()
    bare.close()
    for path in volumes(count):
        (folder / path.replace(".nii.gz", ".json")).write_text(sidecar)
    held_bytes, pickle_bytes, dataset = held()
    assert (held_bytes - bare_bytes) / count < 2000
    assert (pickle_bytes - bare_pickle_bytes) / count < 500
    with dataset:
        subject = dataset[0]
        metadata = subject.t1["metadata"]
        assert copy.deepcopy(subject).t1["metadata"] is metadata
        assert pin_memory([metadata])[0] is metadata
        assert metadata["EchoTime"] == 1
        assert len(metadata["Slices"]) == 2900
        again = pickle.loads(pickle.dumps(metadata))
        assert len(pickle.dumps(metadata)) < 1000
        assert again == metadata
        (batch,) = tio.SubjectsLoader(dataset[:2], batch_size=2, num_workers=1)
        assert [m["EchoTime"] for m in batch["t1"]["metadata"]] == [1, 1]
        assert torch.is_tensor(batch["t1"]["data"])
        assert math.isclose(batch["t1"]["metadata"][1]["Slices"][7], 1)
