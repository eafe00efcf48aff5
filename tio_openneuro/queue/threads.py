"""The threads of a queue: started together, replaced when they die, waited for at the end."""

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


def _raise(error: BaseException) -> None:
    raise error


class Workers:
    """Daemon threads that all run one function, with fixed intra-op threads."""

    def __init__(
        self,
        count: int,
        target: Callable[[], None],
        failed: Callable[[BaseException], None] = _raise,
    ) -> None:
        """Start nothing yet.

        Args:
            count: Number of threads; may be zero.
            target: What each runs, until it returns.
            failed: Told what stopped a thread, in that thread, whatever it was.
        """
        self._count = count
        self._target = target
        self._failed = failed
        self._threads: list[_Candidate] = []

    @property
    def alive(self) -> bool:
        """Whether a thread is left."""
        return any(thread.is_alive() for thread in self._threads)

    def start(self) -> None:
        """Start the threads that are missing: all at first, later those that were stopped."""
        self._threads = [each for each in self._threads if each.is_alive() and not each.stopped]
        missing = self._count - len(self._threads)
        if missing == 0:
            return
        before = torch.get_num_threads()
        self._hire(missing)
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

    def _hire(self, count: int) -> None:
        """Start threads, and others beside them until enough use the main arena.

        In another one freed volumes are unmapped, and mapped anew by page faults: 20 ms of system
        time a patch at 192**3, where it is 2 in the main one (2026-11-24).
        """
        chosen = threading.Event()
        candidates: list[_Candidate] = []
        while sum(c.fits for c in candidates) < count and len(candidates) < count + _CANDIDATES:
            candidates.append(_Candidate(self._target, self._failed, chosen))
        hired = sorted(candidates, key=lambda candidate: not candidate.fits)[:count]
        for candidate in hired:
            candidate.hired = True
        chosen.set()
        for candidate in candidates:
            if candidate.hired:
                candidate.begun.wait(_START_S)
            else:
                candidate.join(_START_S)
        self._threads += hired


class _Candidate(threading.Thread):
    """A thread that is ready to work, and ends if it is not hired."""

    def __init__(
        self,
        target: Callable[[], None],
        failed: Callable[[BaseException], None],
        chosen: threading.Event,
    ) -> None:
        """Start it, and wait until it knows whether it fits.

        Args:
            target: What it runs if it is hired.
            failed: Told what stopped it.
            chosen: Set once it is decided who is.
        """
        super().__init__(name="tio-openneuro-queue", daemon=True)
        self.fits = False
        self.hired = False
        self.stopped = False
        self.begun = threading.Event()
        self._work = target
        self._failed = failed
        self._chosen = chosen
        self._asked = threading.Event()
        self.start()
        self._asked.wait(_START_S)

    def run(self) -> None:
        """Wait for the decision, and work if hired."""
        try:
            self.fits = in_main_arena()
            self._asked.set()
            self._chosen.wait(_START_S)
            if self.hired:
                _count_as_busy()
                torch.set_num_threads(INTRA_OP_THREADS)
                self.begun.set()
                self._work()
        except BaseException as error:  # noqa: BLE001 - raised by whoever waits for the work
            # Before anybody hears of it, who may look at once for threads to replace.
            self.stopped = True
            self._failed(error)
        finally:
            self._asked.set()
            self.begun.set()


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
