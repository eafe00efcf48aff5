"""Several processes on one root: one budget, one fetch per key, and deaths at any instant."""

import itertools
import os
import random
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from fakes import FakeRepo, content_of, make_unit
from workers import Nursery, Observer, Worker

from tio_openneuro.content import ContentUnit
from tio_openneuro.disk.engine import Engine
from tio_openneuro.errors import DiskBudgetError


def make_units(repo: FakeRepo, count: int, sizes: Sequence[int]) -> list[ContentUnit]:
    """Return units of two files whose sizes go round."""
    return [
        make_unit(repo, f"sub-{n}", sizes[n % len(sizes)], sizes[n % len(sizes)] // 4)
        for n in range(count)
    ]


def train(
    root: Path, units: list[ContentUnit], budget_bytes: int, threads: int, seed: int, ahead: bool
) -> tuple[int, int]:
    """Deliver every unit once, in an order of its own; return units delivered, files evicted."""
    order = random.Random(seed).sample(units, len(units))
    delivered: list[str] = []
    with Engine(root, disk_budget=budget_bytes, jobs=4, open_repo=FakeRepo.reopen) as engine:
        if ahead:
            engine.prefetch(order)
        shared = iter(order)
        mutex = threading.Lock()

        def consume() -> None:
            while True:
                with mutex:
                    unit = next(shared, None)
                if unit is None:
                    return
                with engine.lease(unit, timeout_s=60) as paths:
                    for key, path in paths.items():
                        if path.read_bytes() != content_of(key):
                            return
                engine.release(unit, drop=False)
                delivered.append(unit.name)

        consumers = [threading.Thread(target=consume) for _ in range(threads)]
        for thread in consumers:
            thread.start()
        for thread in consumers:
            thread.join()
        return len(set(delivered)), engine.statistics().evicted_files


EQUAL = (80_000,)
TEN_TO_ONE = (80_000, 8_000, 20_000)
GRID = list(itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16), (EQUAL, TEN_TO_ONE), (True, False)))
QUICK = [
    (1, 1, EQUAL, True),
    (2, 1, TEN_TO_ONE, True),
    (2, 4, TEN_TO_ONE, True),
    (4, 2, EQUAL, False),
    (8, 1, TEN_TO_ONE, True),
]


@dataclass(frozen=True)
class Cell:
    """What one cell of the grid came to: the observer's peak, the budget, units delivered."""

    peak_bytes: int
    budget_bytes: int
    delivered: int


def run_cell(
    nursery: Nursery,
    root: Path,
    processes: int,
    budget_units: int,
    sizes: tuple[int, ...],
    *,
    ahead: bool,
) -> Cell:
    """Let processes of four threads share a budget, watched from outside."""
    repo = FakeRepo(root / "clones" / "ds1", chunk_pause_s=0.001)
    units = make_units(repo, 24, sizes)
    largest = max(unit.size_bytes for unit in units)
    budget_bytes = budget_units * largest
    total_bytes = sum(unit.size_bytes for unit in units)
    with Observer(repo) as observer:
        workers = [
            nursery.start(train, root, units, budget_bytes, 4, seed, ahead)
            for seed in range(processes)
        ]
        results = [worker.result() for worker in workers]
    assert [delivered for delivered, _ in results] == [len(units)] * processes
    assert repo.noted("violations") == []
    assert largest <= observer.peak_bytes <= budget_bytes
    with Engine(root, disk_budget=budget_bytes, open_repo=FakeRepo.reopen) as engine:
        statistics = engine.statistics()
        assert engine.check() == []
        assert repo.held_bytes() == statistics.used_bytes
        assert statistics.peak_bytes <= budget_bytes
    if total_bytes > budget_bytes:
        assert sum(evicted for _, evicted in results) * largest >= total_bytes - budget_bytes
    else:
        assert max(repo.fetches().values()) == 1
    delivered = sum(delivered for delivered, _ in results)
    return Cell(observer.peak_bytes, budget_bytes, delivered)


@pytest.mark.parametrize(("processes", "budget_units", "sizes", "ahead"), QUICK)
def test_the_budget_holds(
    nursery: Nursery,
    root: Path,
    processes: int,
    budget_units: int,
    sizes: tuple[int, ...],
    ahead: bool,
) -> None:
    """Held bytes stay within the budget as seen from outside, and every unit arrives."""
    run_cell(nursery, root, processes, budget_units, sizes, ahead=ahead)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "budget_units", "sizes", "ahead"), GRID)
def test_the_budget_holds_everywhere(
    nursery: Nursery,
    root: Path,
    processes: int,
    budget_units: int,
    sizes: tuple[int, ...],
    ahead: bool,
) -> None:
    """The same for every number of processes, budget and mix of sizes."""
    run_cell(nursery, root, processes, budget_units, sizes, ahead=ahead)


