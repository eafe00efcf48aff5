"""In which order an epoch visits the subjects, for any subject sampler, and its plan.

Torch's own samplers are copied and drawn from ahead of time; the user's object is never advanced.
What cannot be foreseen (a sampler of unknown class may depend on what training finds) is asked
once, when the pass begins.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

from torch.utils import data
from torch.utils.data.distributed import DistributedSampler

from tio_openneuro.queue.draw import EpochPlan, Pass, PassStart, derive_seed, permute
from tio_openneuro.torchio_seams import drawing_from

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


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of how many processes of one training this is.

    Attributes:
        rank: Its number, from zero.
        world: How many there are.
        share: Whether they are to share the subjects.
    """

    rank: int = 0
    world: int = 1
    share: bool = False


ALONE = Ranks()


def knows_ranks(subject_sampler: object) -> bool:
    """Tell whether a subject sampler deals the subjects out, as DistributedSampler does."""
    return hasattr(subject_sampler, "num_replicas") or hasattr(subject_sampler, "rank")


class Planner:
    """The subjects of each epoch in their order, and their numbers of patches."""

    def __init__(
        self,
        counts: Sequence[int],
        subject_sampler: Iterable[int] | None,
        *,
        seed: int,
        shuffled: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        """Keep a copy of the subject sampler as it is now.

        Args:
            counts: Patches of each subject of the dataset.
            subject_sampler: The user's, or None: every subject once.
            seed: The queue's seed; it decides where the sampler has no generator of its own.
            shuffled: Whether subjects are permuted where there is no subject sampler.
            ranks: Where they share, this rank has its part: of every subject once, or by draws of
                its own from a subject sampler that knows no ranks.
        """
        shares = ranks.share and ranks.world > 1
        own = shares and subject_sampler is not None and not knows_ranks(subject_sampler)
        self._permuted = shuffled and subject_sampler is None and not shares
        every: Any = range(len(counts))
        if shares and subject_sampler is None:
            # Its seed stays 0: that of the queue may differ between ranks.
            every = DistributedSampler(every, ranks.world, ranks.rank, shuffle=shuffled, seed=0)
        self._live: Iterable[int] = every if subject_sampler is None else subject_sampler
        self.foreseeable = type(self._live) in _FORESEEABLE
        self.uniform = len(set(counts)) == 1
        self.counts = counts
        self._seed = seed
        self._drawn_for = ("subject sampler", ranks.rank) if own else ("subject sampler",)
        self._first = copy.deepcopy(self._live) if self.foreseeable else None
        generator = getattr(self._first, "generator", None)
        if own and ranks.rank > 0 and generator is not None:
            generator.manual_seed(derive_seed(generator.initial_seed(), *self._drawn_for))
        self._copy: Iterable[int] | None = None
        self._copied_epoch = 0
        self._plans: dict[int, EpochPlan] = {}

    def __len__(self) -> int:
        """Return the subjects of one epoch, drawing nothing.

        Raises:
            ValueError: The subject sampler has no length.
        """
        if not isinstance(self._live, Sized):
            raise ValueError(  # noqa: TRY004 - TorchIO's queue raises ValueError
                f"The subject sampler passed to the queue must have a __len__ method, and "
                f"{type(self._live).__name__} has none: give it one that returns the number of "
                f"subjects of an epoch."
            )
        return len(self._live)

    @property
    def largest_total(self) -> int:
        """The most patches that an epoch may have."""
        subjects = len(self._live if isinstance(self._live, Sized) else self.counts)
        return max(self.counts) * max(subjects, 1)

    def total(self, epoch: int) -> int:
        """Return the patches of an epoch; its order is drawn only where subjects differ."""
        return len(self) * self.counts[0] if self.uniform else self.plan(epoch).total

    def plan(self, epoch: int) -> EpochPlan:
        """Return the plan of an epoch; the same one when asked again.

        Args:
            epoch: Number of the epoch. Where the order cannot be foreseen, the first call for an
                epoch draws it.

        Raises:
            ValueError: The subject sampler has no length, or gives an index out of range.
        """
        if epoch not in self._plans:
            self.recall(epoch, self._draw(epoch))
        return self._plans[epoch]

    def following(self, epoch: int) -> EpochPlan | None:
        """Return the plan of the next epoch, or None where it cannot be foreseen."""
        return self.plan(epoch + 1) if self.foreseeable else None

    def recall(self, epoch: int, order: tuple[int, ...]) -> None:
        """Set the order of an epoch, as it was when that was begun before a restart.

        Args:
            epoch: Number of the epoch.
            order: The indices of its subjects.

        Raises:
            ValueError: An index is out of range.
        """
        for index in order:
            if not 0 <= index < len(self.counts):
                raise ValueError(
                    f"The subject sampler gave index {index} in epoch {epoch}, and the dataset "
                    f"has {len(self.counts)} subjects: indices go from 0 to "
                    f"{len(self.counts) - 1}."
                )
        self._plans = {known: plan for known, plan in self._plans.items() if known >= epoch - 1}
        self._plans[epoch] = EpochPlan(epoch, order, tuple(self.counts[i] for i in order))

    def likeliest(self) -> list[int]:
        """Return the subjects that an epoch of unknown order may have, the likeliest first."""
        chosen = getattr(self._live, "indices", None)
        weights = getattr(self._live, "weights", None)
        count = len(self.counts)
        if chosen is None or not all(0 <= int(index) < count for index in chosen):
            chosen = range(count)
        found = sorted({int(index) for index in chosen})
        if weights is None or len(weights) != count:
            return found
        return sorted(found, key=lambda index: -float(weights[index]))

    def _draw(self, epoch: int) -> tuple[int, ...]:
        count = len(self)
        if self._permuted:
            return tuple(permute(count, self._seed, "subjects", epoch))
        with drawing_from(derive_seed(self._seed, *self._drawn_for, epoch)):
            if self.foreseeable:
                return tuple(map(int, self._copy_at(epoch)))
            set_epoch = getattr(self._live, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)
            return tuple(map(int, self._live))

    def _copy_at(self, epoch: int) -> Iterable[int]:
        """Return a copy of the sampler that gives the order of an epoch when it is iterated."""
        if self._copy is None or epoch < self._copied_epoch:
            self._copy = copy.deepcopy(cast("Iterable[int]", self._first))
            self._copied_epoch = 0
        sampler = self._copy
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(epoch)
        elif getattr(sampler, "generator", None) is not None:
            # A generator of the user's own is stateful: epoch n is its n-th pass, counted from
            # the state in which the queue was given it.
            for _ in range(self._copied_epoch, epoch):
                list(sampler)
        self._copied_epoch = epoch + 1
        return sampler


@dataclass(frozen=True, slots=True)
class Script:
    """What one rank makes and takes in some epochs, whatever its machine is like.

    Attributes:
        orders: Index of each subject, of each epoch and of the one after them.
        takes: Of each patch of each epoch, where its subject stands in the orders together.
    """

    orders: tuple[tuple[int, ...], ...]
    takes: tuple[tuple[int, ...], ...]


def write_script(
    counts: Sequence[int], epochs: int, window: int, *, seed: int, ranks: Ranks = ALONE
) -> Script:
    """Return what a queue without a subject sampler makes and takes.

    Args:
        counts: Patches of each subject of the dataset.
        epochs: How many there are.
        window: The queue's ``max_length``.
        seed: The queue's.
        ranks: Which share of the subjects it has.
    """
    planner = Planner(counts, None, seed=seed, shuffled=True, ranks=ranks)
    plans = [planner.plan(epoch) for epoch in range(epochs + 1)]
    takes, before = [], 0
    for plan in plans[:-1]:
        current = Pass(plan, PassStart(), seed=seed, window=window, shuffled=True)
        positions = []
        while not current.finished:
            positions.append(before + current.next()[0].position)
            current.take()
        takes.append(tuple(positions))
        before += len(plan.order)
    return Script(tuple(plan.order for plan in plans), tuple(takes))
