"""Run the demo: publish heads, train on them by accession under both budgets, write the report.

Owns the demo's temporary folder (loopback OpenNeuro, clones, ledger), which is gone when
:func:`run_demo` returns or raises; what stays is the report. Prints nothing: events go to a
callback, in the caller's thread.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
    EpochReport,
    Report,
    StepReport,
    Task,
    dice_score,
    segment,
    train,
)
from tio_openneuro.demo.watch import DiskWatch
from tio_openneuro.loopback import LoopbackOpenNeuro, Volume
from tio_openneuro.queue import BudgetedQueue
from tio_openneuro.select import Label, Scalar
from tio_openneuro.sizes import parse_size

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
_RATE_WINDOW_S = 2.0
_TASK = Task(image="flair", label="lesion", classes=2)


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
        dataset_bytes = _size_of_dataset(root)
        budget_bytes = dataset_bytes // _BUDGET_SHARE
        progress.say(Stage.UNTRAINED, dataset_bytes=dataset_bytes, budget_bytes=budget_bytes)
        with DiskWatch(root) as watch:
            progress.watch_link_and_disk(openneuro, watch)
            with _open_dataset(root, budget_bytes) as dataset:
                training = _train(dataset, progress, epochs=epochs, seed=seed)
        fetched_bytes = openneuro.content_bytes()
    report = folder / REPORT
    progress.say(Stage.REPORTING)
    result = DemoResult(
        heads=heads,
        held_out=len(training.epochs[-1].scores),
        epochs=training.epochs,
        samples=watch.samples(),
        dataset_bytes=dataset_bytes,
        budget_bytes=budget_bytes,
        fetched_bytes=fetched_bytes,
        ram_budget_bytes=parse_size(RAM_BUDGET),
        ram_peak_bytes=training.ram_peak_bytes,
        link_bytes_per_s=_LINK_BYTES_PER_S,
        latency_s=_LATENCY_S,
        train_s=training.train_s,
        wall_s=progress.elapsed_s,
        report=report,
    )
    write_report(result, training.picture, report)
    return replace(result, wall_s=progress.elapsed_s)


@dataclass(frozen=True, slots=True, eq=False)
class _Training:
    """What training leaves behind once the dataset is closed."""

    epochs: tuple[EpochReport, ...]
    picture: Illustration
    ram_peak_bytes: int
    train_s: float


@dataclass(slots=True, eq=False)
class _Progress:
    """The state of the demo as its events tell it."""

    on_event: Callable[[DemoEvent], None]
    epochs: int
    _event: DemoEvent = field(default_factory=lambda: DemoEvent(Stage.HEADS))
    _began_s: float = field(default_factory=time.monotonic)
    _openneuro: LoopbackOpenNeuro | None = None
    _watch: DiskWatch | None = None
    _sent: deque[tuple[float, int]] = field(default_factory=deque)
    first_step_s: float = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the demo began."""
        return time.monotonic() - self._began_s

    def watch_link_and_disk(self, openneuro: LoopbackOpenNeuro, watch: DiskWatch) -> None:
        """Put link and disk into the events from now on."""
        self._openneuro, self._watch = openneuro, watch

    def say(self, stage: Stage, **changed: Any) -> None:  # noqa: ANN401 - fields of DemoEvent
        """Send an event with these fields changed."""
        self._event = replace(
            self._event, stage=stage, epochs=self.epochs, elapsed_s=self.elapsed_s, **changed
        )
        self.on_event(self._event)

    def say_report(self, report: Report) -> None:
        """Send what the training loop reports."""
        if isinstance(report, StepReport):
            self.first_step_s = self.first_step_s or self.elapsed_s
            self.say(
                Stage.TRAINING,
                epoch=report.epoch,
                step=report.step,
                steps=report.steps,
                loss=report.loss,
                wait_s=self._event.wait_s + report.wait_s,
                **self._link_and_disk(),
            )
        else:
            self.say(
                Stage.SCORED,
                epoch=report.epoch,
                step=0,
                loss=report.loss,
                dice=report.dice,
                **self._link_and_disk(),
            )

    def _link_and_disk(self) -> dict[str, Any]:
        if self._openneuro is None or self._watch is None:
            return {}
        now_s, sent_bytes = self.elapsed_s, self._openneuro.content_bytes()
        self._sent.append((now_s, sent_bytes))
        while now_s - self._sent[0][0] > _RATE_WINDOW_S and len(self._sent) > 2:  # noqa: PLR2004
            self._sent.popleft()
        since_s, before_bytes = self._sent[0]
        rate = (sent_bytes - before_bytes) / (now_s - since_s) if now_s > since_s else 0.0
        return {
            "held_bytes": self._watch.held_bytes(),
            "fetched_bytes": sent_bytes,
            "link_bytes_per_s": rate,
        }


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


