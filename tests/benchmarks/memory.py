"""The queue's memory against its RAM budget: what an observer outside sees, over the base.

Every cell is a process of its own, whose consumer keeps nothing. The base is what it holds after
its imports; the peak is that of the kernel's own count of RSS (every page counts, also of files),
beside samples of PSS. Where the machine lets us, each process runs in a memory control group of
the size of its budget, which would kill it.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torchio as tio
from measure import median
from memory_cell import TRANSFORMS, Cell, Reading, measure_cell, memory_cgroup, write_subjects
from rich.console import Console
from rich.table import Table

from tio_openneuro.errors import RamBudgetError
from tio_openneuro.queue.queue import BudgetedQueue

RUNS = 1
Data = tuple[int, str, int]
"""Side, type and channels of the images."""
SIDES = (96, 160, 240, 320)
SAMPLERS = ("uniform", "weighted", "label")
WORKERS = ((1, "light"), (2, "heavy"), (4, "heavy"))
SMALLEST, REUSED = 0, -1
KINDS = (("int16", 1), ("float32", 1), ("float32", 2), ("float32", 4))
TOLD = ("light", "heavy", "nnU-Net-like")


def measure(runs: int, folder: Path, console: Console) -> dict[str, object]:
    """Run it, print its tables and return its figures."""
    smallest = tell_smallest(folder, console)
    readings = []
    for (data, cell), _ in product(_cells(), range(runs)):
        reading = run(data, cell, folder)
        readings.append(reading)
        tell(data, cell, reading, console)
    shares = [reading.peak_rss / reading.budget for reading in readings]
    return {
        **smallest,
        "cells": len(readings),
        "killed": sum(reading.status != 0 for reading in readings),
        "over": sum(share > 1 for share in shares),
        "highest": max(shares),
        "median": median(shares),
    }


def _cells() -> Iterator[tuple[Data, Cell]]:
    for transform, (kind, channels) in product(TRANSFORMS, KINDS):
        yield (96, kind, channels), Cell(96, "uniform", 1, SMALLEST, transform)
    for side, sampler, (workers, transform) in product(SIDES, SAMPLERS, WORKERS):
        for budget in (SMALLEST, REUSED):
            yield (side, "int16", 1), Cell(side, sampler, workers, budget, transform)


def tell_smallest(folder: Path, console: Console) -> dict[str, object]:
    """Return the smallest budgets that a queue accepts, window 64 and patches of 64**3, in MiB."""
    table = Table(title="Smallest accepted ram_budget, MiB; window 64, patch 64**3")
    for name in ("transforms", "128**3", "192**3", "256**3"):
        table.add_column(name, justify="right")
    found: dict[str, object] = {}
    for name in TOLD:
        found[name] = [_smallest_mib(name, side) for side in (128, 192, 256)]
        table.add_row(name, *map(str, found[name]))
    console.print(table)
    return found


def _smallest_mib(name: str, side: int) -> int:
    voxels = np.broadcast_to(np.zeros(1, np.int16), (1, side, side, side))
    label = np.broadcast_to(np.zeros(1, np.uint8), (1, side, side, side))
    subject = tio.Subject(t1=tio.ScalarImage(tensor=voxels), label=tio.LabelMap(tensor=label))
    transform = tio.Compose(TRANSFORMS[name](side))
    dataset = tio.SubjectsDataset([subject] * 16, transform=transform)
    low, high = 1, 2**16
    while low < high:
        middle = (low + high) // 2
        options = {"ram_budget": middle * 2**20, "start_background": False}
        try:
            BudgetedQueue(dataset, 64, 8, tio.UniformSampler(64), **options).close()
            high = middle
        except RamBudgetError:
            low = middle + 1
    return low


def run(data: Data, cell: Cell, folder: Path) -> Reading:
    """Run a cell in a process of its own, in a control group where that may be."""
    subjects = folder / "-".join(map(str, data))
    if not subjects.exists():
        write_subjects(subjects, *data)
    with memory_cgroup("benchmark") as cgroup:
        return measure_cell(cell, subjects, cgroup)


def tell(data: Data, cell: Cell, reading: Reading, console: Console) -> None:
    """Print a cell's line."""
    share = reading.peak_rss / reading.budget
    side, kind, channels = data
    console.print(
        f"{side}^3 {kind} x {channels} {cell.sampler} {cell.transform} {cell.workers} threads"
        f"{' reused' if cell.budget == REUSED else ''}: "
        f"budget {reading.budget / 2**20:.0f} MiB, peak RSS {reading.peak_rss / 2**20:.0f}, "
        f"PSS {reading.peak_pss / 2**20:.0f}, charged {reading.charged / 2**20:.0f}, "
        f"{share:.3f}{' OVER' if share > 1 else ''}{' KILLED' if reading.status else ''}, "
        f"{reading.patches} patches, {reading.took_s:.1f} s"
    )
