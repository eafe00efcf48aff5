"""The most bytes held, as an observer outside sees them, against the budget.

The same cells as the slow test of ``tests/test_engine_processes.py``, whose code this is: each
asserts that every subject arrives in every process, and gives what its observer saw.
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from test_engine_processes import EQUAL, GRID, run_cell
from workers import Nursery

RUNS = 1


def measure(runs: int, folder: Path, console: Console) -> dict[str, object]:
    """Run it, print its table and return its figures."""
    budgets = sorted({budget for _, budget, _, _ in GRID})
    peaks: dict[tuple[str, int, bool, int], float] = {}
    delivered = 0
    results = folder / "results"
    results.mkdir()
    with Nursery(results) as nursery:
        for run in range(runs):
            for number, (processes, budget, sizes, ahead) in enumerate(GRID):
                root = folder / f"root-{run}-{number}"
                cell = run_cell(nursery, root, processes, budget, sizes, ahead=ahead)
                place = (_name(sizes), processes, ahead, budget)
                share = cell.peak_bytes / cell.budget_bytes
                peaks[place] = max(share, peaks.get(place, 0.0))
                delivered += cell.delivered
            console.print(f"run {run + 1} of {runs}: {delivered} deliveries, none missing")
    table = Table(title=f"Peak held / budget, the highest of {runs} run(s); 4 threads a process")
    for name in ("sizes", "processes", "order", *(f"{budget} units" for budget in budgets)):
        table.add_column(name, justify="right" if "unit" in name else "left")
    for sizes, processes, ahead in dict.fromkeys(place[:3] for place in peaks):
        shares = [f"{peaks[sizes, processes, ahead, budget]:.3f}" for budget in budgets]
        table.add_row(sizes, str(processes), "known" if ahead else "unknown", *shares)
    console.print(table)
    highest = max(peaks.values())
    console.print(f"Highest {highest:.4f}; {delivered} of {delivered} deliveries arrived.")
    return {
        "runs": runs,
        "highest": highest,
        "delivered": delivered,
        "peak_share": [[*place, share] for place, share in peaks.items()],
    }


def _name(sizes: tuple[int, ...]) -> str:
    return "equal" if sizes == EQUAL else "10:1"
