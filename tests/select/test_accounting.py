"""What is an image, and that every file that a pattern hits is accounted for.

Real: plain BIDS folders on the disk, read by the dataset itself, and the trees of ten OpenNeuro
repositories. Synthetic: trees of names, drawn at random, against an oracle that tries every set of
files.
"""

import itertools
import os
import random
import re
import struct
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torchio as tio
from conftest import SHARED, heads

import tio_openneuro as tno
from tio_openneuro.annex.tree import index_tree
from tio_openneuro.content import TreeFile
from tio_openneuro.loopback.volume import write_content
from tio_openneuro.select.bids import parse_path
from tio_openneuro.select.patterns import Label, Scalar, is_volume
from tio_openneuro.select.selection import Selection, select
from tio_openneuro.volumes.headers import VolumeFile
from tio_openneuro.volumes.reader import read_nifti


def tree(*paths: str) -> list[TreeFile]:
    """Return files of these paths."""
    return [TreeFile(path, "", None, 1_000_000) for path in paths]


def chosen(selection: Selection) -> dict[str, dict[str, list[str]]]:
    """Return the paths of each row's images that are there."""
    return {
        row.unit: {name: [f.path for f in files] for name, files in row.images.items() if files}
        for row in selection.rows
    }


def skipped(selection: Selection) -> dict[str, str]:
    """Return the reason of each unit or file left out."""
    return {entry.unit: entry.reason for entry in selection.skipped}


