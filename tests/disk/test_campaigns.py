"""Whole trainings side by side, killed at any instant, and on a disk that is just large enough.

Real git-annex over HTTP, the public dataset and queue in processes of their own, and an observer
outside that adds up the bytes on disk.
"""

import contextlib
import hashlib
import logging
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torchio as tio
from conftest import heads
from faulty import LoopbackOpenNeuro
from torch.utils.data import DataLoader
from workers import Nursery, Worker

import tio_openneuro as tno
from tio_openneuro.annex.repo import AnnexRepo
from tio_openneuro.annex.tree import index_tree
from tio_openneuro.content import AnnexKey
from tio_openneuro.demo.watch import DiskWatch
from tio_openneuro.disk.engine import Engine
from tio_openneuro.sources.install import install

ACCESSION = "ds900022"
LARGE = "ds900023"
SUBJECTS = 8
PATCHES = 2
IMAGES = {
    "t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz"),
    "lesion": tno.Label("sub-*/anat/*_label-lesion_mask.nii.gz"),
}


def note(figures: str) -> None:
    """Tell figures of a campaign: ``pytest -m slow --log-cli-level=INFO`` shows them."""
    logging.getLogger(__name__).info("%s", figures)


@pytest.fixture(scope="session")
def _training(_published: LoopbackOpenNeuro) -> None:
    _published.publish(ACCESSION, heads(SUBJECTS, shape=(48, 48, 48)))
    _published.publish(LARGE, heads(5, shape=(128, 128, 96)))


@pytest.fixture
def server(_training: None, openneuro: LoopbackOpenNeuro) -> Iterator[LoopbackOpenNeuro]:
    """Return a loopback OpenNeuro with ``ds900022``, eight heads, over a link of some latency."""
    openneuro.set_latency(0.02)
    openneuro.set_connection_rate(600_000)
    yield openneuro
    openneuro.set_latency(0)
    openneuro.set_connection_rate(None)


class Clone:
    """The clone as an outsider sees it: keys, sizes, what is whole, what was asked for."""

    def __init__(self, root: Path, accession: str = ACCESSION) -> None:
        dataset = install(accession, root)
        self.accession = accession
        self.repo = AnnexRepo(dataset.path, remotes=dataset.remotes)
        files = index_tree(dataset.path, dataset.commit)
        self.keys = {file.path: file.key for file in files if file.key is not None}
        sizes: dict[str, int] = {}
        for path, key in self.keys.items():
            subject = path.partition("/")[0]
            sizes[subject] = sizes.get(subject, 0) + (key.size_bytes or 0)
        self.largest_bytes = max(sizes.values())
        self.total_bytes = sum(sizes.values())

    def whole(self) -> dict[str, AnnexKey]:
        """Return what is complete, after comparing it with its checksum."""
        found = {}
        for path, key in self.keys.items():
            file = self.repo.locate(key)
            if file is not None:
                digest = hashlib.new(key.backend.removesuffix("E"), file.read_bytes()).hexdigest()
                assert key.name.rpartition("--")[2].startswith(digest)
                found[path] = key
        return found

    def held_bytes(self) -> int:
        return sum(stored.size_bytes for stored in self.repo.stored())


def train(root: Path, budget_bytes: int, epochs: int, accession: str = ACCESSION) -> int:
    """Draw every patch of some epochs; return how many there were."""
    with (
        tno.DataladSubjectsDataset(
            accession, IMAGES, root=root, disk_budget=budget_bytes, jobs=3
        ) as dataset,
        tno.BudgetedQueue(
            dataset, 6, PATCHES, tio.UniformSampler(8), num_workers=2, ram_budget="4 GB"
        ) as queue,
    ):
        return sum(1 for _ in range(epochs) for _ in queue)


def count_fetched(root: Path, budget_bytes: int, epochs: int) -> int:
    """Load every subject of some epochs, fetching ahead; return how many files came from afar."""
    with tno.DataladSubjectsDataset(
        ACCESSION, IMAGES, root=root, disk_budget=budget_bytes, jobs=3
    ) as dataset:
        assert sum(1 for _ in range(epochs) for _ in dataset) == epochs * SUBJECTS
        return dataset.statistics().fetched_files


