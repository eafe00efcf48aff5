"""What users of torch and TorchIO type without thinking: indices, names, wrappers, wrong words."""

import contextlib
import copy
import math
import operator
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchio as tio
from conftest import heads
from faulty import LoopbackOpenNeuro
from test_dataset import IMAGES
from torch.utils.data import ConcatDataset, Subset, random_split

import tio_openneuro as tno
from tio_openneuro.loopback.volume import write_content

_VOLUME = "sub-01/anat/sub-01_T1w.nii.gz"


@pytest.fixture
def dataset(openneuro: LoopbackOpenNeuro) -> Iterator[tno.DataladSubjectsDataset]:
    """Return the six heads of the loopback OpenNeuro."""
    with tno.DataladSubjectsDataset("ds900001", IMAGES, disk_budget="1 GB") as made:
        yield made


def write_bids(folder: Path, paths: list[str], **texts: str) -> Path:
    """Write a plain BIDS folder that has the first head under these paths."""
    volume = heads(1)[_VOLUME]
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_content(volume, folder / path)
    (folder / "dataset_description.json").write_text("{}")
    for name, text in texts.items():
        (folder / f"{name}.tsv").write_text(text)
    return folder


def small_subject(name: str) -> tio.Subject:
    """Return a subject in RAM."""
    return tio.Subject(t1=tio.ScalarImage(tensor=torch.ones(1, 6, 6, 6)), subject_id=name)


def names(dataset: tio.SubjectsDataset) -> list[str]:
    """Return the subjects of a dataset or view, loading nothing."""
    return [subject.subject_id for subject in dataset.dry_iter()]


_INTEGERS = {
    "int": lambda n: n,
    "torch": torch.tensor,
    "torch int16": lambda n: torch.tensor(n, dtype=torch.int16),
    "numpy": np.int64,
    "uint8": lambda n: np.array([n % 6], np.uint8)[0],
    "numpy without dimension": np.array,
}


@pytest.mark.parametrize("kind", _INTEGERS)
def test_any_integer_is_an_index(dataset: tno.DataladSubjectsDataset, kind: str) -> None:
    """Of the dataset and of every kind of view, from the front and from the end."""
    number = _INTEGERS[kind]
    assert dataset[number(1)].subject_id == "sub-02"
    assert dataset[number(-1)].subject_id == "sub-06"
    view = dataset[3:]
    assert view[number(0)].subject_id == "sub-04"
    if kind != "uint8":
        with pytest.raises(IndexError, match="subject 3 of 3"):
            view[number(3)]
        with pytest.raises(IndexError, match="subject -4 of 3"):
            view[number(-4)]


def test_permutations_and_samplers_index_it(dataset: tno.DataladSubjectsDataset) -> None:
    """An element of a permutation is one subject; a part of one, whatever holds it, is a view."""
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    expected = [f"sub-{int(n) + 1:02}" for n in order]
    assert [dataset[n].subject_id for n in order[:2]] == expected[:2]
    for part in (order, order.numpy(), order.tolist(), list(order), tuple(order.numpy())):
        assert names(dataset[part]) == expected
    assert names(dataset[[-1, np.int64(0), torch.tensor(-2)]]) == ["sub-06", "sub-01", "sub-05"]
    mask = [False, True, False, False, False, True]
    for kind in (list, tuple, np.array, torch.tensor, lambda m: list(np.array(m))):
        assert names(dataset[kind(mask)]) == ["sub-02", "sub-06"]
    assert names(dataset[[]]) == names(dataset[torch.zeros(6, dtype=torch.bool)]) == []
    with pytest.raises(IndexError, match="subject 6 of 6"):
        dataset[torch.tensor([0, 6])]
    with pytest.raises(IndexError, match="mask of 5"):
        dataset[np.ones(5, bool)]


@pytest.mark.parametrize(
    "index",
    [
        *(1.0, True, None, 1j, object()),
        *(np.float64(1), np.bool_(True), torch.tensor(1.0), torch.tensor(True), np.array(1.5)),
        *([0, 1.5], [True, 1], torch.tensor([0.0, 1.0]), np.array([0.5]), [[0, 1]], {"a": 1}),
    ],
)
def test_what_is_no_index_is_refused_in_words(
    dataset: tno.DataladSubjectsDataset, index: object
) -> None:
    """A fraction is not cut, a truth value is no number, and nothing ends in torch's own words."""
    for part in (dataset, dataset[2:4]):
        with pytest.raises((ValueError, KeyError), match="Cannot take subject"):
            part[index]


