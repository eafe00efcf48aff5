"""Splits of real datasets and of concatenations: saved, read, and asked for in wrong words."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import heads
from faulty import LoopbackOpenNeuro
from test_habits import write_bids

import tio_openneuro as tno
from tio_openneuro.loopback import Volume

T1 = {"t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz")}
_PATHS = [f"sub-{n:02}/anat/sub-{n:02}_T1w.nii.gz" for n in range(1, 7)]

_PROGRAM = """
import json, sys
import tio_openneuro as tno
def units(parts):
    return {n: [(s["dataset_id"], s["subject_id"]) for s in v.dry_iter()] for n, v in parts.items()}
folders, file = sys.argv[2:], sys.argv[1]
images = {"t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz")}
both = tno.concat([tno.DataladSubjectsDataset(f, images, root=file + ".root") for f in folders])
made = both.split({"train": .6, "val": .2, "test": .2}, stratify="site", seed=4)
if not __import__("os").path.exists(file):
    both.save_split(file, made)
print(json.dumps([units(made), units(both.read_split(file))]))
"""


def write_sites(folder: Path, names: str) -> list[Path]:
    """Write plain datasets with the same six participants, of several sites."""
    table = "participant_id\tsite\n" + "".join(f"sub-{n:02}\t{n % 3}x\n" for n in range(1, 7))
    return [write_bids(folder / name, _PATHS, participants=table) for name in names]


def assert_same_views(folder: Path, hash_seeds: range) -> None:
    """Split, save and read a concatenation in processes with other hash seeds."""
    folders = write_sites(folder, "abc")
    seen = []
    for hash_seed in hash_seeds:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(folder / "split.json"), *map(str, folders)],
            env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
            stdout=subprocess.PIPE,
            check=True,
            timeout=300,
        )
        seen += json.loads(done.stdout)
    assert seen == [seen[0]] * len(seen)
    units = sorted((d, s) for part in seen[0].values() for d, s in part)
    assert units == [(d, f"sub-{n:02}") for d in "abc" for n in range(1, 7)]
    assert {name: len(part) for name, part in seen[0].items()} == {"train": 11, "val": 3, "test": 4}


def test_concatenation_with_equal_names_is_read_as_it_was_saved(tmp_path: Path) -> None:
    """No unit of one dataset stands for another's; whatever the order of Python's sets."""
    assert_same_views(tmp_path, range(1, 3))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_concatenation_is_read_alike_in_ten_processes(tmp_path: Path) -> None:
    """The same for ten hash seeds."""
    assert_same_views(tmp_path, range(10))


def test_concatenation_tells_its_parts_apart_or_refuses_them(tmp_path: Path) -> None:
    """A split of one part is read by all; folders of one name cannot be told apart."""
    first, second = (tno.DataladSubjectsDataset(f, T1) for f in write_sites(tmp_path, "ab"))
    both = tno.concat([first, second])
    first.save_split(tmp_path / "first.json", first.split({"train": 0.5, "val": 0.5}))
    parts = both.read_split(tmp_path / "first.json")
    assert [s["dataset_id"] for v in parts.values() for s in v.dry_iter()] == ["a"] * 6
    with pytest.raises(tno.SplitError, match=r"6 of its units .* first a@/.*units of b@"):
        second.read_split(tmp_path / "first.json")
    twin = tno.DataladSubjectsDataset(write_sites(tmp_path / "elsewhere", "a")[0], T1)
    with pytest.raises(tno.SelectionError, match=r"a and .*elsewhere/a: .*same names.*Rename one"):
        tno.concat([first, twin])
    (tmp_path / "b" / "extra.tsv").write_text("only here")
    again = tno.DataladSubjectsDataset(tmp_path / "b", T1)
    with_file = tno.concat([first, again])
    assert with_file.read("extra.tsv") == b"only here"
    for path in ("participants.tsv", "none.tsv"):
        with pytest.raises(tno.SelectionError, match=r"2 datasets, of which (2|none) have"):
            with_file.read(path)


def test_concatenation_takes_pickled_datasets_and_says_each_commit(
    openneuro: LoopbackOpenNeuro,
) -> None:
    """Both commits of one dataset are parts that are told apart, by ``repr`` and when saved."""
    openneuro.publish("ds900031", heads(2))
    with (
        tno.DataladSubjectsDataset("ds900001", T1) as first,
        tno.DataladSubjectsDataset("ds900031", T1) as second,
    ):
        loaded = pickle.loads(pickle.dumps(second))
        both = tno.concat([pickle.loads(pickle.dumps(first)), loaded])
        assert f"at {first.version[:8]}+{second.version[:8]}:" in repr(both)
        assert [s["dataset_id"] for s in both.dry_iter()] == ["ds900001"] * 6 + ["ds900031"] * 2
        assert both[7]["t1"].data.equal(second[1]["t1"].data)
        both.close()
        loaded.close()


def test_template_ties_nobody_and_a_shared_image_does_in_any_view(
    openneuro: LoopbackOpenNeuro,
) -> None:
    """One file that all units have is told by its place; a scan of three is one for them alone."""
    files = heads(6)
    shared = files["sub-01/anat/sub-01_T1w.nii.gz"]
    for name in ("sub-02", "sub-03"):
        files[f"{name}/anat/{name}_T1w.nii.gz"] = shared
    files["template_T1w.nii.gz"] = Volume(np.ones((8, 8, 8), np.int16), np.eye(4))
    openneuro.publish("ds900032", files)
    images = {**T1, "template": tno.Scalar("template_T1w.nii.gz")}
    with tno.DataladSubjectsDataset("ds900032", images) as dataset:
        for seed in range(5):
            parts = dataset.split({"train": 0.5, "val": 0.5}, seed=seed)
            homes = {s["subject_id"]: n for n, v in parts.items() for s in v.dry_iter()}
            assert homes["sub-01"] == homes["sub-02"] == homes["sub-03"]
            assert len(set(homes.values())) == 2
        with pytest.raises(tno.SplitError, match="1 groups that stay together"):
            dataset[:3].k_fold(2)


@pytest.mark.parametrize("wrong", ["t1", "nothing", ["site"], ("site", "t1"), 3], ids=str)
def test_what_is_no_column_is_refused_in_words(tmp_path: Path, wrong: object) -> None:
    """An image, a list, an unknown name: the message tells the columns."""
    dataset = tno.DataladSubjectsDataset(write_sites(tmp_path, "a")[0], T1)
    words = (
        rf"Cannot read column {re.escape(repr(wrong))} of a: .*dataset_id, .*site.*Give the name"
    )
    for call in (
        lambda: dataset.split({"a": 0.5, "b": 0.5}, stratify=wrong),
        lambda: dataset.split({"a": 0.5, "b": 0.5}, group=wrong),
        lambda: dataset.k_fold(2, stratify=wrong),
        lambda: dataset.weights(wrong),
    ):
        with pytest.raises(tno.SelectionError, match=words):
            call()


def test_empty_view_and_broken_index_are_refused_in_words(tmp_path: Path) -> None:
    """No subject can be drawn of none, and 1.5 is no index."""
    dataset = tno.DataladSubjectsDataset(write_sites(tmp_path, "a")[0], T1)
    with pytest.raises(tno.SelectionError, match="Cannot draw a subject of a: this view has none"):
        dataset[[]].sample(0)
    with pytest.raises(ValueError, match=r"Cannot take subject 1\.5: an index is an integer"):
        dataset[1.5]
    with pytest.raises(tno.SplitError, match="0 units: they form 0 groups"):
        dataset[[]].split({"a": 0.5, "b": 0.5})


_ABANDON = """
import shutil, sys
import tio_openneuro as tno
how, root = sys.argv[1:]
dataset = tno.DataladSubjectsDataset("ds900001", {"t1": tno.Scalar(suffix="T1w")}, root=root)
iterators = [iter(dataset), dataset.batches(1)]
for iterator in iterators:
    next(iterator)
if how == "closed":
    dataset.close()
    assert [list(iterator) for iterator in iterators] == [[], []]
elif how == "removed":
    shutil.rmtree(root)
    del iterators[0]
"""


@pytest.mark.parametrize("how", ["closed", "removed", "abandoned"])
def test_iterators_that_are_left_over_end_quietly(
    openneuro: LoopbackOpenNeuro, root: Path, how: str
) -> None:
    """After ``close``, with their root gone, or at the interpreter's end: nothing is printed."""
    del openneuro  # Its environment is the program's, too.
    done = subprocess.run(
        [sys.executable, "-c", _ABANDON, how, str(root)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "")
    # A fetch ahead that was under way may say that the root is gone; the iterators never do.
    assert "generator" not in done.stderr if how == "removed" else not done.stderr


def test_iterator_of_a_closed_dataset_says_so(openneuro: LoopbackOpenNeuro) -> None:
    """Only one that began before ends quietly."""
    del openneuro
    dataset = tno.DataladSubjectsDataset("ds900001", T1)
    dataset.close()
    for iterator in (iter(dataset), dataset.batches(1)):
        with pytest.raises(tno.LedgerError, match="was closed"):
            next(iterator)
