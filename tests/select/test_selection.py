"""Patterns to rows: synthetic trees for each case, and six real repositories.

Real: the trees of OpenNeuro repositories, from git bundles without image content. What should be
selected from them is computed here from ``git ls-tree`` alone.
"""

import os
import pickle
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import SHARED

from tio_openneuro.annex.processes import run
from tio_openneuro.annex.tree import index_tree
from tio_openneuro.content import AnnexKey
from tio_openneuro.errors import SelectionError
from tio_openneuro.select.patterns import Label, Scalar, compile_glob
from tio_openneuro.select.selection import Selection, select

BUNDLES = Path(os.environ.get("TIO_OPENNEURO_TEST_DATA", SHARED)) / "openneuro"


@dataclass(frozen=True)
class File:
    """One file of a synthetic tree."""

    path: str
    key: AnnexKey | None = None
    size_bytes: int | None = 1_000_000


def tree(*paths: str) -> list[File]:
    """Return files of these paths."""
    return [File(path) for path in paths]


def chosen(selection: Selection) -> dict[str, dict[str, list[str]]]:
    """Return the paths of each row's images."""
    return {
        row.unit: {name: [file.path for file in files] for name, files in row.images.items()}
        for row in selection.rows
    }


def skipped(selection: Selection) -> dict[str, str]:
    """Return the reason of each unit left out."""
    return {entry.unit: entry.reason for entry in selection.skipped}


# -- globs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("glob", "path", "answer"),
    [
        ("sub-*/anat/*_T1w.nii.gz", "sub-01/anat/sub-01_T1w.nii.gz", True),
        ("sub-*/anat/*_T1w.nii.gz", "sub-01/ses-1/anat/sub-01_T1w.nii.gz", False),
        ("sub-*/anat/*_T1w.nii.gz", "derivatives/sub-01/anat/sub-01_T1w.nii.gz", False),
        ("sub-*_T1w.nii", "sub-01/anat/sub-01_T1w.nii", False),
        ("**/*_T1w.nii", "sub-01_T1w.nii", True),
        ("**/*_T1w.nii", "sub-01/ses-1/anat/sub-01_T1w.nii", True),
        ("sub-01/**", "sub-01/anat/a.nii", True),
        ("a**b.nii", "a/x/y/b.nii", True),
        ("sub-0?/a.nii", "sub-01/a.nii", True),
        ("sub-0?/a.nii", "sub-0/a.nii", False),
        ("sub-0[1-3]/a.nii", "sub-02/a.nii", True),
        ("sub-0[!1-3]/a.nii", "sub-02/a.nii", False),
        ("sub-0[!1-3]/a.nii", "sub-04/a.nii", True),
        ("a[!b]c.nii", "a/c.nii", False),
        ("a[]]c.nii", "a]c.nii", True),
        ("a[c.nii", "a[c.nii", True),
        ("a+(1).nii", "a+(1).nii", True),
        ("a.nii", "abnii", False),
        ("./sub-1/a.nii", "sub-1/a.nii", True),
        ("/sub-1/a.nii", "sub-1/a.nii", True),
    ],
)
def test_glob_is_matched_from_the_root(glob: str, path: str, *, answer: bool) -> None:
    """One star stays inside a folder, two cross folders, everything else is itself."""
    prefix, expression = compile_glob(glob)
    assert (path.startswith(prefix) and expression.fullmatch(path) is not None) is answer


# -- what is asked for -----------------------------------------------------------------------


def test_patterns_are_values() -> None:
    """They print as the call that makes them, compare by content, and cannot be changed."""
    scalar = Scalar("a/*.nii", required=False, volumes="mean", acq=["b", "c"])
    text = "Scalar('a/*.nii', required=False, volumes='mean', acquisition=('b', 'c'))"
    assert repr(scalar) == text
    assert scalar == eval(text)  # noqa: S307 - our own text
    assert scalar != Scalar("a/*.nii")
    label = Label(suffix="mask", combine="union", when_missing="zeros")
    assert repr(label) == "Label(combine='union', when_missing='zeros', suffix='mask')"
    assert Label("a.nii") != Scalar("a.nii")
    assert len({Scalar("a.nii"), Scalar("a.nii"), Label("a.nii")}) == 2
    assert pickle.loads(pickle.dumps(label)) == label
    with pytest.raises(AttributeError):
        scalar.glob = "b"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Scalar, "says nothing about the file"),
        (lambda: Scalar(" "), "empty pattern"),
        (lambda: Scalar("a", volumes="median"), "volumes must be"),  # type: ignore[arg-type]
        (lambda: Label("a", combine="sum"), "combine must be"),  # type: ignore[arg-type]
        (lambda: Scalar("a", required="no"), "required must be"),  # type: ignore[arg-type]
        (lambda: Scalar("a", combine="union"), "combine='union': it is an option of Label"),
        (lambda: Scalar("a", when_missing="zeros"), "Scalar cannot take when_missing='zeros'"),
        (lambda: Label("a", volumes=0), "Label cannot take volumes=0: it is an option of Scalar"),
        (lambda: Label("a", on_multiple="all"), "it is an option of the dataset"),
        (lambda: Label("a", when_missing="ones"), "when_missing must be"),  # type: ignore[arg-type]
    ],
)
def test_pattern_that_means_nothing_is_refused(make: Callable[[], object], message: str) -> None:
    """At once, not at selection."""
    with pytest.raises(SelectionError, match=message):
        make()


