"""``BudgetedQueue`` against ``torchio.Queue``, side by side, for consumers of several speeds.

Both give patches of the same 20 local subjects through the same ``SubjectsLoader`` to a consumer
that sleeps in its step, as one that waits for its GPU does. Each cell is a process of its own, and
counts from the queue's construction to the last patch. The producer alone is two threads that
load, transform and sample the same subjects and drop the patches; the consumer alone collates
patches that are there and sleeps. The lesser of the two is what no queue can pass.
"""

import threading
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
import psutil
import torch
import torchio as tio
from measure import median
from rich.console import Console
from rich.table import Table
from workers import Nursery

from tio_openneuro.loopback.volume import Volume, write_content
from tio_openneuro.queue.queue import BudgetedQueue

RUNS = 5
SUBJECTS = 20
SIDE = 192
PATCH = 64
BATCH = 4
SAMPLES = 8
WINDOW = 80
WORKERS = 2
EPOCHS = {0.0: 2, 0.05: 2, 0.1: 2, 0.3: 2}
"""Epochs of 160 patches for each step in seconds."""
WANTED_EFFICIENCY = 0.95
WANTED_RATIO = 1.5
_SAMPLE_S = 0.05
Figures = dict[str, float]


def measure(runs: int, folder: Path, console: Console) -> dict[str, object]:
    """Run it, print its table and return its figures."""
    write_subjects(folder)
    rounds = []
    for number in range(runs):
        rounds.append(run_round(folder, number))
        console.print(f"run {number + 1} of {runs} done")
    return summarise(rounds, console)


def write_subjects(folder: Path) -> None:
    """Write smooth heads of 192**3 with a label, which compress as scans do."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, SIDE, dtype=np.float32)] * 3, indexing="ij"))
    radius = np.sqrt((grid**2).sum(axis=0))
    for number in range(SUBJECTS):
        noise = np.random.default_rng(number).normal(0, 20, (SIDE,) * 3).astype(np.float32)
        image = np.where(radius < 0.8, 900 - 400 * radius + noise, 0).astype(np.int16)
        label = (radius < 0.3 + 0.01 * number).astype(np.uint8)
        write_content(Volume(image, np.eye(4)), folder / f"{number:02d}_t1.nii.gz")
        write_content(Volume(label, np.eye(4)), folder / f"{number:02d}_label.nii.gz")


def make_dataset(folder: Path, kind: str) -> tio.SubjectsDataset:
    """Return the subjects with the light or the heavy transforms."""
    transforms = [tio.ToCanonical(), tio.ZNormalization(), tio.RandomFlip()]
    if kind == "heavy":
        transforms += [tio.RandomAffine(), tio.RandomNoise()]
    subjects = [
        tio.Subject(
            t1=tio.ScalarImage(folder / f"{number:02d}_t1.nii.gz"),
            label=tio.LabelMap(folder / f"{number:02d}_label.nii.gz"),
            number=number,
        )
        for number in range(SUBJECTS)
    ]
    return tio.SubjectsDataset(subjects, transform=tio.Compose(transforms))


def run_round(folder: Path, number: int) -> dict[str, Figures]:
    """Run every cell once, the two queues in turns, and return each one's figures."""
    found: dict[str, Figures] = {}
    (folder / f"round-{number}").mkdir()
    with Nursery(folder / f"round-{number}") as nursery:
        for kind in ("light", "heavy"):
            worker = nursery.start(produce_alone, folder, kind)
            found[f"{kind} producer"] = worker.result()
            for step_s in EPOCHS:
                found[f"{kind} {step_s} consumer"] = nursery.start(
                    consume_alone, folder, step_s
                ).result()
                names = ["stock", "ours"] if number % 2 else ["ours", "stock"]
                for name in names:
                    with nursery.start(train, folder, kind, step_s, name) as worker:
                        found[f"{kind} {step_s} {name}"] = worker.result()
            for name in ("ours", "stock"):
                # Apart from the runs that are timed: reading PSS took a fifth of a core.
                with nursery.start(train, folder, kind, 0.0, name) as worker:
                    peak_bytes = watch(worker.process)
                    base_bytes = worker.result()["base_bytes"]
                found[f"{kind} RAM {name}"] = {"mib": (peak_bytes - base_bytes) / 2**20}
    return found


def watch(process: psutil.Process) -> int:
    """Return the peak PSS of a process and its children, until it ends."""
    peak_bytes = 0
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        peak_bytes = max(peak_bytes, pss_bytes(process))
        time.sleep(_SAMPLE_S)
    return peak_bytes


def pss_bytes(process: psutil.Process) -> int:
    """Return the PSS of a process and its children."""
    total = 0
    try:
        tree = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0
    for one in tree:
        try:
            text = Path(f"/proc/{one.pid}/smaps_rollup").read_text(encoding="ascii")
        except OSError:
            continue
        total += 1024 * next(int(r.split()[1]) for r in text.splitlines() if r.startswith("Pss:"))
    return total


