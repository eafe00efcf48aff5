"""From a source to a clone at a commit: versions, reuse, errors, and hostile repositories."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faulty import LoopbackOpenNeuro

from tio_openneuro.annex.processes import run
from tio_openneuro.annex.repo import AnnexRepo
from tio_openneuro.annex.tree import index_tree
from tio_openneuro.errors import (
    NotAnAnnexError,
    RemoteUnavailableError,
    TioOpenNeuroError,
    UnsafeDatasetError,
)
from tio_openneuro.sources.install import install

IMAGE = "sub-01/anat/sub-01_T1w.nii.gz"
UUID = "0f0f0f0f-1111-4222-8333-444444444444"
PUBLIC = (
    f"{UUID} bucket=openneuro.org encryption=none exporttree=yes host=s3.amazonaws.com "
    "name=s3-PUBLIC publicurl=https://s3.amazonaws.com/openneuro.org type=S3 versioning=yes "
    "timestamp=1700000000s\n"
)


def git(folder: Path, *arguments: str, stdin: bytes = b"") -> str:
    """Run git in a folder as the library does."""
    return run(["git", *arguments], cwd=folder, stdin=stdin).decode().strip()


def clones(root: Path) -> list[str]:
    """Return the names of what lies among the clones, less the locks."""
    return sorted(p.name for p in root.glob("clones/*") if p.suffix != ".lock")


def make_repository(folder: Path, remote_log: str | None, trust_log: str = "") -> str:
    """Make a dataset of one annexed image, and return its file URL.

    Args:
        folder: Where.
        remote_log: What its git-annex branch says of special remotes; None: no such branch.
        trust_log: What the branch says of their trust.
    """
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    (folder / "sub-01.nii.gz").symlink_to(".git/annex/objects/xx/yy/MD5E-s3--ab/MD5E-s3--ab")
    git(folder, "add", "sub-01.nii.gz")
    git(folder, "commit", "-q", "-m", "first")
    if remote_log is not None:
        git(folder, "switch", "-q", "--orphan", "git-annex")
        (folder / "remote.log").write_text(remote_log)
        (folder / "trust.log").write_text(trust_log)
        uuids = {line.split(" ")[0] for line in remote_log.splitlines()}
        descriptions = [f"{uuid} odd timestamp=1700000000s\n" for uuid in sorted(uuids)]
        (folder / "uuid.log").write_text("".join(descriptions))
        git(folder, "add", "remote.log", "trust.log", "uuid.log")
        git(folder, "commit", "-q", "-m", "update")
        git(folder, "switch", "-q", "main")
    return folder.as_uri()


class TestInstall:
    """Clones of ours."""

    def test_accession_becomes_a_clone_of_the_newest_snapshot(
        self, openneuro: LoopbackOpenNeuro, root: Path
    ) -> None:
        """The clone has no work tree, one remote, no record of us, and is known by its tag."""
        found = install("ds900001", root)
        assert (found.dataset_id, found.version) == ("ds900001", "1.0.0")
        assert found.path == root / "clones" / "ds900001"
        assert found.remotes == ("s3-PUBLIC",)
        assert found.commit == git(found.path, "rev-parse", "refs/tags/1.0.0")
        assert [path.name for path in found.path.iterdir()] == [".git"]
        changed = git(found.path, "diff", "--name-only", "origin/git-annex", "git-annex")
        assert changed in {"", "remote.log"}
        assert openneuro.total("ds900001").requests == 0

    def test_second_time_needs_no_network(self, openneuro: LoopbackOpenNeuro, root: Path) -> None:
        """A clone that is there is used without a request, for any version that it has."""
        first = install("ds900001", root)
        openneuro.reset_counters()
        assert install("ds900001", root) == first
        by_commit = install("ds900001", root, version=first.commit[:12])
        assert (by_commit.commit, by_commit.version) == (first.commit, first.commit)
        assert install("ds900001", root, version="main").version == "main"
        assert openneuro.total(area="git").requests == 0

    def test_new_version_is_fetched_when_it_is_asked_for(
        self, openneuro: LoopbackOpenNeuro, root: Path
    ) -> None:
        """A clone follows its dataset only when a version is wanted that it lacks."""
        openneuro.publish("ds900011", {IMAGE: b"one" * 99}, tag="1.0.0")
        first = install("ds900011", root)
        openneuro.publish("ds900011", {IMAGE: b"two" * 99}, tag="1.10.0")
        assert install("ds900011", root).commit == first.commit
        second = install("ds900011", root, version="1.10.0")
        assert second.commit != first.commit
        assert install("ds900011", root).version == "1.10.0"
        assert install("ds900011", root, version="1.0.0").commit == first.commit
        repo = AnnexRepo(second.path, remotes=second.remotes)
        key = next(file.key for file in index_tree(second.path, second.commit) if file.key)
        assert repo.get(key).read_bytes() == b"two" * 99
        repo.close()

    def test_version_that_is_nowhere_is_refused_with_those_that_are(
        self, openneuro: LoopbackOpenNeuro, root: Path
    ) -> None:
        """An unknown version raises one error that lists the tags; options are no versions."""
        for version in ("9.9.9", "--upload-pack=touch odd", "0" * 40):
            with pytest.raises(TioOpenNeuroError, match=r"its tags are 1\.0\.0"):
                install("ds900001", root, version=version)

    @pytest.mark.parametrize("branch", ["master", "trunk"])
    def test_without_a_tag_the_default_branch_is_taken(
        self, tmp_path: Path, root: Path, branch: str
    ) -> None:
        """The branch is the one that origin points at, whatever its name."""
        url = make_repository(tmp_path / "data", PUBLIC)
        git(tmp_path / "data", "branch", "-q", "-m", "main", branch)
        assert install(url, root).version == branch

    def test_newest_tag_goes_by_date_not_by_name(self, tmp_path: Path, root: Path) -> None:
        """A later ``1.0.0`` is newer than an early ``00002``."""
        url = make_repository(tmp_path / "data", PUBLIC)
        git(tmp_path / "data", "tag", "00002")
        environment = {
            **os.environ,
            **{
                f"GIT_{who}_{what}": "t@t"
                for who in ("AUTHOR", "COMMITTER")
                for what in ("NAME", "EMAIL")
            },
            "GIT_COMMITTER_DATE": "2090-01-01T00:00:00Z",
        }
        command = ["git", "commit", "-q", "--allow-empty", "-m", "second"]
        run(command, cwd=tmp_path / "data", environment=environment)
        git(tmp_path / "data", "tag", "1.0.0")
        assert install(url, root).version == "1.0.0"

    def test_many_at_once_make_one_clone(self, openneuro: LoopbackOpenNeuro, root: Path) -> None:
        """Who comes while another clones waits, and uses that clone."""
        gate = threading.Barrier(3)

        def go(_: int) -> Path:
            gate.wait()
            return install("ds900001", root).path

        with ThreadPoolExecutor(3) as pool:
            paths = set(pool.map(go, range(3)))
        assert paths == {root / "clones" / "ds900001"}
        assert clones(root) == ["ds900001"]

    def test_what_a_kill_left_is_cleared(self, openneuro: LoopbackOpenNeuro, root: Path) -> None:
        """Half a clone is no clone: it is removed, write-protected objects and all."""
        half = root / "clones" / ".partial-ds900001-abc" / "clone" / "objects"
        half.mkdir(parents=True)
        (half / "object").touch()
        half.chmod(0o500)
        install("ds900001", root)
        assert clones(root) == ["ds900001"]

    def test_two_sources_of_one_name_are_kept_apart(self, tmp_path: Path, root: Path) -> None:
        """Repositories that share the last part of their URL have clones of their own."""
        for place in ("here", "there"):
            (tmp_path / place).mkdir()
            install(make_repository(tmp_path / place / "data", PUBLIC), root)
        assert [name[:5] for name in clones(root)] == ["data-", "data-"]


class TestErrors:
    """One clear message each, and nothing left behind."""

    def test_unknown_accession(self, openneuro: LoopbackOpenNeuro, root: Path) -> None:
        """An accession that OpenNeuro does not have is said to be unknown."""
        with pytest.raises(RemoteUnavailableError, match=r"ds999999.*no such dataset"):
            install("ds999999", root)
        assert clones(root) == []

    def test_no_network(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a way to the server the network is named, and what works without it."""
        monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
        monkeypatch.setenv("GIT_CONFIG_KEY_0", "url.http://127.0.0.1:9/.insteadOf")
        monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://github.com/")
        with pytest.raises(RemoteUnavailableError, match="cannot be reached"):
            install("ds900001", root)
        assert clones(root) == []

    @pytest.mark.parametrize("scheme", ["http", "git"])
    def test_passwords_are_not_shown(self, root: Path, scheme: str) -> None:
        """A token in a URL does not come back in a message, nor in git's own words."""
        with pytest.raises(RemoteUnavailableError, match="git said") as caught:
            install(f"{scheme}://me:secret@127.0.0.1:9/data.git", root)
        assert "secret" not in str(caught.value)

    def test_sources_that_are_none(self, tmp_path: Path, root: Path) -> None:
        """A plain folder, a plain git repository, a wrong word: each is told what it is."""
        (tmp_path / "plain").mkdir()
        with pytest.raises(NotAnAnnexError, match="not the root of a git repository"):
            install(tmp_path / "plain", root)
        url = make_repository(tmp_path / "git", None)
        with pytest.raises(NotAnAnnexError, match="no git-annex branch"):
            install(url, root)
        with pytest.raises(NotAnAnnexError, match="without a git-annex branch"):
            install(tmp_path / "git", root)
        for word in ("no-such", "ext::sh -c odd", "--upload-pack=odd"):
            with pytest.raises(NotAnAnnexError, match="no accession"):
                install(word, root)
        assert clones(root) == []