@pytest.mark.parametrize(
    "options", [{"unit": "scan"}, {"on_missing": "x"}, {"on_multiple": "x"}, {"on_incomplete": "x"}]
)
def test_unknown_option_is_refused(options: dict[str, str]) -> None:
    """The message names the values that exist."""
    with pytest.raises(SelectionError, match=f"{next(iter(options))} must be one of"):
        select(tree("sub-1/a.nii"), {"a": Scalar("**/a.nii")}, **options)  # type: ignore[arg-type]


ANATOMY = tree(
    "participants.tsv",
    "sub-01/anat/sub-01_T1w.nii.gz",
    "sub-01/anat/sub-01_T1w.json",
    "sub-01/anat/sub-01_FLAIR.nii.gz",
    "sub-02/anat/sub-02_T1w.nii.gz",
    "derivatives/prep/sub-02/anat/sub-02_desc-clean_T1w.nii.gz",
    "sourcedata/sub-03/anat/sub-03_T1w.nii.gz",
)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (Scalar("sub-*/anat/*_FLARE.nii.gz"), r"sub-\*/anat/sub-\*_FLAIR\.nii\.gz \(1\)"),
        (Scalar("sub-*/anat/*_T1w.json"), r"1 files that are no images \(\.json \(1\)\)"),
        (Scalar(suffix="T2w"), r"Values of 'suffix' that exist there: T1w \(4\), FLAIR \(1\)"),
        (
            Scalar(sufix="T1w"),
            "no image there has the entity 'sufix'; .* did you mean suffix='T1w'",
        ),
        (Scalar(suffix="T1w", scope="fmriprep"), r"'scope' .*raw \(3\), prep \(1\)"),
    ],
)
def test_pattern_without_a_match_names_what_comes_nearest(pattern: Scalar, message: str) -> None:
    """With the pattern itself, and the number of files that were looked at."""
    with pytest.raises(SelectionError, match=f"(?is)matches 't1' = .*among 7 files.*{message}"):
        select(ANATOMY, {"t1": pattern})


def test_entities_mean_raw_files_unless_only_derivatives_match() -> None:
    """A scope says otherwise; sourcedata is in none."""
    t1 = select(ANATOMY, {"t1": Scalar(suffix="T1w")})
    assert [row.subject_id for row in t1.rows] == ["sub-01", "sub-02"]
    clean = select(ANATOMY, {"t1": Scalar(suffix="T1w", desc="clean")})
    path = "derivatives/prep/sub-02/anat/sub-02_desc-clean_T1w.nii.gz"
    assert chosen(clean) == {"sub-02": {"t1": [path]}}
    assert chosen(select(ANATOMY, {"t1": Scalar(suffix="T1w", scope="prep")})) == chosen(clean)
    assert skipped(clean) == {"sub-01": "no file for 't1'"}


# -- units -----------------------------------------------------------------------------------


def test_units_are_in_natural_order_with_their_ids() -> None:
    """Subject 2 comes before subject 10; a subject without sessions has an empty one."""
    files = tree(*(f"sub-{n}/anat/sub-{n}_T1w.nii" for n in (10, 2, 1)))
    rows = select(files, {"t1": Scalar(suffix="T1w")}, unit="session").rows
    assert [(r.unit, r.subject_id, r.session_id, r.run_id) for r in rows] == [
        (name, name, "", "") for name in ("sub-1", "sub-2", "sub-10")
    ]


