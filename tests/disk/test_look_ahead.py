"""One process that knows what it uses next: what comes ahead, gives way and is cancelled."""

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeRepo, content_of, make_unit
from test_rest import wait_until

from tio_openneuro.content import AnnexKey, ContentUnit
from tio_openneuro.disk.engine import Engine
from tio_openneuro.errors import FetchError

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


def wait_for(engine: Engine, unit: ContentUnit) -> None:
    """Wait until a unit's content is there, without asking for it."""
    leases = engine._here()
    for _ in range(2000):
        since = leases.changes.value
        if all(file.repo.locate(file.key) for file in unit.files):
            return
        leases.changes.wait_here(since, 0.05)
    pytest.fail(f"{unit.name} was not prefetched")


def settle(engine: Engine) -> None:
    """Wait until nothing more is fetched ahead, however long that takes."""
    leases = engine._here()
    prefetcher = leases.look_ahead
    for _ in range(2000):
        now = leases.changes.moment()
        idle = prefetcher._blocked == now or all(entry.ready for entry in prefetcher._entries)
        if idle and not leases.fetches._known:
            return
        leases.changes.wait_here(now[0], 0.05)
    pytest.fail("prefetching went on and on")


def test_the_known_order_is_prefetched(opening: Opening, repo: FakeRepo) -> None:
    """Units come ahead of their leases, in order, as far as there is room, and count as hits."""
    engine = opening(3000, jobs=2)
    units = [make_unit(repo, f"sub-{number}", 1000) for number in range(6)]
    engine.prefetch(units)
    for number, unit in enumerate(units):
        for ahead in units[number : number + 3]:
            wait_for(engine, ahead)
        assert [repo.locate(unit.files[0].key) for unit in units[number + 3 :]] == [None] * max(
            0, 3 - number
        )
        read(engine, unit)
    statistics = engine.statistics()
    assert statistics.hit_files == statistics.fetched_files == 6
    assert statistics.evicted_files == 3
    assert statistics.peak_bytes == 3000


def test_prefetching_spares_what_is_used_sooner(opening: Opening, repo: FakeRepo) -> None:
    """With a known order that comes round again, the content used last of all gives way."""
    engine = opening(3000, jobs=1)
    units = [make_unit(repo, f"sub-{number}", 1000) for number in range(4)]
    engine.prefetch(units * 3)
    for unit in units * 3:
        read(engine, unit)
    # Dropping the longest unused needs 12 fetches here, farthest next use 6, or some more where a
    # lease comes before its prefetch.
    assert 6 <= engine.statistics().fetched_files <= 10


def read_epochs(engine: Engine, units: list[ContentUnit], known: int, again: bool) -> int:
    """Read permutations as slowly as can be; return the files fetched after the first one.

    ``known``: permutations that the engine is told at the beginning of each one.
    """
    shuffler = random.Random(0)
    orders = [shuffler.sample(units, len(units)) for _ in range(6)]
    first_files = 0
    for epoch in range(5):
        told = [unit for order in orders[epoch : epoch + known] for unit in order]
        engine.prefetch(told, again=units if again else [])
        for unit in orders[epoch]:
            settle(engine)
            read(engine, unit)
        first_files = first_files or engine.statistics().fetched_files
    return engine.statistics().fetched_files - first_files


def test_what_is_kept_is_not_given_up_for_more_than_two_units_ahead(
    opening: Opening, repo: FakeRepo
) -> None:
    """However slowly units are used, what comes again stays, but for a window of two units."""
    engine = opening(10_000)
    units = [make_unit(repo, f"sub-{number}", 1000) for number in range(20)]
    fetched_files = read_epochs(engine, units, known=2, again=True)
    # Each epoch at least the 10 that no order can keep; as far ahead as there is room: 16 to 18.
    assert 4 * 10 <= fetched_files <= 4 * 12
    assert engine.statistics().peak_bytes == repo.held_bytes() == 10_000


