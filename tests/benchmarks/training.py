"""Training from a remote under a tenth of the disk, against what people do today.

Three comparisons over the loopback. With a link that allows it: a ``BudgetedQueue`` that fetches
and evicts against ``tio.Queue`` with everything on local disk. At 20 MB/s per connection and
100 ms: the same queue against the plain loop of ``datalad get``, load, train, ``datalad drop``.
And the first batch from an accession, against cloning, fetching one subject and loading it.
A pause stands for the training step, as on a GPU. Imports are done before, on both sides.
"""

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torchio as tio
from datalad import api as datalad
from faulty import LoopbackOpenNeuro
from heads import IMAGES, local_heads, open_heads, write_heads
from measure import interleaved, median
from picture import draw_bars
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

import tio_openneuro as tno
from tio_openneuro.dataset.rows import build_rows
from tio_openneuro.disk.engine import Engine
from tio_openneuro.select.selection import select
from tio_openneuro.sources.catalog import open_catalog

RUNS = 5
UNITS = 40
SIDE = 128
STEP_S = 0.1
WORKERS = 2
BUDGET_SHARE = 10
PLAIN_SIDES = (SIDE, 192)
CONNECTION_BYTES_PER_S = 20e6
LATENCY_S = 0.1
WANTED = {"Queue": 1.3, "bound": 0.95, "plain": 5.0, "first": 1.2}
_ALLOWING_LATENCY_S = 0.01
_ALLOWING_BYTES_PER_S = 125e6
_PATCH_SIDE = 64
_SAMPLES = 8
_BATCH = 4
_WINDOW_PATCHES = 64
_ACCESSIONS = {SIDE: "ds920001", 192: "ds920002"}


def measure(runs: int, folder: Path, console: Console) -> dict[str, object]:
    """Run it, print its tables and return its figures."""
    _prepare_datalad()
    with LoopbackOpenNeuro(folder / "openneuro") as server:
        bench = _Bench(server, folder / "small", SIDE)
        found = {"local": _against_local(bench, runs, console)}
        for side in PLAIN_SIDES:
            other = bench if side == SIDE else _Bench(server, folder / "large", side)
            found[f"plain, {side}³"] = _against_plain(other, runs, console)
        found["first"] = _first_batch(bench, runs, console)
    draw_bars(
        "training",
        {
            "patches/s, everything local but for ours": found["local"]["patches_per_s"],
            **{
                f"seconds of an epoch of {side}³ at 20 MB/s, 100 ms": found[f"plain, {side}³"][
                    "seconds"
                ]
                for side in PLAIN_SIDES
            },
            "seconds to the first batch": found["first"]["seconds"],
        },
        x="median",
    )
    return {"runs": runs, "wanted": WANTED, **found}