SESSIONS = tree(
    "sub-1/ses-a/anat/sub-1_ses-a_T1w.nii.gz",
    "sub-1/ses-a/anat/sub-1_ses-a_run-1_bold.nii.gz",
    "sub-1/ses-a/anat/sub-1_ses-a_run-02_bold.nii.gz",
    "sub-1/ses-b/anat/sub-1_ses-b_T1w.nii.gz",
    "derivatives/m/sub-1/ses-b/anat/sub-1_ses-b_lesion_mask.nii.gz",
    "derivatives/m/sub-1/sub-1_atlas_dseg.nii.gz",
)


def test_images_of_a_session_are_joined_and_others_shared() -> None:
    """A file without a session belongs to each of its subject's."""
    images = {"t1": Scalar(suffix="T1w"), "atlas": Label(suffix="dseg")}
    rows = select(SESSIONS, images, unit="session").rows
    assert [(row.unit, row.session_id) for row in rows] == [
        ("sub-1_ses-a", "ses-a"),
        ("sub-1_ses-b", "ses-b"),
    ]
    assert {row.images["atlas"][0].path for row in rows} == {SESSIONS[5].path}


def test_subject_takes_the_session_that_its_label_is_of() -> None:
    """One lesion mask among several sessions (ds004884) decides which image it goes with."""
    selection = select(SESSIONS, {"t1": Scalar(suffix="T1w"), "lesion": Label(suffix="mask")})
    assert chosen(selection) == {
        "sub-1": {"t1": [SESSIONS[3].path], "lesion": [SESSIONS[4].path]},
    }
    assert selection.rows[0].session_id == "ses-b"


def test_sessions_named_by_the_patterns_stand_side_by_side() -> None:
    """Images that are never of one session are meant to differ in it."""
    images = {"before": Scalar(suffix="T1w", ses="a"), "after": Scalar(suffix="T1w", ses="b")}
    selection = select(SESSIONS, images)
    assert chosen(selection)["sub-1"] == {"before": [SESSIONS[0].path], "after": [SESSIONS[3].path]}


def test_runs_are_units_whatever_their_zeros() -> None:
    """Run 02 of one image and run 2 of another are one run."""
    files = [*SESSIONS, File("derivatives/d/sub-1/ses-a/sub-1_ses-a_run-2_desc-x_mask.nii.gz")]
    images = {"bold": Scalar(suffix="bold"), "mask": Label(desc="x"), "t1": Scalar(suffix="T1w")}
    selection = select(files, images, unit="run")
    assert [(row.unit, row.run_id) for row in selection.rows] == [("sub-1_ses-a_run-02", "run-02")]
    assert skipped(selection) == {
        "sub-1_ses-a_run-1": "no file for 'mask'",
        "sub-1_ses-b": "no file for 'bold' and no file for 'mask'",
    }


def test_label_of_another_session_is_not_paired() -> None:
    """Though it is the only one that its subject has, where others show what belongs together."""
    names = ["sub-1/ses-a/sub-1_ses-a", "sub-2/ses-a/sub-2_ses-a", "sub-2/ses-b/sub-2_ses-b"]
    files = tree(*(f"{n}_{s}.nii" for n, s in zip(names, ("T1w", "T1w", "mask"), strict=True)))
    files.append(File("sub-1/ses-a/sub-1_ses-a_mask.nii"))
    selection = select(files, {"t1": Scalar(suffix="T1w"), "mask": Label(suffix="mask")})
    assert list(chosen(selection)) == ["sub-1"]
    assert skipped(selection) == {
        "sub-2": "no file for 'mask' agrees with 't1' in session, run and stem"
    }


def test_image_is_paired_with_the_label_of_its_run() -> None:
    """Of several runs, the one that was labelled is taken, though no stem says so."""
    files = tree(*(f"sub-1/sub-1_{n}.nii" for n in ("run-1_T1w", "run-2_T1w", "run-2_desc-x_mask")))
    selection = select(files, {"t1": Scalar(suffix="T1w"), "mask": Label(suffix="mask")})
    assert chosen(selection)["sub-1"]["t1"] == ["sub-1/sub-1_run-2_T1w.nii"]


def test_subjects_without_any_image_asked_for_are_named() -> None:
    """A subject's folder that lacks the image is skipped, not forgotten."""
    selection = select(ANATOMY, {"flair": Scalar(suffix="FLAIR")})
    assert skipped(selection) == {"sub-02": "no file for 'flair'"}


def test_missing_image_raises_where_that_is_asked_for() -> None:
    """The message names the first units and the way out."""
    with pytest.raises(SelectionError, match=r"1 unit of 2 .*sub-02: no file for 'flair'.*skip"):
        select(ANATOMY, {"flair": Scalar(suffix="FLAIR")}, on_missing="raise")


