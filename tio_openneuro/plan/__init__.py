"""What a training will fetch, hold and wait for, played on a clock of its own.

Owns the clock, the link and what a budget changes. Promises the queue's and the ledger's own
decisions, so that bytes are those of a run. Never fetches, waits or touches a disk.
"""

from tio_openneuro.plan.forecast import foresee, ram_budgets, total_bytes
from tio_openneuro.plan.training import Training

__all__ = ["Training", "foresee", "ram_budgets", "total_bytes"]
