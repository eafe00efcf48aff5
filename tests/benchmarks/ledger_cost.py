"""What the ledger costs a fetch while several processes use it.

Each process makes the transactions that the engine makes for one lease of absent content: it
asks for room, notes what was dropped for it and asks again, looks its content up, notes that it
arrived and ends the lease. The room is full, so every fetch evicts. Nothing is fetched or
dropped: a pause stands for the fetch, or there is none and all processes write all the time.
"""

import random
import time
from pathlib import Path

from measure import median, quantile
from rich.console import Console
from rich.table import Table
from workers import Nursery

from tio_openneuro.content import ContentId
from tio_openneuro.ledger.ledger import Ledger
from tio_openneuro.ledger.root import prepare_ledger_folder
from tio_openneuro.ledger.schema import Want

RUNS = 5
FETCHES = 100
PROCESSES = 8
ROOM = 64
WANTED_MS = 5.0
FETCH_S = 0.04
_SIZE_BYTES = 7_000_000
_STEPS = ("request", "dropped", "rows", "arrived", "end_lease")


def measure(runs: int, folder: Path, console: Console) -> dict[str, object]:
    """Run it, print its table and return its figures."""
    cases = {
        "1 process, 40 ms a fetch": (1, FETCH_S),
        f"{PROCESSES} processes, 40 ms a fetch": (PROCESSES, FETCH_S),
        f"{PROCESSES} processes, no pause": (PROCESSES, 0.0),
    }
    found: dict[str, list[list[dict[str, float]]]] = {name: [] for name in cases}
    results = folder / "results"
    results.mkdir()
    with Nursery(results) as nursery:
        for number in range(runs):
            for index, (name, (processes, pause_s)) in enumerate(cases.items()):
                root = folder / f"root-{number}-{index}"
                prepare_ledger_folder(root)
                workers = [
                    nursery.start(fetch_often, root, seed, FETCHES, pause_s)
                    for seed in range(processes)
                ]
                costs = [cost for worker in workers for cost in worker.result()]
                found[name].append(costs)
            console.print(f"run {number + 1} of {runs}")
    table = Table(
        title=f"Ledger: ms for one fetch and its eviction (steps: medians), median of {runs}"
    )
    for name in ("", "median", "p99", *(step for step in _STEPS)):
        table.add_column(name, justify="right" if name else "left")
    figures = {name: _figures(per_run) for name, per_run in found.items()}
    for name, values in figures.items():
        table.add_row(name, *(f"{value:.2f}" for value in values.values()))
    console.print(table)
    return {"runs": runs, "ms": figures, "wanted_median_ms": WANTED_MS}


def _figures(per_run: list[list[dict[str, float]]]) -> dict[str, float]:
    """Return the median over the runs of each run's median and p99, in ms."""
    sums = [[1000 * sum(cost.values()) for cost in costs] for costs in per_run]
    found = {
        "median": median([median(values) for values in sums]),
        "p99": median([quantile(values, 0.99) for values in sums]),
    }
    for step in _STEPS:
        found[step] = median([1000 * median([cost[step] for cost in costs]) for costs in per_run])
    return found


def fetch_often(root: Path, seed: int, fetches: int, pause_s: float) -> list[dict[str, float]]:
    """Do one process's part; return the seconds of each fetch by step."""
    ledger = Ledger(root / "ledger", ROOM * _SIZE_BYTES)
    pauses = random.Random(seed)
    try:
        costs = []
        for number in range(fetches + ROOM):
            content = ContentId("/clone", f"SHA256E-s{_SIZE_BYTES}--{seed}-{number}.nii.gz")
            cost = _fetch(ledger, content, pause_s * pauses.uniform(0.5, 1.5))
            # The room is full by then, whoever else fills it.
            if number >= ROOM:
                costs.append(cost)
        return costs
    finally:
        ledger.close()


def _fetch(ledger: Ledger, content: ContentId, pause_s: float) -> dict[str, float]:
    cost = dict.fromkeys(_STEPS, 0.0)
    ticket = 0
    while True:
        began_s = time.perf_counter()
        want = Want(content, _SIZE_BYTES, located=False)
        with ledger.transaction() as decide:
            outcome = decide.request(content.key, [want], ticket=ticket)
        asked_s = time.perf_counter()
        ticket = outcome.ticket
        cost["request"] += asked_s - began_s
        for victim in outcome.victims:
            ledger.dropped(victim)
        cost["dropped"] += time.perf_counter() - asked_s
        if outcome.granted:
            break
        if not outcome.victims:
            time.sleep(0.002)  # as the engine does: others are ahead in the queue
    time.sleep(pause_s)
    for step, transaction in (
        ("rows", lambda: ledger.rows([content])),
        ("arrived", lambda: ledger.arrived(content)),
        ("end_lease", lambda: ledger.end_lease(outcome.lease_id)),
    ):
        began_s = time.perf_counter()
        transaction()
        cost[step] = time.perf_counter() - began_s
    return cost
