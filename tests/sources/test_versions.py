"""New versions of a dataset in a clone that is there: what is seen, what is said, what is kept."""

import json
import os
from pathlib import Path

import pytest
from conftest import heads
from faulty import LoopbackOpenNeuro
from typer.testing import CliRunner

import tio_openneuro as tno
from tio_openneuro.annex.processes import run
from tio_openneuro.cli.commands import app
from tio_openneuro.disk.engine import Engine
from tio_openneuro.errors import (
    LedgerError,
    NotAnAnnexError,
    RemoteUnavailableError,
    TioOpenNeuroError,
)
from tio_openneuro.sources import open_catalog
from tio_openneuro.sources.clones import remove
from tio_openneuro.sources.install import install

T1 = {"t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz")}


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder as the library does."""
    return run(["git", *arguments], cwd=folder).decode().strip()


def subjects(source: str | Path, version: str | None, root: Path) -> list[str]:
    """Return the subjects that a dataset offers, without a fetch."""
    with tno.DataladSubjectsDataset(source, T1, version=version, root=root) as dataset:
        return [str(subject["subject_id"]) for subject in dataset.dry_iter()]


def disk_bytes(root: Path) -> int:
    """Return the bytes of images that lie under the root."""
    return sum(path.stat().st_size for path in root.rglob("*.nii.gz") if path.is_file())


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
        with Engine(root) as engine:
            assert engine.evict_all() > 0
        assert disk_bytes(root) == 0
        assert subjects(accession, "1.1.0", root) == ["sub-01"]

    @pytest.mark.parametrize("name", ["origin", "upstream"])
    def test_clone_of_a_user_that_has_fetched(
        self, openneuro: LoopbackOpenNeuro, tmp_path: Path, root: Path, name: str
    ) -> None:
        """What the user's own ``git fetch`` brought is read, though git-annex did not merge it."""
        accession = f"ds90045{len(name)}"
        grow(openneuro, accession, 1)
        mine = tmp_path / "mine"
        git(tmp_path, "clone", "-q", "-o", name, openneuro.url(accession), "mine")
        git(mine, "annex", "init", "-q")
        git(mine, "annex", "enableremote", "-q", "s3-PUBLIC")
        openneuro.publish(accession, heads(2), tag="1.2.0")
        git(mine, "fetch", "-q", "--tags", name)
        assert subjects(mine, None, root) == ["sub-01", "sub-02"]
        assert open_catalog(mine, root).version == "1.2.0"


