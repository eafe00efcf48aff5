"""Other loaders beside ours: under a cache limit, and with everything local and preprocessed.

MosaicML Streaming, litData and nnU-Net are no dependencies: they are installed from PyPI into an
environment of their own under ``benchmark-results/`` when this first runs (two minutes, 1 GB), on
top of this one's torch. Give ``BENCHMARK_PEERS``, an interpreter that has them, to use that. What
cannot be installed is left out, loudly.
"""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torchio as tio
from faulty import LoopbackOpenNeuro
from heads import IMAGES, local_heads, open_heads, write_heads
from measure import interleaved, median
from picture import RESULTS, draw_bars
from rich.console import Console
from rich.table import Table

import tio_openneuro as tno
from tio_openneuro.demo.watch import DiskWatch

RUNS = 5
UNITS = 48
SIDE = 128
WORKERS = 2
LIMIT_SHARE = 10
WANTED = {"nnU-Net": 1.0, "tio.Queue": 10.0}
_PACKAGES = ("mosaicml-streaming==0.13.0", "litdata==0.2.76", "nnunetv2==2.8.1")
_PATCH = 64
_SAMPLES = 8
_BATCH = 4
_EPOCHS = 2
_BATCHES = 96
_WINDOW_PATCHES = 64
_TIMEOUT_S = 45.0
_ACCESSION = "ds930001"


@dataclass(frozen=True)
class Streamed:
    """What streaming under a limit gave.

    Attributes:
        converted_s: Seconds of conversion before the first sample.
        stored_share: Bytes that the remote must store, over the dataset's.
        peak_share: Most bytes seen in the cache, over the limit.
        delivered_share: Subjects that came, over those of the epochs.
        patches_per_s: Of the second epoch; zero where it never ended.
    """

    converted_s: float
    stored_share: float
    peak_share: float
    delivered_share: float
    patches_per_s: float


def measure(runs: int, folder: Path, console: Console) -> dict[str, object]:
    """Run it, print its tables and return its figures."""
    python = _interpreter(console)
    heads = write_heads(folder / "heads", [(SIDE,) * 3] * UNITS)
    size_bytes = sum(path.stat().st_size for path in heads.rglob("*.nii.gz"))
    with LoopbackOpenNeuro(folder / "openneuro") as server:
        server.publish_folder(_ACCESSION, heads)
        bench = _Bench(folder, heads, size_bytes, python)
        streamed = _under_a_limit(bench, runs, console)
        local = _all_local(bench, runs, console)
    rates = {name: row["patches_per_s"] for name, row in streamed.items()}
    draw_bars(
        "peers",
        {
            "patches/s under a cache limit": rates,
            "most bytes held / limit": {n: row["peak_share"] for n, row in streamed.items()},
            "patches/s, all local, preprocessed": local["patches_per_s"],
        },
        x=f"median of {runs}",
    )
    return {"runs": runs, "wanted": WANTED, "streamed": streamed, "local": local}


