"""Content on disk within a budget: reserve, evict, fetch, verify, lease.

Owns nothing but its settings and, in each process, one :class:`~tio_openneuro.disk.leases.Leases`.
Promises that the bytes held under the root stay within the budget at every instant, in every
process, and that content under a lease stays. Knows nothing of images or of torch.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any, Self

from tio_openneuro.annex import AnnexRepo
from tio_openneuro.closing import Closing
from tio_openneuro.content import AnnexKey, ContentRepo, ContentUnit
from tio_openneuro.disk import many_units, prepared_volumes
from tio_openneuro.disk.audit import audit
from tio_openneuro.disk.leases import Leases, Settings
from tio_openneuro.disk.look_ahead import is_prepared
from tio_openneuro.disk.prepared_volumes import PreparedRepo
from tio_openneuro.disk.statistics import DiskStatistics, RootStatus, SharedCounts
from tio_openneuro.disk.store import FOLDER, OpenRepo
from tio_openneuro.errors import DiskBudgetError, LedgerError, NotAnAnnexError
from tio_openneuro.forks import at_fork
from tio_openneuro.ledger import FLOOR_BYTES, too_large
from tio_openneuro.sizes import ask_unit, parse_size

__all__ = ["DiskStatistics", "Engine", "open_annex"]


def open_annex(path: Path, remotes: tuple[str, ...], root: Path | None = None) -> ContentRepo:
    """Open a clone that the ledger knows, or the folder of prepared volumes, to evict from it."""
    if path.name == FOLDER and not (path / ".git").exists():
        return PreparedRepo(path.parent)
    return AnnexRepo(path, remotes=remotes or ("s3-PUBLIC",), root=root)


class Engine:
    """Holds content on disk, within a budget shared by all processes under one root.

    It can be pickled and survives a fork: each process has its own owner in the ledger, threads
    and children, made when they are first needed. Use it as a context manager, or close it.

    Example:
        >>> with Engine(root, disk_budget="10 GB") as engine:  # doctest: +SKIP
        ...     with engine.lease(unit) as paths:
        ...         print(paths)
    """

    def __init__(
        self,
        root: Path,
        *,
        disk_budget: int | str = "auto",
        jobs: int = 8,
        open_repo: OpenRepo | None = None,
    ) -> None:
        """Open the root's ledger, and make way for the budget.

        Args:
            root: Local folder of clones and ledger; made where it is missing.
            disk_budget: Bytes, text like ``"10 GB"``, or ``"auto"``: half of the space that is
                free when the root is first used, 5 GB always kept free.
            jobs: Fetches at once in this process.
            open_repo: Opens a clone that only the ledger knows; a function that can be pickled.

        Raises:
            DiskBudgetError: What others lease exceeds the budget, or too little is free.
            LedgerError: The root is on a network file system, or cannot be written.
            ValueError: ``disk_budget`` is no size, or ``jobs`` is below one.
        """
        if jobs < 1:
            message = f"Cannot fetch with jobs={jobs}: give at least 1."
            raise ValueError(message)
        auto = disk_budget == "auto"
        budget_bytes = None if auto else parse_size(disk_budget)
        if budget_bytes is not None and (question := ask_unit(budget_bytes)):
            # Before all that the root holds is evicted for it.
            message = f"Cannot keep to disk_budget={disk_budget!r}: no image is so small.{question}"
            raise DiskBudgetError(message)
        floor_bytes = FLOOR_BYTES if auto else 0
        open_repo = open_repo or functools.partial(open_annex, root=Path(root).absolute())
        self._settings = Settings(Path(root).absolute(), budget_bytes, floor_bytes, jobs, open_repo)
        self._begin()
        self._budget_bytes = self._here().ledger.budget_bytes

    def _begin(self, above: SharedCounts | None = None) -> None:
        """Have no leases yet, in this process."""
        self._counts = SharedCounts(above)
        self._opening = threading.Lock()
        self._leases: Leases | None = None
        self._closed = False
        self._last: DiskStatistics | None = None
        at_fork("engine", self, in_child=Engine._after_fork)

    def _after_fork(self) -> None:
        """Let go of the parent's leases; the thread that held the lock may be gone."""
        self._opening = threading.Lock()
        self._counts = SharedCounts(self._counts)
        if self._leases is not None:
            # Kept, since closing a connection that was carried over a fork is not safe.
            self._inherited = self._leases
            self._leases = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings, with the budget chosen; for a spawned process the counts too."""
        settings = replace(self._settings, budget_bytes=self._budget_bytes)
        return {"settings": settings, "counts": self._counts if get_spawning_popen() else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the settings; this process opens the ledger when it needs it."""
        self._settings = state["settings"]
        self._budget_bytes = state["settings"].budget_bytes or 0
        self._begin(state["counts"])

    def _here(self) -> Leases:
        """Return this process's leases, made if need be."""
        with self._opening:
            if self._closed:
                message = f"Cannot use the engine of {self._settings.root}: it was closed."
                raise LedgerError(message)
            if self._leases is None or self._leases.pid != os.getpid():
                self._leases = Leases(self._settings, self._counts)
                Closing(self, self._leases.close)
            return self._leases

    @property
    def root(self) -> Path:
        """Folder of clones and ledger."""
        return self._settings.root

    @property
    def budget_bytes(self) -> int:
        """Budget that this engine stated; the smallest of all live ones holds."""
        return self._budget_bytes

    def binding(self) -> tuple[int, str]:
        """Return the smallest budget of all live ones, and who else states it, as words.

        Opens nothing: where this process has not used the engine, it is the one that it states.
        """
        leases = self._leases
        if leases is not None and leases.pid == os.getpid():
            with suppress(LedgerError):
                return leases.ledger.binding()
        return self._budget_bytes, ""

    def require(self, unit: ContentUnit) -> None:
        """Refuse a budget that cannot hold a unit; content that was there before needs none.

        Raises:
            DiskBudgetError: It cannot.
        """
        leases = self._here()
        files = leases.store.files_of(unit)
        wants = leases.store.wants(files)
        known = leases.ledger.rows(files)
        ours = [want for want in wants if want.content in known or not want.located]
        budget_bytes, stated = leases.ledger.binding()
        if sum(want.size_bytes for want in ours) > budget_bytes:
            raise too_large(unit.name, [want.size_bytes for want in ours], budget_bytes, stated)

    def lease(
        self, unit: ContentUnit, *, timeout_s: float = 600.0
    ) -> AbstractContextManager[dict[AnnexKey, Path]]:
        """Hold a unit's content while the block runs; fetch what is absent.

        All of its bytes are reserved at once, in the order in which leases of all processes were
        asked for. When the block ends the content stays, and may be evicted. Do not lease
        another unit inside the block, nor wait there for whoever consumes: room may be short.

        Args:
            unit: What to hold.
            timeout_s: Seconds to wait for room while nobody gets ahead.

        Returns:
            A context that gives the file of each key's content.

        Raises:
            DiskBudgetError: The unit exceeds the budget, or no room came free.
            FetchError: Content did not arrive.
        """
        return self._here().lease(unit, timeout_s)

    def lease_prepared(self, unit: ContentUnit) -> AbstractContextManager[Path | None]:
        """Hold a unit's prepared volume while the block runs, where it is present; never wait.

        Returns:
            A context that gives its file, or None.
        """
        if unit.prepared is None:
            return nullcontext()
        return prepared_volumes.lease(self._here(), unit, unit.prepared)

    def keep_prepared(self, unit: ContentUnit, data: bytes, prepare_s: float) -> bool:
        """Keep a unit's prepared volume if there is room that is worth less; never wait.

        If the process is killed meanwhile, what was written is charged, and given up when room
        is needed.

        Args:
            unit: The unit; its files are not leased by this thread.
            data: The file's bytes.
            prepare_s: Seconds that it took to load and preprocess the files.

        Returns:
            Whether it was kept.
        """
        if unit.prepared is None:
            return False
        return prepared_volumes.keep(self._here(), unit, unit.prepared, data, prepare_s)

    def drop_prepared(self, unit: ContentUnit, reason: str) -> int:
        """Drop a unit's prepared volume where nobody leases it; return the bytes."""
        if unit.prepared is None:
            return 0
        leases = self._here()
        return leases.drop([leases.store.content_of(unit.prepared)], reason)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def prefetch(self, units: Sequence[ContentUnit], *, again: Sequence[ContentUnit] = ()) -> None:
        """Make this the known order from now on, and fetch ahead along it; return at once.

        Without leases, in room that is free or held by what is used later. The first unit should
        be the one that is leased next.

        Args:
            units: The next uses, in order.
            again: What is used after them in an order that is not known yet, the likeliest first;
                it is not prefetched, and gives way in reverse.
        """
        try:
            self._here().look_ahead.replace(units, again)
        except LedgerError:
            # What is closed, or whose root was removed, looks ahead to nothing anyway.
            if units:
                raise

    def release(self, unit: ContentUnit, *, drop: bool) -> None:
        """Note that a unit is not needed any more for now.

        Args:
            unit: The unit, not leased by this thread.
            drop: Whether to drop its content at once, but for what another unit is known to
                need or anybody leases; else it stays until room is needed.
        """
        leases = self._here()
        contents = leases.store.files_of(unit)
        leases.look_ahead.release(unit, contents)
        if drop:
            alone = leases.store.all_of(unit)
            alone = [c for c in alone if not leases.ledger.needed_by_others(c, unit.name)]
            leases.drop(alone, f"since {unit.name} is done")
        leases.changes.notify()

    def fetch(
        self,
        units: Sequence[ContentUnit],
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Fetch units in their order until the budget is full; return the bytes fetched.

        Args:
            units: What to fetch.
            on_progress: Called with the bytes done and the bytes of all units.

        Raises:
            FetchError: Content did not arrive; the first error, after the others ended.
        """
        units = [unit for unit in units if not is_prepared(unit)]
        return many_units.fetch(self._here(), units, self._settings.jobs, on_progress)

    def evict(self, units: Sequence[ContentUnit]) -> int:
        """Drop what this library fetched of these units and nobody leases; return the bytes."""
        leases = self._here()
        contents = {content for unit in units for content in leases.store.all_of(unit)}
        return leases.drop(contents, "as asked")

    def evict_all(self) -> int:
        """Drop what the root holds and nobody leases, of every dataset; return the bytes."""
        leases = self._here()
        return leases.drop(leases.ledger.rows(), "as asked")

    def forget(self, clone: Path) -> int:
        """Drop what this library fetched into a clone, and forget the clone; return the bytes.

        Raises:
            LedgerError: Another process is at work under the root.
            NotAnAnnexError: There is no such clone, and none is known.
        """
        leases = self._here()
        name = leases.store.name_of(clone)
        if not clone.is_dir() and name not in leases.ledger.clones():
            message = (
                f"Cannot forget {clone.name}: there is no clone of it in {clone.parent}. Look at "
                f"the spelling and at --root."
            )
            raise NotAnAnnexError(message)
        leases.ledger.reap()
        pids = sorted({owner.pid for owner in leases.ledger.other_owners()})
        if pids:
            message = (
                f"Cannot forget {clone}: processes {', '.join(map(str, pids))} are at work under "
                f"{self.root}. Wait until they have ended, or end them."
            )
            raise LedgerError(message)
        held = [content for content in leases.ledger.rows() if content.clone == name]
        dropped_bytes = leases.drop(held, "as asked")
        leases.ledger.forget_clone(name)
        return dropped_bytes

    def adopt(self, units: Sequence[ContentUnit]) -> int:
        """Hand content that was there before to the budget, as far as it fits; return the bytes.

        What no remote can give back is left alone.
        """
        return many_units.adopt(self._here(), units)

    def statistics(self) -> DiskStatistics:
        """Return what was done here, and what the root holds, or held when this was closed."""
        if self._closed and self._last is not None:
            return self._last
        return self._statistics(self._here())

    @staticmethod
    def _statistics(leases: Leases) -> DiskStatistics:
        now, counts = leases.ledger.holdings(), leases.store.counts()
        return leases.counters.statistics(
            now.budget_bytes, now.used_bytes, now.peak_bytes, of_clones=counts
        )

    def status(self) -> RootStatus:
        """Return what the root holds, and who else is at work there."""
        leases = self._here()
        ledger = leases.ledger
        now, gone = ledger.holdings(), {owner.owner_id for owner in ledger.dead()}
        others = [owner for owner in ledger.other_owners() if owner.owner_id not in gone]
        return RootStatus(
            min((owner.budget_bytes for owner in others), default=None),
            now.used_bytes,
            now.peak_bytes,
            now.leased_bytes,
            tuple(sorted({owner.pid for owner in others})),
            now.lease_pids,
            {str(leases.store.path_of(c)): size for c, size in ledger.held_by_clone().items()},
            ledger.size_bytes(),
        )

    def check(self, *, repair: bool = False, adopt: bool = False) -> list[str]:
        """Return the inconsistencies between ledger and disk, after mending them if asked.

        Args:
            repair: Whether to mend them.
            adopt: Whether to hand content of which nobody knows whose it is, since a ledger was
                lost, to the budget, as far as a remote has it.
        """
        leases = self._here()
        if adopt:
            many_units.claim(leases)
        return audit(leases.ledger, leases.store, repair=repair)

    def close(self) -> None:
        """End threads, fetches, children and leases of this process, within 2 s; idempotent."""
        with self._opening:
            self._closed = True
            leases, self._leases = self._leases, None
        if leases is not None:
            with suppress(LedgerError):
                self._last = self._statistics(leases)
            leases.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()
