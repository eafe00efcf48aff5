"""Clones of the user's are not written to, whatever is asked for, but for the content fetched."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import heads
from faulty import Fault, FaultKind, LoopbackOpenNeuro
from hostile import enable_public
from typer.testing import CliRunner

import tio_openneuro as tno
from tio_openneuro.annex.processes import run
from tio_openneuro.cli.commands import app
from tio_openneuro.errors import TioOpenNeuroError

T1 = {"t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz")}
PATTERN = ["--image", "t1=sub-*/anat/*_T1w.nii.gz"]


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder as the library does."""
    return run(["git", *arguments], cwd=folder).decode().strip()


def snapshot(*folders: Path) -> dict[str, object]:
    """Return all that lies in the folders, with its bytes, less the annex's content."""
    found: dict[str, object] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if "/annex/objects" not in path.as_posix():
                link = path.readlink() if path.is_symlink() else None
                data = path.read_bytes() if link is None and path.is_file() else None
                found[str(path)] = (stat.S_IMODE(path.lstat().st_mode), link, data)
    return found


def plain(openneuro: LoopbackOpenNeuro, folder: Path) -> Path:
    """Make what ``git clone`` makes."""
    git(folder, "clone", "-q", openneuro.url("ds900001"), "mine")
    return folder / "mine"


def annexed(openneuro: LoopbackOpenNeuro, folder: Path) -> Path:
    """Make what git-annex makes of it."""
    clone = plain(openneuro, folder)
    git(clone, "annex", "init", "-q", "--no-autoenable", "user")
    enable_public(clone)
    return clone


def adjusted(openneuro: LoopbackOpenNeuro, folder: Path) -> Path:
    """Make a clone on an unlocked branch."""
    clone = annexed(openneuro, folder)
    git(clone, "annex", "adjust", "-q", "--unlock")
    return clone


def worktree(openneuro: LoopbackOpenNeuro, folder: Path) -> Path:
    """Make a linked work tree."""
    git(annexed(openneuro, folder), "worktree", "add", "-q", "--detach", "../linked", "HEAD")
    return folder / "linked"


def submodule(openneuro: LoopbackOpenNeuro, folder: Path) -> Path:
    """Make a superdataset, with the dataset as plain git registers it."""
    (folder / "super").mkdir()
    git(folder / "super", "init", "-q")
    git(folder / "super", "submodule", "--quiet", "add", openneuro.url("ds900001"), "data/mine")
    git(folder / "super", "commit", "-q", "-m", "super")
    return folder / "super" / "data" / "mine"


def bare(openneuro: LoopbackOpenNeuro, folder: Path) -> Path:
    """Make a clone without a work tree."""
    git(folder, "clone", "-q", "--bare", openneuro.url("ds900001"), "bare.git")
    return folder / "bare.git"


def old(openneuro: LoopbackOpenNeuro, folder: Path) -> Path:
    """Make a clone in which git-annex did not merge yet what was fetched."""
    accession = f"ds90044{os.environ['TIO_OPENNEURO_FETCH'] == 'http':d}"
    openneuro.publish(accession, heads(1))
    git(folder, "clone", "-q", openneuro.url(accession), "mine")
    git(folder / "mine", "annex", "init", "-q", "--no-autoenable", "user")
    enable_public(folder / "mine")
    openneuro.publish(accession, heads(6), tag="1.1.0")
    git(folder / "mine", "fetch", "-q")
    return folder / "mine"


def command(*arguments: str) -> dict[str, object]:
    """Run the command line, and return what it reports."""
    ended = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    found: dict[str, object] = json.loads(ended.stdout)
    return found


SHAPES = [plain, annexed, adjusted, worktree, submodule, bare, old]


@pytest.mark.parametrize("make", SHAPES, ids=[shape.__name__ for shape in SHAPES])
def test_no_command_writes_into_a_clone_of_the_user(
    openneuro: LoopbackOpenNeuro,
    tmp_path: Path,
    root: Path,
    way: str,
    make: Callable[[LoopbackOpenNeuro, Path], Path],
) -> None:
    """Refs, settings, journal, logs, work tree: the same bytes after each, but for content."""
    folder = tmp_path / 'the user\'s "é"'
    folder.mkdir()
    clone = make(openneuro, folder)
    status = git(clone, "status", "--porcelain") if make is not bare else ""
    before = snapshot(folder)
    command("info", str(clone), *PATTERN)
    command("plan", str(clone), *PATTERN, "--disk-budget", "1 MB")
    assert not root.exists()
    with tno.DataladSubjectsDataset(clone, T1) as dataset:
        assert snapshot(folder) == before
        assert dataset[0].t1.data.numel() > 0
        assert dataset.fetch() > 0
        used = dataset.statistics().used_bytes
        objects = [p for p in folder.rglob("*.nii.gz") if p.is_file() and not p.is_symlink()]
        held = [p for p in objects if "annex/objects" in p.as_posix()]
        assert sum(p.stat().st_size for p in held) == used > 6 * 9000
        assert dataset.check() == []
    after = {path: what for path, what in snapshot(folder).items() if path in before}
    assert after == before
    assert set(snapshot(folder)) - set(before) <= {f"{p}/annex" for p in folder.rglob("*")} | {
        f"{p}/annex/tmp.tio-openneuro" for p in [clone, *folder.rglob("*")]
    } | {f"{clone}/annex"}
    command("status")
    command("doctor", "--repair")
    assert command("evict")["evicted_bytes"] == used
    assert {path: what for path, what in snapshot(folder).items() if path in before} == before
    assert not [p for p in folder.rglob("annex/objects/**/*.nii.gz") if p.is_file()]
    if make is not bare:
        assert git(clone, "status", "--porcelain") == status
    # What git-annex finds is sound.
    if "annex.uuid" in git(clone, "config", "--list"):
        git(clone, "annex", "fsck", "-q", "--fast")


