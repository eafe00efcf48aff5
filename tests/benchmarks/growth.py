"""How cost grows: with the number of subjects, of workers, and with the size of a file.

Subjects: synthetic git metadata of 10 to 10,000 subjects with two images each, no content.
Workers: threads that fill a queue from local files, no step. File size: one file fetched over the
loopback, whose link is not limited, and loaded; uncompressed NIfTI of zeros, so that generating
it costs nothing, which git-annex checks and the reader reads as any other. Each axis has its
slope: the exponent of cost in what grows, 1 being proportional.
"""

import hashlib
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torchio as tio
from faulty import LoopbackOpenNeuro
from heads import IMAGES, local_heads, write_heads
from indexing import UUID, inline, make_repository, tree
from measure import interleaved, median
from picture import draw_lines
from rich.console import Console
from rich.table import Table

import tio_openneuro as tno
from tio_openneuro.annex.processes import run
from tio_openneuro.queue.draw import EpochPlan
from tio_openneuro.sources.install import install

RUNS = 5
SUBJECTS = (10, 100, 1_000, 10_000)
WORKERS = (1, 2, 3, 4)
FILE_MB = (1, 8, 64, 500)
_FILES_PER_SUBJECT = 5
_LOCAL_UNITS = 16
_LOCAL_SIDE = 128
_ACCESSION = "ds94{:04}"


def measure(runs: int, folder: Path, console: Console) -> dict[str, object]:
    """Run it, print its tables and return its figures."""
    found = {
        "subjects": _by_subjects(runs, folder, console),
        "workers": _by_workers(runs, folder, console),
        "file MB": _by_file_size(runs, folder, console),
    }
    draw_lines(
        "growth",
        {
            axis: {step: (xs, ys) for step, ys in costs.items()}
            for axis, (xs, costs) in found.items()
        },
        x="what grows",
        y="seconds (workers: patches/s)",
        logarithmic=True,
    )
    return {
        "runs": runs,
        **{axis: {"at": xs, "costs": costs, "slopes": _slopes(xs, costs)}
           for axis, (xs, costs) in found.items()},
    }  # fmt: skip


Costs = tuple[list[float], dict[str, list[float]]]


def _slopes(xs: list[float], costs: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return the exponent between each two neighbours."""
    return {
        name: [
            math.log(max(b, 1e-9) / max(a, 1e-9)) / math.log(y / x)
            for (x, a), (y, b) in itertools.pairwise(zip(xs, ys, strict=True))
        ]
        for name, ys in costs.items()
    }


def _show(console: Console, title: str, axis: str, xs: list[float], costs: dict) -> None:
    table = Table(title=title)
    table.add_column(axis)
    for name in xs:
        table.add_column(f"{name:g}", justify="right")
    table.add_column("slopes", justify="right")
    slopes = _slopes(xs, costs)
    for name, values in costs.items():
        shown = [f"{value:.4g}" for value in values]
        table.add_row(name, *shown, " ".join(f"{slope:+.2f}" for slope in slopes[name]))
    console.print(table)


def _medians(cases: dict[str, Callable[[], dict[str, float]]], runs: int) -> dict[str, list[float]]:
    """Return the medians of each step, by step, over the cases in their order."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(runs):
        for name, case in cases.items():
            rows[name].append(case())
    steps = next(iter(rows.values()))[0]
    return {step: [median([row[step] for row in each]) for each in rows.values()] for step in steps}


# Subjects


def _by_subjects(runs: int, folder: Path, console: Console) -> Costs:
    repositories = {count: _make_tree(folder / f"tree-{count}", count) for count in SUBJECTS}
    root = folder / "root-subjects"
    for repository in repositories.values():
        install(repository.as_uri(), root)
    cases = {
        str(count): lambda repository=repository: _open_and_plan(repository, root)
        for count, repository in repositories.items()
    }
    costs = _medians(cases, runs)
    title = f"Seconds by the number of subjects, two images each; medians of {runs}"
    _show(console, title, "subjects", list(SUBJECTS), costs)
    return list(SUBJECTS), costs


def _make_tree(folder: Path, subjects: int) -> Path:
    """Commit that many subjects; record an S3 version of each image, without any content."""
    files = 1 + _FILES_PER_SUBJECT * subjects
    make_repository(folder, files)
    stream = [
        (
            "commit refs/heads/git-annex\ncommitter t <t@t> 1700000001 +0000\ndata 0\n"
            "from refs/heads/git-annex^0\n"
        )
    ]
    for path, content in tree(files):
        if "annex/objects/" in content:
            key = content.rpartition("/")[2]
            digest = hashlib.md5(key.encode(), usedforsecurity=False).hexdigest()
            version = f"1700000000s {UUID}:V +v1#ds/{path}\n"
            stream.append(inline(f"{digest[:3]}/{digest[3:6]}/{key}.log.rmet", version))
    run(["git", "fast-import", "--quiet"], cwd=folder, stdin="".join(stream).encode())
    return folder


def _open_and_plan(repository: Path, root: Path) -> dict[str, float]:
    images = {
        "t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz"),
        "flair": tno.Scalar("sub-*/anat/*_FLAIR.nii.gz"),
    }
    took_s: dict[str, float] = {}
    clock = _Clock(took_s)
    dataset = tno.DataladSubjectsDataset(repository.as_uri(), images, root=root, disk_budget="1 GB")
    clock("construct the dataset")
    with dataset:
        for _ in range(1000):
            len(dataset)
        clock("len, 1,000 times")
        queue = tno.BudgetedQueue(
            dataset, 64, 8, tio.UniformSampler(64), num_workers=2, seed=0, ram_budget="2 GB",
            start_background=False,
        )  # fmt: skip
        clock("construct the queue")
        with queue:
            plan: EpochPlan = queue._planner.plan(0)
            queue._planner.plan(1)
            clock("plan two epochs")
            order = [*plan.order, *queue._planner.plan(1).order]
            units = [dataset._rows[index].content for index in order]
            prefetcher = dataset._engine._here().look_ahead
            clock("")
            prefetcher.replace(units, [row.content for row in dataset._rows])
            clock("publish the order of two epochs")
            prefetcher.replace(())
            clock("")
            queue.state_dict()
            clock("first state_dict")
            queue.state_dict()
            clock("next state_dict")
    took_s.pop("")
    return took_s


