"""What the demo says while it runs and at its end. Frozen records; no behaviour beyond sums."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tio_openneuro.demo.training import SubjectScore
from tio_openneuro.demo.watch import HeldSample
from tio_openneuro.watch import Moment


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
        loss: Of the step, or the epoch's mean at its end; None before the first step.
        scores: Of the held-out heads at the last scoring; none before.
        moment: What the queue tells; None before there is one.
        elapsed_s: Since the demo began.
    """

    stage: Stage
    epoch: int = 0
    epochs: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    scores: tuple[SubjectScore, ...] = ()
    moment: Moment | None = None
    elapsed_s: float = 0.0

    @property
    def dice(self) -> float:
        """Mean Dice of the held-out heads at the last scoring, once there was one."""
        return sum(score.dice for score in self.scores) / len(self.scores)


@dataclass(frozen=True, slots=True, eq=False)
class Illustration:
    """One axial slice of a held-out head: the one with most lesion in the head of median Dice.

    Attributes:
        head: Its number among the held-out heads.
        slice_index: Along the third axis.
        image: Shape ``(I, J)``, left to right and back to front.
        truth: Lesion, bool, shape ``(I, J)``.
        untrained: What the untrained network called lesion, bool, shape ``(I, J)``.
        trained: What the trained network calls lesion, bool, shape ``(I, J)``.
        aspect: Spacing along J over spacing along I.
    """

    head: int
    slice_index: int
    image: NDArray[Any]
    truth: NDArray[Any]
    untrained: NDArray[Any]
    trained: NDArray[Any]
    aspect: float


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo found, all of it measured in this run.

    Attributes:
        heads: Subjects in the dataset.
        epochs: The event at each scoring: the untrained network first, then each epoch's end.
        picture: A slice of one held-out head.
        samples: Disk held over the whole life of the root, sampled by a process of its own.
        dataset_bytes: Content of the dataset.
        budget_bytes: Disk budget.
        fetched_bytes: What the server sent.
        report: The PNG.
    """

    heads: int
    epochs: tuple[DemoEvent, ...]
    picture: Illustration
    samples: tuple[HeldSample, ...]
    dataset_bytes: int
    budget_bytes: int
    fetched_bytes: int
    report: Path

    @property
    def peak_held_bytes(self) -> int:
        """The most that the root held at any sample."""
        return max(sample.held_bytes for sample in self.samples)