def test_a_name_is_its_subject(dataset: tno.DataladSubjectsDataset) -> None:
    """On the dataset and on views, splits and folds; an unknown one names those near it."""
    assert dataset["sub-03"].subject_id == "sub-03"
    assert dataset[np.str_("sub-03")].t1.data.shape == (1, 24, 20, 16)
    assert names(dataset[["sub-03", 0, "sub-05"]]) == ["sub-03", "sub-01", "sub-05"]
    parts = dataset.split({"train": 0.5, "val": 0.5}).values()
    folds = [view for pair in dataset.k_fold(3) for view in pair]
    for view in (dataset[2:], *parts, *folds):
        for name in names(dataset):
            if name in names(view):
                assert view[name].subject_id == name
            else:
                with pytest.raises(KeyError, match=name):
                    view[name]
    for wrong in ("sub-3", "03", "sub_03", "SUB-03"):
        with pytest.raises(KeyError, match=rf"{wrong}.*sub-03"):
            dataset[wrong]
    with pytest.raises(KeyError, match="0 subjects"):
        dataset[[]]["sub-01"]


def test_a_name_that_several_bear_is_a_view_of_them(tmp_path: Path) -> None:
    """Sessions go by both names, and by the subject's alone; runs by all three."""
    paths = [f"sub-01/ses-{n}/anat/sub-01_ses-{n}_run-{m}_T1w.nii.gz" for n in "12" for m in "12"]
    paths += ["sub-02/ses-1/anat/sub-02_ses-1_run-1_T1w.nii.gz"]
    folder = write_bids(tmp_path / "plain", paths)

    def opened(**options: object) -> tno.DataladSubjectsDataset:
        images = {"t1": tno.Scalar(suffix="T1w")}
        return tno.DataladSubjectsDataset(folder, images, on_multiple="first", **options)

    sessions = opened(unit="session")
    for name in ("sub-01 ses-2", "sub-01_ses-2"):
        assert (sessions[name].subject_id, sessions[name].session_id) == ("sub-01", "ses-2")
    assert [s.session_id for s in sessions["sub-01"].dry_iter()] == ["ses-1", "ses-2"]
    assert isinstance(sessions["sub-02"], tio.Subject)
    with pytest.raises(KeyError, match=r"sub-01 ses-3.*sub-01 ses-"):
        sessions["sub-01 ses-3"]
    runs = opened(unit="run")
    assert len(runs) == 5
    assert len(runs["sub-01"]) == 4
    assert len(runs["sub-01 ses-2"]) == 2
    assert isinstance(runs["sub-01 ses-2 run-1"], tio.Subject)
    assert isinstance(opened()["sub-02 ses-1"], tio.Subject)
    both = tno.concat([sessions, sessions[:1]])
    assert len(both["sub-01 ses-1"]) == 2


def test_torchs_own_wrappers_index_it(dataset: tno.DataladSubjectsDataset) -> None:
    """A loader over ``random_split`` or ``ConcatDataset`` gets the subjects that it asks for."""
    parts = random_split(dataset, [4, 2], generator=torch.Generator().manual_seed(0))
    whole = ConcatDataset([*parts, Subset(dataset, torch.tensor([0, 1]))])
    batch = next(iter(tio.SubjectsLoader(whole, batch_size=8)))
    assert sorted(batch["subject_id"][:6]) == names(dataset)
    assert batch["subject_id"][6:] == ["sub-01", "sub-02"]


def test_a_queue_over_what_is_no_subjects_dataset_says_what_to_write(
    dataset: tno.DataladSubjectsDataset,
) -> None:
    """The message names the wrapper, and the way to the same subjects."""
    subset, _ = random_split(dataset, [4, 2])
    loader = tio.SubjectsLoader(dataset)
    for wrong in (subset, ConcatDataset([dataset]), list(dataset.dry_iter()), loader, "ds900001"):
        with pytest.raises(TypeError) as caught:
            tno.BudgetedQueue(wrong, 8, 2, tio.UniformSampler(8))
        for word in (type(wrong).__name__, "dataset[indices]", "split", "tno.concat"):
            assert word in str(caught.value)
    with tno.BudgetedQueue(dataset[subset.indices], 8, 2, tio.UniformSampler(8)) as queue:
        assert queue.num_subjects == 4


class Integer:
    """What becomes an integer, and is none of Python's, NumPy's or torch's."""

    def __index__(self) -> int:
        return 2


@pytest.mark.parametrize("count", [-1, "3", 2.0, math.nan, True, None, [2], np.float32(2)])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_number_of_patches_that_is_none_is_refused_by_the_subjects_name(
    count: object, num_workers: int
) -> None:
    """When the queue is made, whoever fills it; the message tells value and subject."""
    subjects = [small_subject(name) for name in ("sub-01", "sub-02")]
    subjects[1]["num_samples"] = count
    with pytest.raises(ValueError, match=rf"{re.escape(repr(count))} patches of sub-02"):
        tno.BudgetedQueue(
            tio.SubjectsDataset(subjects), 8, 2, tio.UniformSampler(4), num_workers=num_workers
        )


