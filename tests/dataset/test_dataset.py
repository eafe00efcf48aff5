"""``DataladSubjectsDataset`` over a real clone of the loopback OpenNeuro."""

import contextlib
import copy
import glob
import math
import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchio as tio
from conftest import heads
from faulty import LoopbackOpenNeuro

import tio_openneuro as tno
from tio_openneuro.loopback.volume import write_content

IMAGES = {
    "t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz"),
    "lesion": tno.Label("sub-*/anat/*_label-lesion_mask.nii.gz"),
}


def held_bytes(root: Path) -> int:
    """Return the bytes of objects and partial downloads, as an outsider sees them."""
    held = 0
    for folder in (f"{root}/clones/*/.git/annex/{name}" for name in ("objects", "tmp")):
        for place in glob.glob(folder):  # noqa: PTH207 - the pattern is absolute
            # os.walk passes over folders that an eviction removes meanwhile.
            for parent, _, names in os.walk(place):
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        held += Path(parent, name).stat().st_size
    return held


@pytest.fixture
def dataset(openneuro: LoopbackOpenNeuro) -> Iterator[tno.DataladSubjectsDataset]:
    """Return the six heads, with room for two of them."""
    with tno.DataladSubjectsDataset("ds900001", IMAGES, disk_budget="1 GB") as made:
        yield made


def test_constructing_and_listing_fetch_no_content(
    dataset: tno.DataladSubjectsDataset, root: Path, openneuro: LoopbackOpenNeuro
) -> None:
    """Clone, ``len``, ``repr`` and ``dry_iter`` leave the remote's objects alone."""
    assert isinstance(dataset, tio.SubjectsDataset)
    assert len(dataset) == 6
    assert "ds900001" in repr(dataset)
    names = [subject.subject_id for subject in dataset.dry_iter()]
    assert names == [f"sub-{number:02}" for number in range(1, 7)]
    assert all("not loaded" in repr(subject.t1) for subject in dataset.dry_iter())
    assert held_bytes(root) == 0
    assert not [path for path in openneuro.counters() if path.endswith(".nii.gz")]
    assert dataset.statistics().fetched_files == 0


def test_subject_has_the_published_voxels_and_its_participants_row(
    dataset: tno.DataladSubjectsDataset,
) -> None:
    """Voxels, affine and types are those of the published files; columns keep their names."""
    published = heads(6)
    subject = dataset[2]
    volume = published["sub-03/anat/sub-03_T1w.nii.gz"]
    np.testing.assert_array_equal(subject.t1.data[0].numpy(), volume.array)
    np.testing.assert_allclose(subject.t1.affine, volume.affine)
    assert isinstance(subject.t1, tio.ScalarImage)
    assert isinstance(subject.lesion, tio.LabelMap)
    assert subject.lesion.data.sum() == 6**3
    assert (subject.subject_id, subject.session_id, subject.dataset_id) == (
        "sub-03",
        "",
        "ds900001",
    )
    assert (subject.age, subject.sex) == (23.0, "M")


def test_subject_stays_usable_after_its_files_are_evicted(
    dataset: tno.DataladSubjectsDataset, root: Path
) -> None:
    """Crop, copies, pickling, plotting and collating need no file once voxels are in RAM."""
    subject, other = dataset[0], dataset[1]
    assert held_bytes(root) > 0
    assert dataset.evict() > 0
    assert held_bytes(root) == 0
    cropped = tio.CropOrPad(8)(subject)
    assert cropped.t1.shape == (1, 8, 8, 8)
    assert isinstance(cropped.lesion, tio.LabelMap)
    for twin in (copy.copy(subject), copy.deepcopy(subject), pickle.loads(pickle.dumps(subject))):
        assert torch.equal(twin.t1.data, subject.t1.data)
        assert "shape: (1, 24, 20, 16)" in repr(twin.t1)
    batch = next(iter(tio.SubjectsLoader([subject, other], batch_size=2)))
    assert batch["t1"]["data"].shape == (2, 1, 24, 20, 16)
    assert batch["subject_id"] == ["sub-01", "sub-02"]


def test_lazy_images_fetch_when_they_are_asked_for(
    openneuro: LoopbackOpenNeuro, root: Path
) -> None:
    """With ``load_getitem=False`` the header and the voxels come when they are used."""
    with tno.DataladSubjectsDataset("ds900001", IMAGES, load_getitem=False) as dataset:
        subject = dataset[0]
        assert held_bytes(root) == 0
        assert subject.t1.spatial_shape == (24, 20, 16)
        assert dataset.statistics().fetched_files == 1
        dataset.evict()
        assert subject.lesion.data.sum() == 6**3
        assert subject.t1.data.max() > 0
        assert dataset.statistics().fetched_files == 3