def load(root: Path, budget_bytes: int, epochs: int) -> bool:
    """Load every subject in two worker processes; return whether they lived until the end."""
    try:
        load_all(root, budget_bytes, epochs)
    except RuntimeError as error:
        # torch raises from its handler of SIGCHLD, once for each worker that ends after the first
        # and wherever this process is, in the midst of closing too.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if "DataLoader worker" not in str(error):
            raise
        return False
    return True


def load_all(root: Path, budget_bytes: int, epochs: int) -> None:
    with tno.DataladSubjectsDataset(
        ACCESSION, IMAGES, root=root, disk_budget=budget_bytes, jobs=2
    ) as dataset:
        for _ in range(epochs):
            for _ in DataLoader(dataset, batch_size=None, num_workers=2, timeout=60):
                pass


def annexes() -> list[psutil.Process]:
    """Return every git-annex of this test that runs and is not our own child."""
    found = []
    own = {child.pid for child in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid in own or process.status() == psutil.STATUS_ZOMBIE:
                continue
            ours = process.environ().get("HOME") == os.environ["HOME"]
            if ours and any(
                Path(word).name in {"annex", "git-annex"} for word in process.cmdline()
            ):
                found.append(process)
    return found


def look_after_a_death(root: Path, clone: Clone, budget_bytes: int) -> None:
    """Open the root anew, as the next training does, and see that all is well."""
    assert clone.held_bytes() <= budget_bytes
    with Engine(root, disk_budget=budget_bytes) as engine:
        _, alive = psutil.wait_procs(annexes(), timeout=5)
        assert alive == [], [(orphan.ppid(), orphan.cmdline()) for orphan in alive]
        assert engine.check(repair=True) == []
        assert engine.check() == []
        assert len(list((root / "ledger" / "owners").iterdir())) == 1
        assert clone.held_bytes() <= engine.statistics().used_bytes <= budget_bytes
    assert list((root / "ledger" / "owners").iterdir()) == []


def kill_trainer(worker: Worker, instants: random.Random) -> int:
    """Kill the training itself."""
    worker.wait(instants.uniform(0.05, 1.6))
    died = worker.process.is_running() and worker.process.status() != psutil.STATUS_ZOMBIE
    worker.kill()
    return int(died)


def kill_loader(worker: Worker, instants: random.Random) -> int:
    """Kill one of the worker processes; the training ends by itself."""
    worker.wait(instants.uniform(0.6, 1.8))
    loaders = [child for child in children_of(worker) if "annex" not in command_of(child)]
    loaders = [child for child in loaders if "python" in command_of(child)]
    if loaders:
        instants.choice(loaders).kill()
    worker.result(timeout_s=90)
    return int(bool(loaders))


def kill_git_annex(worker: Worker, instants: random.Random) -> int:
    """Kill some git-annex, or the git that started it, while the training goes on to its end."""
    killed = 0
    while killed < 4 and not worker.wait(instants.uniform(0.1, 0.6)):
        running = [child for child in children_of(worker) if "annex" in command_of(child)]
        if running:
            with contextlib.suppress(psutil.NoSuchProcess):
                instants.choice(running).kill()
                killed += 1
    assert worker.result(timeout_s=90) == 2 * SUBJECTS * PATCHES
    return killed


def children_of(worker: Worker) -> list[psutil.Process]:
    try:
        return worker.process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def command_of(process: psutil.Process) -> str:
    try:
        alive = process.status() != psutil.STATUS_ZOMBIE
        return " ".join(process.cmdline()) if alive else ""
    except psutil.Error:
        return ""


VICTIMS = {
    "trainer": (kill_trainer, train),
    "loader": (kill_loader, load),
    "annex": (kill_git_annex, train),
}


def campaign(
    server: LoopbackOpenNeuro,
    nursery: Nursery,
    root: Path,
    victim: str,
    *,
    units: int,
    kills: int,
    seed: int,
) -> None:
    """Kill again and again; nothing complete is fetched again, and the budget holds."""
    clone = Clone(root)
    budget_bytes = min(units * clone.largest_bytes, clone.total_bytes)
    holds_all = budget_bytes == clone.total_bytes
    instants = random.Random(seed)
    kill, work = VICTIMS[victim]
    killed, rounds, refetched = 0, 0, 0
    asked: dict[str, int] = {}
    with DiskWatch(root) as watch:
        while killed < kills:
            rounds += 1
            assert rounds < 4 * kills + 10
            with nursery.start(work, root, budget_bytes, 2) as worker:
                killed += kill(worker, instants)
            look_after_a_death(root, clone, budget_bytes)
            counters = server.counters(ACCESSION)
            whole = clone.whole()
            if holds_all:
                assert set(asked) <= set(whole)
                refetched += sum(counters[path].requests - count for path, count in asked.items())
                asked = {path: counters[path].requests for path in whole if path in counters}
                if len(whole) == len(clone.keys):
                    with Engine(root, disk_budget=budget_bytes) as engine:
                        assert engine.evict_all() == clone.total_bytes
                    asked = {}
        with nursery.start(train, root, budget_bytes, 1) as worker:
            assert worker.result() == SUBJECTS * PATCHES
    peak_bytes = max(sample.held_bytes for sample in watch.samples())
    note(
        f"kills: {victim} {units=} {killed=} {rounds=} {refetched=} "
        f"peak/budget={peak_bytes}/{budget_bytes}={peak_bytes / budget_bytes:.4f}"
    )
    assert refetched == 0
    assert peak_bytes <= budget_bytes


@pytest.mark.parametrize(
    ("way", "victim", "units", "kills"),
    [
        ("http", "trainer", 99, 3),
        ("git-annex", "trainer", 99, 3),
        ("http", "loader", 2, 1),
        ("git-annex", "annex", 2, 3),
    ],
    indirect=["way"],
)
@pytest.mark.usefixtures("way")
def test_kills_lose_nothing(
    server: LoopbackOpenNeuro, nursery: Nursery, root: Path, victim: str, units: int, kills: int
) -> None:
    """After kill -9 the next training goes on, within the budget, and nothing is orphaned."""
    campaign(server, nursery, root, victim, units=units, kills=kills, seed=3)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("victim", "units", "kills"),
    [
        ("trainer", 99, 40),
        ("trainer", 2, 25),
        ("loader", 99, 10),
        ("loader", 2, 10),
        ("annex", 2, 30),
    ],
)
def test_a_hundred_kills_lose_nothing(
    server: LoopbackOpenNeuro, nursery: Nursery, root: Path, victim: str, units: int, kills: int
) -> None:
    """The same, for long."""
    campaign(server, nursery, root, victim, units=units, kills=kills, seed=units)


