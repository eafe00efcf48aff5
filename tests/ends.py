"""Ways in which a process ends, each done by the process itself, and what is seen of it then."""

import contextlib
import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterable

import psutil

SECONDS = 10.0
"""However a process ends, nothing of it lives this much later."""


def _signalled(number: signal.Signals) -> Callable[[], object]:
    return lambda: signal.raise_signal(number)


ENDS: dict[str, Callable[[], object]] = {
    "SIGTERM": _signalled(signal.SIGTERM),
    "SIGHUP": _signalled(signal.SIGHUP),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "abort": os.abort,
    "SIGSEGV": lambda: ctypes.string_at(0),
    "os._exit": lambda: os._exit(3),
}


def end(way: str) -> None:
    """End this process, without what Python does at its end and without a dump of its memory."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ENDS[way]()
    sys.exit(f"{way} did not end the process")


def still_there(processes: Iterable[psutil.Process]) -> list[str]:
    """Wait until these have ended, and return those that live all the same.

    One whose parent is gone may stay a zombie where nobody collects it.
    """
    _, alive = psutil.wait_procs([one for one in processes if not _is_zombie(one)], SECONDS)
    found = []
    for one in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            if not _is_zombie(one):
                found.append(f"{one.pid} {one.cmdline()}")
    return found


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
