"""What real OpenNeuro repositories do otherwise than one expects, and that the dataset copes.

One test for each quirk that 25 repositories showed, here or where its part is tested:

- Labels beside the image, in derivatives, in one session of many, several of one image, of one
  image in two, in another subject's folder, without an image, misspelt; ``acq-`` that differs;
  0, 1 or many files for a pattern; ``*_FLAIR*`` that catches the roi; 0-byte files by their tree:
  ``test_selection.py``. ``sub-1*`` that catches sub-10, ``tmp_dcm2bids/``, nested folders,
  ``.nii`` with ``.nii.gz``, ``.mgz``: here.
- participants.tsv with a mark, CRLF, no final newline, headers that are repeated, padded or not
  ASCII, ids without prefix or repeated, missing values, rows without folders, folders without
  rows, none at all: ``test_participants.py``; with real tables through a dataset: here.
- Names that no rule allows: ``test_bids.py``.
- Newest tag by date, branches of any name: ``test_openneuro.py``; old tags, no tag, main beside
  master and no git-annex branch, on real repositories: here.
- Dead remotes that still say autoenable, remotes that are not OpenNeuro's: ``test_openneuro.py``.
- Paths renamed since their upload, keys without an S3 version: ``test_annex.py``; the subjects
  that have such a key: here. Values in base64 and several versions of a key: here.
- One key under several paths and in several subjects; files that are empty or cut; grids that
  differ; 4D images; sidecars; sessions' tables; controls without a label; whatever is selected
  collates: here.
- Single files larger than the budget: ``test_dataset.py``.
"""

import gzip
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchio as tio
from conftest import SHARED, heads
from faulty import LoopbackOpenNeuro

import tio_openneuro as tno
from tio_openneuro.annex.branch import recorded_versions, version_logs
from tio_openneuro.annex.processes import run
from tio_openneuro.annex.tree import index_tree
from tio_openneuro.content import AnnexKey
from tio_openneuro.loopback import Volume
from tio_openneuro.loopback.volume import Content, write_content

BUNDLES = Path(os.environ.get("TIO_OPENNEURO_TEST_DATA", SHARED)) / "openneuro"
AFFINE = np.diag([1.0, 1.2, 1.5, 1.0])
SHAPE = (10, 9, 8)


def volume(seed: int, *, shape: tuple[int, ...] = SHAPE, affine: np.ndarray = AFFINE) -> Volume:
    """Return an image that its seed tells."""
    array = np.random.default_rng(seed).integers(0, 1000, shape).astype(np.int16)
    return Volume(array, affine)


def mask(first: int, *, kind: str = "u1") -> Volume:
    """Return a label of two planes."""
    array = np.zeros(SHAPE, kind)
    array[first : first + 2] = 1
    return Volume(array, AFFINE)


def reasons(dataset: tno.DataladSubjectsDataset) -> dict[str, str]:
    """Return why each unit was left out."""
    return {entry.unit: entry.reason for entry in dataset.skipped}


def only_batch(dataset: tno.DataladSubjectsDataset) -> dict[str, object]:
    """Return all subjects collated as one batch."""
    return next(iter(tio.SubjectsLoader(dataset, batch_size=len(dataset))))


# -- real repositories -----------------------------------------------------------------------


@pytest.fixture
def bundle() -> Callable[[str], Path]:
    """Return a function that gives a real repository's bundle, or skips loudly."""

    def found(accession: str) -> Path:
        path = BUNDLES / f"{accession}.bundle"
        if not path.exists():
            pytest.skip(f"NOT TESTED ON REAL DATA: no {path}; set TIO_OPENNEURO_TEST_DATA")
        return path

    return found


FLAIR = {
    "flair": tno.Scalar("sub-*/anat/*_FLAIR.nii.gz"),
    "roi": tno.Label("sub-*/anat/*_FLAIR_roi.nii.gz"),
}
REAL = {
    "ds000001": ({"t1": tno.Scalar(suffix="T1w")}, "subject", "1.0.0", 16),
    "ds001226": (
        {
            "t1": tno.Scalar(suffix="T1w"),
            "tumour": tno.Label("derivatives/tumor_masks/sub-*/anat/*_space_T1_label-tumor.nii"),
        },
        "subject",
        "5.0.1",
        25,
    ),
    "ds002424": ({"t1": tno.Scalar(suffix="T1w")}, "session", "1.2.0", None),
    "ds003949": (
        {
            "angio": tno.Scalar(suffix="angio"),
            "brain": tno.Label("derivatives/manual_masks/**/*_desc-brain_mask.nii.gz"),
        },
        "session",
        "master",
        296,
    ),
    "ds004199": (FLAIR, "subject", "1.0.6", 85),
    "ds005616": ({"t2": tno.Scalar(suffix="T2w", acq=None)}, "subject", "1.1.2", None),
}


