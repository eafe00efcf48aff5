"""A plain training loop over a queue of patches, and Dice on whole held-out subjects.

Owns nothing. It knows TorchIO's loader and a network, not where the subjects come from: the demo
and ``examples/01_train_segmentation.py`` share it. Results leave as frozen reports, given to a
callback as they arise; nothing is printed or written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torchio as tio
from torch import Tensor, nn
from torch.nn import functional

from tio_openneuro.demo.network import dice_and_cross_entropy

_WHOLE_VOXELS = 96**3  # larger volumes are segmented in tiles, for the sake of memory
_TILE_SIDE = 96
_TILE_OVERLAP = 16
_WARM_UP = 0.1  # share of all steps


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimisation step.

    Attributes:
        epoch: From 1.
        step: In this epoch, from 1.
        steps: Of this epoch.
        loss: Of the batch.
        wait_s: Seconds that the loop stood waiting for the batch.
    """

    epoch: int
    step: int
    steps: int
    loss: float
    wait_s: float


@dataclass(frozen=True, slots=True)
class SubjectScore:
    """How well one held-out subject was segmented.

    Attributes:
        name: Its ``subject_id``, or its number where it has none.
        dice: Mean over the foreground classes.
    """

    name: str
    dice: float


@dataclass(frozen=True, slots=True)
class EpochReport:
    """One epoch, the held-out subjects included.

    Attributes:
        epoch: From 1; 0 is the network before training.
        loss: Mean over the steps; ``nan`` at epoch 0.
        wait_s: Seconds that the loop stood waiting for batches.
        scores: One for each held-out subject, in their order.
        trained_on: The ``subject_id`` of every patch's subject, each once, sorted.
    """

    epoch: int
    loss: float
    wait_s: float
    scores: tuple[SubjectScore, ...]
    trained_on: tuple[str, ...] = ()

    @property
    def dice(self) -> float:
        """Mean Dice of the held-out subjects, or ``nan`` without any."""
        if not self.scores:
            return math.nan
        return sum(score.dice for score in self.scores) / len(self.scores)


Report: TypeAlias = StepReport | EpochReport


@dataclass(frozen=True, slots=True)
class Task:
    """What is learnt from what.

    Attributes:
        image: Name of the image in each subject.
        label: Name of its label map.
        classes: How many, background included; labels are 0 to ``classes - 1``.
    """

    image: str = "image"
    label: str = "label"
    classes: int = 2


