"""BIDS names as they are found in real repositories."""

import pytest

from tio_openneuro.select.bids import Sidecars, parse_path, split_extension


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            "sub-01/ses-pre/anat/sub-01_ses-pre_acq-iso_run-02_T1w.nii.gz",
            {"subject": "01", "session": "pre", "acq": "iso", "run": "02", "suffix": "T1w"},
        ),
        (
            "sub-00001/anat/sub-00001_acq-T2sel_FLAIR_roi.nii.gz",
            {"acquisition": "T2sel", "suffix": "roi", "datatype": "anat", "scope": "raw"},
        ),
        (
            "derivatives/manual_masks/sub-0/ses-1/anat/sub-0_ses-1_desc-Lesion_1_mask.nii.gz",
            {"desc": "Lesion", "suffix": "mask", "scope": "derivatives"},
        ),
        (
            "derivatives/tumor_masks/sub-P/anat/sub-P_space_MNI_label-tumor.nii",
            {"label": "tumor", "suffix": "", "extension": ".nii", "pipeline": "tumor_masks"},
        ),
        (
            "derivatives/labels/sub-a/anat/sub-a_T1w_label-SC_seg.nii.gz",
            {"label": "SC", "suffix": "seg"},
        ),
        ("derivatives/sub-a/anat/sub-a_T1w-chi.nii.gz", {"suffix": "T1w-chi", "pipeline": ""}),
        (
            "derivatives/reg/params/sub-X/ses-Y/out_MNI_2_T1_1Warp.nii.gz",
            {"subject": "X", "session": "Y", "pipeline": "reg/params", "suffix": "1Warp"},
        ),
        ("sourcedata/sub-1/sub-1_T1w.nii", {"scope": "other", "pipeline": "sourcedata"}),
        ("tmp_dcm2bids/sub-1/001.nii.gz", {"scope": "other", "subject": "1"}),
        ("more/BIDS/sub-1/anat/deeper/sub-1_T1w.mgz", {"scope": "raw", "datatype": "anat"}),
        ("imagesTr/case_0000.nii.gz", {"subject": "", "suffix": "0000", "datatype": ""}),
    ],
)
def test_path_says_what_its_name_and_folders_say(path: str, expected: dict[str, str]) -> None:
    """Names that the specification allows, and those that labels really have, are split alike."""
    parsed = parse_path(path)
    assert {name: parsed.get(name) for name in expected} == expected
    assert parsed.conflict == ""


def test_name_and_folder_of_two_subjects_are_a_conflict() -> None:
    """A label in another subject's folder (ds005616) says so, and goes by its name."""
    parsed = parse_path("derivatives/labels/sub-amuAM/anat/sub-amuALT_T2w_label-SC_seg.nii.gz")
    assert parsed.subject == "sub-amuALT"
    assert parsed.conflict == "its name says sub-amuALT, its folder sub-amuAM"


@pytest.mark.parametrize(
    ("name", "wanted", "answer"),
    [
        ("run", 2, True),
        ("run", "02", True),
        ("run", "run-2", True),
        ("run", 20, False),
        ("session", "ses-pre", True),
        ("ses", "pre", True),
        ("acq", ["hires", "iso"], True),
        ("acquisition", "is", False),
        ("echo", None, True),
        ("run", None, False),
        ("extension", "nii.gz", True),
        ("scope", "masks", True),
        ("scope", "derivatives", True),
        ("scope", "all", True),
        ("scope", "raw", False),
        ("suffix", "T1w", True),
    ],
)
def test_entity_matches_with_or_without_its_prefix(
    name: str, wanted: object, *, answer: bool
) -> None:
    """Numbers match whatever their zeros, lists any of their values, None what is absent."""
    path = "derivatives/masks/sub-1/ses-pre/anat/sub-1_ses-pre_acq-iso_run-02_T1w.nii.gz"
    assert parse_path(path).matches(name, wanted) is answer


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.nii.gz", ("a", ".nii.gz")),
        ("a_res-0.5_T1w.nii", ("a_res-0.5_T1w", ".nii")),
        ("a.func.gii", ("a", ".func.gii")),
        ("README", ("README", "")),
        (".bidsignore", (".bidsignore", "")),
    ],
)
def test_extension_may_have_two_dots(name: str, parts: tuple[str, str]) -> None:
    """Dots in values stay in the stem; BIDS' own double endings are one extension."""
    assert split_extension(name) == parts


def test_sidecars_are_inherited_from_the_general_to_the_particular() -> None:
    """Those of another session, entity, suffix or folder do not apply."""
    paths = [
        "T1w.json",
        "acq-iso_T1w.json",
        "acq-other_T1w.json",
        "sub-01/sub-01_T1w.json",
        "sub-01/sub-01_ses-2_T1w.json",
        "sub-02/sub-02_T1w.json",
        "sub-01/anat/sub-01_acq-iso_T1w.json",
        "sub-01/anat/sub-01_acq-iso_T1w.nii.gz",
        "sub-01/anat/sub-01_acq-iso_run-1_T1w.json",
        "sub-01/anat/sub-01_T2w.json",
        "task-x_bold.json",
    ]
    assert Sidecars(paths).find("sub-01/anat/sub-01_acq-iso_T1w.nii.gz") == (
        "T1w.json",
        "acq-iso_T1w.json",
        "sub-01/sub-01_T1w.json",
        "sub-01/anat/sub-01_acq-iso_T1w.json",
    )


def test_events_of_a_run_are_found_by_their_own_suffix() -> None:
    """An ``_events.tsv`` stands beside the run that it belongs to, and no other."""
    folder = "sub-01/func/sub-01_task-x"
    events = Sidecars([f"{folder}_run-1_events.tsv", f"{folder}_run-2_events.tsv"], ".tsv")
    found = events.find(f"{folder}_run-2_bold.nii.gz", suffix="events")
    assert found == (f"{folder}_run-2_events.tsv",)
