"""Closing what nobody closes: once, outside of a collection, at the latest when Python ends.

A collection runs in any line of any thread, also where this library holds a lock. So nothing is
closed in it: the owner's end only starts a thread that closes. What is open when the interpreter
ends is closed then, newest first; a child that was forked closes nothing of its parent's. Also the
wait that a signal ends.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable

_LOGGER = logging.getLogger(__name__)
_STEP_S = 0.5


class Closing:
    """Closes something once, when it is called, or after its owner is gone."""

    def __init__(self, owner: object, close: Callable[[], object]) -> None:
        """Wait for the owner's end, or the interpreter's.

        Args:
            owner: Held weakly.
            close: Does not hold the owner. Where it is interrupted it is called again.
        """
        self._close = close
        self._pid = os.getpid()
        self._mutex = threading.RLock()
        self._closed = False
        _OPEN[self] = weakref.ref(owner, self._hand_over)

    def __call__(self) -> None:
        """Close now, or wait for the thread that does; never raise, and log what went wrong."""
        if os.getpid() != self._pid:
            return
        with self._mutex:
            if self._closed:
                return
            try:
                self._close()
            except Exception:
                _LOGGER.exception("Something was left open when %r was closed", self._close)
            self._closed = True
            _OPEN.pop(self, None)

    def _hand_over(self, _owner: object) -> None:
        # The start of a Thread takes locks of Python's own, which a collection may be inside of
        # as well: a bare thread takes none, and starts it.
        with contextlib.suppress(RuntimeError):
            _thread.start_new_thread(self._start, ())

    def _start(self) -> None:
        # There are no new threads when the interpreter ends, which closes what is open.
        with contextlib.suppress(RuntimeError):
            threading.Thread(target=self, name="tio-openneuro-closing", daemon=True).start()


_OPEN: dict[Closing, weakref.ref[object]] = {}


@atexit.register
def _close_all() -> None:
    for closing in reversed(list(_OPEN)):
        closing()


def wait_in_steps(wait: Callable[[float], bool], timeout_s: float) -> bool:
    """Wait in short steps, and return what the last one says.

    Python sees a signal before a wait in the main thread begins, or ends the wait; of one that
    comes in between it is told when the wait is over (3.11: 3 of 23 with other threads at work).

    Args:
        wait: Waits at most that many seconds.
        timeout_s: Longest wait in all, in seconds.
    """
    until_s = time.monotonic() + timeout_s
    while not (found := wait(max(min(_STEP_S, until_s - time.monotonic()), 0.0))):
        if time.monotonic() >= until_s:
            break
    return found
