"""What the demo says while it runs and at its end. Frozen records; no behaviour beyond sums."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tio_openneuro.demo.training import EpochReport
from tio_openneuro.demo.watch import HeldSample


class Stage(enum.Enum):
    """What the demo is doing; the value is how it is said."""

    HEADS = "drawing synthetic heads"
    PUBLISHING = "publishing them on the loopback OpenNeuro"
    INDEXING = "cloning and indexing by accession"
    UNTRAINED = "scoring the untrained network"
    TRAINING = "training"
    SCORED = "scored the held-out heads"
    REPORTING = "writing the report"


@dataclass(frozen=True, slots=True)
class DemoEvent:
    """One moment of the demo.

    Attributes:
        stage: What is being done.
        epoch: From 1; 0 before training.
        epochs: Of the whole demo.
        step: In this epoch, from 1; 0 between epochs. While heads are drawn: the head.
        steps: Of this epoch. While heads are drawn: of the heads.
        loss: Of the step, or the epoch's mean at its end; ``nan`` before.
        dice: Mean of the held-out heads at the last scoring; ``nan`` before.
        held_bytes: On disk under the root, seen from outside.
        budget_bytes: Disk budget; 0 before it is known.
        dataset_bytes: Content of the dataset; 0 before it is known.
        fetched_bytes: What the server has sent so far.
        link_bytes_per_s: What it has been sending lately.
        wait_s: Seconds that training has waited for patches so far.
        elapsed_s: Since the demo began.
    """

    stage: Stage
    epoch: int = 0
    epochs: int = 0
    step: int = 0
    steps: int = 0
    loss: float = math.nan
    dice: float = math.nan
    held_bytes: int = 0
    budget_bytes: int = 0
    dataset_bytes: int = 0
    fetched_bytes: int = 0
    link_bytes_per_s: float = 0.0
    wait_s: float = 0.0
    elapsed_s: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Illustration:
    """One axial slice of a held-out head: the one with most lesion in the head of median Dice.

    Attributes:
        name: ``"sub-09"``.
        slice_index: Along the third axis.
        image: Shape ``(I, J)``, left to right and back to front.
        truth: Lesion, bool, shape ``(I, J)``.
        untrained: What the untrained network called lesion, bool, shape ``(I, J)``.
        trained: What the trained network calls lesion, bool, shape ``(I, J)``.
        dice_untrained: Of the whole head.
        dice_trained: Of the whole head.
        aspect: Spacing along J over spacing along I.
    """

    name: str
    slice_index: int
    image: NDArray[Any]
    truth: NDArray[Any]
    untrained: NDArray[Any]
    trained: NDArray[Any]
    dice_untrained: float
    dice_trained: float
    aspect: float


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo found, all of it measured in this run.

    Attributes:
        heads: Subjects in the dataset.
        held_out: Subjects that were kept out of training.
        epochs: The untrained network first (epoch 0), then each epoch.
        samples: Disk held over the whole life of the root, sampled by a process of its own.
        dataset_bytes: Content of the dataset.
        budget_bytes: Disk budget.
        fetched_bytes: What the server sent.
        ram_budget_bytes: RAM budget of the queue.
        ram_peak_bytes: The most that the queue had charged to it.
        link_bytes_per_s: Rate of the server's link.
        latency_s: From each request to its answer's first byte.
        train_s: Seconds from the first epoch's beginning to the last one's end, scoring included.
        wall_s: Seconds of the whole demo.
        report: The PNG.
    """

    heads: int
    held_out: int
    epochs: tuple[EpochReport, ...]
    samples: tuple[HeldSample, ...]
    dataset_bytes: int
    budget_bytes: int
    fetched_bytes: int
    ram_budget_bytes: int
    ram_peak_bytes: int
    link_bytes_per_s: float
    latency_s: float
    train_s: float
    wall_s: float
    report: Path

    @property
    def dice_untrained(self) -> float:
        """Mean Dice of the held-out heads before training."""
        return self.epochs[0].dice

    @property
    def dice_trained(self) -> float:
        """Mean Dice of the held-out heads after training."""
        return self.epochs[-1].dice

    @property
    def peak_held_bytes(self) -> int:
        """The most that the root held at any sample."""
        return max(sample.held_bytes for sample in self.samples)

    @property
    def wait_s(self) -> float:
        """Seconds that training waited for patches."""
        return sum(report.wait_s for report in self.epochs)