def test_images_that_no_unit_has_together_raise() -> None:
    """With the reasons and their numbers, in place of an empty dataset."""
    files = tree("sub-1/sub-1_T1w.nii", "sub-2/sub-2_mask.nii")
    with pytest.raises(SelectionError, match=r"None of 2 units .* 'mask' \(1 units\)"):
        select(files, {"t1": Scalar(suffix="T1w"), "mask": Label(suffix="mask")})


# -- files that cannot be used ---------------------------------------------------------------


def test_files_too_small_for_an_image_are_skipped_with_their_size() -> None:
    """Empty files, of which the key says so too; a small compressed label is kept."""
    key = AnnexKey("MD5E-s351--a.nii", 351)
    files = [
        File("sub-1/sub-1_T1w.nii.gz", size_bytes=0),
        File("sub-2/sub-2_T1w.nii", key, size_bytes=key.size_bytes),
        File("sub-3/sub-3_T1w.nii.gz", size_bytes=90),
        File("sub-4/sub-4_T1w.nii.gz", AnnexKey("URL--a", None), size_bytes=None),
    ]
    selection = select(files, {"t1": Scalar(suffix="T1w")})
    assert list(chosen(selection)) == ["sub-3", "sub-4"]
    assert skipped(selection) == {
        "sub-1": "no file for 't1'; sub-1/sub-1_T1w.nii.gz holds 0 bytes, too few for an image",
        "sub-2": "no file for 't1'; sub-2/sub-2_T1w.nii holds 351 bytes, too few for an image",
    }


def test_broken_label_is_not_taken_for_a_missing_one() -> None:
    """A unit whose label file is empty is no control."""
    files = [*tree("sub-1/sub-1_T1w.nii"), File("sub-1/sub-1_mask.nii", size_bytes=0)]
    files += tree("sub-2/sub-2_T1w.nii", "sub-3/sub-3_T1w.nii", "sub-3/sub-3_mask.nii")
    images = {"t1": Scalar(suffix="T1w"), "mask": Label(suffix="mask", when_missing="zeros")}
    selection = select(files, images)
    assert list(chosen(selection)) == ["sub-2", "sub-3"]
    assert "holds 0 bytes" in skipped(selection)["sub-1"]


def test_label_in_the_folder_of_another_subject_is_not_used() -> None:
    """Neither subject gets it, and the reason says which two it names (ds005616)."""
    paths = (f"sub-{n}/anat/sub-{n}_T2w.nii.gz" for n in "ab")
    files = tree(*paths, "derivatives/l/sub-a/anat/sub-b_T2w_seg.nii.gz")
    files += tree("sub-c/sub-c_T2w.nii.gz", "derivatives/l/sub-c/sub-c_T2w_seg.nii.gz")
    selection = select(files, {"t2": Scalar(suffix="T2w"), "cord": Label(suffix="seg")})
    assert list(chosen(selection)) == ["sub-c"]
    for unit in ("sub-a", "sub-b"):
        assert "its name says sub-b, its folder sub-a" in skipped(selection)[unit]


def test_files_without_a_subject_are_named() -> None:
    """Among subjects' images a stray one belongs to no unit."""
    selection = select([*ANATOMY, File("extra/T1w.nii.gz")], {"t1": Scalar("**/*T1w.nii.gz")},
                       on_multiple="first")  # fmt: skip
    reason = "its path names no subject (sub-…), its folder is extra"
    assert skipped(selection)["extra/T1w.nii.gz"] == reason


def test_one_file_common_to_all_goes_to_every_unit() -> None:
    """An atlas at the root is an image of each subject."""
    files = [*ANATOMY, File("atlas.nii.gz")]
    selection = select(files, {"t1": Scalar(suffix="T1w"), "atlas": Label("atlas.nii.gz")})
    assert [row.images["atlas"][0].path for row in selection.rows] == ["atlas.nii.gz"] * 2


# -- several files for one image -------------------------------------------------------------

RUNS = tree(
    *(f"sub-1/anat/sub-1_run-{n}_T1w.nii.gz" for n in (10, 2, 1)),
    "sub-1/anat/sub-1_FLAIR.nii.gz",
)
BOTH = {"t1": Scalar(suffix="T1w"), "flair": Scalar(suffix="FLAIR")}


def test_several_files_raise_and_say_how_to_choose() -> None:
    """Unit, image, the files and the ways out are in the message."""
    with pytest.raises(
        SelectionError,
        match=r"(?s)sub-1 has 3 files for 't1' = .*run-1_T1w.*run-2_T1w.*run-10_T1w.*"
        r"narrow the pattern; or pass unit='run'; or pass on_multiple='first', 'all'.*'stack'",
    ):
        select(RUNS, BOTH)