def test_a_disk_of_the_budgets_size_is_never_full(nursery: Nursery, tmp_path: Path) -> None:
    """On a file system that holds the budget and no page more, no write fails."""
    disk = tmp_path / "disk"
    disk.mkdir()
    units = make_units(FakeRepo(tmp_path / "size-only"), 12, (4 * 65_536,))
    budget_bytes = units[0].size_bytes
    # A page for each file of locks and logs that the fake keeps beside the content.
    options = f"size={budget_bytes + 8 * 4096}"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        units = make_units(FakeRepo(disk / "ds1", chunk_pause_s=0.001), 12, (4 * 65_536,))
        root = tmp_path / "root"
        workers = [
            nursery.start(train, root, units, budget_bytes, 4, seed, True) for seed in range(2)
        ]
        assert [worker.result()[0] for worker in workers] == [12, 12]
        with Engine(root, disk_budget=budget_bytes, open_repo=FakeRepo.reopen) as engine:
            assert engine.evict(units) == budget_bytes
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def kill_at_random(
    nursery: Nursery, root: Path, budget_units: int, rounds: int, seed: int
) -> FakeRepo:
    """Kill a training again and again, and look after each death."""
    repo = FakeRepo(root / "clones" / "ds1", chunk_pause_s=0.004)
    units = make_units(repo, 24, TEN_TO_ONE)
    budget_bytes = budget_units * max(unit.size_bytes for unit in units)
    instants = random.Random(seed)
    with Observer(repo) as observer:
        for _ in range(rounds):
            with nursery.start(train, root, units, budget_bytes, 4, seed, True) as worker:
                worker.wait(instants.uniform(0.01, 0.4))
                worker.kill()
            with Engine(root, disk_budget=budget_bytes, open_repo=FakeRepo.reopen) as engine:
                assert repo.held_bytes() <= engine.statistics().used_bytes <= budget_bytes
                assert engine.check(repair=True) == []
                assert len(list((root / "ledger" / "owners").iterdir())) == 1
        with nursery.start(train, root, units, budget_bytes, 4, seed, True) as worker:
            assert worker.result()[0] == len(units)
    assert observer.peak_bytes <= budget_bytes
    assert repo.noted("violations") == []
    return repo


def test_a_killed_training_loses_nothing_that_was_complete(nursery: Nursery, root: Path) -> None:
    """With room for all, no content that had arrived is fetched again after kill -9."""
    repo = kill_at_random(nursery, root, 24, rounds=6, seed=1)
    assert max(repo.fetches().values()) == 1