def _size_of_dataset(root: Path) -> int:
    """Clone and index, fetch nothing, and return the bytes of the images selected."""
    with _open_dataset(root, parse_size("1 GB")) as dataset:
        return int(dataset.nbytes)


@contextmanager
def _open_dataset(root: Path, budget_bytes: int) -> Iterator[DataladSubjectsDataset]:
    """Open the published dataset by its accession."""
    with DataladSubjectsDataset(
        ACCESSION,
        {
            _TASK.image: Scalar("sub-*/anat/*_FLAIR.nii.gz"),
            _TASK.label: Label("sub-*/anat/*_FLAIR_roi.nii.gz"),
        },
        root=root,
        disk_budget=budget_bytes,
        preprocess=tio.Compose(
            [tio.ToCanonical(), tio.RescaleIntensity((-1, 1), percentiles=(0.5, 99.5))]
        ),
    ) as dataset:
        yield dataset


def _train(
    dataset: DataladSubjectsDataset, progress: _Progress, *, epochs: int, seed: int
) -> _Training:
    """Train on three quarters of the heads, score on the others."""
    held_out = dataset[list(range(0, len(dataset), _HELD_OUT_EVERY))]
    kept = dataset[[index for index in range(len(dataset)) if index % _HELD_OUT_EVERY]]
    kept.set_transform(tio.RandomFlip(axes=0))  # left to right, the heads being canonical
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet(classes=_TASK.classes)
    untrained = copy.deepcopy(network)
    with (
        _one_core_left(),
        BudgetedQueue(
            kept,
            samples_per_volume=_PATCHES_PER_HEAD,
            max_length=_PATCHES_PER_HEAD * len(kept) // 2,
            sampler=tio.LabelSampler(_PATCH_SIDE, _TASK.label, {0: 1, 1: 1}),
            num_workers=_WORKERS,
            ram_budget=RAM_BUDGET,
            seed=seed,
        ) as queue,
    ):
        reports = train(
            network,
            tio.SubjectsLoader(queue, batch_size=_BATCH, num_workers=0),
            torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE),
            task=_TASK,
            epochs=epochs,
            held_out=held_out,
            on_report=progress.say_report,
        )
        ram_peak_bytes = queue.statistics().ram_peak_bytes
    train_s = progress.elapsed_s - progress.first_step_s
    picture = _illustrate(held_out, reports[-1], untrained, network)
    return _Training(tuple(reports), picture, ram_peak_bytes, train_s)


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
    held_out: DataladSubjectsDataset, last: EpochReport, untrained: UNet, trained: UNet
) -> Illustration:
    """Show the held-out head of median Dice, where its lesion is largest."""
    by_dice = sorted(range(len(last.scores)), key=lambda index: last.scores[index].dice)
    median = by_dice[len(by_dice) // 2]
    subject: Any = held_out[median]
    image, truth = subject[_TASK.image], subject[_TASK.label].data[0] > 0
    before, after = segment(untrained, image.data), segment(trained, image.data)
    at = int(truth.sum(dim=(0, 1)).argmax())
    return Illustration(
        name=last.scores[median].name,
        slice_index=at,
        image=np.asarray(image.data[0, :, :, at]),
        truth=np.asarray(truth[:, :, at]),
        untrained=np.asarray(before[:, :, at] > 0),
        trained=np.asarray(after[:, :, at] > 0),
        dice_untrained=dice_score(before, truth.long()),
        dice_trained=dice_score(after, truth.long()),
        aspect=float(image.spacing[1] / image.spacing[0]),
    )