def test_the_user_goes_on_with_git_annex(
    openneuro: LoopbackOpenNeuro, tmp_path: Path, way: str
) -> None:
    """Content that came into a plain clone is taken over when its user initialises it."""
    clone = plain(openneuro, tmp_path)
    with tno.DataladSubjectsDataset(clone, T1) as dataset:
        assert dataset.fetch() > 0
    git(clone, "annex", "init", "-q", "--no-autoenable")
    here = git(clone, "annex", "find", "--in", "here").splitlines()
    assert [path for path in here if "T1w" in path] == here != []
    git(clone, "annex", "fsck", "-q")
    assert git(clone, "status", "--porcelain") == ""
    with tno.DataladSubjectsDataset(clone, T1, remotes=None) as dataset:
        assert dataset[0].t1.data.numel() > 0


def test_partial_download_of_the_user_is_left_alone(
    openneuro: LoopbackOpenNeuro, tmp_path: Path, way: str
) -> None:
    """What their own interrupted ``git annex get`` left is neither used, counted nor removed."""
    clone = annexed(openneuro, tmp_path)
    key = (clone / "sub-01/anat/sub-01_T1w.nii.gz").readlink().name
    partial = clone / ".git/annex/tmp" / key
    partial.parent.mkdir(exist_ok=True)
    partial.write_bytes(b"theirs")
    with tno.DataladSubjectsDataset(clone, T1) as dataset:
        assert dataset[0].t1.data.numel() > 0
        assert dataset.evict() > 0
        assert dataset.check() == []
    assert partial.read_bytes() == b"theirs"


def test_remote_of_a_plain_clone_may_be_named(tmp_path: Path, root: Path) -> None:
    """A private dataset, cloned by plain git from a relative path, gives its content."""
    data = tmp_path / "data"
    (data / "sub-01").mkdir(parents=True)
    git(data, "init", "-q", "-b", "main")
    git(data, "annex", "init", "-q", "private")
    (data / "sub-01" / "sub-01_T1w.nii.gz").write_bytes(b"private" * 99)
    git(data, "annex", "add", "-q", "sub-01")
    git(data, "commit", "-q", "-m", "first")
    git(tmp_path, "clone", "-q", "data", "mine")
    git(tmp_path / "mine", "remote", "set-url", "origin", "../data")
    before = snapshot(tmp_path / "mine")
    images = {"t1": tno.Scalar("sub-*/*_T1w.nii.gz")}
    with tno.DataladSubjectsDataset(tmp_path / "mine", images, remotes=["origin"]) as dataset:
        assert dataset.fetch() == 99 * 7
        assert dataset.evict() == 99 * 7
    after = snapshot(tmp_path / "mine")
    assert {path: what for path, what in after.items() if path in before} == before
    with pytest.raises(TioOpenNeuroError, match=r"nowhere.*enableremote"):
        tno.DataladSubjectsDataset(tmp_path / "mine", images, remotes=["nowhere"])


class TestFolders:
    """Folders that were there before stay."""

    @pytest.mark.parametrize("source", ["ds999999", "file:///no/such", "no-such", "plain"])
    def test_typing_error_in_the_source_removes_no_folder(
        self, openneuro: LoopbackOpenNeuro, tmp_path: Path, source: str
    ) -> None:
        """An empty folder given as the root stays; one that was made is gone again."""
        (tmp_path / "plain").mkdir()
        root = tmp_path / "empty"
        root.mkdir()
        source = str(tmp_path / source) if source == "plain" else source
        for where in (root, root / "clones", tmp_path / "new" / "deep" / "root"):
            with pytest.raises(TioOpenNeuroError):
                tno.DataladSubjectsDataset(source, T1, root=where)
        assert root.is_dir()
        assert list(root.iterdir()) == []
        assert not (tmp_path / "new").exists()
        (root / "clones").mkdir()
        with pytest.raises(TioOpenNeuroError):
            tno.DataladSubjectsDataset(source, T1, root=root)
        assert (root / "clones").is_dir()


def test_killed_in_the_middle_of_a_fetch(
    openneuro: LoopbackOpenNeuro, tmp_path: Path, way: str
) -> None:
    """What a killed process leaves of a download is charged, taken up, and gone in the end."""
    clone = annexed(openneuro, tmp_path)
    before = snapshot(clone)
    openneuro.set_faults(Fault(FaultKind.HANG, seconds=60, pattern="ds900001/*"))
    code = "import tio_openneuro as tno; "
    code += f"tno.DataladSubjectsDataset({str(clone)!r}, {T1!r}).fetch()".replace(
        "Scalar(", "tno.Scalar("
    )
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    partials = clone / ".git/annex/tmp.tio-openneuro"
    try:
        while not (partials.is_dir() and any(partials.iterdir())):
            assert child.poll() is None
    finally:
        child.kill()
        child.wait()
    openneuro.clear_faults()
    with tno.DataladSubjectsDataset(clone, T1) as dataset:
        left = sum(path.stat().st_size for path in partials.iterdir())
        assert left <= dataset.statistics().used_bytes
        assert dataset.fetch() > 0
        assert dataset.check() == []
    command("evict")
    command("doctor", "--repair")
    assert not any(path.is_file() for path in clone.rglob(".git/annex/**/*.nii.gz"))
    assert {path: what for path, what in snapshot(clone).items() if path in before} == before
