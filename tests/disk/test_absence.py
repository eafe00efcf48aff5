"""What is not where it was: moved, cut, put aside, under another root; absence is seen."""

import os
import shutil
from pathlib import Path

import pytest
from units import key_of, units_of

from tio_openneuro.annex.environment import child_environment
from tio_openneuro.annex.processes import run
from tio_openneuro.annex.repo import AnnexRepo
from tio_openneuro.content import ContentUnit
from tio_openneuro.disk.engine import Engine
from tio_openneuro.errors import LedgerError, NotAnAnnexError, TioOpenNeuroError
from tio_openneuro.sources.install import install

BUDGET = "1 MB"


def fetch(engine: Engine, *units: ContentUnit) -> Path:
    """Lease units, and return the file of the last one."""
    for unit in units:
        with engine.lease(unit, timeout_s=60) as paths:
            path = paths[key_of(unit)]
    return path


def held_bytes(root: Path) -> int:
    """Return what an outsider counts below a root, git's own objects left out."""
    files = [path for path in root.rglob("*") if "annex" in path.parts and path.is_file()]
    return sum(
        path.stat().st_size for path in files if "objects" in path.parts or "bad" in path.parts
    )


def test_a_root_that_was_moved_knows_what_it_holds(repo: AnnexRepo, root: Path) -> None:
    """All of it is charged still under the new path, and gives way there."""
    units = units_of(repo)
    two_bytes = sum(key_of(unit).size_bytes or 0 for unit in units[:2])
    with Engine(root, disk_budget=two_bytes) as engine:
        fetch(engine, *units[:2])
    moved = root.rename(root.with_name("moved"))
    there = AnnexRepo(moved / "clones" / "ds900001", remotes=repo.remotes)
    with Engine(moved, disk_budget=two_bytes) as engine:
        assert engine.statistics().used_bytes == two_bytes
        assert engine.check() == []
        fetch(engine, *units_of(there)[2:4])
        assert held_bytes(moved) <= two_bytes
        assert engine.check() == []


def test_a_clone_that_is_not_seen_stays_charged(repo: AnnexRepo, root: Path) -> None:
    """Moved away or not mounted, also in mid-training: charged, and said; back, it is used."""
    unit, *_ = units_of(repo)
    size_bytes = key_of(unit).size_bytes
    away = repo.path.with_name("away")
    with Engine(root, disk_budget=BUDGET) as engine:
        fetch(engine, unit)
        for empty in (False, True):
            repo.path.rename(away)
            if empty:
                repo.path.mkdir()
            assert engine.evict_all() == 0
            with pytest.raises(TioOpenNeuroError, match="charged"):
                fetch(engine, unit)
            assert engine.statistics().used_bytes == size_bytes
            assert ["cannot be seen" in finding for finding in engine.check(repair=True)] == [True]
            if empty:
                repo.path.rmdir()
            away.rename(repo.path)
        fetch(engine, unit)
        assert engine.statistics().fetched_files == 1
        assert engine.check() == []


def test_a_clone_elsewhere_that_was_moved_is_known_by_its_folder(
    repo: AnnexRepo, root: Path, tmp_path: Path
) -> None:
    """Opened under its new path, what it holds is charged once, and is evicted from there."""
    unit, other, *_ = units_of(AnnexRepo(repo.path.rename(tmp_path / "mine"), remotes=repo.remotes))
    with Engine(root, disk_budget=BUDGET) as engine:
        fetch(engine, unit)
    moved = AnnexRepo((tmp_path / "mine").rename(tmp_path / "theirs"), remotes=repo.remotes)
    unit, other, *_ = units_of(moved)
    with Engine(root, disk_budget=BUDGET) as engine:
        assert len(engine.check()) == 1
        fetch(engine, other)
        assert engine.check() == []
        held = [key_of(unit).size_bytes or 0, key_of(other).size_bytes or 0]
        assert engine.statistics().used_bytes == sum(held)
        assert engine.evict_all() == sum(held)
    assert moved.locate(key_of(unit)) is None


def test_a_clone_serves_one_root_at_a_time(repo: AnnexRepo, root: Path, tmp_path: Path) -> None:
    """A second root is refused while a process of the first lives; nothing is written there."""
    unit = units_of(repo)[0]
    with Engine(root, disk_budget=BUDGET) as engine, Engine(root, disk_budget=BUDGET) as same:
        fetch(engine, unit)
        fetch(same, unit)
        before = sorted((repo.path / ".git").iterdir())
        with (
            Engine(tmp_path / "second", disk_budget=BUDGET) as other,
            pytest.raises(LedgerError, match="under another root"),
        ):
            fetch(other, unit)
        assert sorted((repo.path / ".git").iterdir()) == before
    with Engine(tmp_path / "second", disk_budget=BUDGET) as other:
        fetch(other, unit)


