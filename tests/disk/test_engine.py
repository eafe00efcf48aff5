"""One process with an engine: what it fetches, keeps, gives up, refuses and reports."""

import logging
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FailingRepo, FakeRepo, content_of, decide, make_key, make_unit

from tio_openneuro.content import AnnexKey, ContentFile, ContentUnit
from tio_openneuro.disk import leases
from tio_openneuro.disk.engine import Engine
from tio_openneuro.errors import (
    ContentMismatchError,
    DiskBudgetError,
    FetchError,
    RemoteUnavailableError,
)

Opening = Callable[..., Engine]


@pytest.fixture
def repo(root: Path) -> FakeRepo:
    """Return an empty clone."""
    return FakeRepo(root / "clones" / "ds1")


@pytest.fixture
def opening(root: Path) -> Iterator[Opening]:
    """Return a function that opens engines of one root, which are closed at the end."""
    engines: list[Engine] = []

    def open_engine(budget: int | str, jobs: int = 4) -> Engine:
        engines.append(Engine(root, disk_budget=budget, jobs=jobs, open_repo=FakeRepo.reopen))
        return engines[-1]

    yield open_engine
    for engine in engines:
        engine.close()


def read(engine: Engine, unit: ContentUnit, timeout_s: float = 20.0) -> None:
    """Lease a unit, and compare every byte with what the remote has."""
    with engine.lease(unit, timeout_s=timeout_s) as paths:
        assert set(paths) == {file.key for file in unit.files}
        for key, path in paths.items():
            assert path.read_bytes() == content_of(key)


def test_a_budget_of_exactly_one_unit_works(opening: Opening, repo: FakeRepo) -> None:
    """Units as large as the budget come one after the other, each in the room of the last."""
    engine = opening(3000)
    for number in range(4):
        read(engine, make_unit(repo, f"sub-{number}", 1000, 2000))
        assert repo.held_bytes() == 3000
    statistics = engine.statistics()
    assert statistics.peak_bytes == statistics.used_bytes == 3000
    assert (statistics.fetched_files, statistics.evicted_files) == (8, 6)
    assert (statistics.fetched_bytes, statistics.evicted_bytes) == (12000, 9000)


def test_content_that_is_there_is_not_fetched_again(opening: Opening, repo: FakeRepo) -> None:
    """A second lease within the budget is a hit."""
    engine = opening(5000)
    unit = make_unit(repo, "sub-1", 1000, 2000)
    read(engine, unit)
    read(engine, unit)
    assert repo.fetches().total() == 2
    assert engine.statistics().hit_files == 2


def test_a_unit_larger_than_the_budget_is_refused(opening: Opening, repo: FakeRepo) -> None:
    """The error names the unit and the bytes that it needs, before anything is fetched."""
    engine = opening(2999)
    unit = make_unit(repo, "sub-1", 1000, 2000)
    for refused in (lambda: engine.require(unit), lambda: read(engine, unit)):
        with pytest.raises(DiskBudgetError, match=r"sub-1.* 3000 bytes .*2999") as caught:
            refused()
        assert caught.value.unit == "sub-1"
    assert repo.held_bytes() == 0


def test_a_key_of_two_paths_counts_once(opening: Opening, repo: FakeRepo) -> None:
    """Two files with one key are charged and fetched as one."""
    engine = opening(1000)
    key = make_key("shared", 1000)
    unit = ContentUnit("sub-1", (ContentFile(repo, key, "a"), ContentFile(repo, key, "b")))
    read(engine, unit)
    assert repo.fetches()[key.name] == 1


def test_a_key_without_a_size_is_refused(opening: Opening, repo: FakeRepo) -> None:
    """What cannot be charged is not fetched."""
    engine = opening(1000)
    key = type(make_key("x", 1))("URL--http&c%%x", None)
    with pytest.raises(FetchError, match="states no size"):
        read(engine, ContentUnit("sub-1", (ContentFile(repo, key, "a"),)))