def test_glob_that_also_catches_the_label_raises() -> None:
    """``*_FLAIR*`` finds image and roi, which is no reason to guess."""
    files = tree("sub-1/sub-1_FLAIR.nii.gz", "sub-1/sub-1_FLAIR_roi.nii.gz")
    with pytest.raises(SelectionError, match=r"2 files for 'flair'.*_FLAIR\.nii.*_FLAIR_roi\.nii"):
        select(files, {"flair": Scalar("sub-*/*_FLAIR*")})


def test_first_takes_the_first_in_natural_order() -> None:
    """Run 1 goes before run 2, and run 2 before run 10."""
    assert chosen(select(RUNS[:2], {"t1": Scalar(suffix="T1w")}, on_multiple="first")) == {
        "sub-1": {"t1": ["sub-1/anat/sub-1_run-2_T1w.nii.gz"]}
    }


def test_all_makes_a_row_of_each_combination() -> None:
    """Named by what tells it from the others."""
    selection = select(RUNS, BOTH, on_multiple="all")
    assert list(chosen(selection)) == ["sub-1_run-1", "sub-1_run-2", "sub-1_run-10"]
    assert {row.images["flair"][0].path for row in selection.rows} == {RUNS[3].path}
    assert [row.run_id for row in selection.rows] == ["run-1", "run-2", "run-10"]


def test_all_joins_by_the_entities_that_two_images_share() -> None:
    """Acquisitions are paired where they agree, and what is left over is named."""
    names = ("acq-a_T1w", "acq-b_T1w", "acq-a_T2w", "acq-c_T2w", "acq-z_FLAIR")
    files = tree(*(f"sub-1/sub-1_{name}.nii" for name in names))
    images = {**BOTH, "t2": Scalar(suffix="T2w")}
    selection = select(files, images, on_multiple="all")
    assert chosen(selection) == {
        "sub-1": {
            "t1": ["sub-1/sub-1_acq-a_T1w.nii"],
            "flair": ["sub-1/sub-1_acq-z_FLAIR.nii"],
            "t2": ["sub-1/sub-1_acq-a_T2w.nii"],
        }
    }
    assert set(skipped(selection)) == {f"sub-1/sub-1_{name}.nii" for name in (names[1], names[3])}


def test_stack_keeps_all_files_of_an_image() -> None:
    """In natural order, beside images of one file."""
    rows = chosen(select(RUNS, BOTH, on_multiple="stack"))
    assert rows["sub-1"]["t1"] == [f"sub-1/anat/sub-1_run-{n}_T1w.nii.gz" for n in (1, 2, 10)]
    assert rows["sub-1"]["flair"] == ["sub-1/anat/sub-1_FLAIR.nii.gz"]


def test_stacks_of_different_heights_raise() -> None:
    """Three channels and one could not be collated."""
    files = [*RUNS, File("sub-2/sub-2_T1w.nii"), File("sub-2/sub-2_FLAIR.nii")]
    with pytest.raises(SelectionError, match=r"'t1': 1 units have 1 \(sub-2\), 1 units have 3"):
        select(files, BOTH, on_multiple="stack")
    assert len(select(files, BOTH, on_multiple="stack", on_incomplete="allow").rows) == 2


def test_label_goes_with_the_image_whose_stem_it_follows() -> None:
    """Of several images of a unit, the one that was labelled is taken."""
    names = ("acq-a_FLAIR", "acq-b_FLAIR", "acq-b_FLAIR_roi", "acq-bb_FLAIR")
    files = tree(*(f"sub-1/sub-1_{name}.nii.gz" for name in names))
    selection = select(files, {"flair": Scalar(suffix="FLAIR"), "roi": Label(suffix="roi")})
    assert chosen(selection)["sub-1"]["flair"] == ["sub-1/sub-1_acq-b_FLAIR.nii.gz"]


def test_label_follows_a_whole_stem_and_not_the_beginning_of_one() -> None:
    """A label of ``T1c`` is none of ``T1``."""
    files = tree(*(f"sub-1/sub-1_{name}.nii" for name in ("T1", "T1c", "T1c_roi")))
    images = {"t1": Scalar(suffix=["T1", "T1c"]), "roi": Label(suffix="roi")}
    assert chosen(select(files, images))["sub-1"]["t1"] == ["sub-1/sub-1_T1c.nii"]


