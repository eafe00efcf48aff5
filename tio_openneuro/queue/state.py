"""What a queue reports and what it resumes from: plain values, and the checks between two runs.

A state is a dict of JSON's types, so that any checkpoint format keeps it.
"""

from __future__ import annotations

import base64
import zlib
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tio_openneuro.queue.draw import PassStart, Replacement, Turn

STATE_VERSION = 2
LONGEST_SKIPPED = 500
_LONGEST_REASON = 300


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
        reason = f"{type(error).__name__}: {error}"[:_LONGEST_REASON]
        return cls(unit, reason, turn.index, turn.epoch)


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
        ram_peak_bytes: The most that was charged at once.
        buffer_patches: Patches that are made and not delivered.
        window: Patches from which the next one is drawn in a full window.
        epoch: Number of the current epoch, or of the first one.
        epoch_patches: Patches of it that were delivered or skipped.
        epoch_total: Patches of it.
        intra_op_threads: Torch's intra-op threads in every fill.
    """

    patches: int
    subjects: int
    skipped: int
    wait_s: float
    ram_budget_bytes: int
    ram_charged_bytes: int
    ram_peak_bytes: int
    buffer_patches: int
    window: int
    epoch: int
    epoch_patches: int
    epoch_total: int
    intra_op_threads: int

    def as_dict(self) -> dict[str, int | float]:
        """Return the values by name, flat, for a logger."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class QueueState:
    """Everything that a queue needs to go on from where another was.

    Attributes:
        seed: The queue's seed.
        window: Patches from which the next one is drawn.
        start: Where the next pass begins.
        order: Subjects of the interrupted epoch, where they cannot be drawn again.
        skipped: The last subjects that were skipped.
        parts: Digest or value of each thing that must be the same, by its name.
    """

    seed: int
    window: int
    start: PassStart
    order: tuple[int, ...] | None
    skipped: tuple[SkippedSubject, ...]
    parts: Mapping[str, str]

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
            "order": None if self.order is None else _pack(self.order),
            "skipped": [[s.unit, s.reason, s.index, s.epoch] for s in self.skipped],
            "parts": dict(self.parts),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> QueueState:
        """Read it back.

        Args:
            state: What :meth:`to_dict` returned.

        Raises:
            ValueError: Another version of this library wrote it.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"Cannot resume from this state: its version is {state.get('version')!r}, this "
                f"library reads {STATE_VERSION}. Use the library version that wrote it, or begin "
                f"anew without load_state_dict()."
            )
        return cls(
            seed=state["seed"],
            window=state["window"],
            start=PassStart(
                state["epoch"],
                state["step"],
                state["next_index"],
                frozenset(state["holes"]),
                tuple(Replacement(*entry) for entry in state["replacements"]),
            ),
            order=None if state["order"] is None else _unpack(state["order"]),
            skipped=tuple(SkippedSubject(*entry) for entry in state["skipped"]),
            parts=state["parts"],
        )


def _pack(order: Iterable[int]) -> str:
    return base64.b64encode(zlib.compress(array("q", order).tobytes(), 9)).decode()


def _unpack(text: str) -> tuple[int, ...]:
    order = array("q")
    order.frombytes(zlib.decompress(base64.b64decode(text)))
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
            f"{name}: {saved.get(name, 'absent')!s} then, {current[name]!s} now"
            for name in different
        )
        raise ValueError(
            f"Cannot resume from this state: it was taken with another "
            f"{' and another '.join(different)} ({details}). Make the queue as it was made then, "
            f"or begin anew without load_state_dict()."
        )
