"""The same engine on a real clone of the loopback OpenNeuro, by both ways of fetching."""

import hashlib
import os
import random
import shutil
import threading
from pathlib import Path

import psutil
import pytest
from faulty import Fault, FaultKind, LoopbackOpenNeuro
from workers import Nursery, Observer

from tio_openneuro.annex.repo import AnnexRepo
from tio_openneuro.annex.tree import index_tree
from tio_openneuro.content import ContentFile, ContentUnit
from tio_openneuro.disk.engine import Engine
from tio_openneuro.errors import RemoteUnavailableError
from tio_openneuro.sources.install import install

pytestmark = pytest.mark.usefixtures("way")


@pytest.fixture
def units(openneuro: LoopbackOpenNeuro, root: Path) -> list[ContentUnit]:
    """Return the six subjects of ``ds900001``, each with its image and its label."""
    dataset = install("ds900001", root)
    repo = AnnexRepo(dataset.path, remotes=dataset.remotes)
    subjects: dict[str, list[ContentFile]] = {}
    for file in index_tree(dataset.path, dataset.commit):
        if file.key is not None:
            subject = file.path.partition("/")[0]
            subjects.setdefault(subject, []).append(ContentFile(repo, file.key, file.path))
    return [ContentUnit(name, tuple(files)) for name, files in sorted(subjects.items())]


def read(engine: Engine, unit: ContentUnit) -> None:
    """Lease a unit, and compare its content with the checksums of its keys."""
    with engine.lease(unit, timeout_s=60) as paths:
        for key, path in paths.items():
            digest = hashlib.new(key.backend.removesuffix("E"), path.read_bytes()).hexdigest()
            assert key.name.rpartition("--")[2].startswith(digest)


def test_a_clone_is_kept_within_the_budget(
    openneuro: LoopbackOpenNeuro, root: Path, units: list[ContentUnit], way: str
) -> None:
    """Two passes of two threads through a budget of two subjects: all arrive, none too many."""
    budget_bytes = 2 * max(unit.size_bytes for unit in units)
    repo = units[0].files[0].repo
    with (
        Observer(repo) as observer,
        Engine(root, disk_budget=budget_bytes, jobs=3) as engine,
    ):
        engine.prefetch(units * 2)
        order = iter(units * 2)
        mutex = threading.Lock()
        failures: list[BaseException] = []

        def consume() -> None:
            while True:
                with mutex:
                    unit = next(order, None)
                if unit is None:
                    return
                try:
                    read(engine, unit)
                except BaseException as error:
                    failures.append(error)
                    raise

        threads = [threading.Thread(target=consume) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statistics = engine.statistics()
        assert failures == []
        assert engine.check() == []
    largest = max(unit.size_bytes for unit in units)
    assert largest <= observer.peak_bytes <= budget_bytes
    assert statistics.evicted_files >= 8
    assert statistics.http_files == (statistics.fetched_files if way == "http" else 0)
    assert openneuro.total().bytes >= statistics.fetched_bytes > sum(u.size_bytes for u in units)


def test_content_is_dropped_from_a_clone_that_only_the_ledger_knows(
    root: Path, units: list[ContentUnit]
) -> None:
    """A training on another dataset evicts what an earlier one left, through git-annex."""
    budget_bytes = sum(unit.size_bytes for unit in units[:2])
    with Engine(root, disk_budget=budget_bytes) as engine:
        read(engine, units[0])
        read(engine, units[1])
    with Engine(root, disk_budget=budget_bytes - 1) as engine:
        assert engine.statistics().evicted_files == 1
        assert engine.statistics().used_bytes < budget_bytes
        assert engine.check() == []


def test_evicting_what_another_process_fetched_asks_git_once(
    units: list[ContentUnit], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which remote gives content back is read for all of it, not by git for each file."""
    with Engine(root, disk_budget="1 GB") as engine:
        engine.fetch(units)
    log, real = tmp_path / "git-calls", shutil.which("git")
    shim = tmp_path / "programs" / "git"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\necho "$PPID $*" >> "{log}"\nexec "{real}" "$@"\n')
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}{os.pathsep}{os.environ['PATH']}")
    with Engine(root, disk_budget="1 GB") as again:
        assert again.evict_all() == sum(unit.size_bytes for unit in units)
    calls = [line.split(maxsplit=1) for line in log.read_text().splitlines()]
    ours = [words for pid, words in calls if int(pid) == os.getpid()]
    files = sum(len(unit.files) for unit in units)
    # Refs and which of them contain another, remotes, their log, the versions in two calls; the
    # refs again for git-annex, which merges what was fetched; and the child that drops.
    assert 0 < len(ours) <= 11 < files, ours


def test_a_remote_that_refuses_fails_the_unit_by_name(
    openneuro: LoopbackOpenNeuro, root: Path, units: list[ContentUnit]
) -> None:
    """A 403 is reported with the unit, and neither bytes nor charge are left."""
    openneuro.set_faults(Fault(FaultKind.FORBIDDEN))
    with Engine(root, disk_budget="1 MB") as engine:
        with pytest.raises(RemoteUnavailableError, match="sub-01"):
            read(engine, units[0])
        assert engine.statistics().used_bytes == 0
        openneuro.clear_faults()
        read(engine, units[0])


def train(root: Path, units: list[ContentUnit], budget_bytes: int) -> int:
    """Deliver every unit once; return how many arrived."""
    with Engine(root, disk_budget=budget_bytes, jobs=3) as engine:
        engine.prefetch(units)
        for unit in units:
            read(engine, unit)
    return len(units)


def git_annexes() -> list[psutil.Process]:
    """Return the git-annex processes whose parent is gone."""
    found = []
    for process in psutil.process_iter(["cmdline", "ppid", "environ"]):
        command = " ".join(process.info["cmdline"] or ())
        home = (process.info["environ"] or {}).get("HOME")
        if "annex" in command and process.info["ppid"] == 1 and home == os.environ["HOME"]:
            found.append(process)
    return found


def test_kills_lose_nothing_and_leave_no_git_annex(
    openneuro: LoopbackOpenNeuro, root: Path, nursery: Nursery, units: list[ContentUnit]
) -> None:
    """After kill -9 at any instant the next run goes on, within the budget, without orphans."""
    total_bytes = sum(unit.size_bytes for unit in units)
    openneuro.set_latency(0.02)
    openneuro.set_connection_rate(100_000)
    instants = random.Random(5)
    whole: set[str] = set()
    try:
        with Observer(units[0].files[0].repo) as observer:
            for _ in range(6):
                with nursery.start(train, root, units, total_bytes) as worker:
                    worker.wait(instants.uniform(0.05, 0.8))
                with Engine(root, disk_budget=total_bytes) as engine:
                    assert git_annexes() == []
                    assert engine.check(repair=True) == []
                    stored = [s for s in units[0].files[0].repo.stored() if not s.partial]
                    assert whole <= {each.key_name for each in stored}
                    whole = {each.key_name for each in stored}
                    assert sum(each.size_bytes for each in stored) <= total_bytes
            with nursery.start(train, root, units, total_bytes) as worker:
                assert worker.result() == len(units)
        assert observer.peak_bytes == total_bytes
    finally:
        openneuro.set_latency(0)
        openneuro.set_connection_rate(None)
