"""A gate around ITK's image files, which is closed while this process forks.

ITK looks for the format of a file under a lock of its own. A child that was forked while another
thread held it waits for ever as soon as it reads or writes an image (SimpleITK 2.5.7). So threads
pass a gate on their way into those calls, wherever the call stands: in this library, in TorchIO,
in a transform or dataset of the user's. A fork waits until nobody else is inside. ITK's filters,
nibabel, isal and blosc2 hold no such lock.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

import SimpleITK

from tio_openneuro.forks import at_fork

_LOGGER = logging.getLogger(__name__)
_LONGEST_WAIT_S = 60.0
_CALLS = {
    "ImageFileReader": ("Execute", "ReadImageInformation"),
    "ImageSeriesReader": ("Execute",),
    "ImageFileWriter": ("Execute",),
    "ImageSeriesWriter": ("Execute",),
}


class _Gate:
    """Knows which threads are inside; nothing is locked while one is."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: Counter[int] = Counter()
        self._forking: int | None = None

    def enter(self) -> None:
        """Wait until no other thread forks; who is inside, or forks itself, passes."""
        me = threading.get_ident()
        with self._changed:
            while self._forking not in {None, me} and not self._inside[me]:
                self._changed.wait()
            self._inside[me] += 1

    def leave(self) -> None:
        """Be outside again; nothing happens where an interrupt kept the thread from entering."""
        me = threading.get_ident()
        with self._changed:
            self._inside[me] -= 1
            self._inside = +self._inside
            self._changed.notify_all()

    def close(self) -> None:
        """Let nobody in, and wait until every other thread is outside."""
        me = threading.get_ident()
        with self._changed:
            self._forking = me
            if not self._changed.wait_for(lambda: self._inside.keys() <= {me}, _LONGEST_WAIT_S):
                text = "Forked although %d threads have read images for %.0f s; a child may hang."
                _LOGGER.warning(text, len(self._inside.keys() - {me}), _LONGEST_WAIT_S)

    def open(self) -> None:
        """Let everybody in, in the process that forked."""
        with self._changed:
            self._forking = None
            self._changed.notify_all()

    def open_in_child(self) -> None:
        """Forget the threads that are not there; one of them may hold the lock."""
        me = threading.get_ident()
        self._changed = threading.Condition()
        self._inside = Counter({me: self._inside[me]})
        self._forking = None


_GATE = _Gate()
# Taken once, and never given back.
_INSTALLED = threading.Lock()


def install_reading_gate() -> None:
    """Lead every call that opens an image file through the gate. Called again, it does nothing.

    Source: ``itk::ImageIOFactory::CreateImageIO`` (ITK 5.4) locks a mutex and asks each format in
    turn whether it can read the file. SimpleITK's readers and writers let go of Python's lock.
    """
    if not _INSTALLED.acquire(blocking=False):
        return
    at_fork("gate", _GATE, before=_Gate.close, in_parent=_Gate.open, in_child=_Gate.open_in_child)
    for kind, names in _CALLS.items():
        for name in names:
            owner = getattr(SimpleITK, kind)
            setattr(owner, name, _gated(getattr(owner, name)))


def _gated(call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def gated(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - SimpleITK's own
        try:
            _GATE.enter()
            return call(*args, **kwargs)
        finally:
            _GATE.leave()

    return gated