def _prepare_datalad() -> None:
    """Let DataLad find git-annex and an identity, as in an activated environment of a user."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for who in ("AUTHOR", "COMMITTER"):
        os.environ |= {f"GIT_{who}_NAME": "t", f"GIT_{who}_EMAIL": "t@t"}
    logging.getLogger("datalad").setLevel(logging.WARNING)


class _Bench:
    """One published dataset, its local copy, and ways to train on it."""

    def __init__(self, server: LoopbackOpenNeuro, folder: Path, side: int) -> None:
        self.server = server
        self.folder = folder
        self.side = side
        self.accession = _ACCESSIONS[side]
        self.heads = write_heads(folder / "heads", [(side,) * 3] * UNITS)
        server.publish_folder(self.accession, self.heads)
        self._roots = 0
        with open_heads(self.accession, folder / "sizes", "1 TB") as dataset:
            self.dataset_bytes = dataset.nbytes
        self.budget_bytes = self.dataset_bytes // BUDGET_SHARE
        self.patch_bytes = self.dataset_bytes / UNITS / _SAMPLES

    def new_root(self) -> Path:
        """Return a folder that is not there yet."""
        self._roots += 1
        return self.folder / f"root-{self._roots}"

    @staticmethod
    def transform() -> tio.Transform:
        """Return the transforms of every case."""
        return tio.Compose([tio.ToCanonical(), tio.ZNormalization(), tio.RandomFlip()])

    def ours(self, step_s: float) -> float:
        """Train the second epoch over the link; return patches/s."""
        root = self.new_root()
        with (
            open_heads(self.accession, root, self.budget_bytes, self.transform()) as dataset,
            _queue(dataset, _WINDOW_PATCHES) as queue,
        ):
            return _second_epoch(_loader(queue), step_s)

    def producer(self) -> float:
        """Produce the second epoch for a consumer without a step, all content being there."""
        root = self.folder / "kept"
        with (
            open_heads(self.accession, root, "100 GB", self.transform()) as dataset,
            _queue(dataset, _WINDOW_PATCHES) as queue,
        ):
            return _second_epoch(_loader(queue), 0.0)

    def stock(self, max_length: int) -> float:
        """Train an epoch with ``tio.Queue`` from local files; its epochs are all alike."""
        queue = tio.Queue(
            local_heads(self.heads, self.transform()),
            max_length,
            _SAMPLES,
            tio.UniformSampler(_PATCH_SIDE),
            num_workers=WORKERS,
        )
        return _rate(_loader(queue), STEP_S)

    def close_up(self) -> None:
        """Remove the roots."""
        for root in self.folder.glob("root-*"):
            for inside in (root, *root.rglob("*")):
                if inside.is_dir() and not inside.is_symlink():
                    inside.chmod(0o700)
            shutil.rmtree(root)


def _queue(dataset: tio.SubjectsDataset, max_length: int) -> tno.BudgetedQueue:
    return tno.BudgetedQueue(
        dataset,
        max_length,
        _SAMPLES,
        tio.UniformSampler(_PATCH_SIDE),
        num_workers=WORKERS,
        ram_budget="4 GB",
        seed=0,
    )


def _loader(queue: tio.Queue) -> DataLoader:
    return tio.SubjectsLoader(queue, batch_size=_BATCH, num_workers=0)


def _rate(loader: Iterable[object], step_s: float) -> float:
    began_s = time.perf_counter()
    patches = _train(loader, step_s)
    return patches / (time.perf_counter() - began_s)


def _second_epoch(loader: Iterable[object], step_s: float) -> float:
    _train(loader, step_s)
    return _rate(loader, step_s)


def _train(loader: Iterable[dict], step_s: float) -> int:
    patches = 0
    for batch in loader:
        patches += len(batch["flair"][tio.DATA])
        time.sleep(step_s)
    return patches


# A link that allows it


def _against_local(bench: _Bench, runs: int, console: Console) -> dict[str, dict[str, float]]:
    bench.server.set_connection_rate(None)
    bench.server.set_rate(_ALLOWING_BYTES_PER_S)
    bench.server.set_latency(_ALLOWING_LATENCY_S)
    cases: dict[str, Callable[[], float]] = {
        "ours, remote, a tenth of the disk": lambda: bench.ours(STEP_S),
        f"tio.Queue, local, max_length={_WINDOW_PATCHES}": lambda: bench.stock(_WINDOW_PATCHES),
        f"tio.Queue, local, max_length={4 * _WINDOW_PATCHES}": lambda: bench.stock(
            4 * _WINDOW_PATCHES
        ),
        "producer alone": bench.producer,
    }
    found = interleaved(cases, runs, console.print)
    bench.close_up()
    rates = {name: median(values) for name, values in found.items()}
    ours, *_stock, producer = rates.values()
    rates["consumer alone"] = _BATCH / STEP_S
    rates["link / bytes per patch"] = _ALLOWING_BYTES_PER_S / bench.patch_bytes
    bound = min(rates["consumer alone"], producer, rates["link / bytes per patch"])
    ratios = {f"over {name}": ours / rates[name] for name in list(cases)[1:3]}
    ratios["over the bound"] = ours / bound
    table = Table(
        title=f"Patches/s, second epoch, step {STEP_S} s, {WORKERS} workers, {SIDE}³, link "
        f"{_ALLOWING_BYTES_PER_S / 1e6:.0f} MB/s and {1e3 * _ALLOWING_LATENCY_S:.0f} ms; "
        f"medians of {runs}"
    )
    for name in ("", "patches/s", "min", "max", "ours over it"):
        table.add_column(name, justify="right" if name else "left")
    for name, rate in rates.items():
        values = found.get(name, [rate])
        shown = (rate, min(values), max(values), ours / rate)
        table.add_row(name, *(f"{value:.2f}" for value in shown))
    console.print(table)
    console.print(f"Ours over the bound {bound:.1f}: {ours / bound:.3f}")
    return {"patches_per_s": rates, "ratios": ratios, "all": found}


# The plain way


def _against_plain(bench: _Bench, runs: int, console: Console) -> dict[str, dict[str, float]]:
    _slow_link(bench)
    root = bench.folder / "root-plain"
    with open_heads(bench.accession, root, "1 GB"):
        pass
    clone = bench.folder / "plain"
    datalad.clone(bench.server.url(bench.accession), str(clone), result_renderer="disabled")

    def ours() -> float:
        began_s = time.perf_counter()
        with open_heads(bench.accession, root, bench.budget_bytes, bench.transform()) as whole:
            with _queue(whole, _WINDOW_PATCHES) as queue:
                assert _train(_loader(queue), STEP_S) == UNITS * _SAMPLES
            took_s = time.perf_counter() - began_s
            whole.evict()
        return took_s

    def plain() -> float:
        began_s = time.perf_counter()
        _plain_epoch(clone, bench.transform())
        return time.perf_counter() - began_s

    found = interleaved(
        {"ours": ours, "datalad get, load, datalad drop": plain}, runs, console.print
    )
    seconds = {name: median(values) for name, values in found.items()}
    ours_s, plain_s = seconds.values()
    table = Table(
        title=f"One epoch of {UNITS} subjects of {bench.side}³, 20 MB/s per connection, "
        f"100 ms, step {STEP_S} s; medians of {runs}"
    )
    for name in ("", "s", "min", "max", "its time / ours"):
        table.add_column(name, justify="right" if name else "left")
    for name, values in found.items():
        took_s = median(values)
        shown = (took_s, min(values), max(values), took_s / ours_s)
        table.add_row(name, *(f"{value:.2f}" for value in shown))
    console.print(table)
    return {"seconds": seconds, "ratios": {"plain over ours": plain_s / ours_s}, "all": found}


def _slow_link(bench: _Bench) -> None:
    bench.server.set_rate(None)
    bench.server.set_connection_rate(CONNECTION_BYTES_PER_S)
    bench.server.set_latency(LATENCY_S)


def _plain_epoch(clone: Path, transform: tio.Transform) -> None:
    """Train on one subject after the other, as a script with DataLad alone does."""
    sampler = tio.UniformSampler(_PATCH_SIDE)
    for path in sorted(clone.glob("sub-*/anat/*_FLAIR.nii.gz"))[:UNITS]:
        label = path.with_name(path.name.replace("FLAIR", "FLAIR_roi"))
        both = [str(path), str(label)]
        datalad.get(both, dataset=str(clone), jobs=2, result_renderer="disabled")
        subject = transform(tio.Subject(flair=tio.ScalarImage(path), lesion=tio.LabelMap(label)))
        patches = [patch for patch, _ in zip(sampler(subject), range(_SAMPLES), strict=False)]
        _train(tio.SubjectsLoader(patches, batch_size=_BATCH), STEP_S)
        del subject, patches
        datalad.drop(both, dataset=str(clone), what="filecontent", result_renderer="disabled")


# The first batch


def _first_batch(bench: _Bench, runs: int, console: Console) -> dict[str, dict[str, float]]:
    _slow_link(bench)

    def ours(transform: tio.Transform | None) -> float:
        began_s = time.perf_counter()
        root = bench.new_root()
        with open_heads(bench.accession, root, bench.budget_bytes, transform) as dataset:
            opened_s = time.perf_counter() - began_s
            with _queue(dataset, _WINDOW_PATCHES) as queue:
                batch = next(iter(_loader(queue)))
                took_s = time.perf_counter() - began_s
        assert len(batch["flair"][tio.DATA]) == _BATCH
        parts["ours: until the dataset is open"].append(opened_s)
        return took_s

    def parts_alone() -> float:
        root = bench.new_root()
        began_s = time.perf_counter()
        catalog = open_catalog(bench.accession, root)
        cloned_s = time.perf_counter() - began_s
        selection = select(catalog.files, IMAGES, unit="subject", on_missing="skip",
                           on_multiple="raise", on_incomplete="raise")  # fmt: skip
        with Engine(root, disk_budget="1 GB") as engine:
            rows, _ = build_rows(catalog, selection, engine, on_missing="skip")
            began_s = time.perf_counter()
            with engine.lease(rows[0].content) as paths:
                image, label = sorted(paths.values(), key=lambda path: -path.stat().st_size)
                subject = tio.Subject(flair=tio.ScalarImage(image), lesion=tio.LabelMap(label))
                fetched_s = time.perf_counter() - began_s
                subject.load()
            one_s = time.perf_counter() - began_s
        began_s = time.perf_counter()
        bench.transform()(subject)
        parts["transforms of one subject"].append(time.perf_counter() - began_s)
        parts["clone and index"].append(cloned_s)
        parts["fetch of one subject"].append(fetched_s)
        parts["load of one subject"].append(one_s - fetched_s)
        return cloned_s + one_s

    parts: dict[str, list[float]] = {
        name: []
        for name in (
            "clone and index",
            "fetch of one subject",
            "load of one subject",
            "transforms of one subject",
            "ours: until the dataset is open",
        )
    }
    cases = {
        "ours: first batch": lambda: ours(None),
        "clone + one subject's fetch and load": parts_alone,
        "ours: first batch, with the transforms": lambda: ours(bench.transform()),
    }
    found = interleaved(cases, runs, console.print)
    bench.close_up()
    seconds = {name: median(values) for name, values in (found | parts).items()}
    ratio = seconds["ours: first batch"] / seconds["clone + one subject's fetch and load"]
    table = Table(title=f"First batch of {_BATCH} from an accession, medians of {runs}")
    table.add_column("")
    table.add_column("s", justify="right")
    for name, took_s in seconds.items():
        table.add_row(name, f"{took_s:.3f}")
    console.print(table)
    console.print(f"First batch over its parts: {ratio:.2f}, wanted at most {WANTED['first']}")
    return {"seconds": seconds, "ratios": {"first batch over its parts": ratio}}
