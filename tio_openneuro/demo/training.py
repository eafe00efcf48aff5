"""A plain training loop over patches of the heads, and Dice on whole held-out heads.

Owns nothing. It knows TorchIO's loader and the network, not where the subjects come from.
Nothing is printed or written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torchio as tio
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from tio_openneuro.demo.network import UNet, dice_and_cross_entropy

IMAGE, LABEL = "flair", "lesion"
_WARM_UP = 0.1  # share of all steps


@dataclass(frozen=True, slots=True)
class SubjectScore:
    """How well one held-out subject was segmented.

    Attributes:
        name: Its ``subject_id``.
        dice: Of its lesion.
    """

    name: str
    dice: float


def train_epoch(
    network: UNet, loader: tio.SubjectsLoader, optimiser: torch.optim.Optimizer, schedule: LambdaLR
) -> Iterator[float]:
    """Train on every batch of the loader; yield the loss of each.

    Args:
        network: Trained in place.
        loader: Batches of ``IMAGE`` and ``LABEL``.
        optimiser: Steps once for each batch.
        schedule: Of the learning rate; steps with the optimiser.
    """
    network.train()
    batch: Any
    for batch in loader:
        images = batch[IMAGE][tio.DATA].to(torch.float32)
        labels = batch[LABEL][tio.DATA][:, 0].to(torch.int64)
        optimiser.zero_grad(set_to_none=True)
        loss = dice_and_cross_entropy(network(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        yield loss.item()


def warm_up_and_cosine(optimiser: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Return the schedule of the learning rate over all steps."""
    rising = max(1, round(_WARM_UP * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising))))

    return LambdaLR(optimiser, factor)


def score(network: UNet, subjects: tio.SubjectsDataset) -> tuple[SubjectScore, ...]:
    """Segment whole subjects, one at a time, and return their Dice."""
    scores: list[SubjectScore] = []
    for index in range(len(subjects)):
        subject: Any = subjects[index]
        dice = dice_score(segment(network, subject[IMAGE].data), subject[LABEL].data[0] > 0)
        scores.append(SubjectScore(subject["subject_id"], dice))
    return tuple(scores)


def segment(network: UNet, image: Tensor) -> Tensor:
    """Return where a whole image is likelier lesion than not: bool, shape ``(I, J, K)``.

    The image is padded to what the network divides by. Leaves the network in evaluation mode.

    Args:
        network: Logits from images.
        image: Shape ``(1, I, J, K)``.
    """
    i, j, k = image.shape[1:]
    pads = [size for side in (k, j, i) for size in (0, -side % network.multiple)]
    padded = functional.pad(image.float(), pads, value=float(image.min()))
    network.eval()
    with torch.inference_mode():
        logits: Tensor = network(padded[None])[0]
    return logits[1, :i, :j, :k] > logits[0, :i, :j, :k]


def dice_score(guess: Tensor, truth: Tensor) -> float:
    """Return the Dice of two masks, 1 where both are empty."""
    size = int(guess.sum() + truth.sum())
    return 2 * int((guess & truth).sum()) / size if size else 1.0