def test_a_shared_key_is_dropped_when_no_path_needs_it(opening: Opening, repo: FakeRepo) -> None:
    """Dropping a unit spares what another unit of the order still needs."""
    engine = opening(2000)
    shared = ContentFile(repo, make_key("shared", 1000), "shared")
    first = ContentUnit("sub-1", (shared, *make_unit(repo, "sub-1", 500).files))
    second = ContentUnit("sub-2", (shared,))
    engine.prefetch([first, second])
    read(engine, first)
    engine.release(first, drop=True)
    assert repo.locate(shared.key) is not None
    assert repo.locate(first.files[1].key) is None
    read(engine, second)
    engine.release(second, drop=True)
    assert repo.held_bytes() == 0


class VanishingRepo(FakeRepo):
    """A clone whose user drops what they had, just after it was looked at."""

    def locate(self, key: AnnexKey) -> Path | None:
        found = super().locate(key)
        if found is not None and key in self.lost:
            del self.lost[key]
            found.unlink()
        return found


def test_foreign_content_that_vanishes_before_its_lease_is_fetched(
    opening: Opening, root: Path
) -> None:
    """A lease never holds what somebody else dropped between the look and the reservation."""
    repo = VanishingRepo(root / "clones" / "vanishing")
    unit = make_unit(repo, "sub-1", 500)
    (key,) = (file.key for file in unit.files)
    repo.place(key)
    repo.lost[key] = "dropped by its user"
    engine = opening(1000)
    with engine.lease(unit, timeout_s=20) as paths:
        assert paths[key].read_bytes() == content_of(key)
    assert engine.statistics().fetched_files == 1


def test_foreign_content_is_neither_counted_nor_dropped(opening: Opening, repo: FakeRepo) -> None:
    """What a user had before stays, free of charge, whatever else needs room."""
    mine = make_unit(repo, "sub-1", 5000)
    repo.place(mine.files[0].key)
    engine = opening(1000)
    engine.require(mine)
    read(engine, mine)
    assert engine.statistics().used_bytes == 0
    read(engine, make_unit(repo, "sub-2", 1000))
    engine.release(mine, drop=True)
    assert engine.evict([mine]) == 0
    assert repo.locate(mine.files[0].key) is not None


def test_adopted_content_is_counted_and_dropped(opening: Opening, repo: FakeRepo) -> None:
    """Adopted content belongs to the budget; what no remote has is left alone."""
    units = [make_unit(repo, f"sub-{number}", 1000) for number in range(3)]
    for unit in units:
        repo.place(unit.files[0].key)
    repo.lost = {units[0].files[0].key: "no version recorded"}
    engine = opening(2000)
    assert engine.adopt(units) == 2000
    assert engine.statistics().used_bytes == 2000
    read(engine, make_unit(repo, "sub-9", 2000))
    assert [repo.locate(unit.files[0].key) is not None for unit in units] == [True, False, False]


def test_adoption_stops_where_the_budget_ends(opening: Opening, repo: FakeRepo) -> None:
    """Content that does not fit stays the user's."""
    units = [make_unit(repo, f"sub-{number}", 1000) for number in range(3)]
    for unit in units:
        repo.place(unit.files[0].key)
    engine = opening(2500)
    read(engine, make_unit(repo, "sub-9", 1000))
    assert engine.adopt(units) == 2000
    assert engine.statistics().peak_bytes <= 2500


def test_content_that_was_deleted_is_fetched_again(opening: Opening, repo: FakeRepo) -> None:
    """Content that somebody deleted behind the ledger's back is found missing, and comes back."""
    engine = opening(1000)
    unit = make_unit(repo, "sub-1", 1000)
    read(engine, unit)
    repo.drop(unit.files[0].key)
    assert len(engine.check()) == 1
    read(engine, unit)
    assert engine.check() == []
    assert engine.statistics().used_bytes == 1000


def test_what_cannot_be_dropped_stays_and_counts(opening: Opening, repo: FakeRepo) -> None:
    """A refused drop leaves content charged; where nothing else gives way the error says so."""
    engine = opening(1000)
    unit = make_unit(repo, "sub-1", 600)
    read(engine, unit)
    repo.undroppable = {unit.files[0].key.name}
    with pytest.raises(DiskBudgetError, match=r"sub-2 \(500 bytes"):
        read(engine, make_unit(repo, "sub-2", 500), timeout_s=0.2)
    assert engine.statistics().used_bytes == 600
    read(engine, make_unit(repo, "sub-3", 400))


