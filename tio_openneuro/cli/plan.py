"""``plan``: a training's costs told beforehand, as a record, tables of 80 columns and a picture."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torchio as tio
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from tio_openneuro.ledger import too_large
from tio_openneuro.plan import Training, foresee, ram_budgets, total_bytes
from tio_openneuro.queue import choose_window
from tio_openneuro.ram import available_bytes, bound_subject, read_budget
from tio_openneuro.sizes import format_size
from tio_openneuro.sources import Catalog
from tio_openneuro.torchio_seams import trace_transform
from tio_openneuro.volumes import FLOAT_BYTES, VolumeFile, sum_sizes

# Loading, ZNormalization and a flip of 192**3 voxels and a label took 0.144 s (2026-11-25).
_SECONDS_PER_VOXEL = 2e-8
_BUSY = 0.05
_BAR = 18
_MINUTE_S = 60
_HEADER_BYTES = 1 << 16


def answer(
    units: Mapping[str, dict[str, int]],
    budget_bytes: int,
    *,
    epochs: int,
    voxels_per_byte: float,
    patch_size: int,
    ram_budget: str,
    remote_rate: float | None,
    unit_s: float | None,
    rate: float,
    **training: Any,  # noqa: ANN401 - what a training has beside
) -> dict[str, Any]:
    """Return what a training will cost, by names for programs.

    Args:
        units: Bytes of each key of a unit, by its name.
        budget_bytes: Disk budget of each node.
        epochs: Passes over the units.
        voxels_per_byte: Of compressed files; of others half as many.
        patch_size: Voxels of a patch along each axis.
        ram_budget: Of each process, as the queue's.
        remote_rate: Bytes per second that the remote gives to all nodes together; None: any.
        unit_s: Seconds of one worker for a unit; None guesses them from its voxels.
        rate: Bytes per second of each node's link.
        training: The rest of a :class:`~tio_openneuro.plan.Training`.

    Raises:
        DiskBudgetError: A unit is larger than the budget.
    """
    sizes = {name: sum(files.values()) for name, files in units.items()}
    largest = max(sizes, key=sizes.__getitem__)
    if sizes[largest] > budget_bytes:
        raise too_large(largest, list(units[largest].values()), budget_bytes)
    voxels = [
        round(max(n * voxels_per_byte / (1 + k.endswith(".nii")) for k, n in files.items()))
        for files in units.values()
    ]
    images = max(map(len, units.values()))
    size = sum_sizes([(1, max(voxels), FLOAT_BYTES)] * images)
    # The hungriest of the usual transforms.
    result, needs = trace_transform(tio.ZNormalization(), size, in_place=True)
    work_bytes = bound_subject(size, result, needs, 0).size_bytes
    patch_bytes = patch_size**3 * images * FLOAT_BYTES
    ram_bytes = read_budget(ram_budget, available_bytes())
    workers, samples, nodes = training["workers"], training["samples"], training["nodes"]
    least_ram_bytes, most_ram_bytes = ram_budgets(work_bytes, patch_bytes, samples, workers)
    asked = Training(
        units=list(units.values()),
        make_s=[unit_s or _SECONDS_PER_VOXEL * count for count in voxels],
        window=choose_window(ram_bytes, patch_bytes),
        rate=min(rate, (remote_rate or rate * nodes) / nodes),
        epochs=min(epochs, 3),
        **training,
    )
    told = foresee(asked, budget_bytes)
    record: dict[str, Any] = {
        "units": len(units),
        "epoch_bytes": total_bytes(asked.units),
        "largest_bytes": sizes[largest],
        "budget_bytes": budget_bytes,
        "enough_disk_bytes": told.enough_bytes,
        "peak_disk_bytes": told.peak_bytes,
        "ram_budget_bytes": ram_bytes,
        "least_ram_bytes": least_ram_bytes,
        "enough_ram_bytes": most_ram_bytes,
        "peak_ram_bytes": min(ram_bytes, most_ram_bytes),
        "epochs": epochs,
        "voxels_per_byte": voxels_per_byte,
        "rate_bytes": rate,
        "step_s": asked.step_s,
        "unit_s": sum(asked.make_s) / len(units),
        "seconds": told.first.seconds + (epochs - 1) * told.later.seconds,
    }
    for name, epoch in (("first_epoch", told.first), ("later_epoch", told.later)):
        waits = {"link": epoch.link_wait_s, "decoding": epoch.making_wait_s}
        shares = {why: wait_s / epoch.seconds for why, wait_s in waits.items()}
        cause = max(shares, key=shares.__getitem__)
        record |= {
            f"{name}_bytes": epoch.fetched_bytes,
            f"{name}_s": epoch.seconds,
            f"{name}_waits": shares,
            f"{name}_held_up_by": cause if sum(shares.values()) >= _BUSY else "consumer",
            f"{name}_node_bytes": epoch.node_bytes,
            f"{name}_link_load": max(epoch.node_busy_s) / epoch.seconds,
            f"{name}_remote_bytes_per_s": epoch.fetched_bytes / epoch.seconds,
        }
    busy_s = max(told.first.node_busy_s) + (epochs - 1) * max(told.later.node_busy_s)
    record |= {"link_busy_s": busy_s, "nodes": nodes, "ranks": training["ranks"]}
    record["saturating_nodes"] = None if remote_rate is None else max(int(remote_rate // rate), 1)
    return record | {"curve": [dataclasses.asdict(point) for point in told.curve]}


def show(title: str, record: Mapping[str, Any], console: Console) -> None:
    """Print what was told, for people."""
    size = {name: format_size(value) for name, value in record.items() if name.endswith("_bytes")
            and isinstance(value, int)}  # fmt: skip
    rows: dict[str, Any] = {
        "fetched": lambda e: size[f"{e}_bytes"],
        "fetched by the busiest node": lambda e: format_size(max(record[f"{e}_node_bytes"])),
        "remote gives, each second": lambda e: format_size(record[f"{e}_remote_bytes_per_s"]),
        "duration": lambda e: _duration(record[f"{e}_s"]),
        "link is busy for": lambda e: f"{record[f'{e}_link_load']:.0%} of it",
        "training waits for the link": lambda e: f"{record[f'{e}_waits']['link']:.0%} of it",
        "training waits for decoding": lambda e: f"{record[f'{e}_waits']['decoding']:.0%} of it",
        "held up by": lambda e: record[f"{e}_held_up_by"],
    }
    title += f": {record['units']} units, {size['epoch_bytes']}"
    table = Table("", "first epoch¹", "each later one", title=title, title_justify="left")
    table.caption, table.caption_justify = (
        "¹ With what it fetches ahead for the second one.",
        "left",
    )
    for name, text in rows.items():
        if record["nodes"] > 1 or not {"node", "remote"} & set(name.split()):
            table.add_row(name, text("first_epoch"), text("later_epoch"))
    console.print(table)
    bounds = Table("", "works from", "no gain beyond", "budget", "held at most")
    for name, budget in (
        ("disk of a node", "budget_bytes"),
        ("RAM of a process", "ram_budget_bytes"),
    ):
        kind = name.split()[0].lower()
        least = "largest_bytes" if kind == "disk" else "least_ram_bytes"
        keys = (least, f"enough_{kind}_bytes", budget, f"peak_{kind}_bytes")
        bounds.add_row(name, *(size[key] for key in keys))
    console.print(bounds)
    busy, whole = _duration(record["link_busy_s"]), _duration(record["seconds"])
    console.print(
        f"Taken for given: a link of {size['rate_bytes']} per second, {record['step_s']:g} s for a "
        f"batch,\n{record['unit_s']:.2f} s of a worker to load and transform a unit"
    )
    console.print(f"{record['epochs']} epochs: {whole}, of which the link is busy for {busy}")
    if record["saturating_nodes"] is not None:
        console.print(f"{record['saturating_nodes']} nodes use up the remote's rate")
    curve = Table("disk budget", "fetched", "", "duration", "waiting")
    curve.title, curve.title_justify = "Each later epoch under other disk budgets", "left"
    for point in record["curve"]:
        bar = "█" * round(_BAR * point["fetched_bytes"] / record["epoch_bytes"])
        curve.add_row(
            format_size(point["budget_bytes"]), bar, format_size(point["fetched_bytes"]),
            _duration(point["seconds"]), f"{point['wait_share']:.0%}",
        )  # fmt: skip
    console.print(curve)
    for reason, count in record["skipped_reasons"].items():
        console.print(f"Left out: {count} of {record['units'] + record['skipped']}: {reason}")


def draw(path: Path, title: str, record: Mapping[str, Any]) -> None:
    """Write the curve over the disk budget as a PNG."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="disk budget (GB)")
    budgets = [point["budget_bytes"] / 1e9 for point in record["curve"]]
    axes.plot(budgets, [point["fetched_bytes"] / 1e9 for point in record["curve"]], "o-")
    axes.set_ylabel("fetched by each later epoch (GB)", color="C0")
    axes.axvline(record["budget_bytes"] / 1e9, color="grey", linestyle=":")
    times = axes.twinx()
    times.plot(budgets, [point["seconds"] / 60 for point in record["curve"]], "s--", color="C1")
    times.set_ylabel("duration of each later epoch (min)", color="C1")
    axes.set_ylim(bottom=0)
    times.set_ylim(bottom=0)
    FigureCanvasAgg(figure).print_figure(str(path), format="png")


def probe_headers(catalog: Catalog, units: Mapping[str, dict[str, int]], count: int) -> float:
    """Return the voxels of a compressed byte, from a few headers that are fetched, or one.

    Args:
        catalog: The dataset's files.
        units: Bytes of each key of a unit, by its name.
        count: Units that are looked at, evenly chosen; of each the largest file.
    """
    keys = {str(file.key): file.key for file in catalog.files if file.key is not None}
    chosen = list(units.values())[:: max(len(units) // max(count, 1), 1)][:count]
    found = []
    for files in chosen:
        name = max(files, key=files.__getitem__)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"first{''.join(Path(name).suffixes[-2:])}")
            path.write_bytes(catalog.repo.head(keys[name], _HEADER_BYTES) if catalog.repo else b"")
            size = VolumeFile(path).size
        if size is not None:
            found.append(prod(size[:2]) * (1 + name.endswith(".nii")) / files[name])
    return median(found) if found else 1.0


def _duration(seconds: float) -> str:
    """Return seconds as people read them, in two units at most."""
    if seconds < _MINUTE_S:
        return f"{seconds:.1f} s"
    minutes, hours = divmod(round(seconds), 60)[0], round(seconds) // 3600
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {round(seconds) % 60} s"
