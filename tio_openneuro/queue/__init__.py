"""``BudgetedQueue``: patches in the background, within a RAM budget.

Owns the order, the draw, the buffer and the threads that fill it. Promises the same patches for one
seed. Never drains before it fills.
"""

from tio_openneuro.queue.draw import permute
from tio_openneuro.queue.queue import BudgetedQueue
from tio_openneuro.queue.state import QueueStatistics, Reading, read

__all__ = ["BudgetedQueue", "QueueStatistics", "Reading", "permute", "read"]