def write_plain(folder: Path, names: list[str]) -> Path:
    """Write a plain BIDS folder with a head under each path."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_content(heads(1)["sub-01/anat/sub-01_T1w.nii.gz"], folder / name)
    (folder / "dataset_description.json").write_text('{"Name": "Plain", "BIDSVersion": "1.10.0"}')
    return folder


# -- what is an image ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("sub-1/sub-1_T1w.NII.GZ", True),
        ("sub-1/sub-1_T1w.Nii", True),
        ("sub-1/mri/T1.MGZ", True),
        ("sub-1/sub-1_res-0.5_T1w.nii", True),
        ("sub-1/sub-1_dscalar.nii", True),
        *((f"sub-1/sub-1_bold.{kind}.nii", False) for kind in ("dtseries", "ptseries", "dscalar")),
        *((f"sub-1/sub-1_bold.{kind}.nii", False) for kind in ("dlabel", "pconn", "DCONN")),
        ("sub-1/sub-1_hemi-L_pial.surf.gii", False),
        ("sub-1/sub-1_dwi.png", False),
        ("sub-1/sub-1_photo.tif", False),
    ],
)
def test_image_is_a_file_of_voxels_whatever_its_case(path: str, *, answer: bool) -> None:
    """Neither CIFTI, nor a surface, nor a picture."""
    assert is_volume(path) is answer


def test_pictures_and_cifti_beside_images_are_not_selected() -> None:
    """Reports have a picture of each image, fMRIPrep its time series on a surface."""
    files = tree(
        *(f"sub-{n}/dwi/sub-{n}_dwi.nii.gz" for n in "12"),
        *(f"derivatives/qc/sub-{n}/dwi/sub-{n}_dwi.png" for n in "12"),
        *(f"derivatives/fmriprep/sub-{n}/func/sub-{n}_bold.dtseries.nii" for n in "12"),
    )
    selection = select(files, {"dwi": Scalar(suffix="dwi", scope="all")})
    assert chosen(selection) == {f"sub-{n}": {"dwi": [f"sub-{n}/dwi/sub-{n}_dwi.nii.gz"]}
                                 for n in "12"}  # fmt: skip
    assert list(select(files, None).images) == ["dwi"]
    with pytest.raises(tno.SelectionError, match=r"2 files that are no images \(\.dtseries\.nii"):
        select(files, {"bold": Scalar("**/*_bold.*")})


def test_file_named_in_capitals_is_read_and_guarded_as_any_other(tmp_path: Path) -> None:
    """``.NII.GZ`` and ``.NII`` take the fast reader, and a header that lies is refused."""
    names = [f"sub-{n}/anat/sub-{n}_T1w{end}" for n, end in ((1, ".nii.gz"), (2, ".nii"))]
    folder = write_plain(tmp_path / "plain", names)
    for name in names:
        stem, _, ending = name.partition(".")
        (folder / name).rename(folder / f"{stem}.{ending.upper()}")
    (first, second) = sorted(folder.rglob("*.NII*"))
    assert read_nifti(VolumeFile(first), "first") is not None
    with tno.DataladSubjectsDataset(folder, {"t1": tno.Scalar(suffix="T1w")}) as dataset:
        assert [subject.subject_id for subject in dataset] == ["sub-1", "sub-2"]
        assert dataset[0].t1.data.float().std() > 0
        assert dataset["sub-2"].t1.path == second
        header = bytearray(second.read_bytes())
        struct.pack_into("<4h", header, 40, 3, 30_000, 30_000, 30_000)
        second.write_bytes(header)
        with pytest.raises(tno.RamBudgetError, match=r"sub-2_T1w\.NII.*30000|27000"):
            dataset[1]
    with tno.DataladSubjectsDataset(folder, {"t1": tno.Scalar(extension=".NII.GZ")}) as dataset:
        np.testing.assert_array_equal([s.subject_id for s in dataset.dry_iter()], ["sub-1"])


# -- every hit is in a unit or in skipped ----------------------------------------------------

SUFFIXES = ("T1w", "FLAIR", "bold")


def agree(one: str, other: str) -> bool:
    """Tell whether two names have one value of each of session, run and acquisition, if any."""
    a, b = (dict(re.findall(r"(ses|run|acq)-([a-z0-9]+)", path)) for path in (one, other))
    return all(a[key].lstrip("0") == b[key].lstrip("0") for key in a.keys() & b.keys())


def largest_sets(files: dict[str, list[str]]) -> set[frozenset[str]]:
    """Return all largest sets of files that agree, by trying every one: at most one an image."""
    choices = [[None, *several] for several in files.values()]
    sets = [frozenset(filter(None, chosen)) for chosen in itertools.product(*choices)]
    good = [s for s in sets if s and all(agree(a, b) for a, b in itertools.combinations(s, 2))]
    return {each for each in good if not any(each < other for other in good)}


UNIT_KEYS = {"subject": ["sub"], "session": ["sub", "ses"], "run": ["sub", "ses", "run"]}


def named(text: str) -> dict[str, str]:
    """Return the subject, session and run that a name speaks of."""
    return dict(re.findall(r"(?<![a-z])(sub|ses|run)-([^/_. ]+)", text))


def owns(unit: dict[str, str], path: str, keys: list[str]) -> bool:
    """Tell whether a file is one of a unit's: of its subject, and of no other of these keys."""
    folder, _, name = path.rpartition("/")
    subjects, file = {named(part).get("sub") for part in (folder, name)}, named(path)
    return unit["sub"] in subjects and all(
        unit.get(key, "").lstrip("0") == file[key].lstrip("0") for key in keys[1:] if key in file
    )


def random_tree(draw: random.Random) -> list[TreeFile]:
    """Return a tree of a few subjects, with what goes wrong in real ones."""
    paths = set()
    for subject, session, suffix in itertools.product("12", ("a", "b", ""), SUFFIXES):
        for run in draw.sample(["", "1", "02", "2"], draw.choice([0, 0, 1, 2])):
            folder = f"sub-{subject}" + (f"/ses-{session}" if session else "")
            name = folder.replace("/", "_") + (f"_run-{run}" if run else "")
            ending = draw.choice([".nii.gz", ".nii", ".NII.GZ", ".nii.gz"])
            paths.add(f"{folder}/x/{draw.choice(['', '', '', '._'])}{name}_{suffix}{ending}")
    strays = ["extra/T1w.nii", "more/T1w.nii.gz", "sub-1/x/sub-2_T1w.nii", "sub-1/x/sub-1_T1w.png"]
    paths |= set(draw.sample(strays, 2))
    found = [
        TreeFile(path, "", None, draw.choice([9, *[10**6] * 9, None])) for path in sorted(paths)
    ]
    return draw.sample(found, len(found))


