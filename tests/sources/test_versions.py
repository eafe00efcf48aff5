"""New versions of a dataset in a clone that is there: what is seen, what is said, what is kept."""

from pathlib import Path

import pytest
from conftest import heads
from faulty import LoopbackOpenNeuro

import tio_openneuro as tno
from tio_openneuro.annex.processes import run
from tio_openneuro.sources import open_catalog

T1 = {"t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz")}


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder as the library does."""
    return run(["git", *arguments], cwd=folder).decode().strip()


def subjects(source: str | Path, version: str | None, root: Path) -> list[str]:
    """Return the subjects that a dataset offers, without a fetch."""
    with tno.DataladSubjectsDataset(source, T1, version=version, root=root) as dataset:
        return [str(subject["subject_id"]) for subject in dataset.dry_iter()]


def grow(openneuro: LoopbackOpenNeuro, accession: str, *counts: int) -> None:
    """Publish versions 1.1.0, 1.2.0, … with more subjects each."""
    for number, count in enumerate(counts, 1):
        openneuro.publish(accession, heads(count), tag=f"1.{number}.0")


class TestExistingClone:
    """A clone made when the dataset was younger."""

    def test_new_version_has_the_same_units_as_in_a_fresh_root(
        self, openneuro: LoopbackOpenNeuro, root: Path, tmp_path: Path, way: str
    ) -> None:
        """Before anything is fetched, and in any order of versions; then its content arrives."""
        accession = f"ds90041{way == 'http':d}"
        grow(openneuro, accession, 1)
        assert subjects(accession, "1.1.0", root) == ["sub-01"]
        openneuro.publish(accession, heads(3), tag="1.2.0")
        fresh = subjects(accession, "1.2.0", tmp_path / "fresh")
        assert subjects(accession, "1.2.0", root) == fresh == ["sub-01", "sub-02", "sub-03"]
        with tno.DataladSubjectsDataset(accession, T1, root=root) as dataset:
            assert [s.t1.data.numel() > 0 for s in dataset] == [True] * 3
        assert subjects(accession, "1.1.0", root) == ["sub-01"]

    @pytest.mark.parametrize("name", ["origin", "upstream"])
    def test_clone_of_a_user_that_has_fetched(
        self, openneuro: LoopbackOpenNeuro, tmp_path: Path, root: Path, name: str
    ) -> None:
        """What the user's own ``git fetch`` brought is read, though git-annex did not merge it."""
        accession = f"ds90042{len(name)}"
        grow(openneuro, accession, 1)
        mine = tmp_path / "mine"
        git(tmp_path, "clone", "-q", "-o", name, openneuro.url(accession), "mine")
        git(mine, "annex", "init", "-q")
        git(mine, "annex", "enableremote", "-q", "s3-PUBLIC")
        openneuro.publish(accession, heads(2), tag="1.2.0")
        git(mine, "fetch", "-q", "--tags", name)
        assert subjects(mine, None, root) == ["sub-01", "sub-02"]
        assert open_catalog(mine, root).version == "1.2.0"