def _interpreter(console: Console) -> Path | None:
    """Return an interpreter that has the peers, or None where they cannot be had."""
    given = os.environ.get("BENCHMARK_PEERS")
    if given:
        return Path(given)
    home = RESULTS / "peers"
    python = home / "bin" / "python"
    if (home / "complete").exists():
        return python
    console.print("Installing the peers once, into benchmark-results/peers ...")
    try:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
        own = next(home.glob("lib/*/site-packages"))
        # This environment's packages are seen there, so that torch is neither fetched nor replaced.
        (own / "project.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
        command = [python, "-m", "pip", "install", "--quiet", *_PACKAGES, "torch==2.13.0"]
        subprocess.run(command, check=True, timeout=1800)
    except (OSError, subprocess.SubprocessError) as error:
        console.print(f"[bold red]LEFT OUT: every peer, since they cannot be installed: {error}")
        return None
    (home / "complete").touch()
    return python


class _Bench:
    """One dataset in every loader's form."""

    def __init__(self, folder: Path, heads: Path, size_bytes: int, python: Path | None) -> None:
        self.folder = folder
        self.heads = heads
        self.size_bytes = size_bytes
        self.python = python
        self._count = 0

    def new_folder(self) -> Path:
        """Return a folder that is not there yet."""
        self._count += 1
        return self.folder / f"cache-{self._count}"

    def peer(self, name: str, source: Path, work: Path, **options: int) -> list[dict[str, float]]:
        """Run one peer for as long as is allowed; return the records that it printed."""
        assert self.python is not None
        script = Path(__file__).with_name("peer.py")
        command = [self.python, script, name, source, work, json.dumps(options)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            out, _ = process.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, _ = process.communicate()
        return [json.loads(line) for line in out.splitlines() if line.startswith(b"{")]

    def ours(self, budget: int, root: Path) -> Streamed:
        """Stream from the loopback, whose link is not limited."""
        transform = tio.ZNormalization()
        with (
            open_heads(_ACCESSION, root, budget, transform) as dataset,
            DiskWatch(root, interval_s=0.001) as watch,
            _queue(dataset) as queue,
        ):
            rate = _epoch_rates(queue, _EPOCHS)[-1]
            peak_bytes = max(sample.held_bytes for sample in watch.samples())
        return Streamed(0.0, 1.0, peak_bytes / budget, 1.0, rate)


def _queue(dataset: tio.SubjectsDataset, samples: int = _SAMPLES) -> tno.BudgetedQueue:
    return tno.BudgetedQueue(
        dataset,
        _WINDOW_PATCHES,
        samples,
        tio.UniformSampler(_PATCH),
        num_workers=WORKERS,
        ram_budget="4 GB",
        seed=0,
    )


def _epoch_rates(queue: tio.Queue, epochs: int) -> list[float]:
    """Return the patches/s of each epoch, for a consumer that takes batches and nothing else."""
    loader = tio.SubjectsLoader(queue, batch_size=_BATCH, num_workers=0)
    rates = []
    for _ in range(epochs):
        began_s = time.perf_counter()
        patches = sum(len(batch["flair"][tio.DATA]) for batch in loader)
        rates.append(patches / (time.perf_counter() - began_s))
    return rates


# Under a limit


def _under_a_limit(bench: _Bench, runs: int, console: Console) -> dict[str, dict[str, float]]:
    found: dict[str, list[Streamed]] = {"ours": []}
    converted: dict[str, dict[str, float]] = {}
    for name in ("mosaic", "litdata") if bench.python else ():
        store = bench.folder / f"store-{name}"
        records = bench.peer(f"{name}_convert", bench.heads, store)
        if not records:
            console.print(f"[bold red]LEFT OUT: {name}, which could not convert the dataset")
            continue
        converted[name] = records[-1]
        found[name] = []
    for run in range(runs):
        budget_bytes = bench.size_bytes // LIMIT_SHARE
        found["ours"].append(bench.ours(budget_bytes, bench.new_folder()))
        for name, conversion in converted.items():
            found[name].append(_stream(bench, name, conversion))
        console.print(f"run {run + 1} of {runs}: { ({n: rows[-1] for n, rows in found.items()}) }")
    table = Table(
        title=f"Limit: a tenth of what each stores; {UNITS} subjects, {SIDE}³, {WORKERS} workers; "
        f"medians of {runs}, the highest peak"
    )
    names = ("", "conversion s", "stored / NIfTI", "peak / limit", "delivered", "patches/s")
    for name in names:
        table.add_column(name, justify="right" if name else "left")
    figures = {}
    for name, rows in found.items():
        row = {key: median([asdict(r)[key] for r in rows]) for key in asdict(rows[0])}
        row["peak_share"] = max(r.peak_share for r in rows)
        row["delivered_share"] = min(r.delivered_share for r in rows)
        figures[name] = row
        table.add_row(name, *(f"{value:.2f}" for value in row.values()))
    console.print(table)
    return figures


def _stream(bench: _Bench, name: str, conversion: dict[str, float]) -> Streamed:
    cache = bench.new_folder()
    limit_bytes = int(conversion["charged_bytes"]) // LIMIT_SHARE
    with DiskWatch(cache, interval_s=0.001) as watch:
        records = bench.peer(
            name,
            bench.folder / f"store-{name}",
            cache,
            limit=limit_bytes,
            workers=WORKERS,
            epochs=_EPOCHS,
            patch=_PATCH,
            samples=_SAMPLES,
        )
    peak_bytes = max(sample.held_bytes for sample in watch.samples())
    last = {int(r["epoch"]): r for r in records if "epoch" in r}
    delivered = sum(record["delivered"] for record in last.values())
    second = last.get(_EPOCHS - 1, {"delivered": 0, "took_s": 1.0})
    whole = second["delivered"] == UNITS
    return Streamed(
        conversion["converted_s"],
        conversion["charged_bytes"] / bench.size_bytes,
        peak_bytes / limit_bytes,
        delivered / (_EPOCHS * UNITS),
        UNITS * _SAMPLES / second["took_s"] if whole else 0.0,
    )


# All local


def _all_local(bench: _Bench, runs: int, console: Console) -> dict[str, dict[str, float]]:
    preprocess = tio.ZNormalization()

    def prepared(samples: int) -> float:
        dataset = tno.DataladSubjectsDataset(
            _ACCESSION, IMAGES, root=bench.folder / "root-prepared", disk_budget="100 GB",
            preprocess=preprocess,
        )  # fmt: skip
        with dataset, _queue(dataset, samples) as queue:
            # The first of all writes the volumes; from then on epochs are alike.
            return median(_epoch_rates(queue, 4)[1:])

    def stock() -> float:
        queue = tio.Queue(
            local_heads(bench.heads, preprocess),
            _WINDOW_PATCHES,
            _SAMPLES,
            tio.UniformSampler(_PATCH),
            num_workers=WORKERS,
        )
        return _epoch_rates(queue, 1)[0]

    def nnunet(workers: int) -> float:
        options = {"patch": _PATCH, "batch": _BATCH, "workers": workers}
        records = bench.peer(
            "nnunet", bench.heads, bench.folder / "nnunet", batches=_BATCHES, warm_up=6, **options
        )
        return records[-1]["patches_per_s"]

    cases: dict[str, Callable[[], float]] = {
        "ours, preprocess=, 8 patches a subject": lambda: prepared(_SAMPLES),
        "ours, preprocess=, 1 patch a subject": lambda: prepared(1),
        "tio.Queue, NIfTI again each epoch": stock,
    }
    if bench.python:
        cases["nnU-Net, 2 processes"] = lambda: nnunet(WORKERS)
        cases["nnU-Net, in the consumer"] = lambda: nnunet(0)
    found = interleaved(cases, runs, console.print)
    rates = {name: median(values) for name, values in found.items()}
    ours = next(iter(rates.values()))
    table = Table(title=f"Patches/s of {_PATCH}³, batch {_BATCH}, all local; medians of {runs}")
    for name in ("", "patches/s", "min", "max", "ours over it"):
        table.add_column(name, justify="right" if name else "left")
    for name, values in found.items():
        shown = (rates[name], min(values), max(values), ours / rates[name])
        table.add_row(name, *(f"{value:.2f}" for value in shown))
    console.print(table)
    return {
        "patches_per_s": rates,
        "ratios": {name: ours / rate for name, rate in rates.items()},
        "all": found,
    }
