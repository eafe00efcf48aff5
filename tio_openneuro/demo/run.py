"""Run the demo: publish heads, train on them by accession under both budgets, write the report.

Owns the demo's temporary folder (loopback OpenNeuro, clones, ledger), which is gone when
:func:`run_demo` returns or raises; what stays is the report. Prints nothing: events go to a
callback, in the caller's thread.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchio as tio

from tio_openneuro.dataset import DataladSubjectsDataset
from tio_openneuro.demo.network import UNet
from tio_openneuro.demo.phantom import make_heads
from tio_openneuro.demo.records import DemoEvent, DemoResult, Illustration, Stage
from tio_openneuro.demo.report import write_report
from tio_openneuro.demo.training import (
    IMAGE,
    LABEL,
    SubjectScore,
    score,
    segment,
    train_epoch,
    warm_up_and_cosine,
)
from tio_openneuro.demo.watch import DiskWatch
from tio_openneuro.loopback import LoopbackOpenNeuro, Volume
from tio_openneuro.queue import BudgetedQueue
from tio_openneuro.select import Label, Scalar
from tio_openneuro.sizes import parse_size
from tio_openneuro.watch import Gauge, report

ACCESSION = "ds900001"
REPORT = Path("demo-report", "tio-openneuro-demo.png")
RAM_BUDGET = "512 MB"

_LINK_BYTES_PER_S = 10e6
_LATENCY_S = 0.03
_BUDGET_SHARE = 4  # the disk budget is the dataset's bytes over this
_HELD_OUT_EVERY = 4  # every fourth head is kept out of training
_PATCH_SIDE = 32
_PATCHES_PER_HEAD = 8
_BATCH = 4
_LEARNING_RATE = 0.01
_WORKERS = 2


def run_demo(
    folder: Path,
    on_event: Callable[[DemoEvent], None] = lambda _: None,
    *,
    epochs: int = 6,
    seed: int = 0,
    heads: int = 24,
) -> DemoResult:
    """Train on synthetic heads under a quarter of their bytes on disk, and report.

    If it is interrupted or fails, nothing stays: neither process, nor temporary file, nor report.

    Args:
        folder: Where ``demo-report/tio-openneuro-demo.png`` is written.
        on_event: Called with each event, in this thread.
        epochs: Passes over the training heads.
        seed: Of heads, weights, order and patches.
        heads: How many; every fourth is held out.

    Returns:
        What was measured.
    """
    progress = _Progress(on_event, epochs)
    with (
        tempfile.TemporaryDirectory(prefix="tio-openneuro-demo-") as scratch,
        LoopbackOpenNeuro(
            Path(scratch, "openneuro"), rate_bytes_per_s=_LINK_BYTES_PER_S, latency_s=_LATENCY_S
        ) as openneuro,
    ):
        _publish(openneuro, progress, heads=heads, seed=seed)
        progress.say(Stage.INDEXING)
        root = Path(scratch, "root")
        with _open_dataset(root, parse_size("1 GB")) as dataset:  # fetches nothing
            dataset_bytes = dataset.nbytes
        budget_bytes = dataset_bytes // _BUDGET_SHARE
        progress.say(Stage.UNTRAINED)
        with DiskWatch(root) as watch, _open_dataset(root, budget_bytes) as dataset:
            page = (folder / REPORT).with_suffix(".html")
            scored, picture = _train(dataset, progress, page, epochs=epochs, seed=seed)
        fetched_bytes = openneuro.content_bytes()
    progress.say(Stage.REPORTING)
    result = DemoResult(
        heads=heads,
        epochs=scored,
        picture=picture,
        samples=watch.samples(),
        dataset_bytes=dataset_bytes,
        budget_bytes=budget_bytes,
        fetched_bytes=fetched_bytes,
        report=folder / REPORT,
    )
    write_report(result)
    return result


class _Progress:
    """Sends events, each of them the one before with some fields changed."""

    def __init__(self, on_event: Callable[[DemoEvent], None], epochs: int) -> None:
        """Begin to count the seconds."""
        self._on_event = on_event
        self._event = DemoEvent(Stage.HEADS, epochs=epochs)
        self._began_s = time.monotonic()

    def say(self, stage: Stage, **changed: Any) -> DemoEvent:  # noqa: ANN401 - its fields
        """Send an event with these fields changed, and return it."""
        elapsed_s = time.monotonic() - self._began_s
        self._event = replace(self._event, stage=stage, elapsed_s=elapsed_s, **changed)
        self._on_event(self._event)
        return self._event


def _publish(openneuro: LoopbackOpenNeuro, progress: _Progress, *, heads: int, seed: int) -> None:
    """Draw the heads and publish them as a BIDS dataset."""
    files: dict[str, Volume | bytes | str | Path] = {
        "dataset_description.json": '{"Name": "Synthetic heads", "BIDSVersion": "1.10.0"}\n',
        "README": "Synthetic heads with a lesion, drawn from random fields.\n",
    }
    participants = ["participant_id\tage\tsex"]
    for number, head in enumerate(make_heads(heads, seed=seed), start=1):
        stem = f"{head.name}/anat/{head.name}_FLAIR"
        files[f"{stem}.nii.gz"] = Volume(head.image, head.affine)
        files[f"{stem}_roi.nii.gz"] = Volume(head.label, head.affine)
        participants.append(f"{head.name}\t{head.age}\t{head.sex}")
        progress.say(Stage.HEADS, step=number, steps=heads)
    files["participants.tsv"] = "\n".join(participants) + "\n"
    progress.say(Stage.PUBLISHING, step=0, steps=0)
    openneuro.publish(ACCESSION, files)


def _open_dataset(root: Path, budget_bytes: int) -> DataladSubjectsDataset:
    """Open the published dataset by its accession."""
    scale = tio.RescaleIntensity((-1, 1), percentiles=(0.5, 99.5))
    return DataladSubjectsDataset(
        ACCESSION,
        {
            IMAGE: Scalar("sub-*/anat/*_FLAIR.nii.gz"),
            LABEL: Label("sub-*/anat/*_FLAIR_roi.nii.gz"),
        },
        root=root,
        disk_budget=budget_bytes,
        preprocess=tio.Compose([tio.ToCanonical(), scale]),
    )


def _train(
    dataset: DataladSubjectsDataset,
    progress: _Progress,
    page: Path,
    *,
    epochs: int,
    seed: int,
) -> tuple[tuple[DemoEvent, ...], Illustration]:
    """Train on three quarters of the heads, score on the others."""
    held_out = dataset[list(range(0, len(dataset), _HELD_OUT_EVERY))]
    kept = dataset[[index for index in range(len(dataset)) if index % _HELD_OUT_EVERY]]
    kept.set_transform(tio.RandomFlip(axes=0))  # left to right, the heads being canonical
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet()
    untrained = copy.deepcopy(network)
    optimiser = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE)
    with (
        _one_core_left(),
        BudgetedQueue(
            kept,
            samples_per_volume=_PATCHES_PER_HEAD,
            max_length=_PATCHES_PER_HEAD * len(kept) // 2,
            sampler=tio.LabelSampler(_PATCH_SIDE, LABEL, {0: 1, 1: 1}),
            num_workers=_WORKERS,
            ram_budget=RAM_BUDGET,
            seed=seed,
        ) as queue,
    ):
        loader = tio.SubjectsLoader(queue, batch_size=_BATCH, num_workers=0)
        gauge = Gauge(queue)
        schedule = warm_up_and_cosine(optimiser, epochs * len(loader))
        scores = score(network, held_out)
        scored = [progress.say(Stage.SCORED, scores=scores, moment=gauge.read())]
        for epoch in range(1, epochs + 1):
            losses: list[float] = []
            steps = len(loader)
            for loss in train_epoch(network, loader, optimiser, schedule):
                losses.append(loss)
                progress.say(
                    Stage.TRAINING,
                    epoch=epoch,
                    step=len(losses),
                    steps=steps,
                    loss=loss,
                    moment=gauge.read(),
                )
            event = progress.say(
                Stage.SCORED,
                step=0,
                loss=sum(losses) / len(losses),
                scores=score(network, held_out),
                moment=gauge.read(),
            )
            scored.append(event)
        report(queue, page)
    return tuple(scored), _illustrate(held_out, scored[-1].scores, untrained, network)


@contextmanager
def _one_core_left() -> Iterator[None]:
    """Leave one core to the queue, git-annex and the server.

    On two cores that others used too, a step on both took four times the processor time of a
    step on one, and twice as long: PyTorch's threads wait for one another (2026-11-20).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _illustrate(
    held_out: DataladSubjectsDataset,
    scores: tuple[SubjectScore, ...],
    untrained: UNet,
    trained: UNet,
) -> Illustration:
    """Show the held-out head of median Dice, where its lesion is largest."""
    by_dice = sorted(range(len(scores)), key=lambda index: scores[index].dice)
    median = by_dice[len(by_dice) // 2]
    subject: Any = held_out[median]
    image, truth = subject[IMAGE], subject[LABEL].data[0] > 0
    before, after = (segment(network, image.data) for network in (untrained, trained))
    at = int(truth.sum(dim=(0, 1)).argmax())
    return Illustration(
        head=median,
        slice_index=at,
        image=np.asarray(image.data[0, :, :, at]),
        truth=np.asarray(truth[:, :, at]),
        untrained=np.asarray(before[:, :, at]),
        trained=np.asarray(after[:, :, at]),
        aspect=float(image.spacing[1] / image.spacing[0]),
    )