def test_views_share_the_budget_and_keep_their_own_transform(
    dataset: tno.DataladSubjectsDataset,
) -> None:
    """Slices, lists and masks are lazy views; a view's transform is its own."""
    first, chosen = dataset[:2], dataset[[4, -1]]
    masked = dataset[torch.tensor([False, True, False, False, False, True])]
    assert [subject.subject_id for subject in chosen.dry_iter()] == ["sub-05", "sub-06"]
    assert [subject.subject_id for subject in masked.dry_iter()] == ["sub-02", "sub-06"]
    assert type(first) is tno.DataladSubjectsDataset
    first.set_transform(tio.RescaleIntensity((0, 1)))
    assert first[0].t1.data.max() == 1
    assert dataset[0].t1.data.max() > 1
    with pytest.raises(IndexError):
        dataset[6]
    with pytest.raises(IndexError, match="mask of 2"):
        dataset[[True, False]]


def test_budget_of_one_subject_lets_every_subject_through(
    openneuro: LoopbackOpenNeuro, root: Path
) -> None:
    """With room for the largest subject alone, the epoch evicts and still delivers all."""
    with tno.DataladSubjectsDataset("ds900001", IMAGES) as probe:
        largest = max(view.nbytes for view in (probe[[index]] for index in range(len(probe))))
    with tno.DataladSubjectsDataset("ds900001", IMAGES, disk_budget=largest) as dataset:
        for subject in dataset:
            assert subject.lesion.data.sum() == 6**3
            assert held_bytes(root) <= largest
        statistics = dataset.statistics()
        assert statistics.peak_bytes <= largest < dataset.nbytes
        assert statistics.fetched_bytes >= dataset.nbytes
        assert statistics.evicted_bytes >= dataset.nbytes - largest
        assert dataset.check() == []


def test_budget_below_one_subject_is_refused_at_construction(
    openneuro: LoopbackOpenNeuro, root: Path
) -> None:
    """The message names the subject and the bytes that it needs, and nothing was fetched."""
    with pytest.raises(tno.DiskBudgetError, match=r"sub-0\d.*kB.*1\.0 kB"):
        tno.DataladSubjectsDataset("ds900001", IMAGES, disk_budget="1 kB")
    assert held_bytes(root) == 0


def test_refused_budget_leaves_no_child(openneuro: LoopbackOpenNeuro, root: Path) -> None:
    """Evicting for a smaller budget, and then refusing it, ends what did the evicting."""
    with tno.DataladSubjectsDataset("ds900001", IMAGES, disk_budget="1 MB") as dataset:
        dataset.fetch()
        assert held_bytes(root) == dataset.nbytes
    with pytest.raises(tno.DiskBudgetError, match="sub-0"):
        tno.DataladSubjectsDataset("ds900001", IMAGES, disk_budget="1 kB")
    assert held_bytes(root) <= 1000


def test_pattern_that_matches_nothing_names_what_is_there(openneuro: LoopbackOpenNeuro) -> None:
    """The message shows the pattern, and suffixes that the dataset does have."""
    with pytest.raises(tno.SelectionError, match=r"sub-\*/anat/\*_FLAIR\.nii\.gz.*T1w"):
        tno.DataladSubjectsDataset("ds900001", {"x": tno.Scalar("sub-*/anat/*_FLAIR.nii.gz")})


def test_unknown_accession_leaves_nothing_behind(openneuro: LoopbackOpenNeuro, root: Path) -> None:
    """An accession that the host does not know is one clear error, and no folder stays."""
    with pytest.raises(tno.TioOpenNeuroError, match="ds999999"):
        tno.DataladSubjectsDataset("ds999999", IMAGES)
    assert not [path for path in root.rglob("*") if "ds999999" in path.name]


def test_folder_that_is_no_annex_is_named(tmp_path: Path) -> None:
    """A folder that is neither an annex nor BIDS is refused by its name."""
    (tmp_path / "scans").mkdir()
    with pytest.raises(tno.NotAnAnnexError, match="scans"):
        tno.DataladSubjectsDataset(tmp_path / "scans", IMAGES)


def test_plain_bids_folder_works_and_is_never_counted(tmp_path: Path) -> None:
    """Files of a plain folder are read where they are; nothing of it is evicted."""
    folder = tmp_path / "plain"
    for path, content in heads(3).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_content(content, folder / path)
    dataset = tno.DataladSubjectsDataset(folder, IMAGES)
    assert len(dataset) == 3
    assert dataset[1].lesion.data.sum() == 6**3
    assert dataset.evict() == 0
    assert len(list(folder.rglob("*.nii.gz"))) == 6
    assert dataset.statistics().used_bytes == 0


