"""What a queue reports and what it resumes from: plain values, and the checks between two runs.

A state is a dict of JSON's types, so that any checkpoint format keeps it.
"""

from __future__ import annotations

import base64
import reprlib
import time
import zlib
from array import array
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import starmap
from typing import Any

from tio_openneuro.dataset import DataladSubjectsDataset
from tio_openneuro.disk import DiskStatistics
from tio_openneuro.errors import TioOpenNeuroError
from tio_openneuro.queue.draw import EpochPlan, PassStart, Replacement, Turn
from tio_openneuro.queue.order import Planner, Ranks
from tio_openneuro.recording import History

STATE_VERSION = 2
LONGEST_SKIPPED = 500
WORK = ("content", "decode", "transform", "sample")
_LONGEST_NAME = 300
_LONGEST_TEXT = 5000
# For each subject of an epoch; its replay takes the square of that in time.
_MOST_REPLACED = 8
_COUNT = range(1 << 40)
# What each value of a state is: whole numbers in a range, text, lists of one kind, rows of many.
_KINDS: dict[str, Any] = {
    "seed": range(-(1 << 256), 1 << 256),
    "window": range(1, 1 << 40),
    # A subject sampler with a generator of its own is drawn from once for each epoch before.
    "epoch": range(1_000_000),
    "step": _COUNT,
    "next_index": _COUNT,
    "holes": [_COUNT],
    "replacements": [(_COUNT, _COUNT, _COUNT)],
    "skipped": [(str, str, _COUNT, _COUNT)],
    "parts": {str: str},
    "ranks": (_COUNT, _COUNT),
}


@dataclass(frozen=True, slots=True)
class SkippedSubject:
    """A subject that gave no patches in an epoch.

    Attributes:
        unit: The subject's name.
        reason: What stopped it.
        index: Index in the dataset.
        epoch: Number of the epoch.
    """

    unit: str
    reason: str
    index: int
    epoch: int

    @classmethod
    def because(cls, error: BaseException, unit: str, turn: Turn) -> SkippedSubject:
        """Return an entry whose reason is an error's class and message, cut where it is long."""
        reason = f"{type(error).__name__}: {error}"[:_LONGEST_NAME]
        return cls(unit[:_LONGEST_NAME], reason, turn.index, turn.epoch)


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """What a queue has done, and what it holds.

    Attributes:
        patches: Patches delivered since it was made.
        subjects: Subjects whose patches were made since then, look-ahead included.
        skipped: Subjects skipped, in all epochs.
        wait_s: Seconds that the consumer stood waiting for a patch.
        ram_budget_bytes: The RAM budget.
        ram_charged_bytes: Bytes charged to it now: volumes in work, and patches in the buffer.
        ram_peak_bytes: The most that was charged at once to work that ran to its end: below the
            budget there is room for more threads, a larger window or more patches.
        ram_held_peak_bytes: The most that this process held by its peak of RSS, beyond what it held
            when the queue was made: also what the consumer took. Where it had held more before, or
            the system tells no peak, what it holds now.
        buffer_patches: Patches that are made and not delivered.
        window: Patches from which the next one is drawn in a full window.
        epoch: Number of the current epoch, or of the first one.
        epoch_patches: Patches of it that were delivered or skipped.
        epoch_total: Patches of it.
        intra_op_threads: Torch's intra-op threads in every fill.
        in_work: Subjects of which patches are being made.
        content_s: Seconds of all threads that waited until a subject's content was on disk.
        decode_s: The same, for those that decoded it.
        transform_s: Those that transformed it, ``preprocess`` included.
        sample_s: Those that drew patches from it.

    Example:
        >>> import torch, torchio as tio, tio_openneuro as tno
        >>> image = tio.ScalarImage(tensor=torch.zeros(1, 16, 16, 16))
        >>> dataset = tio.SubjectsDataset([tio.Subject(t1=image)])
        >>> with tno.BudgetedQueue(dataset, 10, 3, tio.UniformSampler(8)) as queue:
        ...     patches = list(queue)
        >>> queue.statistics().patches, queue.statistics().skipped
        (3, 0)
    """

    patches: int
    subjects: int
    skipped: int
    wait_s: float
    ram_budget_bytes: int
    ram_charged_bytes: int
    ram_peak_bytes: int
    ram_held_peak_bytes: int
    buffer_patches: int
    window: int
    epoch: int
    epoch_patches: int
    epoch_total: int
    intra_op_threads: int
    in_work: int
    content_s: float
    decode_s: float
    transform_s: float
    sample_s: float

    def as_dict(self) -> dict[str, int | float]:
        """Return the values by name, flat, for a logger."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a queue and its dataset tell at one moment.

    Attributes:
        time_s: The moment, by a clock that only runs.
        queue: The queue's.
        disk: The dataset's; all zero where nothing is fetched for it.
    """

    time_s: float
    queue: QueueStatistics
    disk: DiskStatistics


