"""Readings of this machine's memory, for the arithmetic of :mod:`tio_openneuro.ram.admission`."""

from __future__ import annotations

from pathlib import Path

import psutil

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
