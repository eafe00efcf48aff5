"""Processor time of an engine that waits, and how soon it hears of room that came free elsewhere.

Three waits, on clones without git-annex: threads with nothing to do, a prefetch that no room is
left for, and a lease that another owner's lease keeps out. Figures of this process alone.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fakes import FakeRepo, make_unit
from measure import interleaved, median
from rich.console import Console
from rich.table import Table

from tio_openneuro.disk.engine import Engine

RUNS = 5
WATCHED_S = 4.0
SETTLING_S = 2.0
_UNITS = 200
_BUDGET_UNITS = 50
_UNIT_BYTES = 1000


def measure(runs: int, folder: Path, console: Console) -> dict[str, object]:
    """Run it, print its table and return its figures."""
    bench = _Bench(folder)
    cases = {
        "nothing to do": bench.idle,
        "a prefetch without room": bench.prefetch,
        "a lease that waits": bench.lease,
    }
    found = interleaved(cases, runs, console.print)
    table = Table(title=f"Processor time of a wait, median of {runs}")
    for name in ("", "ms per s", "max"):
        table.add_column(name, justify="right" if name else "left")
    for name, values in found.items():
        table.add_row(name, f"{median(values):.2f}", f"{max(values):.2f}")
    console.print(table)
    heard_s = median(bench.heard_s)
    console.print(f"Room that came free elsewhere was taken after {heard_s:.2f} s (median).")
    return {"runs": runs, "ms_per_s": found, "heard_s": bench.heard_s}


class _Bench:
    """One clone, and engines that wait for its content."""

    def __init__(self, folder: Path) -> None:
        self._root = folder / "root"
        self._repo = FakeRepo(self._root / "clones" / "ds1")
        self._units = [make_unit(self._repo, f"sub-{n}", _UNIT_BYTES) for n in range(_UNITS)]
        self.heard_s: list[float] = []

    @contextmanager
    def _engine(self) -> Iterator[Engine]:
        budget_bytes = _BUDGET_UNITS * _UNIT_BYTES
        with Engine(self._root, disk_budget=budget_bytes, open_repo=FakeRepo.reopen) as engine:
            yield engine
            engine.prefetch([])
            engine.evict_all()

    def idle(self) -> float:
        """Prefetch all that is wanted, and wait; return milliseconds a second."""
        with self._engine() as engine:
            engine.prefetch(self._units[:_BUDGET_UNITS])
            return _processor_ms_per_s()

    def prefetch(self) -> float:
        """Prefetch more than there is room for."""
        with self._engine() as engine:
            engine.prefetch(self._units)
            return _processor_ms_per_s()

    def lease(self) -> float:
        """Wait for the room that another engine's lease takes, and then for its end."""
        everything = make_unit(self._repo, "all", _BUDGET_UNITS * _UNIT_BYTES)
        taken_s: list[float] = []

        def take(engine: Engine) -> None:
            with engine.lease(self._units[0]):
                taken_s.append(time.perf_counter())

        with self._engine() as holder, self._engine() as waiting:
            with holder.lease(everything):
                thread = threading.Thread(target=take, args=(waiting,))
                thread.start()
                used = _processor_ms_per_s()
                ended_s = time.perf_counter()
            thread.join()
        self.heard_s.append(taken_s[0] - ended_s)
        return used


def _processor_ms_per_s() -> float:
    """Return what this process uses once things have settled."""
    time.sleep(SETTLING_S)
    before_s = time.process_time()
    time.sleep(WATCHED_S)
    return 1000 * (time.process_time() - before_s) / WATCHED_S