class TestChanges:
    """What a dataset's owners did to it since it was cloned."""

    def test_tag_that_moved_is_said_and_followed(
        self, openneuro: LoopbackOpenNeuro, root: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As in a fresh root; what it was is there still, by its commit, and is named."""
        grow(openneuro, "ds900421", 1)
        first = install("ds900421", root)
        openneuro.publish("ds900421", heads(2), tag="1.2.0")
        bare = openneuro.folder / "git" / "ds900421.git"
        git(bare, "tag", "-f", "1.1.0", "1.2.0")
        new = install("ds900421", root, version="1.2.0")
        assert install("ds900421", root, version="1.1.0").commit == new.commit != first.commit
        assert f"1.1.0, which was {first.commit}, is {new.commit} now" in caplog.text
        git(first.path, "gc", "-q", "--prune=now")
        assert install("ds900421", root, version=first.commit).commit == first.commit
        assert subjects("ds900421", first.commit, root) == ["sub-01"]

    def test_rewritten_and_withdrawn_versions_are_said(
        self, openneuro: LoopbackOpenNeuro, root: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Branch and git-annex branch were forced, a tag was taken back: it is used, and named."""
        grow(openneuro, "ds900422", 1, 2)
        withdrawn = install("ds900422", root, version="1.2.0")
        bare = openneuro.folder / "git" / "ds900422.git"
        git(bare, "tag", "-d", "1.2.0")
        for branch in ("main", "git-annex"):
            again = git(bare, "commit-tree", "-m", "rewritten", f"refs/heads/{branch}^{{tree}}")
            git(bare, "update-ref", f"refs/heads/{branch}", again)
        git(bare, "tag", "2.0.0", "main")
        assert install("ds900422", root, version="2.0.0").version == "2.0.0"
        assert "1.2.0" in caplog.text
        assert "is not there any more" in caplog.text
        assert f"main, which was {withdrawn.commit}" in caplog.text
        assert install("ds900422", root, version="1.2.0").commit == withdrawn.commit
        assert "was withdrawn by its owners" in caplog.text
        assert install("ds900422", root).version == "2.0.0"
        assert subjects("ds900422", "1.2.0", root) == subjects("ds900422", None, root)

    def test_dataset_that_was_taken_down(self, openneuro: LoopbackOpenNeuro, root: Path) -> None:
        """What the clone has goes on to work; what it lacks is refused, with what there is."""
        grow(openneuro, "ds900423", 1)
        install("ds900423", root)
        (openneuro.folder / "git" / "ds900423.git").rename(openneuro.folder / "git" / "gone")
        with pytest.raises(
            RemoteUnavailableError, match=r"no such dataset.*has 1\.1\.0, and works"
        ):
            install("ds900423", root, version="1.2.0")
        assert subjects("ds900423", None, root) == ["sub-01"]

    def test_commit_that_no_tag_leads_to(
        self, openneuro: LoopbackOpenNeuro, root: Path, tmp_path: Path
    ) -> None:
        """A pinned commit is found in a new clone too, as long as the server has it."""
        grow(openneuro, "ds900424", 1)
        pinned = install("ds900424", tmp_path / "other").commit
        bare = openneuro.folder / "git" / "ds900424.git"
        again = git(bare, "commit-tree", "-m", "rewritten", "refs/heads/main^{tree}")
        git(bare, "update-ref", "refs/heads/main", again)
        git(bare, "tag", "-f", "1.1.0", "main")
        assert install("ds900424", root).commit == again
        assert install("ds900424", root, version=pinned).commit == pinned

    def test_clone_that_did_not_ask_for_long_says_so(
        self, openneuro: LoopbackOpenNeuro, root: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A default version may be old; a commit is what it is."""
        found = install("ds900001", root)
        assert "may be old" not in caplog.text
        for name in ("HEAD", "FETCH_HEAD"):
            if (found.path / ".git" / name).exists():
                os.utime(found.path / ".git" / name, (1.7e9, 1.7e9))
        install("ds900001", root, version=found.commit)
        assert "may be old" not in caplog.text
        install("ds900001", root)
        assert "may be old" in caplog.text

    def test_version_that_a_clone_of_the_user_lacks(
        self, openneuro: LoopbackOpenNeuro, root: Path, tmp_path: Path
    ) -> None:
        """Nothing is fetched into it; the message tells what the user can do."""
        git(tmp_path, "clone", "-q", openneuro.url("ds900001"), "mine")
        with pytest.raises(TioOpenNeuroError, match=r"git fetch --tags' in .*mine"):
            install(tmp_path / "mine", root, version="9.9.9")


class TestForget:
    """``tio-openneuro forget``."""

    def forget(self, source: str | Path) -> dict[str, object]:
        """Run the command, and return what it reports."""
        ended = CliRunner().invoke(app, ["forget", str(source), "--json"], catch_exceptions=False)
        assert ended.exit_code == 0, ended.output
        found: dict[str, object] = json.loads(ended.stdout)
        return found

    def rows(self, root: Path) -> int:
        """Return how much the ledger knows."""
        with Engine(root) as engine:
            return len(engine.status().clones)

    def test_clone_of_ours_goes_with_its_rows(
        self, openneuro: LoopbackOpenNeuro, root: Path
    ) -> None:
        """Content, clone and rows; other datasets stay; and it can be cloned anew."""
        grow(openneuro, "ds900431", 1)
        for source in ("ds900001", "ds900431"):
            with tno.DataladSubjectsDataset(source, T1, root=root) as dataset:
                dataset.fetch()
        held = disk_bytes(root / "clones" / "ds900431")
        found = self.forget("ds900431")
        assert (found["removed"], found["dropped_bytes"]) == (True, held)
        assert [p.name for p in (root / "clones").iterdir() if p.is_dir()] == ["ds900001"]
        assert self.rows(root) == 1
        assert subjects("ds900431", None, root) == ["sub-01"]
        with pytest.raises(TioOpenNeuroError, match="no clone of it"):
            self.forget("ds900432")

    def test_clone_that_is_damaged_or_deleted(
        self, openneuro: LoopbackOpenNeuro, root: Path
    ) -> None:
        """Nothing goes where nobody can tell whose it is; what was deleted is not charged on."""
        with tno.DataladSubjectsDataset("ds900001", T1, root=root) as dataset:
            dataset.fetch()
        clone = root / "clones" / "ds900001"
        held = disk_bytes(clone)
        (clone / ".git" / "HEAD").unlink()
        ended = CliRunner().invoke(app, ["forget", "ds900001"])
        assert isinstance(ended.exception, NotAnAnnexError)
        assert "no git repository any more" in str(ended.exception)
        assert (disk_bytes(clone), self.rows(root)) == (held, 1)
        remove(clone)
        found = self.forget("ds900001")
        assert (found["removed"], found["kept"], self.rows(root)) == (True, [], 0)
        with pytest.raises(NotAnAnnexError, match="no clone of it"):
            self.forget("ds900001")

    @pytest.mark.parametrize("what", ["content", "file", "commit", "stash"])
    def test_what_the_user_has_there_stays(
        self, openneuro: LoopbackOpenNeuro, root: Path, what: str
    ) -> None:
        """Content that they fetched, a file, a commit: the clone stays, and says why."""
        with tno.DataladSubjectsDataset("ds900001", T1, root=root) as dataset:
            assert dataset[1].t1.data.numel() > 0
            key = dataset._rows[0].content.files[0].key.name
        clone = root / "clones" / "ds900001"
        if what == "content":
            git(clone, "annex", "get", "-q", "--key", key)
        elif what == "file":
            (clone / "notes.txt").write_text("mine")
        else:
            ref = "refs/stash" if what == "stash" else "refs/heads/mine"
            tree = git(clone, "rev-parse", "main^{tree}")
            git(clone, "update-ref", ref, git(clone, "commit-tree", "-m", "x", tree))
        found = self.forget("ds900001")
        assert found["removed"] is False
        assert len(found["kept"]) == 1
        assert found["dropped_bytes"] > 0
        assert (disk_bytes(clone) > 0) == (what == "content")
        assert self.rows(root) == 0

    def test_clone_of_the_user_is_forgotten_and_not_removed(
        self, openneuro: LoopbackOpenNeuro, root: Path, tmp_path: Path, way: str
    ) -> None:
        """What this library fetched into it goes, and nothing else."""
        git(tmp_path, "clone", "-q", openneuro.url("ds900001"), "mine")
        with tno.DataladSubjectsDataset(tmp_path / "mine", T1) as dataset:
            dataset.fetch()
        head = git(tmp_path / "mine", "rev-parse", "HEAD")
        found = self.forget(tmp_path / "mine")
        assert (found["removed"], found["dropped_bytes"] > 0) == (False, True)
        assert git(tmp_path / "mine", "rev-parse", "HEAD") == head
        assert disk_bytes(tmp_path / "mine/.git/annex") == self.rows(root) == 0
        assert not list((root / "git-annex").iterdir())

    def test_refused_while_another_process_is_at_work(
        self, openneuro: LoopbackOpenNeuro, root: Path
    ) -> None:
        """Nothing is dropped; the message names the process."""
        with tno.DataladSubjectsDataset("ds900001", T1, root=root) as dataset:
            dataset.fetch()
            with pytest.raises(LedgerError, match=f"{os.getpid()} are at work"):
                self.forget("ds900001")
            assert dataset.statistics().used_bytes > 0
            assert dataset[0].t1.data.numel() > 0


def test_entities_select_on_the_command_line(openneuro: LoopbackOpenNeuro) -> None:
    """As globs do; what is neither is wrong usage, said in one line."""
    for image in ("t1:suffix=T1w", "t1:suffix=T1w,subject=01", "t1=sub-01/anat/*_T1w.nii.gz"):
        ended = CliRunner().invoke(app, ["info", "ds900001", "--image", image, "--json"])
        assert json.loads(ended.stdout)["units"] == (6 if image.endswith("T1w") else 1)
    for wrong in ("t1:suffix", "t1:", "t1", ":suffix=T1w", "t1:required=no", "t1:volumes=x"):
        ended = CliRunner().invoke(app, ["info", "ds900001", "--image", wrong])
        assert ended.exit_code == 2, wrong