def test_single_label_may_differ_from_its_image_in_acquisition() -> None:
    """One image and one label of a subject are a pair (sub-00048 of ds004199)."""
    files = tree("sub-1/sub-1_acq-a_FLAIR.nii", "sub-1/sub-1_acq-b_FLAIR_roi.nii")
    selection = select(files, {"flair": Scalar(suffix="FLAIR"), "roi": Label(suffix="roi")})
    assert chosen(selection)["sub-1"]["roi"] == [files[1].path]


def test_union_takes_all_label_files_of_its_image_and_no_others() -> None:
    """Each session's image has its own lesions; rows may differ in their number."""
    files = [
        *tree(*(f"sub-1/ses-{s}/sub-1_ses-{s}_T1w.nii" for s in "ab")),
        *tree(*(f"d/sub-1/ses-a/sub-1_ses-a_desc-Lesion_{n}_mask.nii" for n in (1, 2))),
        File("d/sub-1/ses-b/sub-1_ses-b_desc-Lesion_1_mask.nii"),
    ]
    images = {"t1": Scalar(suffix="T1w"), "lesion": Label(desc="Lesion", combine="union")}
    for unit, multiple in (("session", "raise"), ("subject", "all")):
        rows = chosen(select(files, images, unit=unit, on_multiple=multiple))  # type: ignore[arg-type]
        assert [len(row["lesion"]) for row in rows.values()] == [2, 1]
        assert list(rows) == ["sub-1_ses-a", "sub-1_ses-b"]


# -- optional images -------------------------------------------------------------------------


def test_units_that_differ_in_an_optional_image_raise() -> None:
    """A batch of them would not collate; the message names a unit of each kind."""
    images = {"t1": Scalar(suffix="T1w"), "flair": Scalar(suffix="FLAIR", required=False)}
    message = (
        r"'flair': 1 units have 0 \(sub-02\), 1 units have 1 \(sub-01\).*on_incomplete='allow'"
    )
    with pytest.raises(SelectionError, match=message):
        select(ANATOMY, images)
    rows = chosen(select(ANATOMY, images, on_incomplete="allow"))
    assert [len(row["flair"]) for row in rows.values()] == [1, 0]


def test_label_that_may_be_zeros_is_never_missed() -> None:
    """Controls come without a file for it, required or not."""
    files = tree("sub-1/sub-1_T1w.nii", "sub-1/sub-1_mask.nii", "sub-2/sub-2_T1w.nii")
    images = {"t1": Scalar(suffix="T1w"), "mask": Label(suffix="mask", when_missing="zeros")}
    rows = chosen(select(files, images, on_missing="raise"))
    assert [row["mask"] for row in rows.values()] == [["sub-1/sub-1_mask.nii"], []]


# -- no patterns, other layouts --------------------------------------------------------------


def test_without_patterns_every_nifti_has_the_name_of_its_stem() -> None:
    """Runs are told apart by name, masks are labels, pipelines by theirs where stems repeat."""
    files = tree(
        *(f"sub-{n}/func/sub-{n}_task-x_run-{r}_bold.nii.gz" for n in (1, 2) for r in (1, 2)),
        *(f"sub-{n}/anat/sub-{n}_T1w.nii.gz" for n in (1, 2)),
        *(f"derivatives/prep/sub-{n}/anat/sub-{n}_T1w.nii.gz" for n in (1, 2)),
        *(f"derivatives/prep/sub-{n}/anat/sub-{n}_desc-brain_mask.nii.gz" for n in (1, 2)),
        "sub-1/anat/sub-1_T1w.json",
        "sourcedata/sub-1/sub-1_PD.nii.gz",
    )
    selection = select(files, None)
    kinds = {name: type(pattern) for name, pattern in selection.images.items()}
    assert kinds == {
        "T1w": Scalar,
        "prep_T1w": Scalar,
        "desc-brain_mask": Label,
        "task-x_run-1_bold": Scalar,
        "task-x_run-2_bold": Scalar,
    }
    assert [row.subject_id for row in selection.rows] == ["sub-1", "sub-2"]
    assert all(len(several) == 1 for row in selection.rows for several in row.images.values())


