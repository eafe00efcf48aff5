"""A ledger that was lost: what lies in our clones is counted, used, and kept until adopted."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from units import units_of

from tio_openneuro.annex.repo import AnnexRepo
from tio_openneuro.content import ContentUnit
from tio_openneuro.disk.engine import Engine
from tio_openneuro.errors import DiskBudgetError, LedgerError


def fetch(engine: Engine, *units: ContentUnit) -> None:
    for unit in units:
        with engine.lease(unit, timeout_s=60):
            pass


def doctor(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Follow the advice of a message."""
    program = "from tio_openneuro.cli import main; main()"
    command = [sys.executable, "-c", program, "doctor", "--root", str(root), *options]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.mark.parametrize("whole", [False, True])
def test_what_lies_in_our_clones_is_counted_again(repo: AnnexRepo, root: Path, whole: bool) -> None:
    """Used and never evicted; more is refused, with an advice that works."""
    first, second, third, *_ = units_of(repo)
    budget_bytes = first.size_bytes + second.size_bytes
    with Engine(root, disk_budget=budget_bytes) as engine:
        fetch(engine, first, second)
    if whole:
        shutil.rmtree(root / "ledger")
    else:
        (root / "ledger" / "ledger.sqlite").write_bytes(b"")
    with Engine(root, disk_budget=budget_bytes) as engine:
        assert engine.statistics().used_bytes == budget_bytes
        assert engine.check() == []
        fetch(engine, first, second)
        assert engine.statistics().fetched_files == 0
        assert engine.evict_all() == 0
        for act in (lambda: fetch(engine, third), lambda: engine.fetch([third])):
            with pytest.raises(DiskBudgetError, match="doctor --repair --adopt"):
                act()
    with Engine(root, disk_budget=budget_bytes - 1) as engine:
        fetch(engine, first)
    told = doctor(root, "--repair", "--adopt")
    assert told.returncode == 0, told
    with Engine(root, disk_budget=budget_bytes) as engine:
        fetch(engine, third)
        assert engine.statistics().used_bytes <= budget_bytes
        assert engine.check() == []
        assert engine.evict_all() > 0
    assert repo.locate(first.files[0].key) is None


def test_adopting_one_dataset_says_whose_its_content_is(repo: AnnexRepo, root: Path) -> None:
    """What no remote has any more stays; the rest is evicted when room is needed."""
    first, second, *_ = units_of(repo)
    with Engine(root, disk_budget="1 MB") as engine:
        fetch(engine, first, second)
    (root / "ledger" / "ledger.sqlite").unlink()
    with Engine(root, disk_budget="1 MB") as engine:
        assert engine.adopt([first]) == first.size_bytes
        assert engine.evict_all() == first.size_bytes
        assert engine.statistics().used_bytes == second.size_bytes


def test_a_ledger_deleted_in_use_is_not_begun_anew_beside_it(repo: AnnexRepo, root: Path) -> None:
    """Neither the process that used it nor another keeps a second one; both say what to do."""
    first, second, *_ = units_of(repo)
    with Engine(root, disk_budget="1 MB") as engine:
        fetch(engine, first)
        shutil.rmtree(root / "ledger")
        with pytest.raises(LedgerError, match="doctor --repair"):
            fetch(engine, second)
        with pytest.raises(LedgerError, match="doctor --repair"):
            Engine(root, disk_budget="1 MB")
        told = doctor(root, "--repair")
        assert told.returncode == 1
        assert "doctor --repair" in told.stderr
    assert doctor(root, "--repair").returncode == 0
    with Engine(root, disk_budget="1 MB") as engine:
        assert engine.statistics().used_bytes == first.size_bytes
        fetch(engine, second)


def test_what_the_user_fetched_before_our_first_use_is_theirs(repo: AnnexRepo, root: Path) -> None:
    """Where no ledger ever was none is lost."""
    unit = units_of(repo)[0]
    repo.get(unit.files[0].key)
    with Engine(root, disk_budget="1 MB") as engine:
        assert engine.statistics().used_bytes == 0
        fetch(engine, unit)
        assert engine.evict_all() == 0
    repo.close()