@pytest.mark.parametrize("part", range(5))
def test_every_hit_of_random_trees_is_in_a_unit_or_in_skipped(part: int) -> None:
    """Whatever the unit, the options and the order of images and files; with a true reason.

    100 trees for each part. A file is in a unit, or skipped itself, or its whole unit is.
    """
    for seed in range(100 * part, 100 * part + 100):
        draw = random.Random(seed)
        files = random_tree(draw)
        required = {suffix: draw.random() < 0.3 for suffix in SUFFIXES}
        unit = draw.choice(["subject", "session", "run"])
        how = draw.choice(["all", "first", "stack", "raise"])
        found = []
        images = {s: Scalar(f"**/*{s}.*", required=required[s]) for s in SUFFIXES}
        for order in itertools.permutations(SUFFIXES):
            asked = None if seed % 5 == 0 else {s: images[s] for s in order}
            try:
                found.append(select(draw.sample(files, len(files)), asked, unit=unit,
                                    on_multiple=how, on_incomplete="allow"))  # fmt: skip
            except tno.SelectionError as error:
                found.append(re.sub(r"(?s)(No image file matches|has \d+ files|None of).*", r"\1",
                                    str(error)))  # fmt: skip
        if isinstance(found[0], str):
            assert all(isinstance(each, str) for each in found), seed
            continue
        rows = [{(r.unit, *sorted(f.path for s in r.images.values() for f in s)) for r in each.rows}
                for each in found]  # fmt: skip
        assert all(each == rows[0] for each in rows), seed
        selection, used = found[0], {path for row in rows[0] for path in row[1:]}
        out = skipped(selection)
        for file in files:
            parsed = parse_path(file.path)
            if parsed.suffix in SUFFIXES and is_volume(file.path) and file.path not in used:
                kept = [
                    {"sub": row.subject_id, "ses": row.session_id, "run": row.run_id}
                    for row in selection.rows
                ]
                kept = [{k: row[k][4:] for k in UNIT_KEYS[unit] if row[k]} for row in kept]
                left = [named(name) for name in out if "/" not in name]
                assert file.path in out or (
                    any(owns(each, file.path, UNIT_KEYS[unit]) for each in left)
                    and not any(owns(each, file.path, UNIT_KEYS[unit]) for each in kept)
                ), (seed, file.path)
                if "/._" in file.path or file.size_bytes in {9, None}:
                    reason = out.get(file.path, "no file for")
                    assert re.search(
                        "macOS|holds 9 bytes|to no file|no file for|none|names no|its name", reason
                    )
        assert not used & out.keys(), seed
        sizes = {file.path: file.size_bytes for file in files}
        assert all(sizes[path] == 10**6 and "/._" not in path for path in used), seed


def test_optional_images_make_all_largest_sets_that_agree() -> None:
    """Against an oracle that tries every set, on 200 random subjects."""
    for seed in range(200):
        draw = random.Random(seed)
        names = {
            suffix: [
                f"sub-1/x/sub-1{session}{run}_{suffix}.nii"
                for session in ("", "_ses-a", "_ses-b")
                for run in ("", "_run-1", "_run-2")
                if draw.random() < 0.3
            ]
            for suffix in SUFFIXES
        }
        # Sessions and runs that never meet would be meant to differ.
        names = {
            s: [*several, f"sub-1/x/sub-1_ses-z_run-9_{s}.nii"] for s, several in names.items()
        }
        images = {s: Scalar(suffix=s, required=False) for s in draw.sample(SUFFIXES, 3)}
        files = tree(*itertools.chain(*names.values()))
        selection = select(files, images, on_multiple="all", on_incomplete="allow")
        rows = {frozenset(f.path for s in row.images.values() for f in s) for row in selection.rows}
        assert rows == largest_sets(names), seed
        assert len(rows) == len(selection.rows)
        assert len({row.unit for row in selection.rows}) == len(rows)


