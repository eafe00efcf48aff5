"""Counts of what the engine did, in all processes that use it; the ledger's are its own."""

from __future__ import annotations

import ctypes
import os
import threading
from collections import Counter
from dataclasses import dataclass, fields
from multiprocessing.sharedctypes import RawArray
from typing import Any

from tio_openneuro.recording import Activity


@dataclass(frozen=True, slots=True)
class DiskStatistics:
    """What one engine did, and what its root holds.

    "Here" is in this process, and in those that it gave the engine to: workers of a loader.

    Attributes:
        budget_bytes: The smallest disk budget of the live owners of the root.
        used_bytes: Bytes that the root is charged now, by all processes.
        peak_bytes: Most bytes that the root was ever charged at once.
        fetched_bytes: Bytes fetched here.
        fetched_files: Files fetched here.
        evicted_bytes: Bytes evicted here.
        evicted_files: Files evicted here.
        hit_files: Leased files whose content was there already.
        retries: Fetches that were tried again.
        failures: Fetches that failed for good.
        http_files: Files of those that came over HTTP; others came through git-annex.
        fetching_files: Files that this process fetches now.
        fetch_s: Seconds of this process's fetches, added up; several go on at once.
        evict_s: Seconds in which this process evicted.

    Example:
        >>> import tio_openneuro as tno
        >>> images = {"flair": tno.Scalar("sub-*/anat/*_FLAIR.nii.gz")}
        >>> with tno.DataladSubjectsDataset("ds004199", images, disk_budget="2 GB") as dataset:
        ...     _ = dataset[0]
        ...     found = dataset.statistics()
        >>> found.fetched_files, found.used_bytes <= found.budget_bytes
        (1, True)
    """

    budget_bytes: int
    used_bytes: int
    peak_bytes: int
    fetched_bytes: int
    fetched_files: int
    evicted_bytes: int
    evicted_files: int
    hit_files: int
    retries: int
    failures: int
    http_files: int
    fetching_files: int
    fetch_s: float
    evict_s: float

    @classmethod
    def empty(cls) -> DiskStatistics:
        """Return the statistics of a plain folder, where nothing is fetched or evicted."""
        return cls(*(0 for _ in fields(cls)))


_COUNTED = tuple(field.name for field in fields(DiskStatistics)[3:-3])
_SLOTS = 256


@dataclass(frozen=True, slots=True)
class RootStatus:
    """What lies under a root, and who is at work there.

    Attributes:
        budget_bytes: The smallest disk budget of the processes at work; None where none is.
        used_bytes: Bytes charged now.
        peak_bytes: Most bytes ever charged at once.
        leased_bytes: Bytes of content under a lease.
        pids: Processes at work.
        lease_pids: Those of them that hold leases.
        clones: Bytes charged by clone.
        ledger_bytes: Bytes of the ledger itself, which are not charged.
    """

    budget_bytes: int | None
    used_bytes: int
    peak_bytes: int
    leased_bytes: int
    pids: tuple[int, ...]
    lease_pids: tuple[int, ...]
    clones: dict[str, int]
    ledger_bytes: int


class SharedCounts:
    """Counts of one process and of those below it, by slots that each adds to by itself.

    In memory that forks share, and spawned processes are given; one that is killed locks nobody
    out, as a lock that they share would.
    """

    def __init__(self, above: SharedCounts | None = None) -> None:
        """Count nothing yet.

        Args:
            above: Those of the process that this one has its engine from.
        """
        own = RawArray(ctypes.c_longlong, _SLOTS * len(_COUNTED))
        self.arrays: list[ctypes.Array[ctypes.c_longlong]] = [own, *(above.arrays if above else ())]

    def add(self, counts: Counter[str]) -> None:
        """Count what this process did more, here and in all above."""
        first = os.getpid() % _SLOTS * len(_COUNTED)
        for array in self.arrays:
            for place, name in enumerate(_COUNTED, first):
                array[place] += counts[name]

    def total(self) -> list[int]:
        """Return what was done, in the order of :class:`DiskStatistics`."""
        return [sum(self.arrays[0][place :: len(_COUNTED)]) for place in range(len(_COUNTED))]


class DiskCounters:
    """Counts of one process, by the names of :class:`DiskStatistics`; safe to share by threads."""

    def __init__(self, shared: SharedCounts) -> None:
        """Start from zero.

        Args:
            shared: Told all that is counted.
        """
        self.activity = Activity()
        self._mutex = threading.Lock()
        self._shared = shared
        self._counts: Counter[str] = Counter()
        self._of_clones: Counter[str] = Counter()
        self._fetch_s = 0.0

    def add(
        self, *, fetch_s: float = 0.0, of_clones: Counter[str] | None = None, **counts: int
    ) -> None:
        """Count what was done.

        Args:
            fetch_s: Seconds that a fetch took.
            of_clones: What this process's clones have counted until now.
            counts: How many more, by name.
        """
        more = Counter(counts)
        with self._mutex:
            self._fetch_s += fetch_s
            self._counts.update(counts)
            if of_clones is not None:
                more.update(of_clones - self._of_clones)
                self._of_clones |= of_clones
            self._shared.add(more)

    def seconds_per_byte(self) -> float:
        """Return how long a fetch of this process took for each byte; 0 before the first."""
        with self._mutex:
            return self._fetch_s / max(self._counts["fetched_bytes"], 1)

    def statistics(self, *of_the_root: int, of_clones: Counter[str]) -> DiskStatistics:
        """Return the counts and the clones', beside the root's budget, used and peak bytes."""
        self.add(of_clones=of_clones)
        told: list[Any] = self._shared.total()
        told += [self.activity.threads("fetch"), *map(self.activity.seconds, ("fetch", "evict"))]
        return DiskStatistics(*of_the_root, *told)
