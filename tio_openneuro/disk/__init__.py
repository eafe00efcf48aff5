"""Content on disk within a budget: reserve, fetch, verify, lease, evict.

Owns the engine and its threads. Promises that what is held stays within the budget at every
instant, and that leased content stays. Knows nothing of images or of torch.
"""

from tio_openneuro.disk.engine import Engine
from tio_openneuro.disk.prepared_store import PreparedRepo
from tio_openneuro.disk.statistics import DiskStatistics

__all__ = [
    "DiskStatistics",
    "Engine",
    "PreparedRepo",
]
