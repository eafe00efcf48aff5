"""The threads of a queue: started together, and waited for at the end."""

from __future__ import annotations

import atexit
import sys
import threading
import time
from collections.abc import Callable

import torch

from tio_openneuro.ram import in_main_arena

# In every fill: results such as the mean of a volume depend on it (TorchIO 1.2.1, torch 2.13).
INTRA_OP_THREADS = 1
_START_S = 60.0
_JOIN_S = 1.0
_EXIT_S = 8.0
_CANDIDATES = 64
_TEAM = 2
# Twice the size from which torch 2.13 divides an operation (at::internal::GRAIN_SIZE).
_PARALLEL_ELEMENTS = 1 << 16


class Workers:
    """Daemon threads that all run one function, with fixed intra-op threads."""

    def __init__(self, count: int, target: Callable[[], None]) -> None:
        """Start nothing yet.

        Args:
            count: Number of threads; may be zero.
            target: What each runs, until it returns. It raises nothing.
        """
        self._count = count
        self._target = target
        self._threads: list[_Worker] = []

    @property
    def alive(self) -> bool:
        """Whether a thread is left."""
        return any(thread.is_alive() for thread in self._threads)

    def start(self) -> None:
        """Start the threads, and others beside them until enough use the main arena; once.

        In another one freed volumes are unmapped, and mapped anew by page faults: 20 ms of system
        time a patch at 192**3, where it is 2 in the main one (2026-11-24).
        """
        if sum(thread.works for thread in self._threads) == self._count:
            return
        before = torch.get_num_threads()
        chosen = threading.Event()
        while sum(thread.works for thread in self._threads) < self._count:
            choosy = len(self._threads) < self._count + _CANDIDATES
            self._threads.append(_Worker(self._target, chosen, choosy=choosy))
        chosen.set()
        for thread in self._threads:
            if not thread.works:
                thread.join(_START_S)
        # A thread's setting is also the default of threads that start later: the user's own
        # threads get back the number that this one has.
        torch.set_num_threads(before)

    def join(self) -> None:
        """Wait until the threads have ended, for a time."""
        # A thread that is still inside a C++ library when the interpreter ends aborts the
        # process: at exit, which is after the main thread's end, more patience is due.
        main_is_alive = threading.main_thread().is_alive()
        self._join_for(_JOIN_S if main_is_alive else _EXIT_S)
        if main_is_alive and self.alive:
            atexit.register(self._join_for, _EXIT_S)

    def _join_for(self, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(deadline - time.monotonic(), 0.0))


class _Worker(threading.Thread):
    """A thread that works, or ends once enough others do, since its arena is not the main one."""

    def __init__(
        self, target: Callable[[], None], chosen: threading.Event, *, choosy: bool
    ) -> None:
        """Start it, and wait until it knows whether it works.

        Args:
            target: What it runs.
            chosen: Set once enough threads work. Before that its arena would be the next one's.
            choosy: Whether it works in the main arena alone.
        """
        super().__init__(name="tio-openneuro-queue", daemon=True)
        self.works = False
        self._work = target
        self._chosen = chosen
        self._choosy = choosy
        self._asked = threading.Event()
        self.start()
        self._asked.wait(_START_S)

    def run(self) -> None:
        """Work, or wait for others."""
        try:
            self.works = in_main_arena() or not self._choosy
            if self.works:
                _count_as_busy()
                torch.set_num_threads(INTRA_OP_THREADS)
        finally:
            self._asked.set()
        if self.works:
            self._work()
        else:
            self._chosen.wait(_START_S)


def _count_as_busy() -> None:
    """Let libgomp know that this thread competes with the user's own parallel operations.

    A team waits for its slowest member by spinning for milliseconds, unless libgomp counts more
    threads than processors. It does not see ours, which hold the processors that the team waits
    for: collating a batch took 43 ms instead of 4 beside two of them (2026-11-24). The second
    member of a team of this thread's own, which sleeps from then on, stands for it in that count.

    Source: ``GOMP_SPINCOUNT`` in the libgomp manual; ``gomp_managed_threads`` in GCC 12.
    """
    if sys.platform.startswith("linux"):
        torch.set_num_threads(_TEAM)
        torch.zeros(_PARALLEL_ELEMENTS).add_(1)
