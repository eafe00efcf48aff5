"""What the ledger and looking ahead cost with the number of rows, owners and subjects.

Processor time of one process, not seconds: each call of the ledger at several numbers of rows
and with many owners that all know an order, and epochs of leases with the look-ahead running, on
a clone whose remote is arithmetic. Nothing is decoded.
"""

import itertools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from fakes import FakeRepo, make_key
from measure import median
from rich.console import Console
from rich.table import Table

from tio_openneuro.content import AnnexKey, ContentFile, ContentId, ContentUnit
from tio_openneuro.disk.engine import Engine
from tio_openneuro.ledger.ledger import Ledger
from tio_openneuro.ledger.root import prepare_ledger_folder
from tio_openneuro.ledger.schema import Want

RUNS = 1
ROWS = (1_000, 10_000, 100_000)
OWNERS = 64
SUBJECTS = (1_000, 4_000, 10_000)
SHARES = (0.25, 1.0)
CALLS = 50
WANTED_MS = 5.0
WANTED_RATIO = 1.5
WANTED_LEDGER_BYTES = 5_000_000
_SIZE_BYTES = 1000
_FILES = 2
_AT_ONCE = 1000


def measure(runs: int, folder: Path, console: Console) -> dict[str, object]:
    """Run it, print its tables and return its figures."""
    return {
        "runs": runs,
        "calls_ms": _measure_calls(runs, folder, console),
        "epochs": _measure_epochs(folder, console),
        "empty": _measure_empty(folder, console),
    }


# Calls


def _measure_calls(runs: int, folder: Path, console: Console) -> dict[str, dict[str, float]]:
    cases = {f"{rows:,}": (rows, 1) for rows in ROWS} | {
        f"{ROWS[1]:,}, {OWNERS} owners": (ROWS[1], OWNERS)
    }
    found: dict[str, dict[str, float]] = {}
    for name, (rows, owners) in cases.items():
        costs: dict[str, list[float]] = {}
        for number in range(runs):
            with _Filled(folder / f"calls-{rows}-{owners}-{number}", rows, owners) as filled:
                for call, values in filled.costs().items():
                    costs.setdefault(call, []).extend(values)
        found[name] = {call: median(values) for call, values in costs.items()}
        console.print(f"calls at {name} rows: done")
    table = Table(title=f"Ledger: ms of processor time of one call, medians of {CALLS * runs}")
    for column in ("", *cases, "last / first"):
        table.add_column(column, justify="right" if column else "left")
    names = list(cases)
    for call in found[names[0]]:
        values = [found[name][call] for name in names]
        table.add_row(call, *(f"{value:.2f}" for value in values), f"{values[2] / values[0]:.2f}")
    console.print(table)
    return found


def _content(name: str) -> ContentId:
    return ContentId("/clone", make_key(name, _SIZE_BYTES).name)


class _Filled:
    """A ledger full of present content, whose owners all know when they use it next."""

    def __init__(self, root: Path, rows: int, owners: int) -> None:
        self._folder = prepare_ledger_folder(root)
        self._contents = [_content(str(number)) for number in range(rows)]
        self._fresh = (_content(f"new {number}") for number in itertools.count())
        self._random = random.Random(0)
        self._ledger = Ledger(self._folder, rows * _SIZE_BYTES)
        self._others = [Ledger(self._folder, rows * _SIZE_BYTES) for _ in range(owners - 1)]
        for start in range(0, rows, _AT_ONCE):
            part = self._contents[start : start + _AT_ONCE]
            with self._ledger.transaction() as decide:
                for content in part:
                    decide.adopt(Want(content, _SIZE_BYTES, located=True))
        for owner in (self._ledger, *self._others):
            order = self._random.sample(self._contents, rows)
            for start in range(0, rows, _AT_ONCE):
                part = order[start : start + _AT_ONCE]
                with owner.transaction() as decide:
                    uses = [(start + n + 1, f"unit {start + n}", c) for n, c in enumerate(part)]
                    decide.set_order(uses, replace=False, reached=0)
        self._position = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for owner in (self._ledger, *self._others):
            owner.close()

    def costs(self) -> dict[str, list[float]]:
        """Return the milliseconds of each call, by its name."""
        found: dict[str, list[float]] = {}

        def timed(name: str, call: Callable[[], object]) -> object:
            began_s = time.process_time()
            result = call()
            found.setdefault(name, []).append(1000 * (time.process_time() - began_s))
            return result

        ledger = self._ledger
        for _ in range(CALLS):
            self._one_fetch(timed)
            timed("held_after", lambda: ledger.held_after(len(self._contents), 500))
            timed("holdings", ledger.holdings)
            timed("changes", ledger.changes)
            timed("queue", ledger.queue)
            timed("clones", ledger.clones)
            timed("unfinished", ledger.unfinished)
            timed("binding", ledger.binding)
            timed("reap, as a wait does", lambda: ledger.reap(ledger.other_owners()[:8]))
            timed("reap, when one opens", ledger.reap)
        return found

    def _one_fetch(self, timed: Callable[[str, Callable[[], object]], object]) -> None:
        """Do what one fetch with its eviction does, and one lease of what is there."""
        ledger = self._ledger
        present = self._contents[self._position]
        self._position += 1

        def request(content: ContentId, ticket: int = 0, located: bool = False):
            with ledger.transaction() as decide:
                return decide.request(
                    "unit",
                    [Want(content, _SIZE_BYTES, located)],
                    ticket=ticket,
                    position=self._position,
                )

        answer = timed("request, there", lambda: request(present, located=True))
        timed("rows", lambda: ledger.rows([present]))
        timed("cancelled", lambda: ledger.cancelled(present))
        timed("needed_by_others", lambda: ledger.needed_by_others(present, "unit"))
        if answer.granted:
            timed("end_lease", lambda: ledger.end_lease(answer.lease_id))
        content = next(self._fresh)
        asked = timed("request, evicts", lambda: request(content))
        for victim in asked.victims:
            timed("dropped", lambda victim=victim: ledger.dropped(victim))
        granted = timed("request, reserves", lambda: request(content, asked.ticket))
        timed("arrived", lambda: ledger.arrived(content))
        ledger.end_lease(granted.lease_id)

        def ahead(content: ContentId):
            with ledger.transaction() as decide:
                return decide.request_ahead([Want(content, _SIZE_BYTES, located=False)], 1)

        other = next(self._fresh)
        asked = timed("request_ahead, evicts", lambda: ahead(other))
        for victim in asked.victims:
            ledger.dropped(victim)
        timed("request_ahead, reserves", lambda: ahead(other))
        timed("failed", lambda: ledger.failed(other, empty=True))

        def give_up():
            with ledger.transaction() as decide:
                return decide.give_up([content])

        timed("give_up", give_up)
        timed("kept", lambda: ledger.kept(content, refused=False, whole=True))

        def reach():
            with ledger.transaction() as decide:
                decide.reach(self._position)

        timed("reach", reach)