def test_splits_divide_by_participant(dataset: tno.DataladSubjectsDataset) -> None:
    """Parts and folds cover the dataset once, each with its own transform."""
    parts = dataset.split(
        {"train": 2 / 3, "val": 1 / 3},
        stratify="sex",
        transforms={"val": None, "train": tio.RandomFlip()},
    )
    ids = {name: {s.subject_id for s in view.dry_iter()} for name, view in parts.items()}
    assert {name: len(found) for name, found in ids.items()} == {"train": 4, "val": 2}
    assert ids["train"] | ids["val"] == {f"sub-{n:02}" for n in range(1, 7)}
    assert {s.sex for s in parts["val"].dry_iter()} == {"F", "M"}
    folds = dataset.k_fold(3)
    assert sorted(s.subject_id for _, val in folds for s in val.dry_iter()) == sorted(
        ids["train"] | ids["val"]
    )


def test_split_is_saved_with_its_commit(
    dataset: tno.DataladSubjectsDataset, openneuro: LoopbackOpenNeuro, tmp_path: Path
) -> None:
    """A saved split gives the same views, and is refused at another commit."""
    parts = dataset.split({"train": 0.5, "val": 0.5}, seed=3)
    dataset.save_split(tmp_path / "split.json", parts)
    again = dataset.read_split(tmp_path / "split.json", transforms={"train": tio.RandomFlip()})
    for name, view in parts.items():
        assert [s.subject_id for s in again[name].dry_iter()] == [
            s.subject_id for s in view.dry_iter()
        ]
    with pytest.raises(tno.SplitError, match="test"):
        dataset.read_split(tmp_path / "split.json", transforms={"test": None})
    openneuro.publish("ds900003", heads(6))
    with (
        tno.DataladSubjectsDataset("ds900003", IMAGES) as other,
        pytest.raises(tno.SplitError, match=dataset.version),
    ):
        other[:4].read_split(tmp_path / "split.json")


def test_batches_of_whole_subjects_fit_the_ram_budget(dataset: tno.DataladSubjectsDataset) -> None:
    """By count, or as many as half of the budget holds; each subject once, in the seed's order."""
    assert [len(batch) for batch in dataset.batches(4)] == [4, 2]
    subject_bytes = 24 * 20 * 16 * (2 + 1)  # int16 image, uint8 label
    lists = list(dataset.batches(ram_budget=4 * subject_bytes + 10, shuffle=True, seed=1))
    assert [len(batch) for batch in lists] == [2, 2, 2]
    names = [subject.subject_id for batch in lists for subject in batch]
    assert names != sorted(names) == [f"sub-{number:02}" for number in range(1, 7)]
    with pytest.raises(tno.RamBudgetError, match="sub-01"):
        next(dataset.batches(ram_budget=subject_bytes))


def test_the_next_list_is_fetched_while_one_is_used(dataset: tno.DataladSubjectsDataset) -> None:
    """Of six subjects in lists of two, all are on disk before the second list is asked for."""
    lists = dataset.batches(2)
    assert [subject.subject_id for subject in next(lists)] == ["sub-01", "sub-02"]
    deadline_s = time.monotonic() + 60
    while dataset.statistics().fetched_files < 12:
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.01)
    assert [len(batch) for batch in lists] == [2, 2]


def test_released_content_stays_or_is_dropped_as_told(
    dataset: tno.DataladSubjectsDataset, root: Path
) -> None:
    """One unit is dropped at once and leaves the other, which stays until room is needed."""
    assert dataset[0].subject_id == "sub-01"
    assert dataset[1].subject_id == "sub-02"
    dataset.release_index(0, drop=False)
    assert held_bytes(root) == dataset[:2].nbytes
    dataset.release_index(1, drop=True)
    assert held_bytes(root) == dataset[:1].nbytes


