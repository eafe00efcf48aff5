"""Readings of this machine's memory, for the arithmetic of :mod:`tio_openneuro.ram.admission`."""

from __future__ import annotations

from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Return the memory that this machine, or this process's control group, has left."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = (_CGROUP / "memory.current").read_text().strip()
    except OSError:
        return available
    return available if limit == "max" else min(available, max(int(limit) - int(used), 0))


class ResidentPeak:
    """The most RAM that this process held since some moment, beyond what it held then."""

    def __init__(self) -> None:
        """Begin now."""
        self._begun_bytes, self._before_bytes = _resident_bytes()

    @property
    def size_bytes(self) -> int:
        """The kernel's own peak, or what is held now where an earlier peak hides that."""
        now_bytes, most_bytes = _resident_bytes()
        return (most_bytes if most_bytes > self._before_bytes else now_bytes) - self._begun_bytes


def _resident_bytes() -> tuple[int, int]:
    """Return what this process holds, and the most that it ever held, as far as it is told."""
    now_bytes = int(psutil.Process().memory_info().rss)
    lines = _STATUS.read_text(encoding="ascii").splitlines() if _STATUS.exists() else []
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return now_bytes, max([now_bytes, *peaks])