class TestHostile:
    """A repository is what a stranger wrote."""

    @pytest.mark.parametrize(
        "fields",
        [
            "type=external externaltype=odd encryption=none name=s3-PUBLIC",
            "type=directory encryption=none name=s3-PUBLIC",
            "type=rsync rsyncurl=odd.example:/ encryption=none name=s3-PUBLIC",
            "type=hook hooktype=odd encryption=none name=s3-PUBLIC",
            PUBLIC.replace("publicurl=https://s3.amazonaws.com", "publicurl=file:///etc"),
            PUBLIC.replace("publicurl=https://s3.amazonaws.com", "publicurl=https://odd.example"),
            PUBLIC.replace("publicurl=https://s3", "publicurl=https://odd.example/s3"),
            PUBLIC.replace("host=s3.amazonaws.com", "host=odd.example"),
            PUBLIC.replace("encryption=none", "encryption=shared cipher=b2Rk"),
            PUBLIC.replace("encryption=none", "encryption=none s3creds=b2Rk"),
            PUBLIC.replace("bucket=openneuro.org", "bucket=other"),
        ],
    )
    def test_public_remote_that_is_another_is_refused(
        self, tmp_path: Path, root: Path, fields: str
    ) -> None:
        """Only OpenNeuro's own bucket passes under the name of its public remote."""
        line = fields if fields.startswith(UUID) else f"{UUID} {fields} timestamp=1700000000s\n"
        url = make_repository(tmp_path / "data", line)
        with pytest.raises(UnsafeDatasetError, match="not OpenNeuro's public bucket"):
            install(url, root)

    def test_no_other_remote_is_enabled_and_no_program_run(
        self, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Remotes that ask to be enabled are not; nothing that the dataset names is started."""
        programs, mark = tmp_path / "programs", tmp_path / "mark"
        programs.mkdir()
        hooks = tmp_path / "template" / "hooks"
        hooks.mkdir(parents=True)
        scripts = [programs / "git-annex-remote-odd"]
        scripts += [
            hooks / name for name in ("post-checkout", "post-merge", "reference-transaction")
        ]
        for script in scripts:
            script.write_text(f"#!/bin/sh\ntouch '{mark}'\n")
            script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("GIT_TEMPLATE_DIR", str(tmp_path / "template"))
        other = UUID.replace("0f", "1f")
        log = PUBLIC + (
            f"{other} autoenable=true encryption=none externaltype=odd name=odd type=external "
            f"timestamp=1700000000s\n"
            f"{other.replace('1f', '2f')} autoenable=true encryption=none externaltype=odd "
            f"name=s3-PUBLIC type=external timestamp=1700000001s\n"
        )
        found = install(make_repository(tmp_path / "data", log), root)
        assert found.remotes == ("s3-PUBLIC",)
        assert sorted(git(found.path, "remote").split()) == ["origin", "s3-PUBLIC"]
        assert git(found.path, "config", "remote.s3-PUBLIC.annex-uuid") == UUID
        assert not mark.exists()

    def test_remote_that_turns_bad_later_is_refused(self, tmp_path: Path, root: Path) -> None:
        """A record that changes in a later version is looked at again."""
        data = tmp_path / "data"
        url = make_repository(data, PUBLIC)
        install(url, root)
        git(data, "switch", "-q", "git-annex")
        bad = PUBLIC.replace("//s3.amazonaws", "//odd").replace("1700000000s", "1800000000s")
        (data / "remote.log").write_text(bad)
        git(data, "commit", "-q", "-a", "-m", "update")
        git(data, "switch", "-q", "main")
        git(data, "tag", "2.0.0")
        with pytest.raises(UnsafeDatasetError, match="not OpenNeuro's public bucket"):
            install(url, root, version="2.0.0")

    def test_dead_remote_is_passed_over(self, tmp_path: Path, root: Path) -> None:
        """A remote that only trust.log calls dead is not used, though it says autoenable."""
        dead = PUBLIC.replace(UUID, UUID.replace("0f", "1f")).replace(
            "encryption", "x=y encryption"
        )
        trust = f"{UUID.replace('0f', '1f')} X timestamp=1700000000s\n"
        found = install(make_repository(tmp_path / "data", dead + PUBLIC, trust), root)
        assert git(found.path, "config", "remote.s3-PUBLIC.annex-uuid") == UUID


class TestClonesOfUsers:
    """Clones that were there before are used where they are."""

    def test_clone_is_used_and_not_changed(
        self, openneuro: LoopbackOpenNeuro, root: Path, tmp_path: Path
    ) -> None:
        """Neither its configuration nor its refs change, and its enabled remotes are used."""
        clone = tmp_path / "mine"
        git(tmp_path, "clone", "-q", openneuro.url("ds900001"), str(clone))
        git(clone, "annex", "init", "-q", "--no-autoenable")
        assert install(clone, root).remotes == ()
        git(clone, "annex", "enableremote", "-q", "s3-PUBLIC")
        before = (clone / ".git/config").read_bytes(), git(clone, "for-each-ref")
        found = install(str(clone), root)
        assert (found.path, found.version) == (clone, "1.0.0")
        assert found.remotes == ("s3-PUBLIC",)
        assert ((clone / ".git/config").read_bytes(), git(clone, "for-each-ref")) == before
        assert not (root / "clones").exists()

    def test_remote_that_the_user_names_is_used(self, tmp_path: Path, root: Path) -> None:
        """A private dataset gives its content from the remote that is named, here its origin."""
        data = tmp_path / "data"
        url = make_repository(data, "")
        git(data, "annex", "init", "-q", "private")
        (data / "sub-02.nii.gz").write_bytes(b"private" * 99)
        git(data, "annex", "add", "-q", "sub-02.nii.gz")
        git(data, "commit", "-q", "-m", "second")
        found = install(url, root, remotes=("origin",))
        assert found.remotes == ("origin",)
        repo = AnnexRepo(found.path, remotes=found.remotes)
        files = {file.path: file for file in index_tree(found.path, found.commit)}
        key = files["sub-02.nii.gz"].key
        assert key is not None
        assert repo.get(key).read_bytes() == b"private" * 99
        repo.drop(key)
        assert repo.locate(key) is None
        repo.close()
        with pytest.raises(TioOpenNeuroError, match="nowhere"):
            install(url, root, remotes=("nowhere",))