@pytest.mark.parametrize("how", ["cut", "longer", "rotten", "renamed", "misplaced", "doubled"])
def test_what_is_spoilt_in_our_clone_is_counted_and_fetched_again(
    repo: AnnexRepo, root: Path, how: str
) -> None:
    """Reported exactly, mended by repair; without a repair it never takes room twice."""
    unit = units_of(repo)[0]
    size_bytes = key_of(unit).size_bytes or 0
    with Engine(root, disk_budget=size_bytes) as engine:
        for repair in (True, False):
            path = fetch(engine, unit)
            path.parent.chmod(0o755)
            path.chmod(0o644)
            if how == "cut":
                os.truncate(path, size_bytes // 2)
            elif how == "longer":
                os.truncate(path, size_bytes * 2)
            elif how == "rotten":
                (repo.path / ".git/annex/bad").mkdir(exist_ok=True)
                path.rename(repo.path / ".git/annex/bad" / path.name)
            elif how == "renamed":
                path.rename(path.with_name("another"))
            elif how == "misplaced":
                other = repo.path / ".git" / key_of(unit).object_paths()[1]
                other.parent.mkdir(parents=True, exist_ok=True)
                path.rename(other)
            else:
                other = repo.path / ".git" / key_of(unit).object_paths()[1]
                other.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, other)
            found = engine.check()
            assert len(found) == (how != "misplaced"), found
            assert all(path.name in finding for finding in found)
            if repair:
                assert engine.check(repair=True) == []
                assert held_bytes(root) <= size_bytes
        fetch(engine, unit)
        assert engine.check() == [] or how == "doubled"
        assert engine.check(repair=True) == []
        assert held_bytes(root) == size_bytes == engine.evict_all()
        assert held_bytes(root) == 0


@pytest.mark.parametrize("place", ["{0}", "24/{0}", "zz/zz/{0}/{0}", "zz/zz/zz/zz/{0}", "zz/it"])
def test_what_lies_where_no_key_belongs_is_told_and_cleared_away(
    repo: AnnexRepo, root: Path, place: str
) -> None:
    """Among the objects, at whatever depth, by its own name or none; what belongs there stays."""
    unit, other, *_ = units_of(repo)
    with Engine(root, disk_budget=BUDGET) as engine:
        path = fetch(engine, other, unit)
        stray = path.parents[3] / place.format(path.name)
        stray.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, stray)
        (told,) = engine.check()
        assert f"{path.stat().st_size} bytes of {stray.name}" in told
        assert engine.check(repair=True) == []
        assert held_bytes(root) == engine.statistics().used_bytes == engine.evict_all() > 0


@pytest.mark.parametrize("where", ["config", "branch"])
def test_an_annex_of_a_tuned_layout_is_refused(repo: AnnexRepo, root: Path, where: str) -> None:
    """What lies there would be looked for in the wrong place, and never counted."""
    if where == "config":
        run(["git", "config", "annex.tune.objecthash1", "true"], cwd=repo.path)
    else:
        log = b"1f2f1b4c-0000-4000-8000-000000000000 [ObjectHash1] timestamp=1s\n"
        blob = (
            run(["git", "hash-object", "-w", "--stdin"], cwd=repo.path, stdin=log).decode().strip()
        )
        ref = "refs/heads/git-annex"
        run(["git", "read-tree", "--index-output=.git/tuned", ref], cwd=repo.path)
        index = {**child_environment(), "GIT_INDEX_FILE": ".git/tuned"}
        entry = f"100644,{blob},difference.log"
        run(
            ["git", "update-index", "--add", "--cacheinfo", entry], cwd=repo.path, environment=index
        )
        tree = run(["git", "write-tree"], cwd=repo.path, environment=index).decode().strip()
        name = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
        command = ["git", *name, "commit-tree", "-p", ref, "-m", "tuned", tree]
        commit = run(command, cwd=repo.path).decode().strip()
        run(["git", "update-ref", ref, commit], cwd=repo.path)
    with pytest.raises(NotAnAnnexError, match=r"annex\.tune"):
        install("ds900001", root)