@pytest.mark.parametrize(
    ("image", "label", "paths"),
    [
        (
            "imagesTr/*_0000.nii.gz",
            "labelsTr/*.nii.gz",
            "imagesTr/{0}_0000.nii.gz labelsTr/{0}.nii.gz",
        ),
        ("*/t1.nii", "*/seg.nii", "{0}/t1.nii {0}/seg.nii"),
        ("**/*_t1.nii", "**/*_seg.nii", "{0}/{0}_t1.nii {0}/{0}_seg.nii"),
    ],
)
def test_other_layouts_are_joined_by_what_the_wildcards_stand_for(
    image: str, label: str, paths: str
) -> None:
    """Where no path names a subject, as in challenges' data."""
    files = tree(*(p for n in ("case_2", "case_10") for p in paths.format(n).split()))
    selection = select(files, {"image": Scalar(image), "label": Label(label)})
    assert [row.unit for row in selection.rows] == ["case_2", "case_10"]
    assert [row.subject_id for row in selection.rows] == ["case_2", "case_10"]
    assert all(set(row.images) == {"image", "label"} for row in selection.rows)


def test_other_layouts_need_patterns() -> None:
    """Without a subject in any path there is nothing to name units by."""
    with pytest.raises(SelectionError, match="Name the images by glob"):
        select(tree("imagesTr/a.nii.gz"), None)


# -- real repositories -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that clones a real repository's bundle, once."""
    folder = tmp_path_factory.mktemp("bundles")

    def cloned(accession: str) -> Path:
        bundle = BUNDLES / f"{accession}.bundle"
        if not bundle.exists():
            pytest.skip(f"NOT TESTED ON REAL DATA: no {bundle}; set TIO_OPENNEURO_TEST_DATA")
        if not (folder / accession).exists():
            run(["git", "clone", "--quiet", "--no-checkout", str(bundle), str(folder / accession)])
        return folder / accession

    return cloned


def listed(clone: Path, expression: str) -> dict[str, list[str]]:
    """Return paths by what the expression's first group is, from ``git ls-tree``."""
    found: dict[str, list[str]] = {}
    names = run(["git", "-C", str(clone), "ls-tree", "-r", "-z", "--name-only", "HEAD"]).decode()
    for path in names.split("\0"):
        match = re.fullmatch(expression, path)
        if match:
            found.setdefault(match[1], []).append(path)
    return found


def test_ds004199_has_85_pairs(clone: Callable[[str], Path]) -> None:
    """By globs and by entities alike; the other 85 subjects are skipped with their reason."""
    folder = clone("ds004199")
    flair = listed(folder, r"(sub-[^/]+)/anat/[^/]*_FLAIR\.nii\.gz")
    roi = listed(folder, r"(sub-[^/]+)/anat/[^/]*_FLAIR_roi\.nii\.gz")
    expected = {s: {"flair": flair[s], "roi": roi[s]} for s in flair.keys() & roi.keys()}
    assert len(expected) == 85
    files = index_tree(folder, "HEAD")
    for images in (
        {
            "flair": Scalar("sub-*/anat/*_FLAIR.nii.gz"),
            "roi": Label("sub-*/anat/*_FLAIR_roi.nii.gz"),
        },
        {"flair": Scalar(suffix="FLAIR"), "roi": Label(suffix="roi")},
    ):
        selection = select(files, images)
        assert chosen(selection) == expected
        assert skipped(selection) == dict.fromkeys(flair.keys() - roi.keys(), "no file for 'roi'")
    acquisition = {
        name: re.findall(r"acq-[^_]+", str(p)) for name, p in expected["sub-00048"].items()
    }
    assert acquisition == {"flair": ["acq-T2sel"], "roi": ["acq-32ch10"]}


def test_ds003949_has_296_brains_and_167_with_lesions(clone: Callable[[str], Path]) -> None:
    """Per session, with all of a session's lesion files joined to its image."""
    folder = clone("ds003949")
    place = r"[^/]+/(sub-[^/]+/ses-[^/]+)/anat/[^/]*"
    brains = listed(folder, rf"derivatives/{place}_desc-brain_mask\.nii\.gz")
    lesions = listed(folder, rf"derivatives/{place}_desc-Lesion_\d_mask\.nii\.gz")
    assert (len(brains), len(lesions)) == (296, 167)
    files = index_tree(folder, "HEAD")
    angio = Scalar(suffix="angio")
    brain = Label("derivatives/manual_masks/**/*_desc-brain_mask.nii.gz")
    selection = select(files, {"angio": angio, "brain": brain}, unit="session")
    assert [list(row["brain"]) for row in chosen(selection).values()] == list(brains.values())
    assert skipped(selection) == {}
    lesion = Label("derivatives/manual_masks/**/*_desc-Lesion_*_mask.nii.gz", combine="union")
    selection = select(files, {"angio": angio, "lesion": lesion}, unit="session")
    found = {unit.replace("_", "/"): row["lesion"] for unit, row in chosen(selection).items()}
    assert found == lesions
    without = {name.replace("/", "_") for name in brains.keys() - lesions.keys()}
    assert skipped(selection) == dict.fromkeys(without, "no file for 'lesion'")


