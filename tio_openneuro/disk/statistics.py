"""Counts of what the engine did. Owns the counters of one process; the ledger's are its own."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

from tio_openneuro.recording import Activity


@dataclass(frozen=True, slots=True)
class DiskStatistics:
    """What one engine did, and what its root holds.

    Attributes:
        budget_bytes: The smallest disk budget of the live owners of the root.
        used_bytes: Bytes that the root is charged now, by all processes.
        peak_bytes: Most bytes that the root was ever charged at once.
        fetched_bytes: Bytes fetched by this process.
        fetched_files: Files fetched by this process.
        evicted_bytes: Bytes evicted by this process.
        evicted_files: Files evicted by this process.
        hit_files: Leased files whose content was there already.
        retries: Fetches that were tried again.
        failures: Fetches that failed for good.
        http_files: Files of this process's that came over HTTP; others came through git-annex.
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


class DiskCounters:
    """Counts of one process, by the names of :class:`DiskStatistics`; safe to share by threads."""

    def __init__(self) -> None:
        """Start from zero."""
        self.activity = Activity()
        self._mutex = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._fetch_s = 0.0

    def add(self, *, fetch_s: float = 0.0, **counts: int) -> None:
        """Count what was done.

        Args:
            fetch_s: Seconds that a fetch took.
            counts: How many more, by name.
        """
        with self._mutex:
            self._fetch_s += fetch_s
            self._counts.update(counts)

    def seconds_per_byte(self) -> float:
        """Return how long a fetch of this process took for each byte; 0 before the first."""
        with self._mutex:
            return self._fetch_s / max(self._counts["fetched_bytes"], 1)

    def statistics(self, *of_the_root: int, of_clones: Counter[str]) -> DiskStatistics:
        """Return the counts and the clones', beside the root's budget, used and peak bytes."""
        with self._mutex:
            counts = self._counts + of_clones
        told: list[Any] = [counts[field.name] for field in fields(DiskStatistics)[3:-3]]
        told += [self.activity.threads("fetch"), *map(self.activity.seconds, ("fetch", "evict"))]
        return DiskStatistics(*of_the_root, *told)
