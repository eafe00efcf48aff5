"""``BudgetedQueue``: patches in the background, within a RAM budget.

Owns the order, the draw, the buffer and the threads that fill it. Promises the same patches for one
seed. Never drains before it fills.
"""

from tio_openneuro.queue.draw import choose_window, chosen_twice
from tio_openneuro.queue.order import Ranks, Script, write_script
from tio_openneuro.queue.queue import BudgetedQueue
from tio_openneuro.queue.schedule import is_within_reach
from tio_openneuro.queue.state import QueueStatistics, Reading, read

__all__ = [
    "BudgetedQueue",
    "QueueStatistics",
    "Ranks",
    "Reading",
    "Script",
    "choose_window",
    "chosen_twice",
    "is_within_reach",
    "read",
    "write_script",
]
