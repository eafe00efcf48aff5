"""RAM admission: what a subject may need at most, and whether the budget has room for it. Pure.

Readings of the machine come in as numbers. Nothing here allocates, measures or waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tio_openneuro.errors import RamBudgetError
from tio_openneuro.sizes import ask_unit, format_size, parse_size
from tio_openneuro.volumes import SubjectSize

BASE_BYTES = 48 * 2**20
THREAD_BYTES = 8 * 2**20


def read_budget(ram_budget: int | str, available_bytes: int) -> int:
    """Return the RAM budget in bytes.

    Args:
        ram_budget: Bytes, text like ``"4 GB"``, or ``"auto"``: half of what is available.
        available_bytes: Memory that the machine or its control group has left.

    Raises:
        ValueError: The text is not a size.
    """
    if ram_budget == "auto":
        return max(available_bytes // 2, 1)
    return parse_size(ram_budget)


class Need(NamedTuple):
    """An upper bound of what a step of a subject's work holds.

    Attributes:
        size_bytes: The bytes, those of the subject's images among them.
        name: What the step is called, for messages.
    """

    size_bytes: int
    name: str


def bound_subject(
    size: SubjectSize, result: SubjectSize, needs: Sequence[Need], map_voxel_bytes: int
) -> Need:
    """Return the hungriest step of loading, transforming and sampling, which follow one another.

    Decoding holds an image twice, as its reader's own and as a tensor, beside those that are there;
    a sampler's map lies beside the transformed images.

    Args:
        size: The subject's images in its files.
        result: The same once they are transformed.
        needs: What the parts of its transforms hold.
        map_voxel_bytes: Bytes of the patch sampler's map per voxel of the largest grid.
    """
    decoding = Need(size.stored_bytes + size.largest_bytes, "decoding")
    sampling = Need(result.stored_bytes + map_voxel_bytes * result.largest_grid, "the sampler")
    most = max(decoding, *needs, sampling, key=lambda need: need.size_bytes)
    return most._replace(size_bytes=THREAD_BYTES + most.size_bytes)


def refuse_subject(name: str, need_bytes: int, budget_bytes: int, advice: str) -> RamBudgetError:
    """Return the error for a subject that the budget cannot hold.

    Args:
        name: The subject.
        need_bytes: Upper bound of what must be held at once.
        budget_bytes: The RAM budget.
        advice: What the bytes are made of, and what to do.
    """
    return RamBudgetError(
        f"Cannot load {name} within the RAM budget: up to {format_size(need_bytes)} "
        f"({need_bytes} bytes) must be held at once, the budget is {format_size(budget_bytes)} "
        f"({budget_bytes} bytes). {advice}{ask_unit(budget_bytes)}",
        unit=name,
    )


class Admission:
    """What is charged to the RAM budget. Not safe to share by threads: its owner locks.

    Freed memory that the allocator may keep counts as held until it is known to be returned.
    Invariant: a charge is only made where it fits, so that charged bytes pass the budget only
    where a bound was wrong, and then by its error (:meth:`settle`).
    """

    def __init__(self, budget_bytes: int, *, base_bytes: int = BASE_BYTES) -> None:
        """Begin with what is never released.

        Args:
            budget_bytes: The RAM budget.
            base_bytes: What the libraries' code and tables take once they are used.
        """
        self.budget_bytes = budget_bytes
        self.charged_bytes = base_bytes
        self.peak_bytes = base_bytes
        self.retained_bytes = 0
        self._given_back_bytes = 0
        self._base_bytes = base_bytes

    @property
    def idle(self) -> bool:
        """Whether nothing is charged that could be released."""
        return self.charged_bytes <= self._base_bytes

    @property
    def capacity_bytes(self) -> int:
        """The largest charge that fits when nothing else is charged; may be below zero."""
        return self.budget_bytes - self._base_bytes

    def fits(self, size_bytes: int) -> bool:
        """Return whether a charge can be made now."""
        return self.charged_bytes + self.retained_bytes + size_bytes <= self.budget_bytes

    def charge(self, size_bytes: int) -> None:
        """Charge bytes.

        Args:
            size_bytes: Bytes to be allocated.

        Raises:
            RamBudgetError: They do not fit.
        """
        if not self.fits(size_bytes):
            raise RamBudgetError(
                f"Cannot charge {size_bytes} bytes: of the RAM budget of {self.budget_bytes} "
                f"bytes, {self.charged_bytes} are charged and {self.retained_bytes} were freed "
                f"and may not be back. Ask fits() first."
            )
        self.charged_bytes += size_bytes

    def settle(self, charged_bytes: int, kept_bytes: int) -> None:
        """Replace a charge by what is really kept.

        What exists cannot be refused: where more is kept than was charged, the budget may be
        passed by the difference, and nothing fits until it is released.

        Args:
            charged_bytes: The charge that ends.
            kept_bytes: Bytes that stay allocated.
        """
        self.peak_bytes = max(self.peak_bytes, self.charged_bytes)
        self.release(charged_bytes)
        self.charged_bytes += kept_bytes
        self.retained_bytes -= min(kept_bytes, charged_bytes)
        self.peak_bytes = max(self.peak_bytes, self.charged_bytes)

    def release(self, size_bytes: int) -> None:
        """End a charge of bytes that were freed.

        Args:
            size_bytes: Bytes charged before.
        """
        self.charged_bytes -= size_bytes
        self.retained_bytes += size_bytes
        excess = self._base_bytes - self.charged_bytes
        if excess > 0:
            raise ValueError(f"Released {excess} bytes more than were charged.")

    def measured(self, free_bytes: int) -> None:
        """Note what the allocator holds free: what was freed may be in use again, or be more.

        It is more where a bound was too low, or where free pieces fit nothing.

        Args:
            free_bytes: Its own count, of the whole process, with what was given back.
        """
        self._given_back_bytes = min(self._given_back_bytes, free_bytes)
        inferred_bytes = min(self.retained_bytes, free_bytes)
        self.retained_bytes = max(inferred_bytes, free_bytes - self._given_back_bytes)

    def returned(self, free_bytes: int) -> None:
        """Note that all that is free was given back.

        Args:
            free_bytes: As in :meth:`measured`.
        """
        self.retained_bytes, self._given_back_bytes = 0, free_bytes
