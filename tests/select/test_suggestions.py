"""Mistakes in patterns, as a stranger makes them: each has one message with the next step."""

from collections.abc import Callable

import pytest
from test_selection import tree

from tio_openneuro.errors import SelectionError
from tio_openneuro.select.patterns import Label, Scalar
from tio_openneuro.select.selection import select

T1 = r"The nearest that exist: sub-\*/anat/sub-\*_T1w\.nii\.gz \(2\)\.$"
FILES = tree(
    "participants.tsv",
    *(
        f"sub-{n}/{name}"
        for n in ("01", "02")
        for name in (
            f"anat/sub-{n}_T1w.nii.gz",
            f"anat/sub-{n}_acq-iso_FLAIR.nii.gz",
            f"anat/sub-{n}_FLAIR.json",
            f"func/sub-{n}_task-rest_run-01_bold.nii.gz",
        )
    ),
    "derivatives/fmriprep/sub-01/anat/sub-01_desc-brain_mask.nii.gz",
)


@pytest.mark.parametrize(
    ("glob", "words"),
    [
        ("T1w", T1),
        ("_T1w.nii.gz", T1),
        ("sub-01_T1w.nii.gz", T1),
        ("*_T1w.nii.gz", T1),
        ("sub-*/anat/*_t1w.nii.gz", T1),
        ("SUB-*/ANAT/*_T1W.NII.GZ", T1),
        ("sub-*/anat/*_T1w", T1),
        ("sub-*/anat/*_T1w.nii", T1),
        ("sub-*/ses-*/anat/*_T1w.nii.gz", f"{T1[:-3]},"),
        ("sub-*/anat/*_T1.nii.gz", f"{T1[:-3]},"),
        ("/data/ds1/sub-*/anat/*_T1w.nii.gz", T1),
        ("~/ds1/sub-01/anat/sub-01_T1w.nii.gz", T1),
        (r"sub-*\anat\*_T1w.nii.gz", T1),
        (r"C:\data\ds1\sub-01\anat\sub-01_T1w.nii.gz", T1),
        (".*T1w.*", T1),
        ("suffix=T1w", T1),
        ("sub-{01,02}/anat/*_T1w.nii.gz", r"exist: sub-\*/anat/sub-\*_T1w\.nii\.gz \(2\)"),
        ("sub-01/func", r"exist: sub-\*/func/sub-\*_task-rest_run-01_bold\.nii\.gz \(2\)\.$"),
        ("func/", r"exist: sub-\*/func/sub-\*_task-rest_run-01_bold\.nii\.gz \(2\)\.$"),
        ("derivatives", r"exist: derivatives/fmriprep/sub-\*/anat/sub-\*_desc-brain_mask\S* \(1\)"),
        ("*.nii.gz", r"exist: sub-\*/anat/sub-\*_T1w\.nii\.gz \(2\), .*mask"),
        ("xyz", r"Images that exist: sub-\*/anat/sub-\*_T1w\.nii\.gz \(2\), "),
        (
            "sub-*/anat/*.json",
            r"hits 2 files that are no images \(\.json \(2\)\); try \.nii\.gz",
        ),
        ("sub-*/anat", r"exist: sub-\*/anat/sub-\*_T1w\.nii\.gz \(2\), "),
    ],
)
def test_a_glob_that_matches_nothing_is_answered_by_one_that_does(glob: str, words: str) -> None:
    """What exists comes in the form in which it can be typed, and it does match."""
    with pytest.raises(SelectionError, match=words) as caught:
        select(FILES, {"t1": Scalar(glob)})
    assert "\n" not in str(caught.value)
    if words == T1:
        assert len(select(FILES, {"t1": Scalar("sub-*/anat/sub-*_T1w.nii.gz")}).rows) == 2