def produce_alone(folder: Path, kind: str) -> Figures:
    """Return the patches per second of two threads that drop what they make."""
    dataset = make_dataset(folder, kind)
    sampler = tio.UniformSampler(PATCH)
    numbers = count()
    total = 2 * SUBJECTS

    def work() -> None:
        torch.set_num_threads(1)
        while (number := next(numbers)) < total:
            assert len(list(islice(sampler(dataset[number % SUBJECTS]), SAMPLES))) == SAMPLES

    began_s = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"rate": total * SAMPLES / (time.perf_counter() - began_s)}


def consume_alone(folder: Path, step_s: float) -> Figures:
    """Return the patches per second of a consumer to whom all patches are there."""
    subject = make_dataset(folder, "light")[0]
    patches = list(islice(tio.UniformSampler(PATCH)(subject), SUBJECTS * SAMPLES))
    began_s = time.perf_counter()
    for _ in tio.SubjectsLoader(patches, batch_size=BATCH):
        time.sleep(step_s)
    return {"rate": len(patches) / (time.perf_counter() - began_s)}


def train(folder: Path, kind: str, step_s: float, name: str) -> Figures:
    """Consume some epochs of one of the queues, and return what a trainer would see of it."""
    dataset = make_dataset(folder, kind)
    made = BudgetedQueue if name == "ours" else tio.Queue
    base_bytes = pss_bytes(psutil.Process())
    began_s = time.perf_counter()
    queue = made(dataset, WINDOW, SAMPLES, tio.UniformSampler(PATCH), num_workers=WORKERS)
    loader = tio.SubjectsLoader(queue, batch_size=BATCH)
    waits_s, distinct, patches = [], [], 0
    for _ in range(EPOCHS[step_s]):
        for batch, wait_s in _timed(loader):
            waits_s.append(wait_s)
            distinct.append(len(set(batch["number"].tolist())))
            patches += len(batch["number"])
            del batch
            time.sleep(step_s)
    took_s = time.perf_counter() - began_s
    assert patches == EPOCHS[step_s] * SUBJECTS * SAMPLES
    return {
        "rate": patches / took_s,
        "waiting": sum(waits_s) / took_s,
        "longest_s": max(waits_s),
        "first_s": waits_s[0],
        "distinct": sum(distinct) / len(distinct),
        "base_bytes": base_bytes,
    }


def _timed(loader: tio.SubjectsLoader) -> Iterator[tuple[dict[str, torch.Tensor], float]]:
    began_s = time.perf_counter()
    for batch in loader:
        yield batch, time.perf_counter() - began_s
        began_s = time.perf_counter()


def summarise(rounds: list[dict[str, Figures]], console: Console) -> dict[str, object]:
    """Print the medians of all rounds, and return them."""
    cells = {
        name: {key: median([found[name][key] for found in rounds]) for key in figures}
        for name, figures in rounds[0].items()
    }
    table = Table(title=f"{SUBJECTS} subjects of {SIDE}^3, patch {PATCH}, median of {len(rounds)}")
    for name in ("", "producer", "consumer", "patches/s", "efficiency", "waiting", "longest s"):
        table.add_column(name, justify="right" if name else "left")
    for name in ("first s", "RAM MiB", "distinct", "over stock"):
        table.add_column(name, justify="right")
    for kind in ("light", "heavy"):
        for step_s in EPOCHS:
            producer = cells[f"{kind} producer"]["rate"]
            consumer = cells[f"{kind} {step_s} consumer"]["rate"]
            stock = cells[f"{kind} {step_s} stock"]["rate"]
            for name in ("ours", "stock"):
                cell = cells[f"{kind} {step_s} {name}"]
                cell["efficiency"] = cell["rate"] / min(producer, consumer)
                cell["ratio"] = cell["rate"] / stock
                table.add_row(
                    f"{kind}, {step_s} s, {name}",
                    f"{producer:.1f}",
                    f"{consumer:.1f}",
                    f"{cell['rate']:.1f}",
                    f"{cell['efficiency']:.2f}",
                    f"{cell['waiting']:.0%}",
                    f"{cell['longest_s']:.2f}",
                    f"{cell['first_s']:.2f}",
                    f"{cells[f'{kind} RAM {name}']['mib']:.0f}",
                    f"{cell['distinct']:.2f}",
                    f"{cell['ratio']:.2f}",
                )
    console.print(table)
    return {
        "runs": len(rounds),
        "medians": cells,
        "rounds": rounds,
        "wanted_efficiency": WANTED_EFFICIENCY,
        "wanted_ratio": WANTED_RATIO,
    }
