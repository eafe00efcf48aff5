"""Clones as their users have them: used in place, every byte charged, nothing of theirs lost."""

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import heads
from faulty import Fault, FaultKind, LoopbackOpenNeuro
from hostile import enable_public

import tio_openneuro as tno
from tio_openneuro.annex.processes import run
from tio_openneuro.annex.repo import AnnexRepo
from tio_openneuro.annex.tree import index_tree
from tio_openneuro.errors import (
    DiskBudgetError,
    DropRefusedError,
    FetchError,
    RemoteUnavailableError,
)
from tio_openneuro.sources.install import install

T1 = {"t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz")}
IMAGE = "sub-{:02}/anat/sub-{:02}_T1w.nii.gz"


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder as the library does."""
    return run(["git", *arguments], cwd=folder).decode().strip()


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for a clone that the tests copy: making each anew takes seconds."""
    return tmp_path_factory.mktemp("template")


@pytest.fixture
def clone(openneuro: LoopbackOpenNeuro, template: Path, tmp_path: Path) -> Path:
    """Return a user's ordinary clone of ds900001, with OpenNeuro's bucket enabled."""
    first = template / "clone"
    if not first.exists():
        git(template, "clone", "-q", openneuro.url("ds900001"), "clone")
        git(first, "annex", "init", "-q", "--no-autoenable", "user")
        enable_public(first)
    shutil.copytree(first, tmp_path / "mine", symlinks=True)
    return tmp_path / "mine"


def disk_bytes(*folders: Path) -> int:
    """Count the bytes of files that hold content: objects, partials and the work tree."""
    found = {}  # by file: what is renamed during the walk is met under both names
    for folder in folders:
        # Path.rglob raises where a folder goes meanwhile.
        for base, _, names in os.walk(folder):
            inside = Path(base).relative_to(folder).parts
            if inside[:1] != (".git",) or inside[:2] == (".git", "annex"):
                for path in (Path(base, name) for name in names if name.endswith(".gz")):
                    with suppress(FileNotFoundError):
                        status = path.lstat()
                        if stat.S_ISREG(status.st_mode):
                            found[status.st_dev, status.st_ino] = status.st_size
    return sum(found.values())


def charged(dataset: tno.DataladSubjectsDataset) -> int:
    """Return the bytes that the ledger charges."""
    return dataset.statistics().used_bytes


def use(source: Path, **options: object) -> None:
    """Load, compare what is charged with what came to lie on the disk, and evict all of it."""
    before = disk_bytes(source)
    with tno.DataladSubjectsDataset(source, T1, **options) as dataset:
        for index in range(2):
            assert dataset[index].t1.data.numel() > 0
            assert disk_bytes(source) - before <= charged(dataset)
        assert dataset.fetch() > 0
        assert disk_bytes(source) - before <= charged(dataset)
        assert dataset.check() == []
        assert dataset.evict() > 0
        assert charged(dataset) == 0
    assert disk_bytes(source) == before