class _Clock:
    """Notes the seconds since its last call."""

    def __init__(self, into: dict[str, float]) -> None:
        self._into = into
        self._at_s = time.perf_counter()

    def __call__(self, step: str) -> None:
        now_s = time.perf_counter()
        self._into[step] = now_s - self._at_s
        self._at_s = time.perf_counter()


# Workers


def _by_workers(runs: int, folder: Path, console: Console) -> Costs:
    heads = write_heads(folder / "heads", [(_LOCAL_SIDE,) * 3] * _LOCAL_UNITS)
    transform = tio.Compose([tio.ToCanonical(), tio.ZNormalization(), tio.RandomFlip()])

    def rate(workers: int) -> float:
        with tno.BudgetedQueue(
            local_heads(heads, transform), 64, 8, tio.UniformSampler(64), num_workers=workers,
            seed=0, ram_budget="4 GB",
        ) as queue:  # fmt: skip
            began_s = time.perf_counter()
            patches = sum(1 for _ in queue)
            return patches / (time.perf_counter() - began_s)

    cases = {str(n): lambda n=n: rate(n) for n in WORKERS}
    found = interleaved(cases, runs, console.print)
    costs = {"patches/s": [median(values) for values in found.values()]}
    _show(console, f"Patches/s by workers, no step; medians of {runs}", "workers",
          list(WORKERS), costs)  # fmt: skip
    return list(WORKERS), costs


# File size


def _by_file_size(runs: int, folder: Path, console: Console) -> Costs:
    with LoopbackOpenNeuro(folder / "openneuro") as server:
        for size in FILE_MB:
            server.publish_folder(_ACCESSION.format(size), _zeros(folder, size))
        cases = {str(size): lambda size=size: _fetch_and_load(folder, size) for size in FILE_MB}
        costs = _medians(cases, runs)
    title = f"Seconds by the size of a file, link not limited; medians of {runs}"
    _show(console, title, "MB", list(FILE_MB), costs)
    return list(FILE_MB), costs


def _zeros(folder: Path, size_mb: int) -> Path:
    bids = folder / f"zeros-{size_mb}"
    anat = bids / "sub-01" / "anat"
    anat.mkdir(parents=True)
    (bids / "dataset_description.json").write_text('{"Name": "Z", "BIDSVersion": "1.10.0"}')
    shape = (100, 100, size_mb * 1_000_000 // 2 // 10_000)
    import nibabel

    array = np.zeros(shape, np.int16)
    array[0, 0, 0] = size_mb
    nibabel.Nifti1Image(array, np.eye(4)).to_filename(anat / "sub-01_FLAIR.nii")
    return bids


def _fetch_and_load(folder: Path, size: int) -> dict[str, float]:
    took_s: dict[str, float] = {}
    root = folder / "root-sizes"
    images = {"flair": IMAGES["flair"]}
    with tno.DataladSubjectsDataset(
        _ACCESSION.format(size), images, root=root, disk_budget="1 GB"
    ) as dataset:
        with dataset._engine.lease(dataset._rows[0].content):
            pass  # git-annex runs from here on
        dataset.evict()
        clock = _Clock(took_s)
        with dataset._engine.lease(dataset._rows[0].content):
            clock("fetch")
        assert dataset[0]["flair"].data.shape[-1] == size * 50
        clock("load")
        dataset.evict()
    return took_s
