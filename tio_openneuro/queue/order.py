"""In which order an epoch visits the subjects, for any subject sampler, and its plan.

Torch's own samplers are copied and drawn from ahead of time; the user's object is never advanced.
What cannot be foreseen (a sampler of unknown class may depend on what training finds) is asked
once, when the pass begins.
"""

from __future__ import annotations

import copy
from collections.abc import Sized
from typing import TYPE_CHECKING, cast

import torch
from torch.utils import data
from torch.utils.data.distributed import DistributedSampler

from tio_openneuro.queue.draw import EpochPlan, derive_seed, permute
from tio_openneuro.torchio_seams import drawing_from

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_FORESEEABLE = (
    data.SequentialSampler,
    data.RandomSampler,
    data.WeightedRandomSampler,
    data.SubsetRandomSampler,
    DistributedSampler,
    range,
    list,
    tuple,
)


class SubjectOrder:
    """The subjects' indices, epoch by epoch."""

    def __init__(
        self,
        count: int,
        subject_sampler: Iterable[int] | None,
        *,
        seed: int,
        shuffled: bool,
    ) -> None:
        """Keep a copy of the subject sampler as it is now.

        Args:
            count: Subjects in the dataset.
            subject_sampler: The user's, or None: every subject once.
            seed: The queue's seed; it decides where the sampler has no generator of its own.
            shuffled: Whether subjects are permuted where there is no subject sampler.
        """
        self.foreseeable = subject_sampler is None or type(subject_sampler) in _FORESEEABLE
        self._count = count
        self._seed = seed
        self._shuffled = shuffled
        self._live = subject_sampler
        self._first = copy.deepcopy(subject_sampler) if self.foreseeable else None
        self._copy: Iterable[int] | None = None
        self._copied_epoch = 0
        self._known: dict[int, tuple[int, ...]] = {}

    def __len__(self) -> int:
        """Return the subjects of one epoch, drawing nothing.

        Raises:
            ValueError: The subject sampler has no length.
        """
        if self._live is None:
            return self._count
        if not isinstance(self._live, Sized):
            message = (
                f"The subject sampler passed to the queue must have a __len__ method, and "
                f"{type(self._live).__name__} has none: give it one that returns the number of "
                f"subjects of an epoch."
            )
            raise ValueError(message)  # noqa: TRY004 - TorchIO's queue raises ValueError
        return len(self._live)

    @property
    def sized(self) -> bool:
        """Whether the number of subjects of an epoch is known."""
        return self._live is None or isinstance(self._live, Sized)

    def of(self, epoch: int) -> tuple[int, ...]:
        """Return the subjects' indices of an epoch; the same ones when asked again.

        Args:
            epoch: Number of the epoch. Where the order cannot be foreseen, the first call for an
                epoch draws it.

        Raises:
            ValueError: The subject sampler has no length, or gives an index out of range.
        """
        if epoch not in self._known:
            order = self._draw(epoch)
            for index in order:
                if not 0 <= index < self._count:
                    message = (
                        f"The subject sampler gave index {index} in epoch {epoch}, and the "
                        f"dataset has {self._count} subjects: indices go from 0 to "
                        f"{self._count - 1}."
                    )
                    raise ValueError(message)
            for old in [known for known in self._known if known < epoch - 1]:
                del self._known[old]
            self._known[epoch] = order
        return self._known[epoch]

    def likeliest(self) -> list[int]:
        """Return the subjects that an epoch of unknown order may have, the likeliest first."""
        chosen = getattr(self._live, "indices", None)
        weights = getattr(self._live, "weights", None)
        if chosen is None or not all(0 <= int(index) < self._count for index in chosen):
            chosen = range(self._count)
        found = sorted({int(index) for index in chosen})
        if weights is None or len(weights) != self._count:
            return found
        return sorted(found, key=lambda index: -float(weights[index]))

    def recall(self, epoch: int, order: tuple[int, ...]) -> None:
        """Set the order of an epoch that was begun before a restart.

        Args:
            epoch: Number of the epoch.
            order: Its indices.
        """
        self._known[epoch] = order

    def _draw(self, epoch: int) -> tuple[int, ...]:
        if self._live is None:
            if self._shuffled:
                return tuple(permute(self._count, self._seed, "subjects", epoch))
            return tuple(range(self._count))
        len(self)
        with drawing_from(derive_seed(self._seed, "subject sampler", epoch)):
            if not self.foreseeable:
                set_epoch = getattr(self._live, "set_epoch", None)
                if callable(set_epoch):
                    set_epoch(epoch)
                return tuple(int(index) for index in self._live)
            return self._draw_from_copy(epoch)

    def _draw_from_copy(self, epoch: int) -> tuple[int, ...]:
        if self._copy is None or epoch < self._copied_epoch:
            self._copy = copy.deepcopy(cast("Iterable[int]", self._first))
            self._copied_epoch = 0
        sampler = self._copy
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(epoch)
            return tuple(int(index) for index in sampler)
        if getattr(self._first, "generator", self) is None:
            generator = torch.Generator()
            generator.manual_seed(derive_seed(self._seed, "subject sampler", epoch))
            sampler.generator = generator  # type: ignore[attr-defined]
            return tuple(int(index) for index in sampler)
        # A generator of the user's own is stateful: epoch n is its n-th pass, counted from the
        # state in which the queue was given it.
        while self._copied_epoch < epoch:
            for _ in sampler:
                pass
            self._copied_epoch += 1
        self._copied_epoch += 1
        return tuple(int(index) for index in sampler)


class Planner:
    """Plans of epochs, from the subjects' order and their numbers of patches."""

    def __init__(self, order: SubjectOrder, count_of: Callable[[int], int], subjects: int) -> None:
        """Ask nothing yet.

        Args:
            order: The subjects' order in each epoch.
            count_of: Returns the patches of a subject, by its index in the dataset.
            subjects: Subjects in the dataset.
        """
        self._order = order
        self._count_of = count_of
        self._subjects = subjects
        self._plans: dict[int, EpochPlan] = {}
        self._counts: frozenset[int] | None = None

    @property
    def uniform(self) -> int | None:
        """The patches of every subject, or None where they differ."""
        counts = self._distinct()
        return next(iter(counts)) if len(counts) == 1 else None

    @property
    def largest_total(self) -> int:
        """The most patches that an epoch may have."""
        subjects = len(self._order) if self._order.sized else self._subjects
        return max(self._distinct()) * max(subjects, 1)

    def plan(self, epoch: int) -> EpochPlan:
        """Return the plan of an epoch; the same one when asked again."""
        order = self._order.of(epoch)
        plan = self._plans.get(epoch)
        if plan is None or plan.order != order:
            plan = EpochPlan(epoch, order, tuple(map(self._count_of, order)))
            self._plans = {known: p for known, p in self._plans.items() if known >= epoch - 1}
            self._plans[epoch] = plan
        return plan

    def following(self, epoch: int) -> EpochPlan | None:
        """Return the plan of the next epoch, or None where it cannot be foreseen."""
        return self.plan(epoch + 1) if self._order.foreseeable else None

    def total(self, epoch: int) -> int:
        """Return the patches of an epoch; its order is drawn only where subjects differ."""
        uniform = self.uniform
        return self.plan(epoch).total if uniform is None else len(self._order) * uniform

    def _distinct(self) -> frozenset[int]:
        if self._counts is None:
            self._counts = frozenset(map(self._count_of, range(self._subjects)))
        return self._counts
