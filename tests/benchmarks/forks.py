"""Forks and collections beside busy threads: which children hang, and trainings that must not.

First each call that a queue's threads may be inside of at a fork, against each call that the child
makes then, with no gate; then the calls that hang, with it; then sixty trainings beside a
validation with forked workers; then two hundred queues that only a collection closes. Each is in a
process of its own with a deadline.
"""

import time
from itertools import product
from pathlib import Path

import collecting
import forking
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from workers import Nursery

from tio_openneuro.loopback import LoopbackOpenNeuro, Volume

RUNS = 20
_TRAINING_S = 120.0
_TRAININGS = 60
_FOLDS = {60: 80, 300: 80, 1200: 40}
_ACCESSION = "ds900093"


def measure(runs: int, folder: Path, console: Console) -> dict[str, object]:
    """Run all, with so many forks of each pair of calls; print tables, and return the figures."""
    local = folder / "data"
    forking.write_volumes(local)
    forking.write_volumes(local / "local")
    server = LoopbackOpenNeuro(folder / "openneuro")
    with server, Nursery(folder) as nursery:
        server.publish("ds900001", _heads(6, (24, 20, 16), label=True))
        server.publish(_ACCESSION, _heads(max(_FOLDS), (6, 6, 6), label=False))
        found: dict[str, object] = {
            "calls": _fork_beside_calls(nursery, local, runs, console),
            "trainings": _train(nursery, local, console),
            "collections": _collect(nursery, folder, console),
        }
    return found


def _heads(count: int, shape: tuple[int, int, int], *, label: bool) -> dict[str, Volume | bytes]:
    files: dict[str, Volume | bytes] = {}
    for number in range(1, count + 1):
        stem = f"sub-{number:04}/anat/sub-{number:04}"
        voxels = np.random.default_rng(number).integers(0, 1000, shape).astype(np.int16)
        files[f"{stem}_T1w.nii.gz"] = Volume(voxels, np.eye(4))
        if label:
            lesion = (voxels > 500).astype(np.uint8)
            files[f"{stem}_label-lesion_mask.nii.gz"] = Volume(lesion, np.eye(4))
    return files


def _fork_beside_calls(
    nursery: Nursery, folder: Path, forks: int, console: Console
) -> dict[str, dict[str, list[float]]]:
    names = list(forking.calls(folder))
    figures: dict[str, dict[str, list[float]]] = {}
    for gated, title in ((False, "no gate"), (True, "the gate")):
        table = Table("threads inside", *names, title=f"Children that hung, of {forks}: {title}")
        for inside in names:
            row = {}
            for then in names:
                with nursery.start(_beside, folder, inside, then, forks, gated) as worker:
                    row[then] = worker.result(_TRAINING_S)
                    assert row[then][1] == 0, (inside, then)
            figures[f"{inside}, {title}"] = row
            table.add_row(inside, *(f"{hung:.0f}" for hung, _, _ in row.values()))
        console.print(table)
        longest_s = max(cell[2] for name in names for cell in figures[f"{name}, {title}"].values())
        console.print(f"Longest fork with {title}: {1000 * longest_s:.0f} ms")
    return figures


def _beside(folder: Path, inside: str, then: str, forks: int, gated: bool) -> list[float]:
    return forking.fork_beside(folder, inside, then, forks, gated=gated)


def _train(nursery: Nursery, folder: Path, console: Console) -> dict[str, float]:
    cells = list(product(forking.KINDS, (1, 2, 4), forking.TRANSFORMS, forking.WHENS))
    cells += cells[: _TRAININGS - len(cells)]
    hung = orphans = 0
    begun_s = time.monotonic()
    for kind, threads, transforms, when in cells:
        seen: set[psutil.Process] = set()
        with nursery.start(forking.train, folder, kind, threads, transforms, when) as worker:
            for _ in range(int(_TRAINING_S / 0.1)):
                try:
                    seen.update(worker.process.children(recursive=True))
                except psutil.NoSuchProcess:
                    break
                if worker.wait(0.1):
                    break
            if worker.wait(0.1):
                assert worker.result() == forking.wanted(when), (kind, threads, transforms, when)
            else:
                hung += 1
        orphans += len(psutil.wait_procs(seen, timeout=10)[1])
    figures = {"trainings": len(cells), "hung": hung, "orphans": orphans}
    console.print(f"{figures}, {time.monotonic() - begun_s:.0f} s")
    return figures


def _collect(nursery: Nursery, folder: Path, console: Console) -> list[dict[str, object]]:
    found = []
    for subjects, folds in _FOLDS.items():
        begun_s = time.monotonic()
        root = folder / f"root-{subjects}"
        with nursery.start(collecting.train_folds, root, _ACCESSION, subjects, folds) as worker:
            seen = worker.result(600)
        assert seen == {"patches": 3 * folds, "heard": [], "left": []}, seen
        row = {"subjects": subjects, "queues": folds, "seconds": time.monotonic() - begun_s}
        found.append({**row, "hung": 0, "ignored errors": 0})
        console.print(found[-1])
    return found