# Epochs


class _Remote(FakeRepo):
    """A clone whose content is nothing: the file's size is right, and no byte of it was written."""

    def get(self, key: AnnexKey, **_: object) -> Path:
        """Make a file of the size."""
        path = self.object_path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(key.size_bytes or 0)
        return path


def _units(repo: FakeRepo, count: int) -> list[ContentUnit]:
    return [
        ContentUnit(
            f"sub-{n:05}",
            tuple(
                ContentFile(repo, make_key(f"{n}-{file}", _SIZE_BYTES), f"sub-{n:05}/{file}")
                for file in range(_FILES)
            ),
        )
        for n in range(count)
    ]


def _reopen(path: Path, remotes: tuple[str, ...]) -> FakeRepo:
    return _Remote(path)


@contextmanager
def _training(
    root: Path, subjects: int, share: float
) -> Iterator[tuple[Engine, list[ContentUnit]]]:
    units = _units(_Remote(root / "clones" / "ds1"), subjects)
    budget_bytes = int(share * subjects * _FILES * _SIZE_BYTES)
    with Engine(root, disk_budget=budget_bytes, jobs=2, open_repo=_reopen) as engine:
        yield engine, units


def _measure_epochs(folder: Path, console: Console) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {}
    for share in SHARES:
        table = Table(title=f"An epoch (second of two), {share:.0%} of the bytes; a subject")
        for column in ("subjects", "CPU ms", "of that publishing", "fetched", "ledger MB"):
            table.add_column(column, justify="right")
        rows = []
        for subjects in SUBJECTS:
            row = _epoch(folder / f"epoch-{share}-{subjects}", subjects, share)
            rows.append(row)
            table.add_row(f"{subjects:,}", *(f"{value:.3f}" for value in row.values()))
        console.print(table)
        found[f"{share:.0%}"] = rows
    return found


def _epoch(root: Path, subjects: int, share: float) -> dict[str, float]:
    """Return what the second of two epochs cost, by subject."""
    with _training(root, subjects, share) as (engine, units):
        shuffler = random.Random(0)
        orders = [shuffler.sample(units, subjects) for _ in range(4)]
        for epoch in range(2):
            before_files = engine.statistics().fetched_files
            began_s = time.process_time()
            engine.prefetch([*orders[epoch], *orders[epoch + 1]], again=units)
            published_s = time.process_time() - began_s
            for unit in orders[epoch]:
                with engine.lease(unit):
                    pass
                engine.release(unit, drop=False)
            took_s = time.process_time() - began_s
            files = engine.statistics().fetched_files - before_files
        size = sum(path.stat().st_size for path in (root / "ledger").glob("ledger.sqlite*"))
        return {
            "ms": 1000 * took_s / subjects,
            "publish_ms": 1000 * published_s / subjects,
            "fetched": files / _FILES / subjects,
            "ledger_mb": size / 1e6,
        }


def _measure_empty(folder: Path, console: Console) -> dict[str, float]:
    """Return the ledger's MB, nothing fetched, with one owner and with many that know an order."""
    root = folder / "empty"
    found = {}
    subjects = SUBJECTS[-1]
    with _training(root, subjects, 1.0) as (_, units):
        for owners in (1, OWNERS):
            # Smaller than any unit.
            others = [
                Engine(root, disk_budget=_SIZE_BYTES, open_repo=_reopen) for _ in range(owners)
            ]
            for other in others:
                other.prefetch([*units, *units], again=units)
            size = sum(path.stat().st_size for path in (root / "ledger").glob("ledger.sqlite*"))
            found[f"{owners} owners"] = size / 1e6
            for other in others:
                other.close()
    console.print(f"ledger MB at {subjects:,} subjects, nothing fetched: {found}")
    return found