@pytest.mark.parametrize("accession", REAL)
def test_real_repository_is_opened_whole(
    accession: str, bundle: Callable[[str], Path], root: Path
) -> None:
    """Old tags (``00001``, 24 digits), no tag, main beside master: a commit is pinned all the same.

    Every unit without a row has its reason, and the rows of participants.tsv collate.
    """
    images, unit, version, count = REAL[accession]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = tno.DataladSubjectsDataset(
            bundle(accession), images, unit=unit, on_multiple="first", disk_budget="9 GB"
        )
    with dataset:
        (clone,) = (path for path in (root / "clones").iterdir() if path.is_dir())
        ref = f"refs/remotes/origin/{version}" if version == "master" else f"refs/tags/{version}"
        assert dataset.version == run(["git", "rev-parse", ref], cwd=clone).decode().strip()
        subjects = list(dataset.dry_iter())
        if count is not None:
            assert len(subjects) == count
        folders = {
            place[1]
            for file in index_tree(clone, dataset.version)
            if (place := re.match(r"(sub-[^/]+)/.*\.nii(\.gz)?$", file.path))
        }
        kept = {subject["subject_id"] for subject in subjects}
        left = {entry.unit.partition("_")[0] for entry in dataset.skipped}
        assert folders <= kept | left
        assert all(entry.reason for entry in dataset.skipped)
        columns = [set(subject) for subject in subjects]
        assert all(names == columns[0] for names in columns)
        for name in columns[0] - set(images):
            kinds = {type(subject[name]) for subject in subjects}
            assert kinds in ({float}, {str}), name


