"""Whose a file is: ours is what our own transfer made, whatever the user does beside us."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from faulty import Fault, FaultKind, LoopbackOpenNeuro
from units import key_of, units_of
from workers import Nursery

from tio_openneuro.annex.environment import child_environment
from tio_openneuro.annex.repo import AnnexRepo
from tio_openneuro.content import ContentUnit
from tio_openneuro.disk.engine import Engine
from tio_openneuro.disk.store import _LAST_SIGN_NS

pytestmark = pytest.mark.usefixtures("way")
BUDGET = "1 MB"


def user(repo: AnnexRepo, *command: str) -> str:
    """Run git as the clone's user."""
    trusted = "remote.s3-PUBLIC.annex-trustlevel=trusted"
    done = subprocess.run(
        ["git", "-c", trusted, *command],
        cwd=repo.path,
        env=child_environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


def fetch(engine: Engine, unit: ContentUnit) -> None:
    with engine.lease(unit, timeout_s=60):
        pass


def is_the_users(engine: Engine, repo: AnnexRepo, unit: ContentUnit) -> None:
    """Whatever is evicted: the file stays, and is not charged."""
    path = repo.locate(key_of(unit))
    assert path is not None
    before = path.stat()
    assert engine.check() == []
    assert engine.evict([unit]) == engine.evict_all() == 0
    assert engine.statistics().used_bytes == 0
    assert path.stat() == before


def test_what_the_user_fetched_after_dropping_ours_is_theirs(repo: AnnexRepo, root: Path) -> None:
    """Under the same name lies another file: it is neither charged nor dropped."""
    unit, other, *_ = units_of(repo)
    with Engine(root, disk_budget=BUDGET) as engine:
        for once in (unit, other):
            fetch(engine, once)
            user(repo, "annex", "drop", "--key", key_of(once).text)
            user(repo, "annex", "get", "--from", "s3-PUBLIC", "--key", key_of(once).text)
        fetch(engine, unit)
        assert ["replaced" in finding for finding in engine.check()] == [True]
        assert engine.check(repair=True) == []
        is_the_users(engine, repo, unit)
        is_the_users(engine, repo, other)


def test_what_the_user_fetches_beside_our_fetch_is_theirs(
    repo: AnnexRepo, root: Path, openneuro: LoopbackOpenNeuro
) -> None:
    """Their own get is under way when ours begins; whoever ends first, one file is there."""
    unit = units_of(repo)[0]
    openneuro.set_latency(0.3)
    try:
        with Engine(root, disk_budget=BUDGET) as engine:
            theirs = subprocess.Popen(
                ["git", "annex", "get", "-q", "--from", "s3-PUBLIC", "--key", key_of(unit).text],
                cwd=repo.path,
                env=child_environment(),
            )
            partial = repo.path / ".git/annex/tmp" / key_of(unit).name
            while theirs.poll() is None and not partial.exists():
                pass
            fetch(engine, unit)
            assert theirs.wait() == 0
            fetched = engine.statistics().fetched_files
            assert engine.check() == []
            if fetched:
                assert engine.evict_all() == key_of(unit).size_bytes
            else:
                is_the_users(engine, repo, unit)
    finally:
        openneuro.set_latency(0)


def test_git_annex_at_work_on_what_we_hold_leaves_it_ours(repo: AnnexRepo, root: Path) -> None:
    """A check, and a get of what is there already, change nothing; it can still be evicted."""
    unit = units_of(repo)[0]
    with Engine(root, disk_budget=BUDGET) as engine:
        fetch(engine, unit)
        user(repo, "annex", "fsck", "--quiet", "--key", key_of(unit).text)
        user(repo, "annex", "get", "--key", key_of(unit).text)
        assert engine.check() == []
        assert engine.evict_all() == key_of(unit).size_bytes
        assert repo.locate(key_of(unit)) is None


def test_what_the_user_fetched_after_our_death_is_theirs(
    repo: AnnexRepo, root: Path, openneuro: LoopbackOpenNeuro, nursery: Nursery
) -> None:
    """A process dies in mid-fetch, the user fetches the key: it is never dropped.

    In the first tenth of a second after its last sign of life nobody can tell who fetched it.
    """
    unit = units_of(repo)[0]
    openneuro.set_faults(Fault(FaultKind.HANG, at=0.5))
    try:
        with nursery.start(_fetch_in_vain, root, unit) as worker:
            while not list(repo.stored()):
                assert worker.process.is_running()
            worker.kill()
            for child in _holders(repo):
                os.kill(child, 9)
    finally:
        openneuro.clear_faults()
    (lock,) = (root / "ledger" / "owners").glob("*.lock")
    while time.time_ns() - lock.stat().st_atime_ns <= _LAST_SIGN_NS:
        assert lock.exists()
    user(repo, "annex", "get", "--from", "s3-PUBLIC", "--key", key_of(unit).text)
    path = repo.locate(key_of(unit))
    assert path is not None
    with Engine(root, disk_budget=BUDGET) as engine:
        fetch(engine, unit)
        assert engine.evict_all() == 0
        assert path.exists()
        assert engine.check() == []


def _fetch_in_vain(root: Path, unit: ContentUnit) -> None:
    with Engine(root, disk_budget=BUDGET) as engine:
        fetch(engine, unit)


def _holders(repo: AnnexRepo) -> list[int]:
    """Return the git-annex processes at work in the clone."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes()
            if b"annex" in words and (process / "cwd").readlink() == repo.path:
                found.append(int(process.name))
        except OSError:
            continue
    return found


def test_a_folder_that_was_copied_takes_its_files_along(
    repo: AnnexRepo, root: Path, tmp_path: Path
) -> None:
    """Other inodes, the same sizes and times: what was ours is ours in the copy."""
    unit = units_of(repo)[0]
    with Engine(root, disk_budget=BUDGET) as engine:
        fetch(engine, unit)
    elsewhere = tmp_path / "elsewhere"
    subprocess.run(["cp", "-a", str(root), str(elsewhere)], check=True)
    copy = AnnexRepo(elsewhere / "clones" / "ds900001", remotes=repo.remotes)
    with Engine(elsewhere, disk_budget=BUDGET) as engine:
        assert engine.check() == []
        assert engine.evict_all() == key_of(unit).size_bytes
    assert copy.locate(key_of(unit)) is None
    assert repo.locate(key_of(unit)) is not None


def test_a_last_copy_is_not_adopted(
    repo: AnnexRepo, root: Path, openneuro: LoopbackOpenNeuro
) -> None:
    """The records say that the remote has both; it is asked, and answers 404 for one."""
    kept, lost, *_ = units_of(repo)
    for unit in (kept, lost):
        user(repo, "annex", "get", "--from", "s3-PUBLIC", "--key", key_of(unit).text)
    path = repo.locate(key_of(kept))
    assert path is not None
    openneuro.set_faults(Fault(FaultKind.NOT_FOUND, pattern=f"*{kept.name}"))
    try:
        with Engine(root, disk_budget=BUDGET) as engine:
            assert engine.adopt([kept, lost]) == key_of(lost).size_bytes
            assert engine.evict_all() == key_of(lost).size_bytes
    finally:
        openneuro.clear_faults()
    assert path.exists()