def read(queue: Any) -> Reading:  # noqa: ANN401 - the queue, whose room imports this
    """Return what a queue and its dataset tell now; fetch nothing."""
    disk, dataset = DiskStatistics.empty(), queue.subjects_dataset
    if isinstance(dataset, DataladSubjectsDataset):
        with suppress(TioOpenNeuroError):  # It was closed before it was used.
            disk = dataset.statistics()
    return Reading(time.monotonic(), queue.statistics(), disk)


class Record:
    """How a queue's run went so far, for reports; a few MB at most, however long it is.

    Attributes:
        began_s: When it began, in seconds since 1970.
        moments: Two a second at first.
        epochs: Where a pass began.
    """

    def __init__(self) -> None:
        """Begin now, with nothing read."""
        self.began_s = time.time()
        self.moments: History[Reading] = History(most=1024, interval_s=0.5)
        self.epochs: History[Reading] = History(most=512)

    def note(self, queue: Any) -> None:  # noqa: ANN401
        """Read the queue, where that is due."""
        if self.moments.is_due():
            self.moments.add(read(queue))


@dataclass(frozen=True, slots=True)
class QueueState:
    """Everything that a queue needs to go on from where another was.

    Attributes:
        seed: The queue's seed.
        window: Patches from which the next one is drawn.
        start: Where the next pass begins.
        order: Subjects of the interrupted epoch, packed, where they cannot be drawn again.
        skipped: The last subjects that were skipped.
        parts: Digest or value of each thing that must be the same, by its name.
        ranks: Number of the rank that it is of, and how many there were.
    """

    seed: int
    window: int
    start: PassStart
    order: str | None
    skipped: tuple[SkippedSubject, ...]
    parts: Mapping[str, str]
    ranks: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {
            "version": STATE_VERSION,
            "seed": self.seed,
            "window": self.window,
            "epoch": self.start.epoch,
            "step": self.start.step,
            "next_index": self.start.next_index,
            "holes": sorted(self.start.holes),
            "replacements": [[r.step, r.index, r.count] for r in self.start.replacements],
            "order": self.order,
            "skipped": [[s.unit, s.reason, s.index, s.epoch] for s in self.skipped],
            "parts": dict(self.parts),
            "ranks": list(self.ranks),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> QueueState:
        """Read it back.

        Args:
            state: What :meth:`to_dict` returned.

        Raises:
            ValueError: Another version of this library wrote it, or a value that the message
                names is of another type or out of range.
        """
        version = state.get("version") if isinstance(state, Mapping) else None
        if version != STATE_VERSION:
            raise ValueError(
                f"Cannot resume from this state: its version is {version!r}, this "
                f"library reads {STATE_VERSION}. Use the library version that wrote it, or begin "
                f"anew without load_state_dict()."
            )
        for name, kind in _KINDS.items():
            _require(name, state.get(name), sound=_fits(state.get(name), kind))
        epoch, step, next_index = state["epoch"], state["step"], state["next_index"]
        shares = tuple(starmap(Replacement, state["replacements"]))
        start = PassStart(epoch, step, next_index, frozenset(state["holes"]), shares)
        skipped = tuple(starmap(SkippedSubject, state["skipped"]))
        seed, window, parts = state["seed"], state["window"], state["parts"]
        rank, world = state["ranks"]
        _require("next_index", next_index, sound=next_index <= step)
        _require("skipped", len(skipped), sound=len(skipped) <= LONGEST_SKIPPED)
        _require("window", window, sound=parts.get("max_length") == str(window))
        return cls(seed, window, start, state.get("order"), skipped, parts, (rank, world))

    def check(self, planner: Planner, ranks: Ranks) -> None:
        """Refuse what does not fit the subjects or this rank; tell the planner a kept order.

        Args:
            planner: Of the state's seed, which gave no epoch yet.
            ranks: This process's.

        Raises:
            ValueError: It does not; the message names the value.
        """
        start, subjects = self.start, len(planner.counts)
        own = bool(self.skipped or start.holes or self.order is not None)
        same = self.ranks == (ranks.rank, ranks.world)
        if not same if own else start.step and self.ranks[1] != ranks.world:
            raise ValueError(
                f"Cannot resume from this state: it tells of skips, a kept order or part of an "
                f"epoch of rank {self.ranks[0]} of {self.ranks[1]}, and this is rank {ranks.rank} "
                f"of {ranks.world}. Save and load one on each rank, or begin anew without it."
            )
        kept = start.step > 0 and not planner.foreseeable
        _require("order", self.order, sound=kept is (self.order is not None))
        if self.order is not None:
            order = _unpack(self.order, max(subjects, len(planner)))
            _require("order", order, sound=all(0 <= index < subjects for index in order))
            planner.recall(start.epoch, order)
        drawn = kept or planner.foreseeable
        plan = planner.plan(start.epoch) if drawn else EpochPlan(start.epoch, (), ())
        step, total, shares = 0, plan.total, start.replacements
        sound = len(shares) <= min(len(start.holes), _MOST_REPLACED * len(plan.order))
        for each in shares:
            sound &= step <= each.step <= min(start.step, total - 1)
            sound &= each.index < subjects and 1 <= each.count <= max(planner.counts)
            step, total = each.step, total + each.count
        positions = len(plan.order) + len(shares)
        _require("replacements", shares, sound=sound)
        _require("holes", start.holes, sound=all(hole < positions for hole in start.holes))
        _require("step", start.step, sound=start.step <= total)
        _require("skipped", self.skipped, sound=all(s.index < subjects for s in self.skipped))


def _fits(value: object, kind: Any) -> bool:  # noqa: ANN401 - a kind is a type, or one's shape
    """Tell whether a value is of a kind; see ``_KINDS``."""
    if isinstance(kind, range):
        return type(value) is int and value in kind
    if isinstance(kind, dict):
        return isinstance(value, Mapping) and _fits(list(value.items()), list(kind.items()))
    if isinstance(kind, type):
        return isinstance(value, str) and len(value) <= _LONGEST_TEXT
    if not isinstance(value, list | tuple):
        return False
    kinds = kind if isinstance(kind, tuple) else kind * len(value)
    return len(value) == len(kinds) and all(map(_fits, value, kinds))


def _require(name: str, value: object, *, sound: bool) -> None:
    if not sound:
        raise ValueError(
            f"Cannot resume from this state: its {name} cannot be {reprlib.repr(value)}. It is "
            f"damaged, or not of this queue: begin anew without load_state_dict()."
        )


def pack_order(order: Iterable[int]) -> str:
    """Return the indices of an epoch's subjects as text."""
    return base64.b64encode(zlib.compress(array("q", order).tobytes(), 9)).decode()


def _unpack(text: str, most: int) -> tuple[int, ...]:
    """Return what :func:`pack_order` packed, of which no more is unpacked than may be there."""
    order, unpacking = array("q"), zlib.decompressobj()
    try:
        packed = base64.b64decode(text, validate=True)
        order.frombytes(unpacking.decompress(packed, most * order.itemsize + 1))
        sound = unpacking.eof
    except (TypeError, ValueError, zlib.error):
        sound = False
    _require("order", text, sound=sound)
    return tuple(order)


def compare_parts(saved: Mapping[str, str], current: Mapping[str, str]) -> None:
    """Refuse a state that was taken from something else.

    Args:
        saved: Digest or value of each part when the state was taken, by its name.
        current: The same of this queue.

    Raises:
        ValueError: They differ; the message names the parts.
    """
    different = [name for name in current if saved.get(name) != current[name]]
    if different:
        details = "; ".join(
            f"{name}: {saved.get(name, 'absent'):.80} then, {current[name]:.80} now"
            for name in different
        )
        raise ValueError(
            f"Cannot resume from this state: it was taken with another "
            f"{' and another '.join(different)} ({details}). Make the queue as it was made then, "
            f"or begin anew without load_state_dict()."
        )
