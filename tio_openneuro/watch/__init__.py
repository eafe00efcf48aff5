"""Seeing a run: live while it trains, and as one file afterwards.

Owns what a person reads of a queue's record. Promises that nothing is shown unless it was asked
for, and that a report needs no network. Never fetches, and never changes what the queue gives.
"""

from tio_openneuro.watch.gauge import Gauge, Moment
from tio_openneuro.watch.live import board, gauge_bar, progress
from tio_openneuro.watch.page import report

__all__ = ["Gauge", "Moment", "board", "gauge_bar", "progress", "report"]