def test_a_use_under_way_as_the_order_goes_on_is_struck_out_once(
    opening: Opening, repo: FakeRepo
) -> None:
    """What is leased when an epoch begins, and let go after, keeps its use in that epoch."""
    engine = opening(4000)
    units = [make_unit(repo, f"sub-{number}", 1000) for number in range(4)]
    engine.prefetch(units)
    for unit in units[:3]:
        read(engine, unit)
        engine.release(unit, drop=False)
    with engine.lease(units[3], timeout_s=20):
        engine.prefetch([*units, *units])
    engine.release(units[3], drop=False)
    assert engine._here().look_ahead.steps_to("sub-3") == 4
    # Another process's use, which is known by its end alone.
    engine.release(units[0], drop=False)
    assert engine._here().look_ahead.steps_to("sub-0") == 4


def test_the_likeliest_stay_where_the_next_order_is_not_known(
    opening: Opening, repo: FakeRepo
) -> None:
    """Of what comes again at an unknown time the first ones named are kept; nothing is churned."""
    engine = opening(10_000)
    units = [make_unit(repo, f"sub-{number}", 1000) for number in range(20)]
    fetched_files = read_epochs(engine, units, known=1, again=True)
    assert 4 * 10 <= fetched_files <= 4 * 13
    kept = [number for number in range(20) if repo.locate(units[number].files[0].key)]
    assert len(kept) == 10
    assert sum(number < 10 for number in kept) >= 7
    churned = opening(10_000)
    others = [make_unit(repo, f"sub-{number}", 1000) for number in range(20, 40)]
    assert read_epochs(churned, others, known=1, again=False) > 4 * 14


def test_a_lease_cancels_a_prefetch_for_its_room(opening: Opening, repo: FakeRepo) -> None:
    """The unit that is needed now takes the room of a download ahead, whose partial file goes."""
    engine = opening(1000, jobs=2)
    repo.gate = threading.Event()
    ahead, now = make_unit(repo, "ahead", 1000), make_unit(repo, "now", 900)
    engine.prefetch([ahead])
    assert repo.halfway.wait(20)
    repo.gate, gate = None, repo.gate
    read(engine, now)
    gate.set()
    assert repo.partial_path(ahead.files[0].key).exists() is False
    read(engine, ahead)
    assert engine.statistics().failures == 0
    assert engine.statistics().peak_bytes == 1000


def test_a_new_order_cancels_what_is_not_in_it(opening: Opening, repo: FakeRepo) -> None:
    """A download ahead ends when its unit is wanted no more."""
    engine = opening(1000, jobs=1)
    repo.gate = threading.Event()
    engine.prefetch([make_unit(repo, "old", 1000)])
    assert repo.halfway.wait(20)
    repo.gate, gate = None, repo.gate
    new = make_unit(repo, "new", 1000)
    engine.prefetch([new])
    wait_for(engine, new)
    gate.set()
    assert repo.held_bytes() == 1000


def test_closing_ends_a_download_at_once(opening: Opening, repo: FakeRepo) -> None:
    """Closing cancels what hangs, leaves no thread and nothing charged, and is idempotent."""
    before = threading.active_count()
    engine = opening(1000)
    repo.gate = threading.Event()
    engine.prefetch([make_unit(repo, "sub-1", 1000)])
    assert repo.halfway.wait(20)
    engine.close()
    engine.close()
    assert threading.active_count() == before
    assert repo.held_bytes() == 0
    assert repo.closed == 1
    assert engine.statistics().fetched_bytes == 0
    assert opening(1000).statistics().used_bytes == 0


def test_a_forgotten_engine_closes_itself(root: Path, repo: FakeRepo) -> None:
    """Dropping the last reference ends threads and owner, soon, and not within a collection."""
    before = threading.active_count()
    engine = Engine(root, disk_budget=1000, open_repo=FakeRepo.reopen)
    engine.prefetch([make_unit(repo, "sub-1", 1000)])
    del engine
    wait_until(lambda: threading.active_count() == before)
    assert list((root / "ledger" / "owners").iterdir()) == []


class DeafRepo(FakeRepo):
    """A clone whose downloads cannot be cancelled."""

    def get(self, key: AnnexKey, **_: Any) -> Path:
        """Hang until the gate opens, whatever anybody says."""
        assert self.gate is not None
        self.halfway.set()
        self.gate.wait()
        raise FetchError(key.name)