def test_old_tag_and_old_branch_of_a_real_repository_are_versions(
    bundle: Callable[[str], Path],
) -> None:
    """``00001`` and the branch that is behind its default one lead to their own commits."""
    path = bundle("ds001226")
    found = {}
    for version in ("00001", "master", "main", None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with tno.DataladSubjectsDataset(
                path, {"t1": tno.Scalar(suffix="T1w")}, version=version, on_multiple="first"
            ) as dataset:
                found[version] = dataset.version
    assert found[None] == found["main"]
    assert len(set(found.values())) == 3


def test_repository_without_a_git_annex_branch_is_named(
    bundle: Callable[[str], Path], tmp_path: Path, root: Path
) -> None:
    """Its content is nowhere on record (ds004215): one clear error, and no clone stays."""
    bare = tmp_path / "no-annex.git"
    run(["git", "clone", "--quiet", "--bare", str(bundle("ds000001")), str(bare)], cwd=tmp_path)
    run(["git", "update-ref", "-d", "refs/heads/git-annex"], cwd=bare)
    with pytest.raises(tno.NotAnAnnexError, match="no git-annex branch"):
        tno.DataladSubjectsDataset(bare.as_uri(), {"t1": tno.Scalar(suffix="T1w")})
    assert not [path for path in root.rglob("*") if path.is_dir() and "no-annex" in path.name]


def test_real_keys_shared_by_subjects_stay_on_one_side(bundle: Callable[[str], Path]) -> None:
    """Subjects with the same image under two names are found by their keys, and never divided."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = tno.DataladSubjectsDataset(
            bundle("ds004199"), {"flair": tno.Scalar(suffix="FLAIR")}, disk_budget="9 GB"
        )
    with dataset:
        homes: dict[AnnexKey, set[int]] = {}
        for number, (_, val) in enumerate(dataset.k_fold(5, seed=1)):
            for row in val._rows:
                for key in row.keys:
                    homes.setdefault(key, set()).add(number)
        assert all(len(folds) == 1 for folds in homes.values())


# -- synthetic trees, published as OpenNeuro does --------------------------------------------


def published(server: LoopbackOpenNeuro, accession: str, files: dict[str, Content], **how) -> None:
    """Publish a dataset, once for all tests."""
    if not (server.folder / "git" / f"{accession}.git").exists():
        server.publish(accession, files, **how)


SESSIONS: dict[str, Content] = {
    "dataset_description.json": '{"Name": "Quirks", "BIDSVersion": "1.10.0"}',
    # A mark, CRLF, ids with and without prefix, a row without folder, a folder without row,
    # headers that are repeated, padded and not ASCII, and one that is an attribute of Subject.
    "participants.tsv": (
        "\ufeffparticipant_id\t age\tgr\u00f6\u00dfe\tage\tshape\r\n"
        "sub-1\t30\t1.7\tx\ta\r\n2\tn/a\t1.8\tNone\tb\r\nsub-77\t5\t1\tz\tc"
    ),
    "T1w.json": '{"Manufacturer": "root", "EchoTime": 1}',
    "task-rest_bold.json": '{"RepetitionTime": 2.0}',
    "sub-1/sub-1_T1w.json": '{"EchoTime": 2}',
    "sub-1/ses-a/anat/sub-1_ses-a_T1w.json": '{"EchoTime": 3, "Note": "first"}',
    "sub-2/ses-a/anat/sub-2_ses-a_T1w.json": "{ not json",
    "sub-1/sub-1_sessions.tsv": "session_id\tscore\nses-a\t1\nses-b\t2\n",
    "sub-1/ses-a/anat/sub-1_ses-a_T1w.nii.gz": volume(1),
    "sub-1/ses-b/anat/sub-1_ses-b_T1w.nii.gz": volume(2),
    "sub-2/ses-a/anat/sub-2_ses-a_T1w.nii": volume(3),
    "sub-3/ses-a/anat/sub-3_ses-a_T1w.nii.gz": volume(4),
    "sub-10/ses-a/anat/sub-10_ses-a_T1w.nii.gz": volume(5),
    **{
        f"sub-{n}/ses-a/func/sub-{n}_ses-a_task-rest_run-{run_id}_bold.nii.gz": volume(
            10 * n + place, shape=(*SHAPE, 5)
        )
        for n in (1, 2)
        for place, run_id in enumerate(("1", "02"))
    },
    "derivatives/l/sub-1/ses-a/anat/sub-1_ses-a_desc-Lesion_1_mask.nii.gz": mask(0),
    "derivatives/l/sub-1/ses-a/anat/sub-1_ses-a_desc-Lesion_2_mask.nii.gz": mask(4, kind="i2"),
    "derivatives/l/sub-2/ses-a/anat/sub-2_ses-a_desc-Lesion_1_mask.nii.gz": mask(6, kind="f4"),
    "tmp_dcm2bids/sub-1/ses-a/anat/sub-1_ses-a_T1w.nii.gz": volume(90),
    "derivatives/fs/sub-1/ses-a/nested/once/more/sub-1_ses-a_desc-deep_T1w.nii.gz": volume(91),
    "derivatives/fs/sub-1/mri/T1.mgz": b"\0" * 4000,
}
T1 = tno.Scalar(suffix="T1w")


@pytest.fixture
def quirks(openneuro: LoopbackOpenNeuro) -> Iterator[Callable[..., tno.DataladSubjectsDataset]]:
    """Return a function that opens a published dataset of sessions, without any tag."""
    published(openneuro, "ds900040", SESSIONS, tag=None)
    opened = []

    def made(images: object, **how: object) -> tno.DataladSubjectsDataset:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*columns that a subject's")
            dataset = tno.DataladSubjectsDataset("ds900040", images, disk_budget="1 GB", **how)
        opened.append(dataset)
        return dataset

    yield made
    for dataset in opened:
        dataset.close()


Open = Callable[..., tno.DataladSubjectsDataset]


def test_dataset_without_a_tag_is_pinned_at_its_branch(quirks: Open) -> None:
    """The commit of the default branch is the version (ds003949)."""
    dataset = quirks({"t1": T1}, unit="session")
    assert re.fullmatch("[0-9a-f]{40}", dataset.version)


def test_images_mix_nii_and_nii_gz_and_leave_temporary_folders(quirks: Open) -> None:
    """``tmp_dcm2bids/`` and derivatives nested deep are none of the raw images."""
    dataset = quirks({"t1": T1}, unit="session")
    units = [(s["subject_id"], s["session_id"]) for s in dataset.dry_iter()]
    assert units == [
        ("sub-1", "ses-a"),
        ("sub-1", "ses-b"),
        ("sub-2", "ses-a"),
        ("sub-3", "ses-a"),
        ("sub-10", "ses-a"),
    ]
    for subject, seed in zip(dataset, (1, 2, 3, 4, 5), strict=True):
        np.testing.assert_array_equal(subject.t1.numpy()[0], volume(seed).array)
    deep = quirks({"deep": tno.Scalar(suffix="T1w", scope="derivatives", desc="deep")})
    assert [s["subject_id"] for s in deep.dry_iter()] == ["sub-1"]


def test_glob_of_a_subject_does_not_hide_that_it_catches_two(quirks: Open) -> None:
    """``sub-1*`` is sub-1 and sub-10: each is a unit of its own."""
    dataset = quirks({"t1": tno.Scalar("sub-1*/ses-a/anat/*_T1w.nii.gz")})
    assert [s["subject_id"] for s in dataset.dry_iter()] == ["sub-1", "sub-10"]


def test_sidecars_are_inherited_from_root_and_subject(quirks: Open, root: Path) -> None:
    """The nearest field wins; a sidecar that is no JSON is left out; nothing is fetched."""
    dataset = quirks({"t1": T1}, unit="session")
    fields = [dict(s["t1"]["metadata"]) for s in dataset.dry_iter()]
    assert fields[0] == {"Manufacturer": "root", "EchoTime": 3, "Note": "first"}
    assert fields[1] == {"Manufacturer": "root", "EchoTime": 2}
    assert fields[2] == fields[3] == {"Manufacturer": "root", "EchoTime": 1}
    assert dataset.statistics().fetched_files == 0
    batch = only_batch(dataset)
    assert [dict(given) for given in batch["t1"]["metadata"]] == fields


def test_tables_of_participants_and_sessions_reach_their_sessions(quirks: Open) -> None:
    """Marked, padded, repeated and foreign headers; rows and folders that lack each other."""
    dataset = quirks({"t1": T1}, unit="session")
    batch = only_batch(dataset)
    assert batch["participant_id"] == ["sub-1", "sub-1", "sub-2", "sub-3", "sub-10"]
    assert batch["age"].tolist()[:2] == [30, 30]
    assert all(math.isnan(age) for age in batch["age"].tolist()[2:])
    assert batch["gr\u00f6\u00dfe"].tolist()[:3] == pytest.approx([1.7, 1.7, 1.8])
    assert batch["age_2"] == ["x", "x", "", "", ""]
    assert batch["participant_shape"] == ["a", "a", "b", "", ""]
    assert batch["score"].tolist()[:2] == [1, 2]
    assert all(math.isnan(score) for score in batch["score"].tolist()[2:])


def test_column_that_is_an_attribute_is_renamed_with_one_warning(
    openneuro: LoopbackOpenNeuro,
) -> None:
    """A column ``shape`` does not hide the shape of a subject."""
    published(openneuro, "ds900040", SESSIONS, tag=None)
    with (
        pytest.warns(UserWarning, match="participant_shape") as caught,
        tno.DataladSubjectsDataset("ds900040", {"t1": T1}, unit="session") as dataset,
    ):
        assert dataset[0].shape == (1, *SHAPE)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("volumes", "expected"),
    [
        (None, lambda array: array),
        (2, lambda array: array[2:3]),
        (-1, lambda array: array[-1:]),
        (slice(1, 4, 2), lambda array: array[1:4:2]),
        ("mean", lambda array: array.mean(axis=0, keepdims=True)),
    ],
)
def test_volumes_of_4d_images(
    quirks: Open, volumes: object, expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    """One volume, some, their mean, or all as channels; a run is a unit, ``1`` as ``02``."""
    dataset = quirks({"bold": tno.Scalar(suffix="bold", volumes=volumes)}, unit="run")
    names = [row.content.name for row in dataset._rows]
    assert names == [f"sub-{n}_ses-a_run-{r}" for n in (1, 2) for r in ("1", "02")]
    array = np.moveaxis(SESSIONS[
        "sub-1/ses-a/func/sub-1_ses-a_task-rest_run-02_bold.nii.gz"
    ].array, 3, 0)  # fmt: skip
    np.testing.assert_allclose(dataset[1].bold.numpy(), expected(array), rtol=1e-6)
    assert dataset[1].bold["metadata"]["RepetitionTime"] == 2.0
    assert only_batch(dataset)["bold"]["data"].shape[:2] == (4, len(expected(array)))
    unloaded = next(iter(dataset.dry_iter()))
    assert unloaded["bold"].shape == (len(expected(array)), *SHAPE)


@pytest.mark.parametrize(
    ("volumes", "channels"), [(None, 10), (0, 2), (slice(0, 2), 4), ("mean", 2)]
)
def test_stack_picks_volumes_from_each_file(quirks: Open, volumes: object, channels: int) -> None:
    """The runs of a session are channels of one image, each reduced as one file would be."""
    images = {"bold": tno.Scalar(suffix="bold", volumes=volumes), "t1": T1}
    dataset = quirks(images, unit="session", on_multiple="stack")
    assert [s["subject_id"] for s in dataset.dry_iter()] == ["sub-1", "sub-2"]
    subject = dataset[0]
    assert subject.bold.shape == (channels, *SHAPE)
    second = SESSIONS["sub-1/ses-a/func/sub-1_ses-a_task-rest_run-02_bold.nii.gz"].array
    wanted = second.mean(axis=3) if volumes == "mean" else second[..., 0]
    np.testing.assert_allclose(subject.bold.numpy()[channels // 2], wanted, rtol=1e-6)
    assert only_batch(dataset)["bold"]["data"].shape == (2, channels, *SHAPE)


def test_volume_that_a_file_lacks_is_named(quirks: Open) -> None:
    """The message says unit, volume and how many there are."""
    dataset = quirks({"bold": tno.Scalar(suffix="bold", volumes=5)}, unit="run")
    with pytest.raises(
        tno.SelectionError, match=r"volumes=5 of sub-1_ses-a_run-1: .* has 5 volumes"
    ):
        dataset[0]


def test_label_files_of_one_image_are_united_and_controls_get_zeros(quirks: Open) -> None:
    """Two lesion files are one label (ds003949); a control's is empty, on the image's grid.

    Labels are stored as bytes, shorts and floats, and yet the batch collates.
    """
    label = tno.Label(desc="Lesion", combine="union", when_missing="zeros")
    dataset = quirks({"t1": T1, "lesion": label}, unit="session")
    sums = [int(subject.lesion.data.sum()) for subject in dataset]
    plane = SHAPE[1] * SHAPE[2]
    assert sums == [4 * plane, 0, 2 * plane, 0, 0]
    for subject in dataset:
        assert isinstance(subject.lesion, tio.LabelMap)
        np.testing.assert_allclose(subject.lesion.affine, subject.t1.affine)
        subject.check_consistent_space()
    batch = only_batch(dataset)
    assert batch["lesion"]["data"].shape == (5, 1, *SHAPE)
    assert batch["lesion"]["data"].sum(dim=(1, 2, 3, 4)).tolist() == sums
    required = tno.Label(desc="Lesion", combine="union")
    only = quirks({"t1": T1, "lesion": required}, unit="session")
    assert reasons(only) == dict.fromkeys(
        ("sub-1_ses-b", "sub-3_ses-a", "sub-10_ses-a"), "no file for 'lesion'"
    )


def test_zeros_take_the_grid_after_patches_and_queue(quirks: Open) -> None:
    """A queue over patients and controls gives patches of image and label alike."""
    label = tno.Label(desc="Lesion", combine="union", when_missing="zeros")
    dataset = quirks({"t1": T1, "lesion": label}, unit="session")
    with tno.BudgetedQueue(dataset, None, 2, tio.UniformSampler(4), num_workers=1, seed=3) as queue:
        batches = list(tio.SubjectsLoader(queue, batch_size=5))
    assert sum(len(batch["subject_id"]) for batch in batches) == 10
    assert all(batch["lesion"]["data"].shape[1:] == (1, 4, 4, 4) for batch in batches)


def test_everything_that_is_there_collates(quirks: Open) -> None:
    """``images=None`` takes what every subject has; subjects that differ in it raise at once."""
    with pytest.raises(tno.SelectionError, match="could not be collated"):
        quirks(None, unit="session")
    anatomy = quirks(
        {"t1": T1, "bold": tno.Scalar(suffix="bold", required=False)},
        unit="session",
        on_multiple="stack",
        on_incomplete="allow",
    )
    assert ["bold" in subject for subject in anatomy.dry_iter()] == [
        True,
        False,
        True,
        False,
        False,
    ]


# -- keys ------------------------------------------------------------------------------------


TWINS: dict[str, Content] = {
    "participants.tsv": "participant_id\tsex\n" + "".join(f"sub-0{n}\tF\n" for n in range(1, 7)),
    **{
        # sub-02 and sub-05 are one person under two ids, sub-03 has its image twice.
        f"sub-0{n}/anat/sub-0{n}_T1w.nii.gz": volume(2 if n == 5 else n)
        for n in range(1, 7)
    },
    "sub-03/anat/sub-03_T2w.nii.gz": volume(3),
    # The empty mask is common to all but one, and to no one's disadvantage.
    **{f"sub-0{n}/anat/sub-0{n}_label-lesion_mask.nii.gz": mask(20) for n in range(1, 6)},
    "sub-06/anat/sub-06_label-lesion_mask.nii.gz": mask(2),
}
PAIR = {"t1": T1, "lesion": tno.Label(suffix="mask")}


def test_key_shared_by_subjects_is_counted_fetched_and_held_once(
    openneuro: LoopbackOpenNeuro, root: Path
) -> None:
    """One image under two ids (ds000221): ``nbytes``, the disk and the network have it once.

    Dropping one's content leaves the other readable, by fetching again.
    """
    published(openneuro, "ds900041", TWINS)
    openneuro.reset_counters()
    with tno.DataladSubjectsDataset("ds900041", PAIR, disk_budget="1 GB") as dataset:
        keys = {file.key: file.size_bytes for row in dataset._rows for file in row.files}
        assert len(keys) == 5 + 2
        assert dataset.nbytes == sum(keys.values())
        assert dataset.fetch() == dataset.nbytes == dataset.statistics().used_bytes
        assert openneuro.total("ds900041").bytes == dataset.nbytes
        np.testing.assert_array_equal(dataset[1].t1.data, dataset[4].t1.data)
        assert dataset[[1]].evict() > 0
        np.testing.assert_array_equal(dataset[4].t1.numpy()[0], volume(2).array)
        assert dataset.check() == []


@pytest.mark.parametrize("seed", range(5))
def test_subjects_that_share_an_image_are_on_one_side(
    openneuro: LoopbackOpenNeuro, seed: int
) -> None:
    """A shared image joins two subjects; an empty mask common to many does not."""
    published(openneuro, "ds900041", TWINS)
    with tno.DataladSubjectsDataset("ds900041", PAIR) as dataset:
        views = [*dataset.split({"a": 0.5, "b": 0.5}, seed=seed).values()]
        views += [val for _, val in dataset.k_fold(5, seed=seed)]
        for view in views:
            ids = {subject["subject_id"] for subject in view.dry_iter()}
            assert len(ids & {"sub-02", "sub-05"}) in {0, 2}
        assert [len(view) for view in views[:2]] == [3, 3]


def forget_versions(server: LoopbackOpenNeuro, accession: str, number: str) -> None:
    """Take S3 versions and exports of a subject's files out of the public git-annex branch."""
    bare = server.folder / "git" / f"{accession}.git"
    gone = ["export.log"]
    for file in index_tree(bare, "main"):
        if file.key is not None and file.path.startswith(number):
            folders = file.key.object_paths()[1].removeprefix("annex/objects/")[:8]
            gone.append(f"{folders}{file.key.name}.log.rmet")
    stream = (
        "commit refs/heads/git-annex\ncommitter t <t@t> 1900000000 +0000\ndata 0\n"
        "from refs/heads/git-annex^0\n" + "".join(f"D {path}\n" for path in gone)
    )
    run(["git", "fast-import", "--quiet"], cwd=bare, stdin=stream.encode())


def test_subject_whose_key_has_no_s3_version_is_skipped(openneuro: LoopbackOpenNeuro) -> None:
    """The remote would refuse it (ds001499): its reason says so, and nothing is asked for."""
    if not (openneuro.folder / "git" / "ds900042.git").exists():
        openneuro.publish("ds900042", heads(3))
        forget_versions(openneuro, "ds900042", "sub-02")
    images = {"t1": T1, "lesion": tno.Label(suffix="mask")}
    openneuro.reset_counters()
    with tno.DataladSubjectsDataset("ds900042", images) as dataset:
        assert [s["subject_id"] for s in dataset.dry_iter()] == ["sub-01", "sub-03"]
        assert re.search(
            r"sub-02_T1w\.nii\.gz cannot be fetched: .*S3 version", reasons(dataset)["sub-02"]
        )
        assert openneuro.total("ds900042").requests == 0
        assert [subject["subject_id"] for subject in dataset] == ["sub-01", "sub-03"]
    with pytest.raises(tno.SelectionError, match=r"1 units of ds900042.*sub-02.*on_missing='skip'"):
        tno.DataladSubjectsDataset("ds900042", images, on_missing="raise")


@pytest.mark.parametrize(
    ("log", "available"),
    [
        ("1s {0}:V +abc#sub-1/a.nii.gz", True),
        ("1s {0}:V +!YWJjI3N1Yi0xL2EgYi5uaWkuZ3o=", True),
        ("1s {0}:V +abc#a.nii +def#b.nii\n2s {0}:V +ghi#c.nii", True),
        ("1s {0}:V +abc#a.nii\n2s {0}:V -abc#a.nii", False),
        ("1s {0}:V +abc#a.nii +def#b.nii\n2s {0}:V -abc#a.nii", True),
        ("1s other:V +abc#a.nii", False),
        ("", False),
    ],
)
def test_s3_versions_are_read_in_any_form(log: str, available: bool, tmp_path: Path) -> None:
    """Paths with spaces stand in base64, a key has several versions, and some are taken back."""
    uuid = "0f0f0f0f-1111-4222-8333-444444444444"
    key = AnnexKey.parse("MD5E-s9--0cc175b9c0f1b6a831c399e269772661.nii.gz")
    folders = key.object_paths()[1].removeprefix("annex/objects/")[:8]
    content = log.format(uuid).encode() + b"\n"
    path = f"{folders}{key.name}.log.rmet"
    stream = (
        b"commit refs/heads/git-annex\ncommitter t <t@t> 1700000000 +0000\ndata 0\n"
        b"M 100644 inline %b\ndata %d\n%b\n" % (path.encode(), len(content), content)
    )
    run(["git", "init", "-q", "--bare", "."], cwd=tmp_path)
    run(["git", "fast-import", "--quiet"], cwd=tmp_path, stdin=stream)
    for keys in ([key], [key] * 51, None):
        logs = version_logs(tmp_path, ["refs/heads/git-annex"], keys)
        assert bool(recorded_versions(logs[key.name], {uuid})) == available


# -- files that are not what they seem -------------------------------------------------------


def test_empty_and_cut_files_are_skipped_or_named(openneuro: LoopbackOpenNeuro) -> None:
    """A file of 0 bytes has its reason; one that is too short to be read raises by name."""
    files = heads(3)
    files["sub-01/anat/sub-01_T1w.nii.gz"] = b""
    files["sub-02/anat/sub-02_T1w.nii.gz"] = b"\x1f\x8b" + b"cut off" * 40
    published(openneuro, "ds900043", files)
    with tno.DataladSubjectsDataset("ds900043", PAIR) as dataset:
        assert [s["subject_id"] for s in dataset.dry_iter()] == ["sub-02", "sub-03"]
        assert "holds 0 bytes" in reasons(dataset)["sub-01"]
        with pytest.raises(Exception, match="sub-02"):
            dataset[0]
        assert dataset[1].t1.shape == (1, 24, 20, 16)
        with tno.BudgetedQueue(
            dataset, None, 2, tio.UniformSampler(4), num_workers=1, seed=0, on_error="skip"
        ) as queue:
            patches = list(queue)
        assert [patch["subject_id"] for patch in patches] == ["sub-03"] * 2
        assert "sub-02" in str(queue.skipped)


def test_zeros_name_the_image_whose_grid_they_take(tmp_path: Path) -> None:
    """Where its header lies, the error says which label needs it, and why."""
    folder = tmp_path / "bids"
    for path, content in heads(2).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_content(content, folder / path)
    (folder / "sub-02/anat/sub-02_label-lesion_mask.nii.gz").unlink()
    image = folder / "sub-02/anat/sub-02_T1w.nii.gz"
    header = bytearray(gzip.decompress(image.read_bytes()))
    header[42:44] = b"\0\0"
    image.write_bytes(gzip.compress(header))
    lesion = tno.Label(suffix="mask", when_missing="zeros")
    with tno.DataladSubjectsDataset(folder, {"lesion": lesion, "t1": PLAIN}) as dataset:
        with pytest.raises(tno.DamagedImageError) as caught:
            dataset.dry_iter()[1].lesion.load()
        assert str(caught.value).startswith("Cannot load sub-02/anat/sub-02_T1w.nii.gz of sub-02: ")
        assert "its dim is [3, 0, 20, 16" in str(caught.value)
        lacks = "sub-02 lacks Label(when_missing='zeros', suffix='mask'), whose zeros take the grid"
        assert f"{lacks} of sub-02/anat/sub-02_T1w.nii.gz." in str(caught.value)


def test_small_label_in_git_itself_is_read(openneuro: LoopbackOpenNeuro) -> None:
    """Files below 1 kB are often not annexed at all: they need no fetch and no budget."""
    files = heads(2)
    published(openneuro, "ds900044", files, annexed=lambda path: path.endswith("T1w.nii.gz"))
    with tno.DataladSubjectsDataset("ds900044", PAIR) as dataset:
        assert dataset[1].lesion.data.sum() == 6**3
        assert dataset.statistics().fetched_files == 1
        assert next(iter(dataset.dry_iter()))["lesion"].shape == (1, 24, 20, 16)
        assert only_batch(dataset)["lesion"]["data"].shape == (2, 1, 24, 20, 16)


GRIDS: dict[str, Content] = {
    **heads(2),
    "sub-02/anat/sub-02_label-lesion_mask.nii.gz": Volume(
        np.ones((12, 10, 8), np.uint8), np.diag([2.0, 2.4, 3.0, 1.0])
    ),
    # No lesion, an atlas of its own, and two acquisitions that differ in shape.
    "sub-03/anat/sub-03_T1w.nii.gz": volume(1),
    "sub-03/anat/sub-03_acq-b_T1w.nii.gz": volume(2, shape=(5, 6, 7)),
    "sub-03/anat/sub-03_dseg.nii.gz": mask(2),
}
PLAIN = tno.Scalar(suffix="T1w", acq=None)


@pytest.mark.parametrize("workers", [0, 1])
def test_grids_that_differ_are_named_by_the_queue(
    openneuro: LoopbackOpenNeuro, workers: int
) -> None:
    """The error has both images, their shapes and spacings, and the transform that mends it."""
    published(openneuro, "ds900045", GRIDS)
    with tno.DataladSubjectsDataset("ds900045", {**PAIR, "t1": PLAIN}) as dataset:
        with (
            tno.BudgetedQueue(
                dataset, None, 2, tio.UniformSampler(4), num_workers=workers, seed=0
            ) as queue,
            pytest.raises(Exception, match=r"(?s)sub-02") as caught,
        ):
            list(queue)
        said = ""
        error: BaseException | None = caught.value
        while error is not None:
            said += str(error)
            error = error.__cause__
        for part in ("'t1'", "'lesion'", "(24, 20, 16)", "(12, 10, 8)", "(1, 1.2, 1.5)",
                     "(2, 2.4, 3)", "tio.Resample('t1')"):  # fmt: skip
            assert part in said
    mended = tio.Resample("t1")
    with (
        tno.DataladSubjectsDataset("ds900045", {**PAIR, "t1": PLAIN}, preprocess=mended) as dataset,
        tno.BudgetedQueue(
            dataset, None, 2, tio.UniformSampler(4), num_workers=workers, seed=0
        ) as queue,
    ):
        assert len(list(queue)) == 4


def test_stacked_files_of_different_grids_are_named(openneuro: LoopbackOpenNeuro) -> None:
    """Channels of different shapes cannot be: the error names the subject and both shapes."""
    published(openneuro, "ds900045", GRIDS)
    with (
        tno.DataladSubjectsDataset(
            "ds900045", {"t1": T1}, on_multiple="stack", on_incomplete="allow"
        ) as dataset,
        pytest.raises(tno.SelectionError, match=r"sub-03 .*\(10, 9, 8\).*\(5, 6, 7\)"),
    ):
        dataset[2]


def test_missing_label_takes_the_grid_of_what_there_is(openneuro: LoopbackOpenNeuro) -> None:
    """That of an image, else of another label; a subject without any file is no control."""
    published(openneuro, "ds900045", GRIDS)
    lesion = tno.Label(suffix="mask", when_missing="zeros")
    atlas = tno.Label(suffix="dseg", when_missing="zeros")
    with tno.DataladSubjectsDataset("ds900045", {"lesion": lesion}) as dataset:
        assert reasons(dataset) == {"sub-03": "has none of the images"}
    shapes = [(24, 20, 16), (12, 10, 8), SHAPE]
    with tno.DataladSubjectsDataset("ds900045", {"lesion": lesion, "atlas": atlas}) as dataset:
        assert [subject.atlas.spatial_shape for subject in dataset] == shapes
        assert [subject.lesion.spatial_shape for subject in dataset] == shapes
    with tno.DataladSubjectsDataset("ds900045", {"lesion": lesion, "t1": PLAIN}) as dataset:
        assert torch.equal(dataset[2].lesion.data, torch.zeros(1, *SHAPE, dtype=torch.uint8))
        np.testing.assert_allclose(dataset[2].lesion.affine, AFFINE)
