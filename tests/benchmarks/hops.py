"""How far one leased key travels through the package: its modules, seen from the main thread.

The budget holds one unit, so that each ``dataset[i]`` evicts one key and fetches another from the
loopback, with every child, thread and table warm. ``sys.setprofile`` watches the main thread from
``dataset[i]`` to its return. A *call* is a call of a function that stands in a file of the
package, a generator's resumption included. A *change* is that the innermost such function belongs
to another module than the one before: there by a call, and back by its return; what lies between
them of Python's, torch's or TorchIO's own does not count. A wait looks again and again, so the
figures are medians.
"""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import numpy as np
from measure import median
from rich.console import Console
from rich.table import Table

import tio_openneuro as tno
from tio_openneuro.loopback import LoopbackOpenNeuro, Volume

RUNS = 15
SUBJECTS = 6
_SHAPE = (24, 20, 16)
_PACKAGE = Path(tno.__file__).parent


@dataclass
class Hops:
    """What one thread called of the package while :meth:`watch` ran something.

    Attributes:
        calls: Calls of functions of ours.
        path: Modules in the order in which the thread came to them.
    """

    calls: int = 0
    path: list[str] = field(default_factory=list)
    _stack: list[str] = field(default_factory=list)

    @property
    def changes(self) -> int:
        """Changes from one module to another."""
        return max(len(self.path) - 1, 0)

    def watch(self, act: Callable[[], object]) -> None:
        """Count while it runs."""
        sys.setprofile(self._note)
        try:
            act()
        finally:
            sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        name = frame.f_code.co_filename
        if event not in {"call", "return"} or not name.startswith(str(_PACKAGE)):
            return
        if event == "call":
            self.calls += 1
            self._stack.append(str(Path(name).relative_to(_PACKAGE).with_suffix("")))
        elif self._stack:
            self._stack.pop()
        if self._stack and self.path[-1:] != self._stack[-1:]:
            self.path.append(self._stack[-1])


def measure(runs: int, folder: Path, console: Console) -> dict[str, object]:
    """Run it, print its table and the path of the median run, and return its figures."""
    with LoopbackOpenNeuro(folder / "openneuro") as server:
        server.publish("ds900020", _heads())
        found = _read(runs, folder / "root")
    by_changes = sorted(found, key=lambda hops: hops.changes)
    usual = by_changes[len(by_changes) // 2]
    figures = {
        "calls": median([hops.calls for hops in found]),
        "changes": median([hops.changes for hops in found]),
        "modules": median([len(set(hops.path)) for hops in found]),
    }
    table = Table(title=f"One leased key, evicting and fetching: medians of {runs}")
    for name in figures:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.0f}" for value in figures.values()))
    console.print(table)
    console.print(" → ".join(usual.path))
    console.print(dict(Counter(usual.path).most_common()))
    return {"runs": runs, "medians": figures, "path": usual.path}


def _heads() -> dict[str, Volume | bytes]:
    """Return the files of a dataset with one image of one size for each subject."""
    files: dict[str, Volume | bytes] = {
        "dataset_description.json": b'{"Name": "Heads", "BIDSVersion": "1.10.0"}'
    }
    for number in range(1, SUBJECTS + 1):
        voxels = np.random.default_rng(number).integers(0, 1000, _SHAPE).astype(np.int16)
        name = f"sub-{number:02}/anat/sub-{number:02}_T1w.nii"
        files[name] = Volume(voxels, np.diag([1.0, 1.2, 1.5, 1.0]))
    return files


def _read(runs: int, root: Path) -> list[Hops]:
    """Read a warm dataset, one subject after the other; return each access's hops."""
    budget_bytes = int(1.5 * np.prod(_SHAPE)) * np.int16().itemsize
    images = {"t1": tno.Scalar("sub-*/anat/*_T1w.nii")}
    found = []
    with tno.DataladSubjectsDataset(
        "ds900020", images, root=root, disk_budget=budget_bytes
    ) as dataset:
        for index in [*range(SUBJECTS)] * 2:
            dataset[index]
        for number in range(runs):
            before = dataset.statistics()
            hops = Hops()
            hops.watch(lambda index=number % SUBJECTS: dataset[index])
            after = dataset.statistics()
            assert after.fetched_files - before.fetched_files == 1
            assert after.evicted_files - before.evicted_files == 1
            found.append(hops)
    return found
