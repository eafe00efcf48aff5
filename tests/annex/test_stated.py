"""What a dataset states of its tree, its branch and its content is counted, not believed.

Each bomb is made with git's own plumbing, small to make and to keep, since it is one content many
times over; ``tests/benchmarks bombs`` shows what refusing each costs.
"""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import heads
from faulty import LoopbackOpenNeuro
from hostile import Repository

from tio_openneuro import bounds
from tio_openneuro.annex.branch import exported_keys, refuse_bombs, special_remotes, version_logs
from tio_openneuro.annex.processes import CommandError, run
from tio_openneuro.annex.repo import AnnexRepo
from tio_openneuro.annex.tree import index_tree, read_blobs
from tio_openneuro.content import AnnexKey
from tio_openneuro.errors import ContentMismatchError, UnsafeDatasetError
from tio_openneuro.loopback import Volume
from tio_openneuro.sources.install import install


@pytest.fixture
def bare(tmp_path: Path) -> Repository:
    """Return a bare repository with nothing in it."""
    return Repository(tmp_path / "ds900650")


class TestTrees:
    """What git says of a commit."""

    @pytest.mark.parametrize("leaf", ["file", "nothing"])
    def test_endless_tree_is_refused_before_it_is_listed(self, bare: Repository, leaf: str) -> None:
        """Ten folders, each of which holds the next ten times, make ten thousand million paths."""
        tree = bare.endless({"x": ("100644", bare.blob(b"x"))} if leaf == "file" else {})
        with pytest.raises(UnsafeDatasetError, match=rf"ds900650.* {bounds.ENTRIES} is the most"):
            index_tree(bare.path, tree)

    def test_long_path_is_refused(self, bare: Repository) -> None:
        """A name of a few kilobytes is none of a file; one of 900 bytes is."""
        blob = bare.blob(b"x")
        assert len(index_tree(bare.path, bare.tree({"n" * 900: ("100644", blob)}))) == 1
        with pytest.raises(UnsafeDatasetError, match=r"ds900650.*bytes in one path"):
            index_tree(bare.path, bare.tree({"n" * 4000: ("100644", blob)}))

    def test_link_blob_is_measured_before_it_is_read(self, bare: Repository) -> None:
        """A link of 100 MB names no file."""
        link = bare.blob(b"a/" * (50 << 20))
        with pytest.raises(UnsafeDatasetError, match=r"ds900650: it has 104857600 bytes"):
            index_tree(bare.path, bare.tree({"l": ("120000", link)}))

    def test_contents_are_measured_together_while_they_come(self, bare: Repository) -> None:
        """The same text a thousand times is as long as all of it."""
        blob = bare.blob(bytes(1 << 20))
        with pytest.raises(UnsafeDatasetError, match=r"1000 files like .* it has 135266304 bytes"):
            list(read_blobs(bare.path, [blob] * 1000))
        with pytest.raises(UnsafeDatasetError, match="it has 1048576 bytes"):
            list(read_blobs(bare.path, [blob], 1000))

    def test_commit_that_git_cannot_stream_costs_git_no_more(self, bare: Repository) -> None:
        """A message of 170 MB is none that git has to hold."""
        tree = bare.tree({"x": ("100644", bare.blob(b"x"))})
        commit = bare.commit(tree, b"m" * (170 << 20))
        with pytest.raises(CommandError, match="attempting to allocate"):
            index_tree(bare.path, commit)

    def test_key_of_an_absurd_size_is_no_key(self) -> None:
        """What no disk and no database could count is not counted."""
        assert AnnexKey.parse(f"MD5E-s{'9' * 6000}--aa.nii.gz") is None
        assert AnnexKey.parse(f"MD5E-s{'9' * 18}--aa.nii.gz") is not None


