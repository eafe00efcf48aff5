"""What the C library keeps of memory that was freed; nothing where it is not glibc.

Owns the bargain between speed and what other programs see: freed volumes are used again while a
queue fills, and given back where its budget has no room, once it idles, and at its end.
"""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from tio_openneuro.memory import Admission

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
_MOST_MAPPED = 65_536
_MAPPED_BYTES = 32 * 2**20
_KEPT_BYTES = 8 * 2**20
_LARGEST_INT = 2**31 - 1


class _Mallinfo2(ctypes.Structure):
    """``struct mallinfo2``; see mallinfo(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def reuse_free_memory(most_bytes: int) -> None:
    """Have glibc use freed volumes again, in this process, rather than give each one back.

    A volume that is mapped anew costs a page fault for each 4 kB: 22 of 50 ms of processor time a
    patch at 192**3, and 38 patches/s where 65 are made without (2026-11-24). It holds for the main
    arena alone: any other unmaps what is free at its end, and no new ones are made from now on.

    Args:
        most_bytes: Free memory at the heap's end beyond this goes back by itself.

    Source: mallopt(3); ``sysmalloc``, ``heap_trim`` and ``mtrim`` in glibc 2.36.
    """
    _set_option(_M_ARENA_MAX, 1)
    _set_option(_M_MMAP_MAX, 0)
    _set_option(_M_TRIM_THRESHOLD, min(most_bytes, _LARGEST_INT))


def bound_free_memory() -> None:
    """Have glibc give large freed memory back by itself, and give back what is free now."""
    _set_option(_M_MMAP_MAX, _MOST_MAPPED)
    _set_option(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
    _set_option(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    return_free_memory()


def return_free_memory() -> None:
    """Give memory that was freed back to the system, where glibc would keep it."""
    trim = _libc_function("malloc_trim")
    if trim is not None:
        trim(0)


def make_room(admission: Admission, size_bytes: int) -> bool:
    """Return whether a charge fits, once what is free was given back where it did not.

    Not after each subject: giving back, and faulting the pages in again, takes half of the
    producers' time (2026-11-24). What was freed and is in use again is no longer free.

    Args:
        admission: The charges.
        size_bytes: Bytes to be charged.
    """
    if not admission.fits(size_bytes):
        free = _free_bytes()
        if free is not None:
            admission.measured(free)
    if not admission.fits(size_bytes):
        give_back(admission)
    return admission.fits(size_bytes)


def give_back(admission: Admission) -> None:
    """Give back what is free, and note it.

    Args:
        admission: The charges.
    """
    if admission.retained_bytes:
        return_free_memory()
        admission.returned()


def _free_bytes() -> int | None:
    """Return the bytes that glibc holds free, given back or not; None where it does not say."""
    read = _libc_function("mallinfo2")
    if read is None:
        return None
    read.restype = _Mallinfo2  # type: ignore[attr-defined]
    return int(read().fordblks)  # type: ignore[attr-defined]


def in_main_arena() -> bool:
    """Return whether this thread's memory comes from glibc's main arena; True elsewhere.

    That is the one below the program break; other arenas are mapped far above.

    Source: sbrk(2); ``arena_get2`` in glibc 2.36 gives each new thread an arena that nobody uses,
    and the next one in turn where there is none.
    """
    sbrk, malloc, free = (_libc_function(name) for name in ("sbrk", "malloc", "free"))
    if sbrk is None or malloc is None or free is None:
        return True
    for function in (sbrk, malloc):
        function.restype = ctypes.c_void_p  # type: ignore[attr-defined]
    # Larger than what a thread keeps beside its arena (tcache).
    place = malloc(1 << 14)
    free(ctypes.c_void_p(place))
    return place < sbrk(0)


def _set_option(name: int, value: int) -> None:
    mallopt = _libc_function("mallopt")
    if mallopt is not None:
        mallopt(name, value)


def _libc_function(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
