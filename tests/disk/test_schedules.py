"""The five rules against deadlock, under thousands of seeded schedules of the real ledger.

Ranks with loaders, prefetches, evictions, failing fetches, cancelled loads, kills, in-order
hand-over and a barrier are generators; a seeded scheduler picks who takes the next step. There
are no threads, no sleeps and no clock: a job that waits runs again once anything has changed, so
a schedule in which nobody can run is a deadlock, found exactly. The disk is a dictionary and the
ledger the real one, over one connection or, for some schedules, with one
for each rank. The same rules broken one by one do deadlock: the test can fail.
"""

import random
import uuid
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest
from fakes import decide

from tio_openneuro.content import ContentId
from tio_openneuro.ledger.database import LedgerDatabase, make_database
from tio_openneuro.ledger.ledger import Ledger
from tio_openneuro.ledger.schema import ID, SCHEMA_VERSION, TABLES, Answer, ContentState, Want

CHUNKS = 2
MOST_FAILURES = 3
MOST_STEPS = 5000
TABLE_NAMES = ("leased", "lease", "ticket", "upcoming", "content", "owner", "clone")
Step = Generator[bool, None, None]
"""A job; it yields True where it waits until something changes."""
GO, WAIT = False, True


class Broken(Enum):
    """Which rule is not kept."""

    NONE = "none"
    RETRY_GIVES_ROOM_BACK = "1"
    LEASE_WAITS_FOR_CONSUMER = "2"
    LEASE_WAITS_FOR_DISK = "2, 5"
    PREFETCH_IS_LEASED = "3"


class DeadlockError(Exception):
    """No job can take a step, and not all has been handed over."""


class SharedLedger(Ledger):
    """The real ledger but for how an owner enters: all of them on one connection."""

    def __init__(self, database: LedgerDatabase, folder: Path, budget_bytes: int) -> None:
        """Enter an owner."""
        self.folder = folder
        self._db = database
        self.owner_id = uuid.uuid4().hex
        self.budget_bytes = budget_bytes
        with database.writing() as db:
            self._enter(db, auto=False)

    def close(self) -> None:
        """Leave; the database is another schedule's next."""
        self.lock.remove()


class World:
    """A disk, a budget, and how ledgers are opened."""

    def __init__(self, folder: Path, *, shared: bool) -> None:
        """Keep the owners' locks and the database in a folder."""
        self.folder = folder / "schedules"
        (self.folder / "owners").mkdir(parents=True)
        self._database = None
        if shared:
            path = self.folder / "shared.sqlite"
            make_database(path, TABLES, SCHEMA_VERSION)
            self._database = LedgerDatabase(path, SCHEMA_VERSION)

    def open(self, budget_bytes: int) -> Ledger:
        """Open a ledger as a process does that starts."""
        if self._database is None:
            return Ledger(self.folder, budget_bytes)
        return SharedLedger(self._database, self.folder, budget_bytes)

    def close(self) -> None:
        """Close the database."""
        if self._database is not None:
            self._database.close()

    def clear(self) -> None:
        """Forget everything, for the next schedule."""
        if self._database is not None:
            with self._database.writing() as db:
                for name in TABLE_NAMES:
                    db.execute(f"DELETE FROM {name}")
                db.execute("UPDATE sums SET peak_bytes = 0")


@dataclass(eq=False)
class Flight:
    """A fetch under way in one process."""

    content: ContentId
    ended: bool = False


@dataclass(eq=False)
class Job:
    """A job of a process, and when it runs again."""

    rank: int
    steps: Step
    weight: float
    seen: int = -1


@dataclass(eq=False)
class Rank:
    """One training process: what it hands over, in which order, and how far it is."""

    number: int
    order: list[int]
    ledger: Ledger
    handed_over: int = 0
    begun: int = 0
    loaded: set[int] = field(default_factory=set)
    kept_leases: dict[int, int] = field(default_factory=dict)
    prefetch_leases: dict[int, int] = field(default_factory=dict)