@pytest.mark.parametrize("count", [0, 2, np.int64(2), torch.tensor(2), Integer()])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_any_integer_is_a_number_of_patches(count: object, num_workers: int) -> None:
    """Zero gives no patch of the subject; a dataset of such subjects has epochs of none."""
    subjects = [small_subject(f"sub-{n}") for n in range(3)]
    wanted = operator.index(count)
    for subject in subjects[::2]:
        subject["num_samples"] = count
    for dataset, expected in ((subjects, 2 * wanted + 3), (subjects[::2], 2 * wanted)):
        with tno.BudgetedQueue(
            tio.SubjectsDataset(dataset), 8, 3, tio.UniformSampler(4), num_workers=num_workers
        ) as queue:
            for _ in range(2):
                found = [patch["subject_id"] for patch in queue]
                assert len(found) == len(queue) == expected
                assert found.count("sub-0") == wanted


@pytest.mark.parametrize("parameter", ["max_length", "samples_per_volume", "num_workers"])
@pytest.mark.parametrize("value", ["3", 2.5, True, math.nan, -1])
def test_a_parameter_of_the_queue_that_is_no_number_is_named(parameter: str, value: object) -> None:
    """In words, when it is made."""
    dataset = tio.SubjectsDataset([small_subject("sub-01")])
    with pytest.raises(ValueError, match=f"{parameter}={value!r}"):
        tno.BudgetedQueue(dataset, sampler=tio.UniformSampler(4), **{parameter: value})


@pytest.mark.parametrize(
    "images",
    [
        "sub-*/anat/*_T1w.nii.gz",
        ["sub-*/anat/*_T1w.nii.gz"],
        Path("sub-01"),
        tno.Scalar(suffix="T1w"),
        [tno.Scalar(suffix="T1w")],
        {tno.Scalar(suffix="T1w")},
        tno.Scalar,
        7,
        {"t1": "sub-*/anat/*_T1w.nii.gz"},
        {"t1": [tno.Scalar(suffix="T1w")]},
        {"t1": tno.Scalar},
        {"t1": tio.ScalarImage},
        {"t1": None},
        {1: tno.Scalar(suffix="T1w")},
        {"": tno.Scalar(suffix="T1w")},
        {"subject_id": tno.Scalar(suffix="T1w")},
        {},
    ],
    ids=repr,
)
def test_images_of_another_shape_are_refused_before_anything_is_cloned(
    images: object, root: Path
) -> None:
    """In words, with what to write instead, and without asking any server."""
    with pytest.raises(tno.SelectionError, match=r"tno\.Scalar\("):
        tno.DataladSubjectsDataset("ds900001", images)
    assert not root.exists()


def test_concat_takes_transforms_that_are_equal(openneuro: LoopbackOpenNeuro) -> None:
    """Made twice is the same; what differs in one parameter is another one."""
    with contextlib.ExitStack() as stack:

        def opened(**options: object) -> tno.DataladSubjectsDataset:
            return stack.enter_context(tno.DataladSubjectsDataset("ds900001", IMAGES, **options))

        def pair(**change: object) -> dict[str, object]:
            made = {"preprocess": tio.ToCanonical(), "transform": tio.RandomFlip(axes=(0,))}
            return {**made, **change}

        first = opened(**pair())
        assert len(tno.concat([first, opened(**pair())])) == 12
        assert len(tno.concat([first, copy.copy(first), first[:2]])) == 14
        for change in (
            {"preprocess": None},
            {"preprocess": tio.Resample(1)},
            {"transform": tio.RandomFlip(axes=(1,))},
            {"transform": tio.RandomFlip(axes=(0,), flip_probability=0.1)},
        ):
            with pytest.raises(tno.SelectionError, match="different preprocess or transform"):
                tno.concat([first, opened(**pair(**change))])


def test_concat_reads_no_file_of_the_wrong_part(
    dataset: tno.DataladSubjectsDataset, tmp_path: Path
) -> None:
    """Two datasets have two of each table: the message names both; parts of one have one."""
    images = {"t1": tno.Scalar(suffix="T1w")}
    first, second = (
        tno.DataladSubjectsDataset(
            write_bids(tmp_path / name, [_VOLUME], participants=f"participant_id\n{name}\n"), images
        )
        for name in ("one", "two")
    )
    halves = tno.concat([dataset[:2], dataset[4:]])
    assert halves.read("participants.tsv") == dataset.read("participants.tsv")
    for both in (tno.concat([first, second]), tno.concat([tno.concat([first, second]), first])):
        for part in (both, both[:1]):
            with pytest.raises(tno.SelectionError, match=r"participants\.tsv.*one.*two.*read"):
                part.read("participants.tsv")
    assert b"two" in second.read("participants.tsv")
    assert both.nbytes == first.nbytes + second.nbytes


def test_path_names_a_place_whether_or_not_the_content_is_there(
    dataset: tno.DataladSubjectsDataset, root: Path
) -> None:
    """``image.path`` has the dataset's own name of the file, and nothing needs to lie there."""
    lazy = copy.copy(dataset)
    lazy.load_getitem = False
    for subject in (dataset[0], lazy[0]):
        assert subject.t1.path == root / "clones" / "ds900001" / _VOLUME
        dataset.evict()
        assert not subject.t1.path.exists()
        assert subject.t1.data.shape == (1, 24, 20, 16)
    assert ".path" in (tno.DataladSubjectsDataset.__doc__ or "")
