"""Train on OpenNeuro MRI datasets that are larger than the disk and the RAM at hand.

``DataladSubjectsDataset`` yields TorchIO subjects whose images are fetched on demand, within a
disk budget; ``BudgetedQueue`` cuts patches from them, within a RAM budget.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tio_openneuro.dataset import DataladSubjectsDataset, concat
    from tio_openneuro.disk import DiskStatistics
    from tio_openneuro.errors import (
        ContentMismatchError,
        DamagedImageError,
        DiskBudgetError,
        DropRefusedError,
        FetchError,
        LedgerError,
        NotAnAnnexError,
        RamBudgetError,
        RemoteUnavailableError,
        SelectionError,
        SplitError,
        TioOpenNeuroError,
        UnsafeDatasetError,
    )
    from tio_openneuro.queue import BudgetedQueue, QueueStatistics
    from tio_openneuro.select import Label, Scalar, Skipped

__all__ = [
    "BudgetedQueue",
    "ContentMismatchError",
    "DamagedImageError",
    "DataladSubjectsDataset",
    "DiskBudgetError",
    "DiskStatistics",
    "DropRefusedError",
    "FetchError",
    "Label",
    "LedgerError",
    "NotAnAnnexError",
    "QueueStatistics",
    "RamBudgetError",
    "RemoteUnavailableError",
    "Scalar",
    "SelectionError",
    "Skipped",
    "SplitError",
    "TioOpenNeuroError",
    "UnsafeDatasetError",
    "concat",
]

# Found when they are first asked for: `tio-openneuro status` needs no torch, which takes seconds.
_HOMES = {
    "concat": "dataset",
    "BudgetedQueue": "queue",
    "DataladSubjectsDataset": "dataset",
    "DiskStatistics": "disk",
    "Label": "select",
    "QueueStatistics": "queue",
    "Scalar": "select",
    "Skipped": "select",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    """Import a public name from its module."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES.get(name, 'errors')}")
    return getattr(home, name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
