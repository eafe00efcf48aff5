"""Train on OpenNeuro MRI datasets that are larger than the disk and the RAM at hand.

DataladSubjectsDataset     TorchIO subjects whose images are fetched on demand, on a disk budget
Scalar, Label              which files are an image, by pattern or BIDS entities
concat                     one dataset over several, under one budget
BudgetedQueue              patches of subjects, made in the background, on a RAM budget
DiskStatistics             what ``dataset.statistics()`` returns
QueueStatistics            what ``queue.statistics()`` returns
progress, report           what a queue does, seen live; how its run went, as one HTML file
Skipped                    an entry of ``dataset.skipped``: a unit that was left out, and why
TioOpenNeuroError          base of every error that is raised on purpose; the tree of them, from
                           ContentMismatchError to UnsafeDatasetError, is drawn in ``errors``
=========================  =======================================================================
=======
- `DataladSubjectsDataset`: TorchIO subjects whose images are fetched on demand, on a disk budget
- `Scalar`, `Label`: which files are an image, by pattern or BIDS entities
- `concat`: one dataset over several, under one budget
- `BudgetedQueue`: patches of subjects, made in the background, on a RAM budget
- `DiskStatistics`: what ``dataset.statistics()`` returns
- `QueueStatistics`: what ``queue.statistics()`` returns
- `progress`, `report`: what a queue does, seen live; how its run went, as one HTML file
- `Skipped`: an entry of ``dataset.skipped``: a unit that was left out, and why
- `TioOpenNeuroError`: base of every error that is raised on purpose; the tree of them, from
  `ContentMismatchError` to `UnsafeDatasetError`, is drawn in ``errors``

The packages and modules beside these names are internal.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tio_openneuro.dataset import DataladSubjectsDataset, concat
    from tio_openneuro.disk import DiskStatistics
    from tio_openneuro.queue import BudgetedQueue, QueueStatistics
    from tio_openneuro.select import Label, Scalar, Skipped
    from tio_openneuro.watch import progress, report

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
    "progress",
    "report",
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
    "progress": "watch",
    "report": "watch",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    """Import a public name from its room."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
