"""Run benchmarks: ``python tests/benchmarks [NAME...] [--runs N] [--json FILE]``.

Each writes ``benchmark-results/NAME.json`` and ``NAME.png`` too.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.extend(str(room) for room in Path(__file__).parent.parent.iterdir() if room.is_dir())

import bombs
import budget
import campaign
import eviction
import forks
import growth
import hops
import http_fetching
import indexing
import ledger_cost
import maps
import memory
import peers
import plan_against_run
import prepared
import queueing
import reading
import scale
import throughput
import training
import waiting
from picture import RESULTS, draw_tables
from rich.console import Console

BENCHMARKS = {
    "throughput": throughput,
    "ledger": ledger_cost,
    "budget": budget,
    "campaign": campaign,
    "waiting": waiting,
    "indexing": indexing,
    "eviction": eviction,
    "training": training,
    "peers": peers,
    "prepared": prepared,
    "growth": growth,
    "scale": scale,
    "queueing": queueing,
    "memory": memory,
    "reading": reading,
    "maps": maps,
    "hops": hops,
    "http_fetching": http_fetching,
    "forks": forks,
    "bombs": bombs,
    "plan_against_run": plan_against_run,
}


def main() -> None:
    """Run what is named, or all; print tables, write JSON and pictures."""
    parser = argparse.ArgumentParser(prog="python tests/benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--runs", type=int, help="runs of each case; default: its own")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - BENCHMARKS.keys():
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}: {', '.join(BENCHMARKS)}")
    console = Console(width=120)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    found: dict[str, object] = {"cpus": os.cpu_count(), "load_at_the_start": load}
    console.print(f"{os.cpu_count()} cores; load at the start {load:.1f}, should be near 0")
    for name in arguments.names or BENCHMARKS:
        module = BENCHMARKS[name]
        runs = arguments.runs or module.RUNS
        (RESULTS / f"{name}.png").unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"benchmark-{name}-") as folder:
            # An empty home, so that no configuration of this computer's git matters.
            os.environ["HOME"] = str(Path(folder, "home"))
            Path(folder, "home").mkdir()
            found[name] = module.measure(runs, Path(folder), console)
        RESULTS.mkdir(exist_ok=True)
        figures = json.dumps(found[name], indent=1) + "\n"
        (RESULTS / f"{name}.json").write_text(figures, encoding="utf-8")
        if not (RESULTS / f"{name}.png").exists():
            draw_tables(name, found[name])
        console.print(f"Written: {RESULTS / name}.json and .png")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