def test_image_without_its_label_in_another_session_is_named() -> None:
    """It agrees with no file for the label, and says so."""
    files = tree("sub-1/sub-1_ses-a_T1w.nii", "sub-1/sub-1_ses-a_mask.nii",
                 "sub-1/sub-1_ses-b_T1w.nii")  # fmt: skip
    images = {"t1": Scalar(suffix="T1w"), "mask": Label(suffix="mask")}
    for how in ("raise", "first", "all", "stack"):
        selection = select(files, images, on_multiple=how)
        assert len(selection.rows) == 1
        assert skipped(selection) == {files[2].path: "agrees with no file for 'mask' of sub-1"}


def test_linked_folders_and_broken_links_of_a_plain_folder_are_seen(tmp_path: Path) -> None:
    """Links are followed, in no circle; one to nothing has its reason, as a long path has."""
    names = [f"sub-{n}/anat/sub-{n}_T1w.nii.gz" for n in "12"]
    folder = write_plain(tmp_path / "plain", names)
    (folder / "sub-2").rename(tmp_path / "elsewhere")
    (folder / "sub-2").symlink_to(tmp_path / "elsewhere")
    (folder / "sub-1/circle").symlink_to(folder)
    (folder / "sub-3").mkdir()
    (folder / "sub-3/sub-3_T1w.nii.gz").symlink_to("nowhere")
    (folder / "participants.tsv").symlink_to("nowhere.tsv")
    with tno.DataladSubjectsDataset(folder, {"t1": tno.Scalar(suffix="T1w")}) as dataset:
        assert [subject.subject_id for subject in dataset] == ["sub-1", "sub-2"]
        assert [entry.unit for entry in dataset.skipped] == ["sub-3"]
        assert "is a link to no file" in dataset.skipped[0].reason


# -- labels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [{"when_missing": "zeros"}, {"required": False}, {}])
def test_label_that_reaches_no_unit_is_an_error(option: dict[str, object]) -> None:
    """It says how many files matched, and why they name no unit."""
    files = tree(*(f"sub-C{n}/sub-C{n}_T1w.nii" for n in "123"),
                 *(f"derivatives/subject_C{n}/lesion.nii" for n in "123"))  # fmt: skip
    images = {"t1": Scalar(suffix="T1w"), "lesion": Label("derivatives/**/lesion.nii", **option)}
    with pytest.raises(tno.SelectionError, match=r"3 files match 'lesion'.*folder is subject_C1"):
        select(files, images, on_incomplete="allow")


@pytest.mark.parametrize(
    ("stem", "is_label"),
    [
        *((stem, True) for stem in (
            "seg-manual", "T1w_labels-disc-manual", "T2w_spinalcordmask", "T1w_defacemask",
            "HIP_manual", "lesion", "aseg", "tumor_segmentation", "desc-aparcaseg_dseg", "T1w_roi",
            "desc-Lesion_1_mask", "T1w_label-brain", "training_labels", "FLAIR_label-tumour",
            "space-T1w_atlas-AAL", "desc-brain_mask", "wm.seg", "brainmask", "parcellation",
        )),
        *((stem, False) for stem in (
            "T1w", "label-GM_probseg", "CEREBRUM7T_probMap", "desc-preproc_T1w", "T1w-chi",
            "seg-schaefer_bold", "desc-lesionfilled_T1w", "label-brain_T1w", "T1_1Warp",
            "desc-masked_FLAIR", "atlas-AAL_desc-mean_bold", "label-GM_prob",
        )),
    ],
)  # fmt: skip
def test_label_maps_are_told_by_their_names(stem: str, *, is_label: bool) -> None:
    """By the schema's words, by entities, and by those of hand-made labels."""
    files = tree("sub-1/sub-1_T2starw.nii", f"sub-1/sub-1_{stem}.nii.gz")
    (kind,) = {type(p) for name, p in select(files, None).images.items() if name != "T2starw"}
    assert kind is (Label if is_label else Scalar)


def test_a_word_after_a_subjects_dot_is_part_of_the_name() -> None:
    """Two structures of one subject are two images, each in a unit."""
    paths = [f"derivatives/fs/sub-1/sub-1.{area}_exvivo.nii.gz" for area in ("BA1", "BA2")]
    paths += ["derivatives/fs/sub-1/sub-1.BA3.nii.gz", "sub-1/sub-1_T1w.nii.gz"]
    (row,) = select(tree(*paths), None).rows
    found = {name: [file.path for file in several] for name, several in row.images.items()}
    named = zip(("BA1_exvivo", "BA2_exvivo", "BA3", "T1w"), paths, strict=True)
    assert found == {name: [path] for name, path in named}


