"""Bytes fetched again in each epoch after the first, against the least that is possible.

Real: the loopback's content server counts what it sent (cancelled downloads included), an
observer in a process of its own sees what is held. A fresh permutation each epoch, as training
does. Beside it, on the very same orders: what eviction of the longest unused and dropping at
once would fetch, simulated without any prefetch, which flatters them.
"""

import itertools
import multiprocessing
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchio as tio
from faulty import LoopbackOpenNeuro
from heads import open_heads, write_heads
from measure import median
from picture import draw_lines
from rich.console import Console
from rich.table import Table
from torch import distributed
from torch.utils.data.distributed import DistributedSampler

import tio_openneuro as tno
from tio_openneuro.demo.watch import DiskWatch
from tio_openneuro.queue.order import Planner

RUNS = 5
UNITS = 40
EPOCHS = 6
SHARES = (0.10, 0.25, 0.50, 0.75, 1.00)
RANKS = (1, 2)
WANTED = 1.02
_SIDES = {"equal": (64, 64), "4:1": (64, 16)}
_SAMPLES = 4
_WINDOW_PATCHES = 16
_BATCH = 4
STEP_S = 0.05


@dataclass(frozen=True)
class Cell:
    """What one training of some epochs cost.

    Attributes:
        fetched_share: Bytes fetched per epoch after the first, over the dataset's.
        peak_share: Most bytes seen held, over the budget.
    """

    fetched_share: float
    peak_share: float


def measure(runs: int, folder: Path, console: Console) -> dict[str, object]:
    """Run it, print its tables and return its figures."""
    found: dict[str, Any] = {"runs": runs, "units": UNITS, "epochs": EPOCHS, "wanted": WANTED}
    with LoopbackOpenNeuro(folder / "openneuro") as server:
        for name, sides in _SIDES.items():
            accession = f"ds91000{len(found)}"
            shapes = [(64, 64, sides[number % 2]) for number in range(UNITS)]
            heads = write_heads(folder / accession, shapes, suffix=".nii")
            server.publish_folder(accession, heads)
            for ranks in RANKS:
                title = f"{name}, {ranks} rank{'s' * (ranks > 1)}"
                found[title] = _compare(
                    server, accession, folder / f"{accession}-{ranks}", ranks, runs, console, title
                )
    draw_lines(
        "eviction",
        {
            title: {
                line: (SHARES, [row[line] for row in rows])
                for line in ("floor", "ours", "longest unused", "drop at once")
            }
            for title, rows in found.items()
            if isinstance(rows, list)
        },
        x="disk budget / dataset",
        y="fetched per epoch / dataset",
    )
    return found