# Two trainings at once


def side_by_side(
    nursery: Nursery, root: Path, budget_bytes: int, epochs: int, work: Callable[..., int] = train
) -> tuple[int, list[int]]:
    """Run two trainings on one root to their ends; return the peak held, and what they returned."""
    with (
        DiskWatch(root) as watch,
        nursery.start(work, root, budget_bytes, epochs) as one,
        nursery.start(work, root, budget_bytes, epochs) as other,
    ):
        found = [one.result(), other.result()]
    peak_bytes = max(sample.held_bytes for sample in watch.samples())
    note(f"two trainings: peak/budget={peak_bytes}/{budget_bytes}={peak_bytes / budget_bytes:.4f}")
    return peak_bytes, found


@pytest.mark.usefixtures("server")
def test_two_trainings_fetch_each_file_once(nursery: Nursery, root: Path) -> None:
    """With room for all, every file is fetched by one of them, and used by both.

    Requests are not counted: a prefetch that gives way to what is waited for is asked for again.
    """
    clone = Clone(root)
    peak_bytes, fetched = side_by_side(nursery, root, clone.total_bytes, 2, count_fetched)
    assert peak_bytes == clone.total_bytes
    assert sum(fetched) == len(clone.keys)


@pytest.mark.parametrize(
    ("units", "epochs"),
    [(3, 1), *(pytest.param(units, 4, marks=pytest.mark.slow) for units in (1, 2, 4))],
)
def test_two_trainings_share_one_budget(
    server: LoopbackOpenNeuro, nursery: Nursery, root: Path, units: int, epochs: int
) -> None:
    """Both finish, and together they never hold more than the one budget."""
    clone = Clone(root)
    budget_bytes = units * clone.largest_bytes
    peak_bytes, patches = side_by_side(nursery, root, budget_bytes, epochs)
    assert peak_bytes <= budget_bytes
    assert patches == [epochs * SUBJECTS * PATCHES] * 2