class Schedule:
    """One simulated training, from its seed."""

    def __init__(self, world: World, seed: int, broken: Broken, *, tight: bool) -> None:
        """Draw ranks, units, sizes, the budget, and how often things go wrong.

        Args:
            world: Disk and ledger, cleared.
            seed: Everything follows from it.
            broken: Rule that is not kept.
            tight: Whether room is short and hands are many, so that every rule matters.
        """
        self.rng = rng = random.Random(seed)
        self.world, self.broken = world, broken
        self.counts: Counter[str] = Counter()
        self.events = 0
        self.dead: list[Ledger] = []
        self.jobs: list[Job] = []
        self.disk: dict[ContentId, int] = {}
        keys = [ContentId("/clone", f"key-{place}") for place in range(rng.randint(3, 7))]
        self.sizes = {key: rng.choice((1, 1, 2, 4, 10)) for key in keys}
        self.units = [tuple(rng.sample(keys, rng.randint(1, 3))) for _ in range(rng.randint(2, 4))]
        self.buffer, self.loaders = rng.randint(1, 4), rng.randint(1, 3)
        self.fail_share = rng.choice((0.0, 0.1, 0.3, 0.5))
        self.cancel_share = rng.choice((0.0, 0.0, 0.02, 0.1))
        self.kills = rng.choice((0, 0, 1, 2))
        self.collective = rng.random() < 0.7
        self.in_lockstep = rng.choice((1, 1, 2))
        self.prefetches, self.drops = rng.random() < 0.7, rng.random() < 0.3
        self.prepares = rng.random() < 0.3
        # What was evicted again is prefetched later than what follows it.
        self.holes = rng.random() < 0.5
        self.uneven = rng.random() < 0.5
        ranks = rng.choice((1, 2, 2, 3))
        if tight:
            # Nothing shared, and no process that dies or load that ends early and frees others.
            names = [(f"{place}a", f"{place}b") for place in range(6)]
            self.units = [tuple(ContentId("/clone", name) for name in pair) for pair in names]
            self.sizes = {key: rng.choice((2, 3, 4)) for unit in self.units for key in unit}
            self.loaders, self.fail_share, self.cancel_share, self.kills = 3, 0.5, 0.0, 0
            self.buffer = rng.choice((1, 4))
            self.prefetches = self.prepares = self.collective = self.holes = True
        largest = max(sum(self.sizes[key] for key in unit) for unit in self.units)
        self.budget_bytes = int(largest * rng.choice((1.5, 2) if tight else (1, 1, 1.5, 2, 3)))
        self.ranks: list[Rank] = []
        for number in range(ranks):
            order = rng.sample(range(len(self.units)), len(self.units))
            self.ranks.append(Rank(number, order, world.open(self.budget_bytes)))
            self.begin(self.ranks[-1])
        self.now = self.moment()

    # The scheduler

    def run(self) -> Counter[str]:
        """Let jobs take steps until everything is handed over; return what happened how often."""
        try:
            for step in range(MOST_STEPS):
                if all(rank.handed_over == len(rank.order) for rank in self.ranks):
                    self.counts["steps"] = step
                    return self.counts
                self.take_a_step()
                before, self.now = self.now, self.moment()
                if self.now != before:
                    self.check()
            message = f"{MOST_STEPS} steps without an end"
            raise DeadlockError(message)
        finally:
            for ledger in [rank.ledger for rank in self.ranks] + self.dead:
                ledger.close()

    def take_a_step(self) -> None:
        """Have one job that can run do so; processes die and are reaped now and then."""
        ready = [job for job in self.jobs if job.seen != self.now]
        if self.dead and (not ready or self.rng.random() < 0.02):
            self.reap()
            return
        if self.kills and self.rng.random() < 0.01:
            self.kills -= 1
            self.kill(self.rng.choice(self.ranks))
            return
        if not ready:
            waiting = self.ranks[0].ledger.queue()
            message = f"handed over {[r.handed_over for r in self.ranks]}, waiting: {waiting}"
            raise DeadlockError(message)
        weights = [job.weight for job in ready] if self.uneven else None
        job = self.rng.choices(ready, weights)[0]
        try:
            waits = next(job.steps)
        except StopIteration:
            self.jobs.remove(job)
            self.events += 1
            return
        # What it changed itself is no reason to run again.
        job.seen = self.moment() if waits else -1

    def moment(self) -> int:
        """Return what changes whenever a row or anything here does."""
        ledgers = [rank.ledger for rank in self.ranks]
        if isinstance(ledgers[0], SharedLedger):
            ledgers = ledgers[:1]
        return self.events + sum(ledger._db._connected().total_changes for ledger in ledgers)

    def spawn(self, rank: Rank, steps: Step) -> None:
        """Add a job to a process."""
        weight = 10 ** self.rng.uniform(-2, 0) if self.uneven else 1.0
        self.jobs.append(Job(rank.number, steps, weight))

    def check(self) -> None:
        """At every step: what lies on disk is charged, and what is charged within the budget."""
        used_bytes = self.ranks[0].ledger._db.read("SELECT SUM(size_bytes) FROM content")[0][0]
        assert sum(self.disk.values()) <= (used_bytes or 0) <= self.budget_bytes

    def reap(self) -> None:
        """A live process finds that others died."""
        found = self.rng.choice(self.ranks).ledger.reap()
        assert {owner.owner_id for owner in found} <= {ledger.owner_id for ledger in self.dead}
        self.dead.clear()
        self.counts["reaped"] += len(found)
        self.events += 1

    def kill(self, rank: Rank) -> None:
        """A process ends in the middle of anything, and is started again where it had come to."""
        self.jobs = [job for job in self.jobs if job.rank != rank.number]
        dead = rank.ledger
        # As if its id had been given to another process since.
        with dead._db.writing() as db:
            db.execute("UPDATE owner SET created_s = 0 WHERE name = ?", (dead.owner_id,))
        dead.lock.let_go()
        if not isinstance(dead, SharedLedger):
            self.events += dead._db._connected().total_changes
            dead._db.close()
        self.dead.append(dead)
        rank.ledger = self.world.open(self.budget_bytes)
        if not isinstance(rank.ledger, SharedLedger):
            self.dead.clear()  # who starts reaps
        self.counts["killed"] += 1
        self.begin(rank)

    # The jobs of a process

    def begin(self, rank: Rank) -> None:
        """Start a process's jobs."""
        rank.begun = rank.handed_over
        rank.loaded, rank.kept_leases, rank.prefetch_leases = set(), {}, {}
        uses = [
            (place + 1, str(place), content)
            for place in range(rank.handed_over, len(rank.order))
            for content in self.units[rank.order[place]]
        ]
        decide(rank.ledger).set_order(uses, replace=True, reached=rank.handed_over)
        self.spawn(rank, self.settle(rank))
        self.spawn(rank, self.consume(rank))
        for _ in range(self.loaders):
            self.spawn(rank, self.load_all(rank))
        if self.prefetches:
            self.spawn(rank, self.prefetch(rank))

    def settle(self, rank: Rank) -> Step:
        """Finish what the dead began."""
        rows = rank.ledger.unfinished()
        for row in rows:
            whole = self.disk.get(row.content) == row.size_bytes
            if row.state is ContentState.RESERVED and whole:
                rank.ledger.arrived(row.content)
        dropping = [row.content for row in rows if row.state is ContentState.DROPPING]
        yield GO
        marked = decide(rank.ledger).give_up(dropping)
        yield from self.drop(rank, [row.content for row in marked])

    def consume(self, rank: Rank) -> Step:
        """Hand over in order, no rank ahead of another by more than a step of training."""
        for place in range(rank.handed_over, len(rank.order)):
            while place not in rank.loaded or not self.others_came_along(rank, place):
                yield WAIT
            rank.handed_over = place + 1
            self.events += 1
            if place in rank.kept_leases:
                rank.ledger.end_lease(rank.kept_leases.pop(place))
            yield GO
            if self.drops:
                unit = self.units[rank.order[place]]
                alone = [c for c in unit if not rank.ledger.needed_by_others(c, str(place))]
                marked = decide(rank.ledger).give_up(alone)
                yield from self.drop(rank, [row.content for row in marked])

    def others_came_along(self, rank: Rank, place: int) -> bool:
        """Return whether the collective of this step, if there is one, can end."""
        step = place - place % self.in_lockstep
        return not self.collective or all(
            other.handed_over >= min(step, len(other.order)) for other in self.ranks
        )

    def load_all(self, rank: Rank) -> Step:
        """Load one unit after the other: first buffer room, then the lease."""
        while rank.begun < len(rank.order):
            if rank.begun >= rank.handed_over + self.buffer:
                yield WAIT
                continue
            place = rank.begun
            rank.begun += 1
            yield GO
            while not (yield from self.load(rank, place)):
                self.counts["loaded again"] += 1
            rank.loaded.add(place)
            self.events += 1
            yield GO

    def load(self, rank: Rank, place: int) -> Generator[bool, None, bool]:
        """Lease, wait for the content, decode, end the lease; return whether it came to that."""
        ledger, unit = rank.ledger, self.units[rank.order[place]]
        lease = yield from self.acquire(rank, str(place), unit, position=place + 1)
        if lease is None:
            return False
        if place in rank.prefetch_leases:
            ledger.end_lease(rank.prefetch_leases.pop(place))
        arrived = yield from self.arrive(rank, unit, lease)
        if arrived:
            yield GO
            assert all(self.disk[content] == self.sizes[content] for content in unit)
            self.counts["decoded"] += 1
            if self.prepares:
                yield from self.prepare(rank, place)
        if arrived and self.broken is Broken.LEASE_WAITS_FOR_CONSUMER:
            rank.kept_leases[place] = lease.lease_id
        else:
            ledger.end_lease(lease.lease_id)
        return arrived

    def acquire(
        self, rank: Rank, name: str, unit: Iterable[ContentId], *, position: int | None = None
    ) -> Generator[bool, None, Answer | None]:
        """Reserve all or none, in the queue; None where the load is cancelled meanwhile."""
        ticket = 0
        while True:
            outcome = decide(rank.ledger).request(
                name, self.wants(unit), ticket=ticket, position=position
            )
            if outcome.granted:
                assert not outcome.foreign
                return outcome
            ticket = outcome.ticket
            self.counts["queued"] += 1
            if outcome.victims:
                yield from self.drop(rank, outcome.victims)
            elif self.chance(self.cancel_share):
                rank.ledger.withdraw(ticket)
                self.counts["withdrawn"] += 1
                return None
            else:
                yield WAIT

    def arrive(
        self, rank: Rank, unit: tuple[ContentId, ...], lease: Answer
    ) -> Generator[bool, None, bool]:
        """Wait for leased content, and fetch what nobody fetches; False where it is cancelled."""
        ledger = rank.ledger
        cancel: list[bool] = []
        flights = [self.fly(rank, content, cancel) for content in sorted_ids(lease.fetch)]
        while True:
            rows = ledger.rows(unit)
            if self.broken is not Broken.RETRY_GIVES_ROOM_BACK:
                assert rows.keys() == set(unit)
            for content, row in rows.items():
                if row.state is ContentState.PRESENT:
                    assert self.disk[content] == row.size_bytes
                elif not row.owner_id and decide(ledger).claim(content, absent=False):
                    flights.append(self.fly(rank, content, cancel))
            present = [c for c, row in rows.items() if row.state is ContentState.PRESENT]
            if len(present) == len(unit):
                return True
            if not cancel and self.chance(self.cancel_share):
                cancel.append(True)
                self.counts["cancelled"] += 1
                while not all(flight.ended for flight in flights):
                    yield WAIT
                return False
            yield WAIT

    def prepare(self, rank: Rank, place: int) -> Step:
        """Try to keep a prepared volume; it is a convenience, so it never waits."""
        content = ContentId("/prepared", f"{rank.order[place]}")
        self.sizes.setdefault(content, 1)
        ticket = 0
        while True:
            outcome = decide(rank.ledger).request("prepared", self.wants([content]), ticket=ticket)
            if outcome.granted:
                if outcome.fetch:
                    yield GO
                    self.disk[content] = self.sizes[content]
                    rank.ledger.arrived(content)
                rank.ledger.end_lease(outcome.lease_id)
                self.counts["prepared"] += 1
                return
            ticket = outcome.ticket
            yield from self.drop(rank, outcome.victims)
            if self.broken is not Broken.LEASE_WAITS_FOR_DISK:
                rank.ledger.withdraw(ticket)
                return
            if not outcome.victims:
                yield WAIT

    # Fetches

    def fly(self, rank: Rank, content: ContentId, cancel: list[bool] | None) -> Flight:
        """Start a fetch; a prefetch has no list by which its lease could cancel it."""
        flight = Flight(content)
        self.spawn(rank, self.fetch(rank, flight, cancel))
        return flight

    def fetch(self, rank: Rank, flight: Flight, cancel: list[bool] | None) -> Step:
        """Fetch in chunks, retried in the same room; the ledger hears how it ended."""
        ledger, content = rank.ledger, flight.content
        size_bytes = self.sizes[content]
        failures = 0
        done_bytes = self.disk.get(content, 0)
        while done_bytes < size_bytes:
            yield GO
            if cancel or (cancel is None and ledger.cancelled(content)):
                self.counts["fetches ended early"] += 1
                break
            if failures < MOST_FAILURES and self.chance(self.fail_share):
                failures += 1
                self.counts["retries"] += 1
                if self.broken is Broken.RETRY_GIVES_ROOM_BACK and cancel is not None:
                    if not (yield from self.ask_anew(rank, content)):
                        flight.ended = True
                        return
                    done_bytes = 0
                continue
            done_bytes = min(size_bytes, done_bytes + -(-size_bytes // CHUNKS))
            self.disk[content] = done_bytes
            self.events += 1
        yield GO
        if done_bytes == size_bytes:
            ledger.arrived(content)
            self.counts["fetched"] += 1
        else:
            self.disk.pop(content, None)
            yield GO
            ledger.failed(content, empty=True)
        flight.ended = True
        self.events += 1

    def ask_anew(self, rank: Rank, content: ContentId) -> Generator[bool, None, bool]:
        """Break rule 1: give a file's room back, and queue for it while the others are held.

        Returns whether it is ours to fetch still.
        """
        with rank.ledger._db.writing() as db:
            found = db.execute(f"SELECT lease FROM leased WHERE content = {ID}", content)
            leases = [row[0] for row in found]
            db.execute(f"DELETE FROM leased WHERE content = {ID}", content)
        self.disk.pop(content, None)
        rank.ledger.failed(content, empty=True)
        ticket = 0
        while True:
            outcome = decide(rank.ledger).request("again", self.wants([content]), ticket=ticket)
            if outcome.granted:
                break
            ticket = outcome.ticket
            yield from self.drop(rank, outcome.victims)
            if not outcome.victims:
                yield WAIT
        with rank.ledger._db.writing() as db:
            for lease in leases:
                db.execute(
                    f"INSERT OR IGNORE INTO leased SELECT id, {ID} FROM lease WHERE id = ?",
                    (*content, lease),
                )
        rank.ledger.end_lease(outcome.lease_id)
        return content in outcome.fetch

    def prefetch(self, rank: Rank) -> Step:
        """Fetch ahead along the order, in room that nobody needs sooner, without a lease."""
        places = list(range(rank.handed_over, len(rank.order)))
        if self.holes:
            self.rng.shuffle(places)
        for place in places:
            unit = self.units[rank.order[place]]
            while place >= rank.begun:
                steps = place + 1 - rank.begun
                outcome = decide(rank.ledger).request_ahead(self.wants(unit), steps)
                if outcome.granted:
                    if self.broken is Broken.PREFETCH_IS_LEASED:
                        lease = decide(rank.ledger).request(str(place), self.wants(unit))
                        assert lease.granted
                        rank.prefetch_leases[place] = lease.lease_id
                    for content in sorted_ids(outcome.fetch):
                        self.fly(rank, content, None)
                        self.counts["prefetched"] += 1
                    break
                if outcome.victims:
                    yield from self.drop(rank, outcome.victims)
                else:
                    yield WAIT
            yield GO

    # The disk

    def wants(self, unit: Iterable[ContentId]) -> list[Want]:
        """Look at the disk, as whoever asks for room does."""
        return [
            Want(content, self.sizes[content], self.disk.get(content) == self.sizes[content])
            for content in unit
        ]

    def drop(self, rank: Rank, victims: Iterable[ContentId]) -> Step:
        """Drop, disk first, ledger second."""
        for content in victims:
            yield GO
            self.disk.pop(content, None)
            self.events += 1
            yield GO
            rank.ledger.dropped(content)
            self.counts["evicted"] += 1

    def chance(self, share: float) -> bool:
        """Draw whether something goes wrong now."""
        return self.rng.random() < share


def sorted_ids(contents: Iterable[ContentId]) -> list[ContentId]:
    """Return contents in an order that is the same in every run."""
    return sorted(contents, key=lambda content: content.key)


def campaign(
    world: World, seeds: Iterable[int], broken: Broken = Broken.NONE, *, tight: bool = False
) -> tuple[Counter[str], list[int]]:
    """Run schedules; return what happened in all of them, and the seeds that deadlocked."""
    total: Counter[str] = Counter()
    deadlocked = []
    for seed in seeds:
        world.clear()
        try:
            total += Schedule(world, seed, broken, tight=tight).run()
        except DeadlockError:
            deadlocked.append(seed)
    return total, deadlocked


HAPPENS = ("retries", "queued", "evicted", "prefetched", "cancelled", "withdrawn", "killed")


@pytest.mark.parametrize(
    "seeds", [range(1000), pytest.param(range(1000, 60_000), marks=pytest.mark.slow)], ids=len
)
@pytest.mark.timeout(3600)
def test_every_schedule_completes_within_the_budget(tmp_path: Path, seeds: range) -> None:
    """With the rules kept nobody deadlocks, whoever is slow, fails, is cancelled or is killed."""
    with closing(World(tmp_path / "world", shared=True)) as world:
        total, deadlocked = campaign(world, seeds)
    assert deadlocked == []
    # Everything that the rules are about did happen, often.
    assert {name: total[name] for name in HAPPENS if total[name] < len(seeds) // 10} == {}


def test_schedules_over_separate_connections_complete(tmp_path: Path) -> None:
    """The same holds where every rank has a database connection of its own, on files."""
    deadlocked = []
    for seed in range(60):
        world = World(tmp_path / str(seed), shared=False)
        deadlocked += campaign(world, [seed])[1]
    assert deadlocked == []


@pytest.mark.parametrize("broken", list(Broken), ids=lambda rule: rule.name)
def test_breaking_a_rule_deadlocks(tmp_path: Path, broken: Broken) -> None:
    """Where room is tight no schedule deadlocks with the rules, and many without any of them."""
    seeds = range(50)
    with closing(World(tmp_path / "world", shared=True)) as world:
        _, deadlocked = campaign(world, seeds, broken, tight=True)
    if broken is Broken.NONE:
        assert deadlocked == []
    else:
        assert len(deadlocked) >= len(seeds) // 10
