"""What the C library keeps of memory that was freed; nothing where it is not glibc."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING

from tio_openneuro.memory import THREAD_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MAPPED_BYTES = 32 * 2**20


def bound_free_memory() -> None:
    """Have glibc give large freed memory back by itself, in this process, from now on.

    What a thread's arena keeps at its top is bounded so. ``malloc_trim`` does not reach it, and
    by default it may be 64 MiB: two threads passed a budget of 636 MB by 115 MB (192**3, label
    sampler, 2026-11-21). A threshold of 32 MiB for mapping, glibc's own upper bound, costs a
    tenth less system time than one of 2 MiB.

    Source: mallopt(3), M_TRIM_THRESHOLD and M_MMAP_THRESHOLD; ``mtrim`` in glibc 2.36.
    """
    mallopt = _libc_function("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, THREAD_BYTES)


def return_free_memory() -> None:
    """Give memory that was freed back to the system, where glibc would keep it."""
    trim = _libc_function("malloc_trim")
    if trim is not None:
        trim(0)


def _libc_function(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