def test_preprocess_computes_on_one_thread_whatever_the_users_are(
    openneuro: LoopbackOpenNeuro,
) -> None:
    """Sums depend on the number of threads: what is kept must not depend on the machine."""
    seen = []

    def look(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return tensor

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with tno.DataladSubjectsDataset("ds900001", IMAGES, preprocess=tio.Lambda(look)) as dataset:
            assert dataset[0].subject_id == "sub-01"
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


def test_runs_know_their_events(openneuro: LoopbackOpenNeuro) -> None:
    """A run's events stand in its metadata by path, and are read from git without fetching."""
    volume = heads(1)["sub-01/anat/sub-01_T1w.nii.gz"]
    stem = "sub-01/func/sub-01_task-rest_run-1"
    table = b"onset\tduration\n1.5\t2\n"
    files = {"dataset_description.json": b"{}", f"{stem}_events.tsv": table}
    openneuro.publish("ds900005", {**files, f"{stem}_bold.nii.gz": volume})
    with tno.DataladSubjectsDataset("ds900005", {"bold": tno.Scalar(suffix="bold")}) as dataset:
        events = dataset.dry_iter()[0]["bold"]["metadata"]["events"]
        assert events == f"{stem}_events.tsv"
        assert dataset.read(events) == table
        for path in ("sub-01/func/none.tsv", "../outside", f"{stem}_bold.nii.gz"):
            with pytest.raises(tno.SelectionError, match="Cannot read"):
                dataset.read(path)
        assert openneuro.total("ds900005").requests == 0


def test_concat_tells_datasets_apart_under_one_budget(openneuro: LoopbackOpenNeuro) -> None:
    """Columns that one dataset lacks are filled; batches over both collate."""
    files = heads(2)
    files["participants.tsv"] = b"participant_id\tage\thandedness\nsub-01\t70\tleft\n"
    openneuro.publish("ds900004", files)
    with (
        tno.DataladSubjectsDataset("ds900001", IMAGES, disk_budget="30 kB") as first,
        tno.DataladSubjectsDataset("ds900004", IMAGES, disk_budget="30 kB") as second,
    ):
        both = tno.concat([first, second])
        assert len(both) == 8
        loader = tio.SubjectsLoader(both, batch_size=8)
        batch = next(iter(loader))
        assert batch["dataset_id"] == ["ds900001"] * 6 + ["ds900004"] * 2
        assert batch["handedness"] == [""] * 6 + ["left", ""]
        assert batch["age"].tolist()[:7] == [21, 22, 23, 24, 25, 26, 70]
        assert math.isnan(batch["age"][7])
        assert both.statistics().peak_bytes <= 30_000
        assert both.statistics().evicted_files > 0
        renamed = {"t2": IMAGES["t1"], "lesion": IMAGES["lesion"]}
        with (
            tno.DataladSubjectsDataset("ds900004", renamed) as other,
            pytest.raises(tno.SelectionError, match="t2"),
        ):
            tno.concat([first, other])


def test_concat_refuses_what_one_root_and_one_pipeline_cannot_serve(
    openneuro: LoopbackOpenNeuro, tmp_path: Path
) -> None:
    """Another root, preprocess or transform is named; the same ones are one dataset."""
    canonical, flip = tio.ToCanonical(), tio.RandomFlip()
    with contextlib.ExitStack() as stack:

        def opened(**options: object) -> tno.DataladSubjectsDataset:
            options = {"preprocess": canonical, "transform": flip, **options}
            return stack.enter_context(tno.DataladSubjectsDataset("ds900001", IMAGES, **options))

        first = opened()
        assert len(tno.concat([first, opened()])) == 12
        with pytest.raises(tno.SelectionError, match=r"roots are .*root and .*elsewhere"):
            tno.concat([first, opened(root=tmp_path / "elsewhere")])
        for option in ({"preprocess": tio.Resample(2)}, {"transform": None}):
            with pytest.raises(tno.SelectionError, match="different preprocess or transform"):
                tno.concat([first, opened(**option)])


def test_weights_balance_a_column(dataset: tno.DataladSubjectsDataset) -> None:
    """Each value of the column weighs the same in all; an unknown column is named."""
    weights = dataset[:5].weights("sex")
    assert math.isclose(sum(weights), 1)
    assert weights == pytest.approx([1 / 6, 1 / 4, 1 / 6, 1 / 4, 1 / 6])
    with pytest.raises(tno.SelectionError, match=r"'handedness'.*age.*sex"):
        dataset.weights("handedness")


def test_dataset_travels_to_spawned_loader_workers(dataset: tno.DataladSubjectsDataset) -> None:
    """A pickled dataset fetches in another process, under the same root."""
    loader = tio.SubjectsLoader(
        dataset, batch_size=3, num_workers=2, multiprocessing_context="spawn"
    )
    ids = [name for batch in loader for name in batch["subject_id"]]
    assert ids == [f"sub-{number:02}" for number in range(1, 7)]
    assert dataset.statistics().peak_bytes == dataset.nbytes


def test_version_is_a_commit_and_older_tags_stay_reachable(openneuro: LoopbackOpenNeuro) -> None:
    """The newest tag is the default; a second publication of a dataset works beside the first."""
    openneuro.publish("ds900002", heads(2), tag="1.0.0")
    openneuro.publish("ds900002", heads(3), tag="1.1.0")
    with (
        tno.DataladSubjectsDataset("ds900002", IMAGES) as newest,
        tno.DataladSubjectsDataset("ds900002", IMAGES, version="1.0.0") as older,
    ):
        assert (len(newest), len(older)) == (3, 2)
        assert len(newest.version) == 40
        assert newest.version != older.version
        assert older[1].subject_id == newest[1].subject_id