def said(pattern: Scalar | Label) -> str:
    """Return what is said of a pattern that matches nothing, after what it was."""
    with pytest.raises(SelectionError, match="among 10 files") as caught:
        select(FILES, {"t1": pattern})
    return str(caught.value).partition("among 10 files. ")[2]


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        (Scalar(suffix="t1w"), "suffix='T1w'"),
        (Scalar(suffix="T1w.nii.gz"), "suffix='T1w'"),
        (Scalar(suffix="_T1w"), "suffix='T1w'"),
        (Scalar(suffix="*T1w*"), "suffix='T1w'"),
        (Scalar(suffix="sub-01_T1w"), "suffix='T1w'"),
        (Scalar(suffix=["t1w", "t2w"]), "suffix='T1w'"),
        (Scalar(suffix="FLARE"), "suffix='FLAIR'"),
        (Scalar(acq="T1w"), "suffix='T1w'"),
        (Scalar(contrast="T1w"), "suffix='T1w'"),
        (Scalar(modality="anat"), "datatype='anat'"),
        (Scalar(suffix="anat"), "datatype='anat'"),
        (Scalar(datatype="Anat", suffix="T1w"), "datatype='anat'"),
        (Scalar(task="Rest"), "task='rest'"),
        (Scalar(task="rst"), "task='rest'"),
        (Scalar(tsk="rest"), "task='rest'"),
        (Scalar(task="task-Rest", run=1), "task='rest'"),
        (Scalar(suffix="rest"), "task='rest'"),
        (Label(desc="mask"), "suffix='mask'"),
        (Label(suffix="mask", scope="fMRIPrep"), "pipeline='fmriprep'"),
        (Scalar("sub-*/anat/*", suffix="flair"), "suffix='FLAIR'"),
        (Scalar(extension="nii", suffix="T1w"), "extension='.nii.gz'"),
    ],
)
def test_an_entity_that_nothing_has_is_answered_by_what_it_means(
    pattern: Scalar | Label, meant: str
) -> None:
    """By its value, which stands elsewhere or in another case, and else by its spelling."""
    assert said(pattern).endswith(f" Did you mean {meant}?")
    name, _, value = meant.partition("=")
    assert select(
        FILES, {"x": Scalar(**{name: value.strip("'")}, required=True)}, on_multiple="all"
    )


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (Scalar(suffix="T1w", space="T1"), "No image there has the entity 'space'; they have"),
        (Scalar(suffix="T2w"), "Values of 'suffix' that exist there: T1w (2), FLAIR (2)"),
        (Scalar(suffix="T1map"), "Values of 'suffix' that exist there: "),
        (Scalar(datatype="dwi"), "Values of 'datatype' that exist there: anat (5), func (2)."),
        (Scalar(run=2), "Values of 'run' that exist there: 01 (2)."),
        (Scalar(ses=1), "No image there has the entity 'session'; they have subject (7)"),
        (Scalar(subject="99"), "Values of 'subject' that exist there: 01 (4), 02 (3)."),
        (Scalar(Subject="01"), "has the entity 'Subject'; they have subject (7)"),
    ],
)
def test_a_word_that_bids_knows_is_no_misspelling(pattern: Scalar, words: str) -> None:
    """What is there is told, and nothing is guessed that was not meant."""
    assert words in said(pattern)
    assert "Did you mean" not in said(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        Scalar(suffix="T1w", sub="sub-01"),
        Scalar(suffix="T1w", subject=1),
        Scalar(task="rest", run=1),
        Scalar("./sub-01/anat/*_T1w.nii.gz"),
        Scalar("**/*_T1w.nii.gz"),
        Label(suffix="mask"),
    ],
)
def test_what_is_no_mistake_is_taken(pattern: Scalar | Label) -> None:
    """Prefixes, leading zeros and short names are understood."""
    assert select(FILES, {"x": pattern}).rows


@pytest.mark.parametrize("make", [lambda: Scalar(["a"]), lambda: Scalar("")])
def test_what_is_no_text_is_answered_by_an_example(make: Callable[[], object]) -> None:
    """At once."""
    with pytest.raises(SelectionError, match=r"Give a glob from the dataset's root, 'sub-\*/anat"):
        make()


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (("anat/sub-1_T1w.nii", "anat/sub-1_T2w.nii"), ["sub-1_T1w", "sub-1_T2w"]),
        (("anat/sub-1_T1w.nii", "anat/sub-1_T1w_2.nii"), ["sub-1", "sub-1_2"]),
        (
            ("anat/sub-1_T1w.nii", "anat/sub-1_T1w.nii.gz"),
            ["sub-1_sub-1_T1w.nii", "sub-1_sub-1_T1w.nii.gz"],
        ),
        (("a/sub-1_T1w.nii", "b/sub-1_T1w.nii"), ["sub-1_a", "sub-1_b"]),
        (
            ("anat/sub-1_run-1_T1w.nii", "anat/sub-1_run-2_T1w.nii"),
            ["sub-1_run-1", "sub-1_run-2"],
        ),
    ],
)
def test_units_that_no_entity_tells_apart_are_told_by_file_name(
    paths: tuple[str, str], names: list[str]
) -> None:
    """Not by a number, which says nothing of the file."""
    files = tree(*(f"sub-1/{path}" for path in paths))
    selection = select(files, {"x": Scalar("sub-*/*/*_T*")}, on_multiple="all")
    assert [row.unit for row in selection.rows] == names
    assert [row.images["x"][0].path for row in selection.rows] == [file.path for file in files]