def test_a_download_that_cannot_be_cancelled_counts_until_it_ends(
    opening: Opening, root: Path
) -> None:
    """Closing does not wait for it for long; its owner leaves when it has ended, and not before."""
    deaf = DeafRepo(root / "clones" / "deaf")
    deaf.gate = threading.Event()
    engine, other = opening(1000), opening(1000)
    engine.prefetch([make_unit(deaf, "sub-1", 1000)])
    assert deaf.halfway.wait(20)
    threads = [t for t in threading.enumerate() if t.name.startswith("tio-openneuro-fetch")]
    engine.close()
    assert other.statistics().used_bytes == 1000
    assert len(list((root / "ledger" / "owners").iterdir())) == 2
    deaf.gate.set()
    for thread in threads:
        thread.join()
    assert other.statistics().used_bytes == 0
    assert len(list((root / "ledger" / "owners").iterdir())) == 1


def test_a_lease_takes_the_thread_of_what_is_fetched_ahead(
    opening: Opening, repo: FakeRepo
) -> None:
    """Where every thread fetches ahead, the last to begin ends, and its unit comes again later."""
    engine = opening(4000, jobs=1)
    ahead, wanted = make_unit(repo, "sub-1", 1000), make_unit(repo, "sub-2", 1000)
    repo.gate = threading.Event()
    engine.prefetch([ahead])
    assert repo.halfway.wait(20)
    repo.gate = None
    held = threading.Event()
    threading.Thread(target=lambda: (read(engine, wanted), held.set()), daemon=True).start()
    assert held.wait(20)
    wait_for(engine, ahead)


def writes_of(engine: Engine, act: Callable[[], object]) -> int:
    """Return how often an act, and what it starts, writes to the ledger."""
    db = engine._here().ledger._db._connected()
    said: list[str] = []
    db.set_trace_callback(said.append)
    act()
    settle(engine)
    db.set_trace_callback(None)
    return said.count("BEGIN IMMEDIATE")


def test_looking_ahead_at_what_is_there_writes_nothing(opening: Opening, repo: FakeRepo) -> None:
    """Neither what we fetched nor what is the user's costs a transaction for each use."""
    engine = opening(100_000)
    units = [make_unit(repo, f"sub-{number}", 300, 200) for number in range(100)]
    engine.fetch(units)
    for number in range(100, 200):
        units.append(make_unit(repo, f"sub-{number}", 700))
        repo.place(units[-1].files[0].key)
    assert writes_of(engine, lambda: engine.prefetch([*units, *units], again=units)) <= 3
    assert engine.statistics().fetched_files == 200
    assert writes_of(engine, lambda: engine.prefetch([*units, *units], again=units)) == 0


def test_of_the_order_the_ledger_has_only_what_is_held(opening: Opening, repo: FakeRepo) -> None:
    """A long order does not make it large; what is held is there with its next use, and no more."""
    engine = opening(1000)
    units = [make_unit(repo, f"sub-{number}", 1000) for number in range(2000)]
    ledger = engine._here().ledger
    before_bytes = ledger.size_bytes()
    read(engine, units[7])
    engine.prefetch([*units, *units], again=units)
    settle(engine)
    # The first use took the room of the eighth.
    assert [use for _, _, use in ledger.held_after(0, 10)] == [1]
    assert ledger.size_bytes() - before_bytes < 500_000
    engine.prefetch([])
    assert [use for _, _, use in ledger.held_after(0, 10)] == [None]


def test_what_another_process_fetches_is_known_to_be_used(opening: Opening, repo: FakeRepo) -> None:
    """Whoever brings it, and whoever needs room: it stays before what is used later."""
    engine, other = opening(3000), opening(3000)
    soon, late, never = (make_unit(repo, name, 1000) for name in ("soon", "late", "never"))
    with engine._here().look_ahead.held():  # it fetches nothing itself
        engine.prefetch([soon, late])
        for unit in (soon, late, never):
            read(other, unit)
        ledger = engine._here().ledger
        wait_until(lambda: [use for _, _, use in ledger.held_after(0, 10)] == [1, 2, None])
        read(other, make_unit(repo, "new", 2000))
        assert [repo.locate(u.files[0].key) is not None for u in (soon, late, never)] == [
            True,
            False,
            False,
        ]
