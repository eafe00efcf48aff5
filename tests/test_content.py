"""Annex keys: their names, and where their content lies."""

import os
from pathlib import Path

import pytest

from tio_openneuro.annex.processes import run
from tio_openneuro.content import AnnexKey


@pytest.mark.parametrize(
    ("name", "size_bytes"),
    [
        ("MD5E-s432013312--9f00.nii.gz", 432013312),
        ("SHA256E-s0--e3b0.nii", 0),
        ("URL--http&c%%example.org%a", None),
        ("SHA256E-s10-m1700000000--ab.nii.gz", 10),
    ],
)
def test_key_is_read_from_its_name(name: str, size_bytes: int | None) -> None:
    """The size is what the key states, or None; the name stays whole."""
    key = AnnexKey.parse(name)
    assert key is not None
    assert (key.name, key.size_bytes, key.backend) == (
        name,
        size_bytes,
        name.split("-", maxsplit=1)[0],
    )


@pytest.mark.parametrize("name", ["", "README", "MD5E-s12", "../MD5E-s1--a", "MD5E-s1--a/../../b"])
def test_name_that_is_no_key_is_none(name: str) -> None:
    """Nothing is made of a name without the key's form, or with a folder in it."""
    assert AnnexKey.parse(name) is None


def test_pointer_is_read_from_symlink_and_from_pointer_file() -> None:
    """Locked files are symlinks into the annex, unlocked ones small files that name the key."""
    key = AnnexKey.parse("MD5E-s12--5a.nii.gz")
    target = "../../.git/annex/objects/zV/3Q/MD5E-s12--5a.nii.gz/MD5E-s12--5a.nii.gz"
    assert AnnexKey.from_pointer(target) == key
    assert AnnexKey.from_pointer("/annex/objects/MD5E-s12--5a.nii.gz\n") == key
    assert AnnexKey.from_pointer("../sub-02/anat/MD5E-s12--5a.nii.gz") is None


def test_object_paths_are_where_git_annex_puts_content(tmp_path: Path) -> None:
    """Ordinary clones use mixed-case folders, bare ones lower-case ones."""
    for number in range(5):
        clone, bare = tmp_path / f"clone{number}", tmp_path / f"bare{number}.git"
        run(["git", "init", "-q", str(clone)])
        run(["git", "annex", "init", "-q"], cwd=clone)
        (clone / "scan.nii.gz").write_bytes(os.urandom(20))
        run(["git", "annex", "add", "-q", "scan.nii.gz"], cwd=clone)
        key = AnnexKey.from_pointer(str((clone / "scan.nii.gz").readlink()))
        assert key is not None
        assert (clone / ".git" / key.object_paths()[0]).stat().st_size == 20
        if number == 0:
            run(["git", "commit", "-q", "-m", "Add a scan"], cwd=clone)
            run(["git", "clone", "-q", "--bare", str(clone), str(bare)])
            run(["git", "annex", "init", "-q"], cwd=bare)
            run(["git", "annex", "get", "-q", "--all"], cwd=bare)
            assert (bare / key.object_paths()[1]).stat().st_size == 20
