"""The root: the local folder of clones and ledger. Refuses what cannot hold a ledger."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tio_openneuro.errors import DiskBudgetError, LedgerError
from tio_openneuro.forks import close_apart, open_apart
from tio_openneuro.ledger.owners import (
    holding_pids,
    lock_alone,
    lock_shared,
    locked_owners,
    unlock,
)
from tio_openneuro.roots import refuse_root
from tio_openneuro.sizes import ask_unit, format_size

FLOOR_BYTES = 5_000_000_000
"""Free space that an automatic budget never uses."""

_ALONE_TIMEOUT_S = 3.0
_ALONE_PAUSE_S = 0.02


def prepare_ledger_folder(root: Path) -> Path:
    """Make ``root/ledger`` for this user alone, and return it.

    Raises:
        LedgerError: The root cannot hold a ledger, for one reason or another.
    """
    refuse_root(root.absolute())
    folder = root / "ledger"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        (folder / "owners").mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        message = (
            f"Cannot make the ledger's folder {folder}: {error}. Give a root that you may write."
        )
        raise LedgerError(message) from error
    return folder


def hold_root(folder: Path, why_lost: Callable[[], str], begin_anew: Callable[[], None]) -> int:
    """Hold a root, as all of its owners do; begin its ledger anew where it is lost, alone.

    Args:
        folder: ``root/ledger``.
        why_lost: Returns why the ledger cannot be used; empty where it can.
        begin_anew: Makes one; called while no other owner holds the root.

    Returns:
        The root's descriptor, for ``close_apart``, which holds it until then.

    Raises:
        LedgerError: The ledger is lost, and others hold the root.
    """
    descriptor = open_apart(folder.parent, os.O_RDONLY)
    deadline_s = time.monotonic() + _ALONE_TIMEOUT_S
    pause = threading.Event()
    try:
        while True:
            why = ""
            if lock_shared(descriptor) and not (why := why_lost()):
                return descriptor
            if lock_alone(descriptor) and not locked_owners(folder / "owners"):
                if why_lost():
                    begin_anew()
                lock_shared(descriptor)
                return descriptor
            if time.monotonic() > deadline_s:
                files = [folder.parent, *folder.glob("owners/*.lock")]
                pids = ", ".join(map(str, holding_pids(files, {"FLOCK"}))) or "others"
                message = (
                    f"Cannot use the ledger in {folder}: {why or 'it is lost'}, and it cannot be "
                    f"begun anew while processes that run use the root ({pids}): what they fetch "
                    f"would not be counted. End them, and run `tio-openneuro doctor --repair`."
                )
                raise LedgerError(message)  # noqa: TRY301 - the descriptor is closed below
            unlock(descriptor)
            pause.wait(_ALONE_PAUSE_S)
    except BaseException:
        close_apart(descriptor)
        raise


def refuse_beside(unclaimed_bytes: int, unit: str, needed_bytes: int, budget: int) -> None:
    """Refuse a unit that does not fit beside content that nobody may drop.

    Raises:
        DiskBudgetError: It does not.
    """
    if not unclaimed_bytes or unclaimed_bytes + needed_bytes <= budget:
        return
    message = (
        f"Cannot fetch {unit}: it needs {needed_bytes} bytes ({format_size(needed_bytes)}) of the "
        f"disk budget of {budget} ({format_size(budget)}), and {unclaimed_bytes} "
        f"({format_size(unclaimed_bytes)}) lie in clones of this library of which nobody knows "
        f"whether it or you fetched them: its ledger was lost, or a process died. They may be "
        f"used, and are not evicted. Hand them to the budget with `tio-openneuro doctor --repair "
        f"--adopt`, or those of one dataset with `tio-openneuro adopt`, or raise disk_budget."
    )
    raise DiskBudgetError(message, unit=unit)


def automatic_budget(free: int, used_bytes: int) -> int:
    """Return the disk budget of those who state none: half of what is free or held by us.

    Args:
        free: Free bytes of the root's file system.
        used_bytes: Bytes that the ledger has charged already.

    Raises:
        DiskBudgetError: Less than the floor is free.
    """
    budget_bytes = min((free + used_bytes) // 2, free + used_bytes - FLOOR_BYTES)
    if budget_bytes <= 0:
        message = (
            f"Cannot choose a disk budget: {free} bytes ({format_size(free)}) are free under the "
            f"root, and {format_size(FLOOR_BYTES)} are kept free. Free some, give a root on "
            f"another disk, or state disk_budget yourself."
        )
        raise DiskBudgetError(message)
    return budget_bytes


def too_large(
    unit: str, sizes_bytes: Sequence[int], budget_bytes: int, stated: str = ""
) -> DiskBudgetError:
    """Return the error for a unit that the budget cannot hold, alone.

    Args:
        unit: Its name.
        sizes_bytes: Bytes of each of its files that count.
        budget_bytes: The disk budget.
        stated: By whom it was stated, as the message goes on.
    """
    size_bytes = sum(sizes_bytes)
    message = (
        f"Cannot hold {unit}: its {len(sizes_bytes)} files need {size_bytes} bytes "
        f"({format_size(size_bytes)}) at once, and the disk budget is {budget_bytes} bytes "
        f"({format_size(budget_bytes)}{stated}). Raise disk_budget to at least {size_bytes}, or "
        f"select fewer images per unit.{ask_unit(budget_bytes)}"
    )
    return DiskBudgetError(message, unit=unit)


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the file system that holds the folder, or its next parent."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