def train(
    network: nn.Module,
    loader: tio.SubjectsLoader,
    optimiser: torch.optim.Optimizer,
    *,
    task: Task,
    epochs: int,
    held_out: tio.SubjectsDataset | None = None,
    on_report: Callable[[Report], None] = lambda _: None,
) -> list[EpochReport]:
    """Train for some epochs, and score the held-out subjects before and after each.

    The learning rate rises to the optimiser's own in the first tenth of the steps and then falls
    to zero along a cosine.

    Args:
        network: Logits from images; may have ``multiple``, which the sides must be a multiple of.
        loader: Loader over a ``tio.Queue`` or the like; one pass is one epoch.
        optimiser: Over the network's parameters.
        task: Names of image and label.
        epochs: Passes over the loader.
        held_out: Whole subjects, loaded one at a time after each epoch.
        on_report: Called in this thread with each report as it arises.

    Returns:
        One report per epoch, and before them that of the untrained network, epoch 0.
    """
    device = _device_of(network)
    schedule: torch.optim.lr_scheduler.LambdaLR | None = None
    reports = [EpochReport(0, math.nan, 0.0, score(network, held_out, task=task))]
    on_report(reports[0])
    for epoch in range(1, epochs + 1):
        network.train()
        steps = len(loader)
        schedule = schedule or _warm_up_and_cosine(optimiser, epochs * steps)
        losses: list[float] = []
        waits_s: list[float] = []
        trained_on: set[str] = set()
        for batch, wait_s in _timed(loader):
            images = batch[task.image][tio.DATA].to(device, torch.float32)
            labels = batch[task.label][tio.DATA][:, 0].to(device, torch.int64)
            optimiser.zero_grad(set_to_none=True)
            loss = dice_and_cross_entropy(network(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
            waits_s.append(wait_s)
            trained_on.update(map(str, batch.get("subject_id", ())))
            on_report(StepReport(epoch, len(losses), steps, losses[-1], wait_s))
        mean_loss = sum(losses) / len(losses) if losses else math.nan
        scores = score(network, held_out, task=task)
        seen = tuple(sorted(trained_on))
        reports.append(EpochReport(epoch, mean_loss, sum(waits_s), scores, seen))
        on_report(reports[-1])
    return reports


def score(
    network: nn.Module, subjects: tio.SubjectsDataset | None, *, task: Task
) -> tuple[SubjectScore, ...]:
    """Segment whole subjects, one at a time, and return their Dice."""
    scores: list[SubjectScore] = []
    for index in range(len(subjects) if subjects is not None else 0):
        subject: Any = subjects[index]  # type: ignore[index]
        guess = segment(network, subject[task.image].data)
        dice = dice_score(guess, subject[task.label].data[0], classes=task.classes)
        scores.append(SubjectScore(str(subject.get("subject_id", index)), dice))
    return tuple(scores)


def segment(network: nn.Module, image: Tensor) -> Tensor:
    """Return the likeliest class of each voxel of a whole image.

    The image is padded to what the network divides by; a large one is segmented in overlapping
    tiles, whose results are averaged. Leaves the network in evaluation mode.

    Args:
        network: Logits from images.
        image: Shape ``(C, I, J, K)``.

    Returns:
        Integers, shape ``(I, J, K)``, on the processor.
    """
    multiple = int(getattr(network, "multiple", 1))
    shape = image.shape[1:]
    margins = [-side % multiple for side in shape]
    pads = [size for margin in reversed(margins) for size in (0, margin)]
    padded = functional.pad(image.float(), pads, value=float(image.min()))
    network.eval()
    with torch.inference_mode():
        if padded[0].numel() <= _WHOLE_VOXELS:
            logits: Tensor = network(padded[None].to(_device_of(network)))[0].cpu()
        else:
            logits = _segment_tiles(network, padded, multiple)
    i, j, k = shape
    return logits.argmax(dim=0)[:i, :j, :k]


def dice_score(guess: Tensor, truth: Tensor, *, classes: int = 2) -> float:
    """Return the mean Dice of the foreground classes that either map contains.

    Args:
        guess: Class of each voxel, shape ``(I, J, K)``.
        truth: The same, from the label.
        classes: How many, background included.

    Returns:
        From 0 to 1; 1 where both are background alone.
    """
    scores: list[float] = []
    for value in range(1, classes):
        one, other = guess == value, truth == value
        size = int(one.sum() + other.sum())
        if size:
            scores.append(2 * int((one & other).sum()) / size)
    return sum(scores) / len(scores) if scores else 1.0


def _segment_tiles(network: nn.Module, padded: Tensor, multiple: int) -> Tensor:
    """Return averaged logits of overlapping tiles; each side divides by ``multiple``."""
    largest = _TILE_SIDE - _TILE_SIDE % multiple
    tile: Any = tuple(min(largest, side) for side in padded.shape[1:])
    overlap: Any = tuple(_TILE_OVERLAP if side > _TILE_OVERLAP else 0 for side in tile)
    image = tio.ScalarImage(tensor=padded)  # type: ignore[no-untyped-call]
    sampler = tio.GridSampler(tio.Subject(image=image), tile, overlap)
    aggregator = tio.GridAggregator(sampler, overlap_mode="average")
    for index in range(len(sampler)):
        patch: Any = sampler[index]
        logits = network(patch["image"].data[None].to(_device_of(network))).cpu()
        aggregator.add_batch(logits, patch[tio.LOCATION][None])
    return aggregator.get_output_tensor()


def _device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _timed(loader: tio.SubjectsLoader) -> Iterator[tuple[Any, float]]:
    """Yield each batch with the seconds that it was waited for."""
    batches = iter(loader)
    while True:
        asked_s = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - asked_s


def _warm_up_and_cosine(
    optimiser: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the schedule of the learning rate over all steps."""
    rising = max(1, round(_WARM_UP * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising))))

    return torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