def test_ds003949_says_that_its_subjects_have_sessions(clone: Callable[[str], Path]) -> None:
    """By subject, eleven have several; the message leads to unit='session'."""
    files = index_tree(clone("ds003949"), "HEAD")
    with pytest.raises(SelectionError, match=r"\(10 more units have several\).*unit='session'"):
        select(files, {"angio": Scalar(suffix="angio")})


def test_ds001226_has_25_tumours(clone: Callable[[str], Path]) -> None:
    """A label without a session joins the image of the subject's only one; controls are skipped."""
    folder = clone("ds001226")
    pattern = r"derivatives/tumor_masks/(sub-[^/]+)/anat/[^/]*space_T1_label-tumor\.nii"
    tumours = listed(folder, pattern)
    subjects = listed(folder, r"(sub-[^/]+)/ses-preop/anat/[^/]*_T1w\.nii\.gz")
    assert (len(tumours), len(subjects)) == (25, 36)
    label = Label("derivatives/tumor_masks/sub-*/anat/*_space_T1_label-tumor.nii")
    selection = select(index_tree(folder, "HEAD"), {"t1": Scalar(suffix="T1w"), "tumour": label})
    assert {unit: row["tumour"] for unit, row in chosen(selection).items()} == tumours
    assert {row.session_id for row in selection.rows} == {"ses-preop"}
    assert skipped(selection) == dict.fromkeys(
        subjects.keys() - tumours.keys(), "no file for 'tumour'"
    )


def test_ds005616_uses_no_label_of_another_subject(clone: Callable[[str], Path]) -> None:
    """Two cord labels lie in the folder of another subject; each row's files name its subject."""
    folder = clone("ds005616")
    labels = "derivatives/labels/sub-*/anat/*_T2w_label-SC_seg.nii.gz"
    found = listed(folder, r"derivatives/labels/(sub-[^/]+)/anat/[^/]*_T2w_label-SC_seg\.nii\.gz")
    strays = [p for s, paths in found.items() for p in paths if f"/{s}_" not in p]
    assert len(strays) == 2
    t2 = listed(folder, r"(sub-[^/]+)/anat/[^/]*_T2w\.nii\.gz")
    own = {s for s, paths in found.items() if any(f"/{s}_" in p for p in paths)}
    selection = select(
        index_tree(folder, "HEAD"), {"t2": Scalar(suffix="T2w"), "cord": Label(labels)}
    )
    assert {row.unit for row in selection.rows} == own & t2.keys()
    used = [path for row in chosen(selection).values() for path in row["cord"]]
    assert not set(used) & set(strays)
    assert set(skipped(selection)).isdisjoint(own & t2.keys())


def test_ds002424_pairs_each_task_with_its_session(clone: Callable[[str], Path]) -> None:
    """A task's run is joined to the anatomy of its own session."""
    folder = clone("ds002424")
    expression = r"(sub-[^/]+/ses-[^/]+)/{}/[^/]*_{}\.nii\.gz"
    bold = listed(folder, expression.format("func", "task-VLI_bold"))
    t1 = listed(folder, expression.format("anat", "T1w"))
    images = {"bold": Scalar(suffix="bold", task="VLI"), "t1": Scalar(suffix="T1w")}
    selection = select(index_tree(folder, "HEAD"), images, unit="session")
    expected = {
        k.replace("/", "_"): {"bold": bold[k], "t1": t1[k]} for k in bold.keys() & t1.keys()
    }
    assert chosen(selection) == expected
    reasons = Counter(skipped(selection).values())
    lacking_t1 = len(bold.keys() - t1.keys())
    assert reasons["no file for 't1'"] == lacking_t1


def test_ds000001_is_taken_whole_without_patterns(clone: Callable[[str], Path]) -> None:
    """Every NIfTI of the sixteen subjects stands in a row, under its own name."""
    folder = clone("ds000001")
    niftis = listed(folder, r"(sub-[^/]+)/.*\.nii\.gz")
    selection = select(index_tree(folder, "HEAD"), None)
    found = {
        u: sorted(p for ps in row.values() for p in ps) for u, row in chosen(selection).items()
    }
    assert found == niftis
    assert sorted(selection.images) == sorted(
        ["T1w", "inplaneT2"]
        + [f"task-balloonanalogrisktask_run-0{n}_bold" for n in (1, 2, 3)]
    )  # fmt: skip