def test_a_guessed_image_that_no_unit_has_is_left_out() -> None:
    """It is in ``skipped``, and among no unit's images."""
    template = "derivatives/mni_mask.nii.gz"
    selection = select(tree("sub-1/sub-1_T1w.nii.gz", template), None)
    assert list(selection.images) == ["T1w"]
    assert [list(row.images) for row in selection.rows] == [["T1w"]]
    assert [entry.unit for entry in selection.skipped] == [template]


@pytest.mark.parametrize(
    ("stem", "stored", "intent", "is_label"),
    [
        *(("hippocampus", "u1", 0, True), ("hippocampus", "i2", 0, False)),
        *(("hippocampus", "i2", 1002, True), ("T1w", "u1", 0, False)),
        ("tissue_prob", "u1", 0, False),
    ],
)
def test_header_tells_a_label_map_where_the_name_tells_nothing(
    tmp_path: Path, stem: str, stored: str, intent: int, *, is_label: bool
) -> None:
    """In a plain folder; what is annexed comes and goes, and is told by its name alone."""
    folder = tmp_path / "bids" / "sub-1"
    folder.mkdir(parents=True)
    (folder.parent / "dataset_description.json").write_text('{"Name": "Plain"}')
    image = nib.Nifti1Image(np.zeros((4, 5, 6), stored), np.eye(4))
    image.header.set_intent(intent)
    image.to_filename(folder / f"sub-1_{stem}.nii.gz")
    with tno.DataladSubjectsDataset(folder.parent) as dataset:
        assert isinstance(dataset[0][stem], tio.LabelMap) == is_label


# -- real repositories -----------------------------------------------------------------------

BUNDLES = Path(os.environ.get("TIO_OPENNEURO_TEST_DATA", SHARED)) / "openneuro"
TEN = [
    *("ds000001", "ds000228", "ds001226", "ds001421", "ds002424"),
    *("ds003642", "ds003949", "ds004199", "ds004616", "ds005616"),
]


@pytest.mark.parametrize("accession", TEN)
def test_every_image_of_a_real_repository_is_accounted_for(accession: str, tmp_path: Path) -> None:
    """Counted by ``git ls-tree``; what cannot be batched says in 500 characters what to do."""
    bundle = BUNDLES / f"{accession}.bundle"
    if not bundle.exists():
        pytest.skip(f"NOT TESTED ON REAL DATA: no {bundle}; set TIO_OPENNEURO_TEST_DATA")
    subprocess.run(["git", "clone", "-q", "-n", bundle, tmp_path / "clone"], check=True)
    listing = subprocess.check_output(
        ["git", "-C", tmp_path / "clone", "ls-tree", "-rz", "--name-only", "HEAD"]
    )
    niftis = {
        path
        for path in listing.decode().split("\0")
        if re.search(r"(?<!\.dtseries)(?<!\.dscalar)\.nii(\.gz)?$", path)
        and not re.match("sourcedata/|code/|stimuli/|tmp|[.]", path)
    }
    files = index_tree(tmp_path / "clone", "HEAD")
    for unit, how in itertools.product(("subject", "session", "run"), ("all", "first", "stack")):
        selection = select(files, None, unit=unit, on_multiple=how, on_incomplete="allow")
        used = {f.path for row in selection.rows for s in row.images.values() for f in s}
        out = skipped(selection)
        whole = [named(name) for name in out if name not in niftis]
        left = {p for p in niftis - used - out.keys()
                if not any(owns(each, p, UNIT_KEYS[unit]) for each in whole)}  # fmt: skip
        assert used <= niftis
        assert not left
        assert how != "all" or len(used) + len(out) >= len(niftis)
    said = ""
    try:
        select(files, None)
    except tno.SelectionError as error:
        said = str(error)
    assert len(said) < 500
    assert not said or re.search("on_incomplete='allow'|on_multiple=", said)
