"""Start the observer on a root, and keep what it saw.

Owns the observer's process, and ends it.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from tio_openneuro.annex import Coprocess
from tio_openneuro.demo import observer
from tio_openneuro.errors import TioOpenNeuroError

if TYPE_CHECKING:
    from types import TracebackType

_END_TIMEOUT_S = 20.0


class HeldSample(NamedTuple):
    """What an observer saw at one instant.

    Attributes:
        time_s: Seconds since the watch began.
        held_bytes: Bytes that the root held.
    """

    time_s: float
    held_bytes: int


class DiskWatch:
    """Bytes held under a root, sampled by a process of its own between ``with`` and its end."""

    def __init__(self, root: Path, *, interval_s: float = 0.005) -> None:
        """Prepare; nothing is started before ``with``.

        Args:
            root: Folder of clones and ledger; may not exist yet.
            interval_s: Pause between two samples.
        """
        self._arguments = (observer.__file__, str(root), str(interval_s))
        self._samples: list[HeldSample] = []
        self._process: Coprocess | None = None
        self._began_s = 0.0

    def __enter__(self) -> Self:
        """Start to watch; return once the first sample is there."""
        self._began_s = time.time()
        self._process = Coprocess([sys.executable, "-I", *self._arguments])
        try:
            self._take(self._process, timeout_s=_END_TIMEOUT_S)
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the last sample and end the observer."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            if exception is None:
                process.write_line(b"stop")
                while self._take(process, timeout_s=_END_TIMEOUT_S):
                    pass
        finally:
            process.finish(_END_TIMEOUT_S)

    def samples(self) -> tuple[HeldSample, ...]:
        """Return all samples so far, the oldest first."""
        with contextlib.suppress(TimeoutError):
            while self._process is not None and self._take(self._process, timeout_s=0.0):
                pass
        return tuple(self._samples)

    def _take(self, process: Coprocess, *, timeout_s: float) -> bool:
        """Read one sample; return False at the end of them."""
        line = process.read_line(timeout_s)
        if line is None:
            if self._process is not None:
                message = f"The disk observer ended on its own. It said: {process.stderr}"
                raise TioOpenNeuroError(message)
            return False
        time_s, held = line.split()
        self._samples.append(HeldSample(float(time_s) - self._began_s, int(held)))
        return True