class TestOrdinary:
    """A clone with its content locked, as git-annex makes it."""

    def test_content_that_was_there_is_neither_counted_nor_dropped(self, clone: Path) -> None:
        """Until it is adopted: then it counts, and goes where a remote can give it back."""
        git(clone, "annex", "get", "-q", IMAGE.format(1, 1))
        size = (clone / IMAGE.format(1, 1)).stat().st_size
        status = git(clone, "status", "--porcelain")
        with tno.DataladSubjectsDataset(clone, T1) as dataset:
            assert dataset[0].t1.data.numel() > 0
            assert charged(dataset) == 0
            assert dataset[1].t1.data.numel() > 0
            assert charged(dataset) == dataset._rows[1].content.size_bytes
            dataset.evict()
            assert (clone / IMAGE.format(1, 1)).stat().st_size == size
            assert charged(dataset) == 0
            assert dataset.adopt() == size == charged(dataset)
            assert dataset.evict() == size
            assert not (clone / IMAGE.format(1, 1)).exists()
            assert charged(dataset) == 0
        assert git(clone, "status", "--porcelain") == status

    def test_content_that_nobody_else_has_is_never_dropped(self, clone: Path) -> None:
        """Adopted or not: what no remote was given stays, and the reason is told."""
        path = clone / IMAGE.format(9, 9)
        path.parent.mkdir(parents=True)
        template = clone / IMAGE.format(1, 1)
        git(clone, "annex", "get", "-q", IMAGE.format(1, 1))
        path.write_bytes(template.read_bytes() + b"mine")
        git(clone, "annex", "add", "-q", IMAGE.format(9, 9))
        git(clone, "commit", "-q", "-m", "mine")
        commit = git(clone, "rev-parse", "HEAD")
        with tno.DataladSubjectsDataset(clone, T1, version=commit) as dataset:
            assert "sub-09" in [row.subject["subject_id"] for row in dataset._rows]
            dataset.fetch()
            dataset.adopt()
            dataset.evict()
            assert path.read_bytes().endswith(b"mine")
            assert not template.exists()
            file = next(
                file
                for row in dataset._rows
                for file in row.content.files
                if file.path == IMAGE.format(9, 9)
            )
            with pytest.raises(DropRefusedError, match="stays"):
                file.repo.drop(file.key)
        assert path.read_bytes().endswith(b"mine")

    def test_budget_holds_beside_content_of_the_user(self, clone: Path) -> None:
        """The budget is of what this library fetches; what the user has is beside it."""
        git(clone, "annex", "get", "-q", "sub-01", "sub-02")
        before = disk_bytes(clone)
        with tno.DataladSubjectsDataset(clone, T1) as probe:
            budget = max(row.content.size_bytes for row in probe._rows)
        with tno.DataladSubjectsDataset(clone, T1, disk_budget=budget) as dataset:
            for _ in dataset:
                assert disk_bytes(clone) - before <= budget
            assert dataset.statistics().evicted_files > 0
            dataset.evict()
        with pytest.raises(DiskBudgetError):
            tno.DataladSubjectsDataset(clone, T1, disk_budget=budget // 2)


class TestUnlocked:
    """Where content in the work tree is a second copy, which no fetch may make."""

    def test_unlocked_files(self, clone: Path) -> None:
        """Present unlocked content is the user's; fetched content lies in the annex alone."""
        git(clone, "annex", "get", "-q", IMAGE.format(1, 1))
        git(clone, "annex", "unlock", "-q", IMAGE.format(1, 1), IMAGE.format(2, 2))
        git(clone, "commit", "-q", "-m", "unlocked")
        commit = git(clone, "rev-parse", "HEAD")
        pointer = (clone / IMAGE.format(2, 2)).read_bytes()
        assert pointer.startswith(b"/annex/objects/")
        own = (clone / IMAGE.format(1, 1)).read_bytes()
        use(clone, version=commit)
        assert (clone / IMAGE.format(2, 2)).read_bytes() == pointer
        assert (clone / IMAGE.format(1, 1)).read_bytes() == own

    def test_adjusted_branch(self, clone: Path) -> None:
        """An adjusted, unlocked branch keeps its pointers, whatever is fetched and dropped."""
        git(clone, "annex", "adjust", "-q", "--unlock")
        assert git(clone, "branch", "--show-current").startswith("adjusted/")
        pointer = (clone / IMAGE.format(2, 2)).read_bytes()
        assert pointer.startswith(b"/annex/objects/")
        use(clone)
        use(clone, version=git(clone, "rev-parse", "HEAD"))
        assert (clone / IMAGE.format(2, 2)).read_bytes() == pointer

    def test_adopted_unlocked_content_is_charged_with_its_second_copy(self, clone: Path) -> None:
        """What adopting charges, or leaves alone, is never less than what evicting frees."""
        git(clone, "annex", "adjust", "-q", "--unlock")
        git(clone, "annex", "get", "-q", IMAGE.format(1, 1))
        before = disk_bytes(clone)
        with tno.DataladSubjectsDataset(clone, T1) as dataset:
            adopted = dataset.adopt()
            freed = dataset.evict()
            assert freed <= adopted
            assert charged(dataset) == adopted - freed
            assert before - disk_bytes(clone) >= freed
            assert dataset[0].t1.data.numel() > 0
            assert dataset.check() == []


def mounted(folder: Path, *options: str) -> bool:
    """Mount something; say whether this machine lets us."""
    folder.mkdir()
    if os.name == "nt" or shutil.which("mount") is None:
        return False
    command = ["mount", *options, str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a file system of its own."""
    folder = tmp_path / "other"
    if not mounted(folder, "-t", "tmpfs", "-o", "size=64m", "tmpfs"):
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def fat_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a file system that has neither links nor modes."""
    image, folder = tmp_path / "fat.img", tmp_path / "fat"
    make = shutil.which("mkfs.vfat", path=f"{os.environ['PATH']}:/sbin:/usr/sbin")
    if make is None:
        pytest.skip("needs mkfs.vfat")
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run([make, str(image)], check=True, capture_output=True)
    if not mounted(folder, "-t", "vfat", "-o", "loop", str(image)):
        pytest.skip("needs the right to mount a vfat image, and a kernel that has vfat")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


class TestFileSystems:
    """Clones on file systems other than the root's, and of fewer abilities."""

    def test_other_file_system_than_the_root(self, clone: Path, other_disk: Path) -> None:
        """The ledger lies under the root, and the content where the clone is."""
        there = other_disk / "clone"
        shutil.copytree(clone, there, symlinks=True)
        use(there, disk_budget="50 MB")

    def test_file_system_without_links(
        self, openneuro: LoopbackOpenNeuro, fat_disk: Path, root: Path
    ) -> None:
        """On vfat git-annex itself makes an adjusted, unlocked branch."""
        there = fat_disk / "clone"
        git(fat_disk, "clone", "-q", openneuro.url("ds900001"), "clone")
        git(there, "annex", "init", "-q", "--no-autoenable")
        enable_public(there)
        use(there, disk_budget="50 MB")

    def test_clone_that_is_treated_as_on_a_poor_file_system(
        self, openneuro: LoopbackOpenNeuro, tmp_path: Path
    ) -> None:
        """``annex.crippledfilesystem`` and no links: what Windows and exFAT look like."""
        there = tmp_path / "poor"
        git(tmp_path, "clone", "-q", "-c", "core.symlinks=false", openneuro.url("ds900001"), "poor")
        git(there, "config", "annex.crippledfilesystem", "true")
        git(there, "annex", "init", "-q", "--no-autoenable")
        enable_public(there)
        git(there, "annex", "adjust", "-q", "--unlock")
        assert not (there / IMAGE.format(1, 1)).is_symlink()
        use(there)

    def test_read_only_clone(self, clone: Path, tmp_path: Path) -> None:
        """What it holds can be used; fetching names the clone and the reason; nothing hangs."""
        git(clone, "annex", "get", "-q", IMAGE.format(1, 1))
        view = tmp_path / "view"
        if not mounted(view, "--bind", str(clone)):
            pytest.skip("needs the right to mount")
        try:
            command = ["mount", "-o", "remount,ro,bind", str(view)]
            subprocess.run(command, check=True, capture_output=True)
            with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
                (view / "new").touch()
            with tno.DataladSubjectsDataset(view, T1) as dataset:
                assert dataset[0].t1.data.numel() > 0
                with pytest.raises(FetchError, match="cannot be written to"):
                    dataset[1]
                assert charged(dataset) == 0
        finally:
            subprocess.run(["umount", "-l", str(view)], check=True)


class TestShapes:
    """Clones that are laid out otherwise."""

    def test_clone_that_plain_git_made(self, openneuro: LoopbackOpenNeuro, tmp_path: Path) -> None:
        """Content goes into it; it stays what plain git made, with no remote enabled."""
        git(tmp_path, "clone", "-q", openneuro.url("ds900001"), "plain")
        plain = tmp_path / "plain"
        before = (plain / ".git/config").read_bytes(), git(plain, "for-each-ref")
        with tno.DataladSubjectsDataset(plain, T1) as dataset:
            assert dataset[0].t1.data.numel() > 0
            assert disk_bytes(plain) == charged(dataset) > 0
        assert ((plain / ".git/config").read_bytes(), git(plain, "for-each-ref")) == before

    def test_clone_that_cannot_take_content(
        self, openneuro: LoopbackOpenNeuro, tmp_path: Path, way: str
    ) -> None:
        """It can be looked at; a fetch names the file that is in the way."""
        git(tmp_path, "clone", "-q", openneuro.url("ds900001"), "plain")
        (tmp_path / "plain/.git/annex").write_text("in the way")
        with (
            tno.DataladSubjectsDataset(tmp_path / "plain", T1) as dataset,
            pytest.raises(FetchError, match=r"plain/\.git/annex"),
        ):
            dataset[0]

    def test_linked_worktree(self, clone: Path, tmp_path: Path) -> None:
        """Content goes into the common annex, and is found there by the main clone."""
        linked = tmp_path / "linked"
        git(clone, "worktree", "add", "-q", "--detach", str(linked), "HEAD")
        before = disk_bytes(clone)
        with tno.DataladSubjectsDataset(linked, T1) as dataset:
            assert dataset[0].t1.data.numel() > 0
            assert disk_bytes(clone) - before == charged(dataset) > 0
            assert dataset.evict() > 0
            assert dataset.check() == []
        assert disk_bytes(clone) == before

    def test_bare_clone(self, openneuro: LoopbackOpenNeuro, tmp_path: Path) -> None:
        """Without a work tree, everything works by key."""
        git(tmp_path, "clone", "-q", "--bare", openneuro.url("ds900001"), "bare.git")
        bare = tmp_path / "bare.git"
        git(bare, "annex", "init", "-q", "--no-autoenable")
        enable_public(bare)
        with tno.DataladSubjectsDataset(bare, T1) as dataset:
            assert dataset[0].t1.data.numel() > 0
            held = sum(
                p.stat().st_size for p in (bare / "annex/objects").rglob("*.gz") if p.is_file()
            )
            assert held == charged(dataset) > 0
            assert dataset.evict() == held
            assert dataset.check() == []


class TestVersions:
    """Several S3 versions on record for one key."""

    def test_expired_version_gives_way_to_the_next_on_record(
        self, openneuro: LoopbackOpenNeuro, root: Path
    ) -> None:
        """Where one version is gone (404, 403), the others are asked, and the content arrives."""
        files = heads(2)
        image = files[IMAGE.format(1, 1)]
        openneuro.publish("ds900701", {IMAGE.format(1, 1): image})
        replaced = {IMAGE.format(1, 1): files[IMAGE.format(2, 2)], IMAGE.format(3, 3): image}
        openneuro.publish("ds900701", replaced, tag="1.0.1")
        installed = install("ds900701", root)
        repo = AnnexRepo(installed.path, remotes=installed.remotes)
        tree = index_tree(installed.path, installed.commit)
        key = next(file.key for file in tree if file.path == IMAGE.format(3, 3))
        assert key is not None
        for gone in (1, 3):
            for kind in (FaultKind.NOT_FOUND, FaultKind.FORBIDDEN):
                openneuro.set_faults(Fault(kind, pattern=f"ds900701/{IMAGE.format(gone, gone)}"))
                assert repo.get(key).stat().st_size == key.size_bytes
                repo.drop(key)
        openneuro.set_faults(Fault(FaultKind.NOT_FOUND, pattern="ds900701/*"))
        with pytest.raises(RemoteUnavailableError, match="404"):
            repo.get(key)
        repo.close()
