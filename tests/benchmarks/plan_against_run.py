"""What ``plan`` tells against a run over the loopback: bytes and seconds of three epochs.

Three disk budgets, two links. The seconds of a worker for a subject are measured first, in an epoch
of which all is on disk, since no plan can know them; everything else is as ``plan`` takes it.
"""

import time
from pathlib import Path

import torchio as tio
from faulty import LoopbackOpenNeuro
from heads import open_heads, write_heads
from measure import median
from rich.console import Console
from rich.table import Table

import tio_openneuro as tno
from tio_openneuro.plan.training import Play, Training

RUNS = 5
UNITS = 24
EPOCHS = 3
SHARES = (0.3, 0.6, 1.0)
LINKS = {"1 MB/s": 1e6, "8 MB/s": 8e6}
LATENCY_S = 0.02
STEP_S = 0.1
WANTED = 0.15
_ACCESSION = "ds910090"
_SHAPES = ((64, 64, 64), (64, 64, 48))
_QUEUE = {"max_length": 16, "samples_per_volume": 4, "num_workers": 2}
_BATCH = 4


def measure(runs: int, folder: Path, console: Console) -> dict[str, object]:
    """Run it, print its table and return its figures."""
    rows = []
    with LoopbackOpenNeuro(folder / "openneuro") as server:
        shapes = [_SHAPES[number % 2] for number in range(UNITS)]
        server.publish_folder(_ACCESSION, write_heads(folder / _ACCESSION, shapes, suffix=".nii"))
        make_s = _seconds_of_a_unit(folder / "calibration")
        server.set_latency(LATENCY_S)
        for link, rate in LINKS.items():
            server.set_rate(rate)
            for share in SHARES:
                ran = [_run(folder / f"{rate}-{share}-{n}", share, n) for n in range(runs)]
                told = [_foretell(folder / "calibration", share, n, rate, make_s)
                        for n in range(runs)]  # fmt: skip
                seconds = median([each[0] for each in ran])
                foretold_s = median([each[0] for each in told])
                rows.append(
                    {
                        "link": link,
                        "budget": share,
                        "fetched": median([each[1] for each in ran]),
                        "foretold": median([each[1] for each in told]),
                        "equal": sum(a[1] == b[1] for a, b in zip(ran, told, strict=True)),
                        "seconds": seconds,
                        "foretold_s": foretold_s,
                        "ratio": foretold_s / seconds,
                    }
                )
    table = Table(title=f"Three epochs, medians of {runs}; a unit takes a worker {make_s:.3f} s")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        shown = (
            f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()
        )
        table.add_row(*shown)
    console.print(table)
    return {"runs": runs, "rows": rows, "make_s": make_s, "wanted": WANTED}


def _queue(dataset: tno.DataladSubjectsDataset, seed: int) -> tno.BudgetedQueue:
    return tno.BudgetedQueue(
        dataset, sampler=tio.UniformSampler(32), ram_budget="2 GB", seed=seed, **_QUEUE
    )


def _seconds_of_a_unit(root: Path) -> float:
    """Return what a worker takes for a unit, with all on disk and a consumer that does nothing."""
    with open_heads(_ACCESSION, root, "10 GB") as dataset:
        dataset.fetch()
        with _queue(dataset, 0) as queue:
            for _ in queue:
                pass
            began_s = time.monotonic()
            for _ in queue:
                pass
            return (time.monotonic() - began_s) * _QUEUE["num_workers"] / (UNITS + 1)


def _run(root: Path, share: float, seed: int) -> tuple[float, float]:
    """Return the seconds of a training, and the bytes fetched over the dataset's."""
    with open_heads(_ACCESSION, root, "10 GB") as dataset:
        total_bytes = dataset.nbytes
    with open_heads(_ACCESSION, root, round(share * total_bytes)) as dataset:
        began_s = time.monotonic()
        with _queue(dataset, seed) as queue:
            loader = tio.SubjectsLoader(queue, batch_size=_BATCH, num_workers=0)
            for _ in range(EPOCHS):
                for _ in loader:
                    time.sleep(STEP_S)
            return time.monotonic() - began_s, dataset.statistics().fetched_bytes / total_bytes


def _foretell(
    root: Path, share: float, seed: int, rate: float, make_s: float
) -> tuple[float, float]:
    with open_heads(_ACCESSION, root, "10 GB") as dataset:
        files = [row.content.files for row in dataset._rows]
        total_bytes = dataset.nbytes
    training = Training(
        units=[{str(file.key): file.key.size_bytes for file in unit} for unit in files],
        make_s=[make_s] * UNITS,
        step_s=STEP_S,
        rate=rate,
        latency_s=LATENCY_S,
        epochs=EPOCHS,
        seed=seed,
        window=_QUEUE["max_length"],
        samples=_QUEUE["samples_per_volume"],
        workers=_QUEUE["num_workers"],
        batch=_BATCH,
    )
    mark = Play(training, round(share * total_bytes)).marks[EPOCHS - 1]
    return mark.seconds, mark.fetched_bytes[0] / total_bytes
