"""The threads of a queue: started together, replaced when they die, waited for at the end."""

from __future__ import annotations

import atexit
import sys
import threading
import time
from typing import TYPE_CHECKING

import torch

from tio_openneuro.production import fix_intra_op_threads

if TYPE_CHECKING:
    from collections.abc import Callable

_START_S = 60.0
_JOIN_S = 1.0
_EXIT_S = 8.0
_TEAM = 2
# Twice the size from which torch 2.13 divides an operation (at::internal::GRAIN_SIZE).
_PARALLEL_ELEMENTS = 1 << 16


class Workers:
    """Daemon threads that all run one function, with fixed intra-op threads."""

    def __init__(self, count: int, target: Callable[[], None]) -> None:
        """Start nothing yet.

        Args:
            count: Number of threads; may be zero.
            target: What each runs, until it returns.
        """
        self._count = count
        self._target = target
        self._threads: list[threading.Thread] = []

    @property
    def alive(self) -> bool:
        """Whether a thread is left."""
        return any(thread.is_alive() for thread in self._threads)

    def start(self) -> None:
        """Start the threads that are missing: all at first, later those that died."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        missing = self._count - len(self._threads)
        if missing == 0:
            return
        before = torch.get_num_threads()
        ready = threading.Barrier(missing + 1)
        for number in range(missing):
            name = f"tio-openneuro-queue-{number}"
            thread = threading.Thread(target=self._run, args=(ready,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        ready.wait(_START_S)
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

    def _run(self, ready: threading.Barrier) -> None:
        _count_as_busy()
        fix_intra_op_threads()
        ready.wait(_START_S)
        self._target()


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