def train_and_stop(root: Path, budget_bytes: int, stopped: Path, go: Path) -> int:
    """Draw some patches, then say so and wait to be told to go on."""
    with (
        tno.DataladSubjectsDataset(
            ACCESSION, IMAGES, root=root, disk_budget=budget_bytes, jobs=3
        ) as dataset,
        tno.BudgetedQueue(
            dataset, 6, PATCHES, tio.UniformSampler(8), num_workers=2, ram_budget="4 GB"
        ) as queue,
    ):
        count = 0
        for _ in queue:
            count += 1
            if count == PATCHES:
                stopped.write_text("stopped")
                go.read_text()
        return count


@pytest.mark.parametrize("units", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_rank_that_stops_does_not_stop_the_other(
    server: LoopbackOpenNeuro, nursery: Nursery, root: Path, tmp_path: Path, units: int
) -> None:
    """One training stands in its step: the other finishes its epoch; then the first one does."""
    clone = Clone(root)
    budget_bytes = units * clone.largest_bytes
    stopped, go = tmp_path / "stopped", tmp_path / "go"
    os.mkfifo(stopped)
    os.mkfifo(go)
    with (
        DiskWatch(root) as watch,
        nursery.start(train_and_stop, root, budget_bytes, stopped, go) as standing,
    ):
        assert stopped.read_text() == "stopped"
        with nursery.start(train, root, budget_bytes, 1) as other:
            assert other.result() == SUBJECTS * PATCHES
        assert standing.process.is_running()
        go.write_text("go")
        assert standing.result() == SUBJECTS * PATCHES
    assert max(sample.held_bytes for sample in watch.samples()) <= budget_bytes


# A disk of the budget's size


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Mount a small file system; skip where this machine does not let us."""
    folder.mkdir()
    options = f"size={size_bytes}"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.name == "nt" or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def used_bytes(folder: Path) -> int:
    disk = os.statvfs(folder)
    return (disk.f_blocks - disk.f_bfree) * disk.f_frsize


@pytest.mark.parametrize("units", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_disk_of_the_budgets_size_is_enough(
    server: LoopbackOpenNeuro, nursery: Nursery, tmp_path: Path, units: int
) -> None:
    """Two epochs on a disk of the budget plus git's metadata never meet a full disk."""
    server.set_connection_rate(None)
    with small_disk(tmp_path / "ample", 500_000_000) as root:
        clone = Clone(root, LARGE)
        with nursery.start(train, root, clone.total_bytes, 2, LARGE) as worker:
            assert worker.result() == 2 * 5 * PATCHES
        metadata_bytes = used_bytes(root) - clone.held_bytes()
    budget_bytes = units * clone.largest_bytes
    # git-annex's databases and the ledger grow with use; a fetch wants a megabyte to be free.
    size_bytes = budget_bytes + metadata_bytes + 2_000_000
    note(f"small disk: {metadata_bytes=} {budget_bytes=} {size_bytes=}")
    with small_disk(tmp_path / "small", size_bytes) as root, DiskWatch(root) as watch:
        with nursery.start(train, root, budget_bytes, 2, LARGE) as worker:
            assert worker.result() == 2 * 5 * PATCHES
        with Engine(root, disk_budget=budget_bytes) as engine:
            assert engine.check() == []
        peak_bytes = max(sample.held_bytes for sample in watch.samples())
        note(f"small disk: {peak_bytes=} used at the end={used_bytes(root)}")
    assert peak_bytes <= budget_bytes
