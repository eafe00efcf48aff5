"""What nobody uses rests: threads and children end by themselves, and come back when needed."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from fakes import FakeRepo, content_of, make_unit
from faulty import LoopbackOpenNeuro

import tio_openneuro as tno
from tio_openneuro.disk import fetching, look_ahead
from tio_openneuro.disk.engine import Engine

_TIMEOUT_S = 60


def wait_until(condition: Callable[[], bool]) -> None:
    """Fail unless something comes true in time."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.01)


def left() -> set[object]:
    """Return the threads and children that there are."""
    return {*threading.enumerate(), *psutil.Process().children(recursive=True)}


def test_threads_end_when_there_is_nothing_to_fetch(tmp_path: Path) -> None:
    """After leases, prefetches and an order that was given up; a later use starts them again."""
    repo = FakeRepo(tmp_path / "clone")
    units = [make_unit(repo, f"sub-{n}", 1000) for n in range(12)]
    before = left()
    with Engine(tmp_path / "root", disk_budget=3000, jobs=4, open_repo=FakeRepo.reopen) as engine:
        for chosen in (units[:6], units[6:]):
            engine.prefetch(chosen)
            for unit in chosen[:4]:
                with engine.lease(unit) as paths:
                    assert left() > before
                    assert all(path.read_bytes() == content_of(key) for key, path in paths.items())
            engine.prefetch([])
            wait_until(lambda: left() == before)
        with engine.lease(units[0]) as paths:
            assert paths
        assert engine.statistics().used_bytes <= 3000


def test_a_dataset_that_is_only_held_keeps_no_thread_and_no_child(
    openneuro: LoopbackOpenNeuro,
) -> None:
    """Children of git-annex too, those that drop among them; all of it is there again later."""
    images = {"t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz")}
    server = left()
    with tno.DataladSubjectsDataset("ds900001", images, disk_budget="1 GB") as dataset:
        for _ in range(2):
            assert [subject.subject_id for subject in dataset][-1] == "sub-06"
            assert dataset.evict() == dataset.nbytes
            assert left() > server
            wait_until(lambda: left() == server)
        assert dataset.statistics().fetched_files == 12


def test_a_work_that_is_started_while_it_ends_looks_again() -> None:
    """Whoever starts it finds its threads there, and starts no other."""
    fetches = fetching.Fetches(1, None, None)
    runs: list[int] = []

    def work() -> None:
        runs.append(len(threading.enumerate()))
        if len(runs) == 1:
            fetches.start(work)

    before = left()
    fetches.start(work)
    wait_until(lambda: left() == before)
    assert len(runs) == 2
    fetches.start(work)
    wait_until(lambda: left() == before)
    assert len(runs) == 3
    assert len(set(runs)) == 1


@pytest.mark.parametrize("jobs", [1, 4])
@pytest.mark.parametrize("idle_s", [0, 0.001, 0.01])
def test_a_fetch_that_comes_just_when_threads_end_is_carried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, idle_s: float
) -> None:
    """Whenever it comes, where they end after no time at all."""
    monkeypatch.setattr(fetching, "IDLE_S", idle_s)
    monkeypatch.setattr(look_ahead, "IDLE_S", idle_s)
    repo = FakeRepo(tmp_path / "clone")
    units = [make_unit(repo, f"sub-{n}", 1000) for n in range(12)]
    with Engine(
        tmp_path / "root", disk_budget=4000, jobs=jobs, open_repo=FakeRepo.reopen
    ) as engine:
        for number in range(100):
            unit, following = units[number % 12], units[(number + 5) % 12]
            if number % 2:
                engine.prefetch([unit, following])
            with engine.lease(unit, timeout_s=20) as paths:
                assert paths
            threading.Event().wait(0.0005 * (number % 25))
        wait_until(lambda: following.files[0].repo.locate(following.files[0].key) is not None)
