"""What people type for a dataset: one of OpenNeuro, a path, or a mistake.

The ids lead to datasets of the loopback OpenNeuro; mistakes are met before anything is cloned.
"""

from pathlib import Path

import pytest
from faulty import LoopbackOpenNeuro

from tio_openneuro.errors import NotAnAnnexError, TioOpenNeuroError
from tio_openneuro.sources.catalog import open_catalog
from tio_openneuro.sources.install import forget, identify, install

PAGE = "https://openneuro.org/datasets/ds004199"
CODE = "https://github.com/OpenNeuroDatasets/ds004199"


@pytest.mark.parametrize(
    ("source", "version"),
    [
        ("ds4199", None),
        ("DS004199", None),
        (" ds004199\n", None),
        ("ds004199@1.0.0", "1.0.0"),
        (PAGE, None),
        (f"{PAGE}/", None),
        (f"{PAGE}/versions/1.0.6", "1.0.6"),
        (f"{PAGE}/versions/1.0.6/file-display/participants.tsv", "1.0.6"),
        ("openneuro.org/datasets/ds004199", None),
        ("OpenNeuroDatasets/ds004199", None),
        ("///openneuro/ds004199", None),
        (CODE, None),
        (f"{CODE}.git", None),
        (f"{CODE}/tree/1.0.6", "1.0.6"),
        ("10.18112/openneuro.ds004199.v1.0.6", "1.0.6"),
        ("https://doi.org/10.18112/openneuro.ds004199.v1.0.6", "1.0.6"),
    ],
)
def test_an_id_is_known_in_each_of_its_forms(source: str, version: str | None) -> None:
    """All lead to the one clone of the accession, at the version that they name."""
    found, within = identify(source)
    assert (found, within) == (identify("ds004199")[0], version)
    wanted = version or "1.0.6"
    assert identify(source, wanted)[1] == wanted
    if version is not None:
        with pytest.raises(TioOpenNeuroError, match=r"version='2\.0\.0': these are two versions"):
            identify(source, "2.0.0")


@pytest.mark.parametrize(
    "source",
    [
        "git@github.com:OpenNeuroDatasets/ds004199.git",
        "https://github.com/me/ds004199",
        "https://example.org/ds004199.git",
        "file:///data/ds004199",
    ],
)
def test_another_repository_stays_what_it_is(source: str) -> None:
    """A URL of another place, or by another way, is not taken for OpenNeuro's."""
    found, version = identify(source)
    assert found != identify("ds004199")[0]
    assert (getattr(found, "url", ""), version) == (source, None)


def test_a_version_within_the_source_is_the_version(
    openneuro: LoopbackOpenNeuro, root: Path
) -> None:
    """As with ``version=``; what is forgotten is a whole clone, by any of its names."""
    image = "sub-01/anat/sub-01_T1w.nii.gz"
    openneuro.publish("ds900012", {image: b"one" * 99}, tag="1.0.0")
    openneuro.publish("ds900012", {image: b"two" * 99}, tag="1.1.0")
    old = install("ds900012", root, version="1.0.0")
    assert install("ds900012", root).version == "1.1.0"
    assert install("DS900012@1.0.0", root) == old
    page = "https://openneuro.org/datasets/ds900012/versions/1.0.0"
    assert open_catalog(page, root).commit == old.commit
    with pytest.raises(TioOpenNeuroError, match=r"holds all versions\. Leave the version out"):
        forget("ds900012@1.0.0", root, lambda _: 0)
    assert old.path.exists()
    forget("https://github.com/OpenNeuroDatasets/ds900012", root, lambda _: 0)
    assert not old.path.exists()


def test_what_exists_is_a_path(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that lies there is meant, unless it has an accession's exact name."""
    monkeypatch.chdir(tmp_path)
    for name in ("ds4199", "OpenNeuroDatasets/ds004199"):
        Path(name).mkdir(parents=True)
        assert identify(name) == (Path(name), None)
        (Path(name) / "dataset_description.json").touch()
        assert open_catalog(name, root).folder == tmp_path / name


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("./data/ds", ["there is no", "data/ds", "Look at the path"]),
        (
            "/nowhere/ds004199",
            ["there is no /nowhere/ds004199;", "of it / exists.", "give 'ds004199'"],
        ),
        ("~/not-here", ["there is no", "home/not-here"]),
        ("~nobody-at-all/x", ["there is no", "~nobody-at-all/x"]),
        ("data/dataset", ["data exists.", "Look at the path."]),
        ("ds004199/", ["there is no", "For OpenNeuro's own give 'ds004199' alone"]),
        (r"C:\data\ds", ["there is no", "Look at the path"]),
        (Path("ds004199"), ["there is no", "For OpenNeuro's own give 'ds004199' alone"]),
        ("4199", ["no accession", "give 'ds004199' alone"]),
        ("ds-4199", ["no accession", "give 'ds004199' alone"]),
        ("ds00419", ["no accession", "give 'ds000419' alone"]),
        ("ds0041990", ["no accession (like 'ds004199')", "Look at the spelling."]),
        ("", ["no accession (like", "Cannot use ''"]),
        (" ", ["no accession (like", "Cannot use ' '"]),
    ],
)
def test_a_mistake_is_answered_by_its_kind(
    tmp_path: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str | Path,
    words: list[str],
) -> None:
    """A path as a path, by what exists of it; an id by how ids look; nothing is made."""
    (tmp_path / "data" / "datasets").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotAnAnnexError) as caught:
        open_catalog(source, root)
    for word in words:
        assert word in str(caught.value)
    assert ("no accession" in str(caught.value)) is ("no accession" in words[0])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert not root.exists()