def test_a_failure_names_the_unit_and_returns_its_room(opening: Opening, root: Path) -> None:
    """A fetch that fails leaves neither bytes nor charge, and the next unit goes on."""
    failing = FailingRepo(root / "clones" / "bad", share=1.0)
    engine = opening(1000)
    with pytest.raises(RemoteUnavailableError, match=r"sub-1.*sub-1/anat/0.nii.gz.*503") as caught:
        read(engine, make_unit(failing, "sub-1", 1000))
    assert caught.value.unit == "sub-1"
    assert failing.held_bytes() == 0
    assert engine.statistics().used_bytes == 0
    assert engine.statistics().failures == 1
    failing.share = 0.0
    read(engine, make_unit(failing, "sub-2", 1000))


def test_one_fetch_serves_all_threads_that_wait(opening: Opening, repo: FakeRepo) -> None:
    """Eight threads that want one unit fetch it once."""
    engine = opening(1000)
    repo.gate = threading.Event()
    unit = make_unit(repo, "sub-1", 1000)
    threads = [threading.Thread(target=read, args=(engine, unit)) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert repo.halfway.wait(20)
    repo.gate.set()
    for thread in threads:
        thread.join()
    assert repo.fetches().total() == 1
    assert engine.statistics().hit_files == 7


def test_leased_content_is_never_evicted(opening: Opening, repo: FakeRepo) -> None:
    """A lease that leaves no room makes others wait, and time out with a diagnosis."""
    engine = opening(1000)
    held, wanted = make_unit(repo, "sub-1", 800), make_unit(repo, "sub-2", 500)
    with engine.lease(held) as paths:
        with pytest.raises(DiskBudgetError, match=r"sub-2 \(500 bytes.*800 bytes.*processes: \d+"):
            read(engine, wanted, timeout_s=0.2)
        assert all(path.exists() for path in paths.values())
    read(engine, wanted)


def test_requests_are_served_in_their_order(opening: Opening, repo: FakeRepo) -> None:
    """A small request that came later does not pass a large one that waits."""
    engine = opening(1000)
    large, small = make_unit(repo, "large", 1000), make_unit(repo, "small", 10)
    order: list[str] = []

    def lease(unit: ContentUnit) -> None:
        with engine.lease(unit):
            order.append(unit.name)

    with engine.lease(make_unit(repo, "first", 500)):
        threads = []
        for unit in (large, small):
            threads.append(threading.Thread(target=lease, args=(unit,)))
            threads[-1].start()
            leases = engine._here()
            while not any(unit.name == name for name in leases.ledger.queue()):
                leases.changes.wait_here(leases.changes.value, 0.01)
        assert order == []
    for thread in threads:
        thread.join()
    assert order == ["large", "small"]


def test_fetch_stops_where_the_budget_is_full(opening: Opening, repo: FakeRepo) -> None:
    """Fetching at the prompt warms the first units that fit and keeps them."""
    engine = opening(2500)
    units = [make_unit(repo, f"sub-{number}", 500, 500) for number in range(4)]
    seen: list[tuple[int, int]] = []
    assert engine.fetch(units, on_progress=lambda *done: seen.append(done)) == 2000
    assert seen == [(1000, 4000), (2000, 4000)]
    assert repo.held_bytes() == 2000
    assert engine.fetch(units) == 0
    assert engine.evict(units[:1]) == 1000
    assert engine.fetch(units[1:]) == 1000


def test_fetch_reports_the_first_error_after_the_rest_arrived(
    opening: Opening, root: Path, repo: FakeRepo
) -> None:
    """One unit that fails does not keep others from coming."""
    failing = FailingRepo(root / "clones" / "bad", share=1.0)
    engine = opening(3000, jobs=1)
    good = [make_unit(repo, f"sub-{number}", 500) for number in range(2)]
    with pytest.raises(RemoteUnavailableError, match="503"):
        engine.fetch([good[0], make_unit(failing, "sub-bad", 500), good[1]])
    assert repo.held_bytes() == 1000


def test_a_smaller_budget_evicts_before_it_opens(opening: Opening, repo: FakeRepo) -> None:
    """A second engine with less is obeyed by both, from the moment it is open."""
    large = opening(3000)
    for number in range(3):
        read(large, make_unit(repo, f"sub-{number}", 1000))
    small = opening(1500)
    assert repo.held_bytes() == 1000
    assert small.statistics().evicted_files == 2
    with pytest.raises(DiskBudgetError, match=r"1500"):
        read(large, make_unit(repo, "sub-9", 2000))
    small.close()
    read(large, make_unit(repo, "sub-9", 2000))


def test_a_smaller_budget_is_refused_while_leases_exceed_it(
    opening: Opening, repo: FakeRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the bytes and who leases them, is in force no longer, and nothing was dropped."""
    monkeypatch.setattr(leases, "_SHRINK_TIMEOUT_S", 0.2)
    large = opening(3000)
    with large.lease(make_unit(repo, "sub-1", 2000)):
        words = rf"1500 bytes: 500 bytes too many.*2000 bytes.*leased \(processes: {os.getpid()}\)"
        with pytest.raises(DiskBudgetError, match=words):
            opening(1500)
        assert repo.held_bytes() == 2000
        assert large.statistics().budget_bytes == 3000
    read(large, make_unit(repo, "sub-2", 3000))
    assert opening(1500).statistics().used_bytes == repo.held_bytes() == 0


def test_a_pickled_engine_is_another_owner_with_the_same_budget(
    opening: Opening, repo: FakeRepo
) -> None:
    """An engine that crosses to a worker knows the budget, and shares the ledger."""
    engine = opening(1000)
    unit = make_unit(repo, "sub-1", 1000)
    read(engine, unit)
    with pickle.loads(pickle.dumps(engine)) as other:
        assert other.budget_bytes == 1000
        read(other, unit)
        assert other.statistics().hit_files == 1


def test_the_automatic_budget_is_half_of_what_is_free(opening: Opening) -> None:
    """Engines that state no budget agree on one."""
    first, second = opening("auto"), opening("auto")
    assert first.budget_bytes == second.budget_bytes > 10**9


def test_the_free_floor_is_kept(opening: Opening, repo: FakeRepo) -> None:
    """Where the disk has no more than its floor left, content is refused though the budget fits."""
    engine = opening("auto")
    engine._here().store._floor_bytes = 1 << 60
    with pytest.raises(DiskBudgetError, match="sub-1"):
        read(engine, make_unit(repo, "sub-1", 1000), timeout_s=0.1)
    assert repo.held_bytes() == 0


def test_fetches_and_evictions_are_logged(
    opening: Opening, repo: FakeRepo, caplog: pytest.LogCaptureFixture
) -> None:
    """One line for each, with key, bytes, reason and what is charged."""
    engine = opening(1000)
    with caplog.at_level(logging.INFO, "tio_openneuro"):
        read(engine, make_unit(repo, "sub-1", 1000))
        read(engine, make_unit(repo, "sub-2", 1000))
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split()[0] for line in lines] == ["Fetched", "Evicted", "Fetched"]
    assert "(1.0 kB) for sub-2; 1.0 kB charged before, 0 Bytes after, of 1.0 kB." in lines[1]


def test_repair_mends_what_a_crash_leaves(opening: Opening, repo: FakeRepo) -> None:
    """Rows without content, content without rows, and interrupted work are found and mended."""
    engine = opening(10_000)
    unit = make_unit(repo, "sub-1", 100, 200, 300, 400, 500)
    read(engine, unit)
    absent, cut, dropping, empty, _ = (file.key for file in unit.files)
    ledger = engine._here().ledger
    contents = [engine._here().store.content_of(file) for file in unit.files]
    repo.drop(absent)
    repo.object_path(cut).chmod(0o600)
    repo.object_path(cut).write_bytes(b"cut")
    decide(ledger).give_up([contents[2]])
    decide(ledger).claim(contents[3], absent=True)
    ledger.failed(contents[3], empty=False)
    stray = make_key("stray", 600)
    repo.partial_path(stray).write_bytes(b"half")
    ours = [line for line in engine.check() if "lock" not in line]
    assert len(ours) == 4, ours
    assert dropping != empty
    engine.close()
    again = opening(10_000)
    assert len(again.check()) == 3
    assert again.check(repair=True) == []
    assert again.statistics().used_bytes == 400 + 500 + 600
    assert repo.held_bytes() == 400 + 500 + len(b"half")


class HangingRepo(FakeRepo):
    """A clone where every fetch but of damaged content hangs until it is cancelled."""

    def get(self, key: AnnexKey, **how: Any) -> Path:
        """Hang, or fail as any other clone."""
        if key.name in self.corrupt:
            assert self.halfway.wait(20)
            return super().get(key, **how)
        self.halfway.set()
        while not how["cancelled"]():
            threading.Event().wait(0.01)
        raise FetchError(key.name)


def test_a_lease_that_fails_ends_what_it_still_fetches(opening: Opening, root: Path) -> None:
    """One file is damaged, the other hangs: nothing is charged once the error is raised."""
    repo = HangingRepo(root / "clones" / "hanging")
    engine = opening(2000)
    unit = make_unit(repo, "sub-1", 400, 800)
    repo.corrupt.add(unit.files[1].key.name)
    with pytest.raises(ContentMismatchError), engine.lease(unit, timeout_s=20):
        pass
    assert engine.statistics().used_bytes == 0


class LateRepo(FakeRepo):
    """A clone whose fetch is over just when it is cancelled, and which says that it was."""

    def get(self, key: AnnexKey, **how: Any) -> Path:
        """Fetch whole what is not to come any more."""
        self.halfway.set()
        while not how["cancelled"]():
            threading.Event().wait(0.01)
        super().get(key, owner_fd=how["owner_fd"], made=how["made"])
        raise FetchError(key.name)


class BesideRepo(FakeRepo):
    """A clone into which the user brings the same content while our own fetch fails."""

    def get(self, key: AnnexKey, **how: Any) -> Path:
        """Fail beside the user's file."""
        super().get(key, **how | {"made": None})
        raise FetchError(key.name)


def test_what_came_whole_although_it_was_cancelled_is_present(opening: Opening, root: Path) -> None:
    """As when an engine closes in that instant: another process finds nothing to mend."""
    repo = LateRepo(root / "clones" / "late")
    unit = make_unit(repo, "sub-1", 1000)
    engine, other = opening(2000), opening(2000)
    engine.prefetch([unit])
    assert repo.halfway.wait(20)
    engine.close()
    assert repo.locate(unit.files[0].key) is not None
    assert other.check() == []
    assert other.statistics().used_bytes == 1000
    read(other, unit)


def test_what_appears_while_a_fetch_fails_is_not_taken_for_its_own(
    opening: Opening, root: Path
) -> None:
    """It is the user's: neither charged nor dropped."""
    repo = BesideRepo(root / "clones" / "beside")
    unit = make_unit(repo, "sub-1", 1000)
    engine = opening(2000)
    with pytest.raises(FetchError), engine.lease(unit, timeout_s=20):
        pass
    assert engine.check() == []
    assert engine.statistics().used_bytes == 0
    assert engine.evict_all() == 0
    assert repo.locate(unit.files[0].key) is not None


class ShortRepo(FakeRepo):
    """A clone that takes half of the content for the whole."""

    def get(self, key: AnnexKey, **how: Any) -> Path:
        """Fetch, and cut off."""
        path = super().get(key, **how)
        os.truncate(path, path.stat().st_size // 2)
        return path


def test_content_of_another_size_is_refused_and_dropped(opening: Opening, root: Path) -> None:
    """The budget relies on sizes, so they are looked at whatever the clone says."""
    repo = ShortRepo(root / "clones" / "short")
    engine = opening(2000)
    unit = make_unit(repo, "sub-1", 1000)
    with (
        pytest.raises(ContentMismatchError, match=r"500 bytes arrived and its key .* states 1000"),
        engine.lease(unit, timeout_s=20),
    ):
        pass
    assert engine.statistics().used_bytes == 0
    assert not repo.object_path(unit.files[0].key).exists()