def test_a_killed_training_stays_within_its_budget(nursery: Nursery, root: Path) -> None:
    """Whatever kill -9 leaves is counted, and the next run goes on with it."""
    kill_at_random(nursery, root, 2, rounds=6, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_training_killed_a_hundred_times(nursery: Nursery, root: Path, seed: int) -> None:
    """The same, for long."""
    kill_at_random(nursery, root, 1 + seed, rounds=30, seed=seed)


class ChildRepo(FakeRepo):
    """A clone whose downloads are in the hands of a child that outlives the process."""

    def get(self, key, *, owner_fd=None, cancelled=None, made=None):  # type: ignore[no-untyped-def]
        """Start a child that inherits the owner's lock, and hang."""
        child = subprocess.Popen(
            [sys.executable, "-c", "import signal; print(1, flush=True); signal.pause()"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(owner_fd,),
            start_new_session=True,
        )
        child.stdout.readline()
        self.partial_path(key).write_bytes(content_of(key)[:100])
        self.note("children", str(child.pid))
        child.wait()


def hang(root: Path, unit: ContentUnit) -> None:
    """Lease a unit that never arrives."""
    with (
        Engine(root, disk_budget=10_000, open_repo=FakeRepo.reopen) as engine,
        engine.lease(unit),
    ):
        pass


def noted_child(repo: FakeRepo, worker: Worker) -> psutil.Process:
    """Wait for the child that a process starts."""
    while not repo.noted("children"):
        assert worker.process.is_running()
        threading.Event().wait(0.01)
    return psutil.Process(int(repo.noted("children")[0]))


def test_orphaned_children_are_ended_before_their_room_is_given_back(
    nursery: Nursery, root: Path
) -> None:
    """A download that outlives its process counts, is ended, and is then resumed by the next."""
    repo = ChildRepo(root / "clones" / "ds1")
    unit = make_unit(repo, "sub-1", 4000)
    with nursery.start(hang, root, unit) as worker:
        child = noted_child(repo, worker)
        with Engine(root, disk_budget=10_000, open_repo=FakeRepo.reopen) as engine:
            assert engine._here().ledger.reap() == []
            assert child.is_running()
        worker.kill()
        assert child.is_running()
        with Engine(root, disk_budget=10_000, open_repo=FakeRepo.reopen) as engine:
            assert not child.is_running()
            assert engine.statistics().used_bytes == 4000
            assert engine.check() == []
            plain = make_unit(FakeRepo(repo.path), "sub-1", 4000)
            with engine.lease(plain, timeout_s=20) as paths:
                assert [path.read_bytes() for path in paths.values()] == [
                    content_of(plain.files[0].key)
                ]
            assert engine.statistics().peak_bytes == 4000


def hold(root: Path, unit: ContentUnit, budget_bytes: int) -> None:
    """Lease a unit until this process is killed."""
    with (
        Engine(root, disk_budget=budget_bytes, open_repo=FakeRepo.reopen) as engine,
        engine.lease(unit),
    ):
        (unit.files[0].repo.path / "held").touch()
        threading.Event().wait()


def test_a_lease_ends_with_its_process(nursery: Nursery, root: Path) -> None:
    """Who waits for the room of a dead process gets it, soon and without a restart."""
    repo = FakeRepo(root / "clones" / "ds1")
    held, wanted = make_unit(repo, "sub-1", 1000), make_unit(repo, "sub-2", 1000)
    with (
        nursery.start(hold, root, held, 1000) as worker,
        Engine(root, disk_budget=1000, open_repo=FakeRepo.reopen) as engine,
    ):
        while not (repo.path / "held").exists():
            assert worker.process.is_running()
            threading.Event().wait(0.01)
        lease = engine.lease(wanted, timeout_s=0.2)
        with pytest.raises(DiskBudgetError, match=rf"leased \(processes: {worker.pid}\)"), lease:
            pass
        threading.Timer(0.1, worker.kill).start()
        with engine.lease(wanted, timeout_s=20):
            assert repo.held_bytes() == 1000


def idle(root: Path, units: list[ContentUnit], budget_bytes: int) -> None:
    """Prefetch and lease one unit, then stop consuming until killed."""
    with Engine(root, disk_budget=budget_bytes, open_repo=FakeRepo.reopen) as engine:
        engine.prefetch(units)
        with engine.lease(units[0]):
            pass
        (units[0].files[0].repo.path / "idle").touch()
        threading.Event().wait()


def test_a_rank_that_stops_consuming_does_not_stop_the_other(nursery: Nursery, root: Path) -> None:
    """What an idle process prefetched gives way to one that goes on."""
    repo = FakeRepo(root / "clones" / "ds1")
    units = make_units(repo, 12, EQUAL)
    budget_bytes = 2 * units[0].size_bytes
    with nursery.start(idle, root, units[::-1], budget_bytes) as worker:
        while not (repo.path / "idle").exists():
            assert worker.process.is_running()
            threading.Event().wait(0.01)
        delivered, evicted = train(root, units, budget_bytes, 4, 0, ahead=True)
        assert delivered == 12
        assert evicted >= 10
        assert worker.process.is_running()
    with Engine(root, disk_budget=budget_bytes, open_repo=FakeRepo.reopen) as engine:
        assert engine.check(repair=True) == []


CHURNED = 20


def churn(root: Path, units: list[ContentUnit], budget_bytes: int, seed: int) -> int:
    """Open, fetch, evict and close again and again; return how often."""
    chance = random.Random(seed)
    for _ in range(CHURNED):
        with Engine(root, disk_budget=budget_bytes, open_repo=FakeRepo.reopen) as engine:
            for unit in chance.sample(units, 3):
                with engine.lease(unit, timeout_s=60):
                    pass
                if chance.random() < 0.5:
                    engine.evict([unit])
    return CHURNED


def test_a_check_beside_others_raises_no_false_alarm(nursery: Nursery, root: Path) -> None:
    """What one look at the disk or at the ledger caught on its way is no inconsistency."""
    repo = FakeRepo(root / "clones" / "ds1")
    units = make_units(repo, 12, (4_000,))
    budget_bytes = 6 * units[0].size_bytes
    found: list[str] = []
    checks = 0
    with Engine(root, disk_budget=budget_bytes, open_repo=FakeRepo.reopen) as engine:
        workers = [nursery.start(churn, root, units, budget_bytes, seed) for seed in range(4)]
        while any(worker.process.is_running() for worker in workers):
            found += engine.check()
            checks += 1
        assert [worker.result() for worker in workers] == [CHURNED] * 4
        assert engine.statistics().evicted_files + sum(repo.fetches().values()) > CHURNED
    assert found == []
    assert checks > CHURNED


def test_statistics_stay_known_after_closing(root: Path) -> None:
    """They are those of the instant before."""
    repo = FakeRepo(root / "clones" / "ds1")
    unit = make_unit(repo, "sub-1", 4_000)
    with Engine(root, disk_budget=8_000, open_repo=FakeRepo.reopen) as engine:
        with engine.lease(unit):
            pass
        before = engine.statistics()
    assert before.fetched_files == 1
    assert engine.statistics() == before