class TestBranch:
    """What the git-annex branch records."""

    @pytest.mark.parametrize("name", ["remote.log", "uuid.log", "trust.log", "abc/def/K.log"])
    def test_long_log_is_refused_before_git_annex_reads_it(
        self, bare: Repository, name: str
    ) -> None:
        """Of a log that only git-annex reads, too."""
        bare.branch("git-annex", {name: bytes(2 << 20)})
        with pytest.raises(UnsafeDatasetError, match=rf"{name}.*ds900650: it has 2097152 bytes"):
            refuse_bombs(bare.path)
        if name == "remote.log":
            with pytest.raises(UnsafeDatasetError, match="2097152 bytes"):
                special_remotes(bare.path, ["git-annex"])

    def test_many_long_logs_are_refused_together(self, bare: Repository) -> None:
        """Logs of keys are looked up by the ten thousand, and each may be small."""
        blob = bare.blob(b"1s u:V +v#p\n" * 80_000)
        tree = bare.tree({f"K{number}.log.rmet": ("100644", blob) for number in range(400)})
        bare.git("update-ref", "refs/heads/git-annex", bare.commit(tree))
        with pytest.raises(UnsafeDatasetError, match=r"400 files like .*13\d{7} bytes"):
            version_logs(bare.path, ["git-annex"], None)

    def test_many_exported_trees_are_refused(self, bare: Repository) -> None:
        """Each would be indexed."""
        lines = "".join(f"1s u{number}:me {'a' * 40}\n" for number in range(1000))
        bare.branch("git-annex", {"export.log": lines.encode()})
        with pytest.raises(UnsafeDatasetError, match=r"ds900650.* 1000 exported trees"):
            exported_keys(bare.path, ["git-annex"], ["me"])

    def test_tags_in_great_number_are_refused(self, bare: Repository) -> None:
        """Git is ended when it has listed more of them than a dataset could have."""
        commit = bare.commit(bare.tree({"x": ("100644", bare.blob(b"x"))}))
        name = "t" * 240
        refs = "".join(f"{commit} refs/tags/{name}{n:06}\n" for n in range(60_000))
        (bare.path / "packed-refs").write_text(refs)
        with pytest.raises(UnsafeDatasetError, match=rf"ds900650.* {bounds.OUTPUT_BYTES} is the"):
            run(["git", "for-each-ref", "refs/tags"], cwd=bare.path)

    @pytest.mark.parametrize("kind", ["log", "tree"])
    def test_dataset_is_refused_before_git_annex_sees_it(
        self, kind: str, tmp_path: Path, root: Path
    ) -> None:
        """It reads logs whole, and lists what HEAD has. No clone stays."""
        made = Repository(tmp_path / "ds900651")
        made.branch("main", {"dataset_description.json": b"{}"})
        made.branch("git-annex", {"uuid.log": bytes(2 << 20) if kind == "log" else b""})
        if kind == "tree":
            made.git("update-ref", "refs/heads/main", made.commit(made.endless({})))
        with pytest.raises(UnsafeDatasetError, match=r"uuid\.log|files, links and folders"):
            install(made.path.as_uri(), root)
        assert [path for path in (root / "clones").glob("*") if path.is_dir()] == []


@pytest.fixture(scope="session")
def _longer(_published: LoopbackOpenNeuro) -> LoopbackOpenNeuro:
    """Publish ds900652, whose image of 1 MB is followed by 13 more MB on the server."""
    image = next(each for each in heads(1, shape=(96, 80, 70)).values() if isinstance(each, Volume))
    _published.publish("ds900652", {"sub-01/anat/sub-01_T1w.nii.gz": image})
    for folder, _, names in os.walk(_published.folder):
        if folder.endswith("sub-01_T1w.nii.gz@") and "ds900652" in folder:
            with Path(folder, names[0]).open("ab") as file:
                file.write(os.urandom(13 << 20))
    return _published


@pytest.fixture
def longer(
    openneuro: LoopbackOpenNeuro, _longer: LoopbackOpenNeuro, root: Path
) -> Iterator[AnnexRepo]:
    """Return a clone of ds900652."""
    openneuro.set_rate(30e6)
    dataset = install("ds900652", root)
    yield AnnexRepo(dataset.path, remotes=dataset.remotes)
    openneuro.set_rate(None)


def test_transfer_ends_at_the_byte_after_the_stated_size(way: str, longer: AnnexRepo) -> None:
    """Over HTTP and through git-annex, whatever the server sends."""
    files = index_tree(longer.path, "HEAD")
    (key,) = [file.key for file in files if file.key is not None]
    stated_bytes = key.size_bytes or 0
    assert 5e5 < stated_bytes < 2e6
    largest = [0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            held = [each.size_bytes for each in longer.stored()]
            largest[0] = max(largest[0], *held, 0)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with pytest.raises(ContentMismatchError, match="another size or checksum"):
            longer.get(key)
    finally:
        done.set()
        watching.join()
        longer.close()
    assert stated_bytes / 2 < largest[0] < stated_bytes + (1 << 20), way
    assert sum(each.size_bytes for each in longer.stored()) == 0
