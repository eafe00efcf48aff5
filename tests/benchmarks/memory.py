"""The queue's memory against its RAM budget: what an observer outside sees, over the base.

Every cell is a process of its own, whose consumer keeps nothing. The base is what it holds after
its imports; the peak is that of the kernel's own count of RSS (every page counts, also of files),
beside samples of PSS. Where the machine lets us, each process runs in a memory control group of
the size of its budget, which would kill it.
"""

from itertools import product
from pathlib import Path

from measure import median
from memory_cell import Cell, Reading, measure_cell, memory_cgroup, write_subjects
from rich.console import Console
from rich.table import Table

RUNS = 1
SIDES = (96, 160, 240, 320)
SAMPLERS = ("uniform", "weighted", "label")
WORKERS = ((1, "light"), (2, "heavy"), (4, "heavy"))
BUDGETS = (0, 1_000_000_000, 2_000_000_000, 4_000_000_000)
"""The first is the smallest that is accepted; more than that is given to four threads only."""


def measure(runs: int, folder: Path, console: Console) -> dict[str, object]:
    """Run it, print its table and return its figures."""
    for side in SIDES:
        write_subjects(folder / str(side), side)
    found: dict[Cell, list[Reading]] = {}
    for _ in range(runs):
        for side, sampler, (workers, transform) in product(SIDES, SAMPLERS, WORKERS):
            smallest = 0
            for budget in BUDGETS if (workers, transform) == WORKERS[-1] else BUDGETS[:1]:
                cell = Cell(side, sampler, workers, budget, transform)
                if 0 < budget < smallest:
                    continue
                reading = _run(cell, folder)
                smallest = smallest or reading.budget
                found.setdefault(cell, []).append(reading)
                _tell(cell, reading, console)
    table = Table(title=f"Highest peak of RSS over base, as a share of the budget; {runs} runs")
    for name in ("side", "sampler", "smallest budget, MB", "smallest", "1 GB", "2 GB", "4 GB"):
        table.add_column(name, justify="right")
    for side, sampler in product(SIDES, SAMPLERS):
        mine = {c: r for c, r in found.items() if (c.side, c.sampler) == (side, sampler)}
        smallest = median([r.budget for c, rs in mine.items() if c.budget == 0 for r in rs]) / 1e6
        shown = []
        for budget in BUDGETS:
            shares = [
                r.peak_rss / r.budget for c, rs in mine.items() if c.budget == budget for r in rs
            ]
            shown.append(f"{max(shares):.2f}" if shares else "-")
        table.add_row(str(side), sampler, f"{smallest:.0f}", *shown)
    console.print(table)
    readings = [r for rs in found.values() for r in rs]
    return {
        "cells": len(readings),
        "killed": sum(r.status != 0 for r in readings),
        "over": sum(r.peak_rss > r.budget for r in readings),
        "highest": max(r.peak_rss / r.budget for r in readings),
    }


def _run(cell: Cell, folder: Path) -> Reading:
    with memory_cgroup("benchmark") as cgroup:
        return measure_cell(cell, folder / str(cell.side), cgroup)


def _tell(cell: Cell, reading: Reading, console: Console) -> None:
    share = reading.peak_rss / reading.budget
    console.print(
        f"{cell.side}^3 {cell.sampler} {cell.transform} {cell.workers} threads: "
        f"budget {reading.budget / 1e6:.0f} MB, peak RSS {reading.peak_rss / 1e6:.0f}, "
        f"PSS {reading.peak_pss / 1e6:.0f}, charged {reading.charged / 1e6:.0f}, "
        f"{share:.2f}{' OVER' if share > 1 else ''}{' KILLED' if reading.status else ''}, "
        f"{reading.patches / max(reading.took_s, 0.1):.1f} patches/s"
    )
