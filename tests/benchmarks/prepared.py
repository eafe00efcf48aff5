"""Epochs after the first, from prepared volumes; and what a volume may be written as.

First the formats, each array in turn: the time of a 64³ patch and of the whole, of writing, and
the bytes on disk. Then a ``BudgetedQueue`` on prepared volumes against ``tio.Queue``, which reads
NIfTI files and preprocesses them again in each epoch; the consumer does nothing, files are local
and warm, both have the same transform, patches, batches and workers.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np
import torch
import torchio as tio
from faulty import LoopbackOpenNeuro
from heads import local_heads, open_heads, write_heads
from measure import interleaved, median
from rich.console import Console
from rich.table import Table

import tio_openneuro as tno
from tio_openneuro.prepared import file as prepared_file

RUNS = 5
UNITS = 12
SIDE = 192
PATCH_SIDE = 64
SAMPLES = 8
BATCH = 4
WORKERS = 2
WANTED_RATIO = 10.0
_EPOCHS = 4
_READS = 24
_ACCESSION = "ds920002"
_DISK_BLOCK_BYTES = 512


def preprocess() -> tio.Transform:
    """Return what both sides do to each head."""
    return tio.Compose([tio.ToCanonical(), tio.ZNormalization()])


def measure(runs: int, folder: Path, console: Console) -> dict[str, object]:
    """Run it, print its tables and return its figures."""
    heads = write_heads(folder / "heads", [(SIDE,) * 3] * UNITS)
    formats = _formats(local_heads(heads)[0], folder / "formats", runs, console)
    with LoopbackOpenNeuro(folder / "openneuro") as server:
        server.publish_folder(_ACCESSION, heads)
        queues = _queues(heads, folder / "root", runs, console)
    return {"runs": runs, "wanted": {"ratio": WANTED_RATIO}, "formats": formats, "queues": queues}


# -- formats -----------------------------------------------------------------------------------


class _Format:
    """One way to write an array of shape ``(1, I, J, K)`` and to read a box of it."""

    def __init__(self, path: Path, array: np.ndarray) -> None:
        self.path = path
        self.array = array

    def write(self) -> None:
        raise NotImplementedError

    def read(self, corner: tuple[int, int, int], size: int) -> np.ndarray:
        raise NotImplementedError

    def disk_bytes(self) -> int:
        """Return the bytes that the disk gives it, as ``du`` counts them."""
        files = [self.path] if self.path.is_file() else self.path.rglob("*")
        return sum(file.stat().st_blocks * _DISK_BLOCK_BYTES for file in files)


class _Npy(_Format):
    def write(self) -> None:
        with self.path.open("wb") as file:
            np.save(file, self.array)

    def read(self, corner: tuple[int, int, int], size: int) -> np.ndarray:
        i, j, k = corner
        mapped = np.load(self.path, mmap_mode="r")
        return mapped[:, i : i + size, j : j + size, k : k + size].copy()


class _Ours(_Format):
    def write(self) -> None:
        self.path.write_bytes(prepared_file.encode({"image": self.array}, b""))

    def read(self, corner: tuple[int, int, int], size: int) -> np.ndarray:
        with prepared_file.opened(self.path) as file:
            box = [(0, 1), *((start, start + size) for start in corner)]
            return file.array("image").read(box)


class _Blosc(_Format):
    codec, level, filters, block = blosc2.Codec.LZ4, 1, blosc2.Filter.SHUFFLE, 16

    def write(self) -> None:
        parameters = blosc2.CParams(
            codec=self.codec, clevel=self.level, filters=[self.filters], nthreads=1
        )
        self.path.unlink(missing_ok=True)
        blosc2.asarray(
            self.array,
            chunks=(1, 64, 64, 64),
            blocks=(1, self.block, self.block, self.block),
            cparams=parameters,
            urlpath=str(self.path),
        )

    def read(self, corner: tuple[int, int, int], size: int) -> np.ndarray:
        i, j, k = corner
        threads = blosc2.DParams(nthreads=1)
        array = blosc2.open(str(self.path), mode="r", mmap_mode="r", dparams=threads)
        return array[:, i : i + size, j : j + size, k : k + size]


class _Zstd(_Blosc):
    codec = blosc2.Codec.ZSTD


class _BitShuffle(_Blosc):
    filters = blosc2.Filter.BITSHUFFLE


class _LargeBlocks(_Blosc):
    block = 32


class _Zarr(_Format):
    def write(self) -> None:
        import zarr

        shutil.rmtree(self.path, ignore_errors=True)
        codec = zarr.codecs.BloscCodec(cname="lz4", clevel=1, shuffle="shuffle")
        array = zarr.create_array(
            str(self.path),
            shape=self.array.shape,
            chunks=(1, 32, 32, 32),
            dtype=self.array.dtype,
            compressors=[codec],
        )
        array[:] = self.array

    def read(self, corner: tuple[int, int, int], size: int) -> np.ndarray:
        import zarr

        i, j, k = corner
        array = zarr.open_array(str(self.path), mode="r")
        return array[:, i : i + size, j : j + size, k : k + size]


FORMATS: dict[str, type[_Format]] = {
    "ours: b2nd LZ4, 16³, checksums": _Ours,
    "b2nd LZ4, 16³": _Blosc,
    "b2nd LZ4, 32³": _LargeBlocks,
    "b2nd LZ4, 16³, bit shuffle": _BitShuffle,
    "b2nd zstd, 16³": _Zstd,
    "npy, memory map": _Npy,
    "zarr 3 LZ4, 32³": _Zarr,
}


def _formats(
    subject: tio.Subject, folder: Path, runs: int, console: Console
) -> dict[str, dict[str, dict[str, float]]]:
    folder.mkdir()
    normalised = preprocess()(subject)
    arrays = {
        "float32": normalised["flair"].data.contiguous().numpy(),
        "int16": subject["flair"].data.contiguous().numpy(),
        "uint8 label": subject["lesion"].data.contiguous().numpy(),
    }
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind, array in arrays.items():
        formats = {name: made(folder / f"{number}", array) for number, (name, made) in
                   enumerate(FORMATS.items()) if _is_there(name)}  # fmt: skip
        cases: dict[str, Callable[[], float]] = {}
        for name, each in formats.items():
            cases[f"{name} write"] = lambda each=each: _timed(each.write, 1)
            cases[f"{name} patch"] = lambda each=each: _time_patches(each)
            cases[f"{name} whole"] = lambda each=each: _time_whole(each)
        seconds = interleaved_rounds(cases, runs)
        table = Table(title=f"{kind}, {array.nbytes / 2**20:.1f} MiB; medians of {runs}")
        for column in ("format", "patch 64³ ms", "whole ms", "write ms", "MiB on disk"):
            table.add_column(column, justify="left" if column == "format" else "right")
        found[kind] = {}
        for name, each in formats.items():
            figures = {
                "patch_ms": 1e3 * median(seconds[f"{name} patch"]),
                "whole_ms": 1e3 * median(seconds[f"{name} whole"]),
                "write_ms": 1e3 * median(seconds[f"{name} write"]),
                "disk_bytes": each.disk_bytes(),
            }
            found[kind][name] = figures
            numbers = [f"{figures[key]:.2f}" for key in ("patch_ms", "whole_ms", "write_ms")]
            table.add_row(name, *numbers, f"{figures['disk_bytes'] / 2**20:.2f}")
        console.print(table)
        shutil.rmtree(folder)
        folder.mkdir()
    return found


def _is_there(name: str) -> bool:
    """Return whether what the format needs is installed; zarr is no dependency."""
    if not name.startswith("zarr"):
        return True
    try:
        import zarr
    except ImportError:
        return False
    return bool(zarr.__version__)


def interleaved_rounds(cases: dict[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    """Run every case once without counting, so that all is written, then as often as asked."""
    for case in cases.values():
        case()
    return interleaved(cases, runs, lambda _: None)


def _timed(work: Callable[[], object], count: int) -> float:
    began_s = time.perf_counter()
    work()
    return (time.perf_counter() - began_s) / count


def _time_patches(each: _Format) -> float:
    corners = np.random.default_rng(0).integers(0, SIDE - PATCH_SIDE + 1, (_READS, 3)).tolist()
    return _timed(lambda: [each.read(corner, PATCH_SIDE) for corner in corners], _READS)


def _time_whole(each: _Format) -> float:
    return _timed(lambda: each.read((0, 0, 0), SIDE), 1)


# -- queues ------------------------------------------------------------------------------------


def _queues(heads: Path, root: Path, runs: int, console: Console) -> dict[str, object]:
    opened = open_heads(_ACCESSION, root, "20 GB", preprocess=preprocess())
    with opened as dataset:
        sampler = tio.UniformSampler(PATCH_SIDE)
        for index in range(len(dataset)):
            dataset[index]
        fetched_bytes = dataset.statistics().fetched_bytes
        local = local_heads(heads, preprocess())
        patches = UNITS * SAMPLES

        def ours(chosen: tio.data.PatchSampler) -> float:
            with tno.BudgetedQueue(
                dataset, 32, SAMPLES, chosen, num_workers=WORKERS, seed=0, ram_budget="4 GB"
            ) as queue:
                _drain(tio.SubjectsLoader(queue, batch_size=BATCH))
                return _EPOCHS * patches / _timed(lambda: _drain_epochs(queue), 1)

        def stock() -> float:
            torch.manual_seed(0)
            queue = tio.Queue(local, 32, SAMPLES, sampler, num_workers=WORKERS)
            return patches / _timed(lambda: _drain(tio.SubjectsLoader(queue, batch_size=BATCH)), 1)

        label = tio.LabelSampler(PATCH_SIDE, "lesion")
        cases = {
            "tio.Queue": stock,
            "BudgetedQueue": lambda: ours(sampler),
            "BudgetedQueue, LabelSampler": lambda: ours(label),
        }
        found = interleaved(cases, runs, console.print)
        assert dataset.statistics().fetched_bytes == fetched_bytes
    speeds = {name: median(values) for name, values in found.items()}
    ratio = median([a / b for a, b in zip(found["BudgetedQueue"], found["tio.Queue"], strict=True)])
    table = Table(title=f"Patches/s, epochs after the first, medians of {runs}; {WORKERS} workers")
    for column in ("", "patches/s", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for name, speed in speeds.items():
        table.add_row(name, f"{speed:.0f}", f"{speed / speeds['tio.Queue']:.1f}")
    console.print(table)
    return {"patches_per_s": speeds, "ratio": ratio}


def _drain_epochs(queue: tno.BudgetedQueue) -> None:
    for _ in range(_EPOCHS):
        _drain(tio.SubjectsLoader(queue, batch_size=BATCH))


def _drain(loader: tio.SubjectsLoader) -> None:
    for batch in loader:
        assert batch["flair"][tio.DATA].dtype == torch.float32