def _compare(
    server: LoopbackOpenNeuro,
    accession: str,
    folder: Path,
    ranks: int,
    runs: int,
    console: Console,
    title: str,
) -> list[dict[str, float]]:
    rows = []
    table = Table(title=f"Fetched per epoch after the first / dataset; {title}; median of {runs}")
    for name in ("budget", "floor", "ours", "ours / floor", "max", "longest unused",
                 "drop at once", "peak / budget"):  # fmt: skip
        table.add_column(name, justify="right")
    with open_heads(accession, folder / "sizes", "1 GB") as dataset:
        sizes = [row.content.size_bytes for row in dataset._rows]
        total_bytes = dataset.nbytes
    for share in SHARES:
        budget_bytes = int(share * total_bytes)
        began_s = time.perf_counter()
        cells = [
            _train(server, accession, folder / f"{share}-{seed}", budget_bytes, ranks, seed)
            for seed in range(runs)
        ]
        took_s = (time.perf_counter() - began_s) / runs
        window_bytes = max(2 * max(sizes), budget_bytes // 20)
        floor = max(0.0, 1 - (budget_bytes - window_bytes) / total_bytes)
        orders = [_orders(UNITS, ranks, seed) for seed in range(runs)]
        row = {
            "budget": share,
            "floor": floor,
            "ours": median([cell.fetched_share for cell in cells]),
            "max": max(cell.fetched_share for cell in cells),
            "longest unused": median([lru_share(o, sizes, budget_bytes) for o in orders]),
            "drop at once": 1.0,
            "peak": max(cell.peak_share for cell in cells),
        }
        rows.append(row)
        shown = [row["ours"] / floor if floor else 0.0, row["max"], row["longest unused"], 1.0]
        table.add_row(
            f"{share:.0%}",
            f"{floor:.3f}",
            f"{row['ours']:.3f}",
            *(f"{value:.3f}" for value in shown),
            f"{row['peak']:.3f}",
        )
        console.print(f"{title}, {share:.0%}: {row['ours']:.3f} in {took_s:.0f} s a run")
    console.print(table)
    return rows


def _train(
    server: LoopbackOpenNeuro, accession: str, root: Path, budget_bytes: int, ranks: int, seed: int
) -> Cell:
    with open_heads(accession, root, budget_bytes) as dataset:
        total_bytes = dataset.nbytes
    server.reset_counters()
    with DiskWatch(root, interval_s=0.001) as watch:
        if ranks == 1:
            marks = [
                server.total(accession).bytes for _ in _epochs(accession, root, budget_bytes, seed)
            ]
        else:
            marks = _train_ranks(server, accession, root, budget_bytes, ranks, seed)
    peak_bytes = max(sample.held_bytes for sample in watch.samples())
    fetched_bytes = (marks[-1] - marks[0]) / (EPOCHS - 1)
    return Cell(fetched_bytes / total_bytes, peak_bytes / budget_bytes)


def _epochs(
    accession: str, root: Path, budget_bytes: int, seed: int, rank: int = -1, ranks: int = 1
):
    """Train; yield after each epoch."""
    with open_heads(accession, root, budget_bytes) as dataset:
        sampler = None
        if ranks > 1:
            sampler = DistributedSampler(dataset, ranks, rank, shuffle=True, seed=seed)
        with tno.BudgetedQueue(
            dataset,
            _WINDOW_PATCHES,
            _SAMPLES,
            tio.UniformSampler(16),
            subject_sampler=sampler,
            shuffle_subjects=sampler is None,
            num_workers=2,
            ram_budget="1 GB",
            seed=seed,
        ) as queue:
            loader = tio.SubjectsLoader(queue, batch_size=_BATCH, num_workers=0)
            for epoch in range(EPOCHS):
                for _ in loader:
                    time.sleep(STEP_S)
                    if ranks > 1:
                        distributed.barrier()
                yield epoch


def _train_ranks(
    server: LoopbackOpenNeuro, accession: str, root: Path, budget_bytes: int, ranks: int, seed: int
) -> list[int]:
    """Train in that many processes that step together; return the bytes sent by each epoch."""
    context = multiprocessing.get_context("spawn")
    meet, go_on = context.Queue(), context.Barrier(ranks + 1)
    arguments = (accession, root, budget_bytes, seed, ranks, meet, go_on)
    processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    marks = []
    for _ in range(EPOCHS):
        for _ in range(ranks):
            meet.get(timeout=120)
        marks.append(server.total(accession).bytes)
        go_on.wait(60)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return marks


def _rank(rank, accession, root, budget_bytes, seed, ranks, meet, go_on) -> None:
    torch.set_num_threads(1)
    address = f"file://{root}/meeting-{seed}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    for epoch in _epochs(accession, root, budget_bytes, seed, rank, ranks):
        meet.put((rank, epoch))
        go_on.wait(60)
    distributed.destroy_process_group()


def _orders(units: int, ranks: int, seed: int) -> list[list[int]]:
    """Return the order of each epoch, that of the ranks in turns."""
    if ranks == 1:
        planner = Planner([1] * units, None, seed=seed, shuffled=True)
        return [list(planner.plan(epoch).order) for epoch in range(EPOCHS)]
    found = []
    for epoch in range(EPOCHS):
        parts = []
        for rank in range(ranks):
            sampler = DistributedSampler(range(units), ranks, rank, shuffle=True, seed=seed)
            sampler.set_epoch(epoch)
            parts.append(list(sampler))
        found.append(list(itertools.chain(*zip(*parts, strict=True))))
    return found


def lru_share(epochs: Sequence[Sequence[int]], sizes: Sequence[int], budget_bytes: int) -> float:
    """Return what evicting the longest unused fetches per epoch after the first, over all."""
    held: OrderedDict[int, int] = OrderedDict()
    fetched_bytes = 0
    for number, order in enumerate(epochs):
        for unit in order:
            if unit in held:
                held.move_to_end(unit)
                continue
            fetched_bytes += sizes[unit] if number else 0
            while sum(held.values()) + sizes[unit] > budget_bytes:
                held.popitem(last=False)
            held[unit] = sizes[unit]
    return fetched_bytes / (len(epochs) - 1) / sum(sizes)
