"""The one place of disk accounting, shared by all processes under one root.

Owns the SQLite database and the owners' locks. Promises that charged bytes never pass the smallest
budget, and that a step costs what its own keys do, however many rows, owners and uses there are.
Never touches content: callers drop and fetch, and report.
"""

from tio_openneuro.ledger.changes import Changes, growing_pause_s
from tio_openneuro.ledger.eviction import (
    Resident,
    is_worth_room,
    pick,
    pick_enough,
    prefetch_window,
    steps_to_spare,
    victim_order,
)
from tio_openneuro.ledger.ledger import Ledger
from tio_openneuro.ledger.owners import hold_folder
from tio_openneuro.ledger.root import (
    FLOOR_BYTES,
    free_bytes,
    prepare_ledger_folder,
    refuse_beside,
    too_large,
)
from tio_openneuro.ledger.schema import Answer, ContentRow, ContentState, Want
from tio_openneuro.ledger.transaction import Transaction, Use

__all__ = [
    "FLOOR_BYTES",
    "Answer",
    "Changes",
    "ContentRow",
    "ContentState",
    "Ledger",
    "Resident",
    "Transaction",
    "Use",
    "Want",
    "free_bytes",
    "growing_pause_s",
    "hold_folder",
    "is_worth_room",
    "pick",
    "pick_enough",
    "prefetch_window",
    "prepare_ledger_folder",
    "refuse_beside",
    "steps_to_spare",
    "too_large",
    "victim_order",
]
