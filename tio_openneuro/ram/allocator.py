"""What the C library keeps of memory that was freed; nothing where it is not glibc.

Owns the bargain between speed and what other programs see: freed volumes are used again while a
queue fills, and given back where its budget has no room, once it idles, and at its end. The C
library has one set of options for the whole process, and its queues share them: what any of them
relies on holds until that one ends.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Callable
from typing import ClassVar

from tio_openneuro.ram.admission import Admission

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
_MOST_MAPPED = 65_536
_LEAST_MAPPED_BYTES = 2**20
_MAPPED_BYTES = 32 * 2**20
_KEPT_BYTES = 8 * 2**20
_LARGEST_INT = 2**31 - 1
# Free pieces between others cannot always be used: with one thread 1.44 times the bound was held
# at 192**3, with two 0.96 of both (2026-11-24).
_FRAGMENTED = 1.5
_SLACK = 0.5


class _Mallinfo2(ctypes.Structure):
    """``struct mallinfo2``; see mallinfo(3)."""

    _fields_: ClassVar = [
        ("others", ctypes.c_size_t * 8),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    ]


class FreedMemory:
    """What becomes of the memory that a queue's subjects free: used again, where there is room.

    Not safe to share by threads: its owner locks. Several may be at work in one process: memory is
    given back at once if one of them needs that, since the others only lose time by it.
    """

    # Of the process, as the options are.
    _deciding: ClassVar[set[weakref.ref[FreedMemory]]] = set()

    def __init__(self, capacity_bytes: int, threads: int, window: int) -> None:
        """Decide nothing yet.

        Args:
            capacity_bytes: What the RAM budget leaves for subjects and patches.
            threads: Subjects in work at a time.
            window: Patches that wait for delivery at most.
        """
        self._capacity_bytes = capacity_bytes
        self._threads = threads
        self._window = window
        self._largest_bytes = 0
        self._reused: bool | None = None
        # Whether it was ever: pieces that were free then are filled before new ones are mapped.
        self._fragmented = False
        self.pid = os.getpid()

    def bound(self, work_bytes: int, patch_bytes: int, *, known: bool) -> int:
        """Return the bound of a subject's work, after deciding what becomes of what it frees.

        Args:
            work_bytes: Bound of what it holds at once.
            patch_bytes: Bytes of a patch.
            known: Whether these are no guesses.
        """
        largest_bytes = max(self._largest_bytes, work_bytes)
        if known:
            self._largest_bytes = largest_bytes
        left_bytes = self._capacity_bytes - self._window * patch_bytes
        # Where the budget has no room for what that takes, each piece is given back once freed.
        most_bytes = self._threads * int(largest_bytes * _FRAGMENTED) + int(largest_bytes * _SLACK)
        reused = most_bytes <= left_bytes
        if reused != self._reused:
            self._reused = reused
            self.begin()
        self._fragmented |= reused
        if not self._fragmented:
            return work_bytes
        return max(work_bytes, min(int(work_bytes * _FRAGMENTED), left_bytes))

    @property
    def kept_bytes(self) -> int:
        """Free bytes that may stay; none where each piece is to be given back at once."""
        return max(self._capacity_bytes, 1) if self._reused else 0

    def begin(self) -> None:
        """Set what was decided, in this process."""
        if self._reused is not None:
            self._deciding.add(weakref.ref(self, self._deciding.discard))
            self._set_options()

    def end(self) -> None:
        """Need nothing more; the last one leaves the process as other programs like it."""
        self._deciding.discard(weakref.ref(self))
        self._set_options()

    @classmethod
    def _set_options(cls) -> None:
        """Set what all need. Who set what is outdated by now sees that, and sets it again."""
        needs: list[int] | None = None
        while needs != (needs := cls._needs()):
            if not needs:
                bound_free_memory()
            elif 0 in needs:
                give_back_at_once()
            else:
                reuse_free_memory(min(needs))

    @classmethod
    def _needs(cls) -> list[int]:
        """Return the free bytes that may stay for each that decided in this process."""
        found = (reference() for reference in cls._deciding.copy())
        return sorted(each.kept_bytes for each in found if each and each.pid == os.getpid())


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


def give_back_at_once() -> None:
    """Have glibc give each volume back once it is freed, in this process, from now on."""
    _map_from(_LEAST_MAPPED_BYTES, kept_bytes=_LEAST_MAPPED_BYTES)


def bound_free_memory() -> None:
    """Have glibc keep little of what is freed, as other programs like it."""
    _map_from(_MAPPED_BYTES, kept_bytes=_KEPT_BYTES)
    return_free_memory()


def _map_from(size_bytes: int, *, kept_bytes: int) -> None:
    _set_option(_M_ARENA_MAX, 1)
    _set_option(_M_MMAP_MAX, _MOST_MAPPED)
    _set_option(_M_MMAP_THRESHOLD, size_bytes)
    _set_option(_M_TRIM_THRESHOLD, kept_bytes)


def return_free_memory() -> None:
    """Give memory that was freed back to the system, where glibc would keep it."""
    trim = _libc_function("malloc_trim")
    if trim is not None:
        trim(0)


def make_room(admission: Admission, size_bytes: int) -> bool:
    """Return whether a charge fits, once what is free was given back where it did not.

    What the C library holds free counts as held, whatever it was charged: a bound that was wrong
    is mended before the next charge. Not given back after each subject: that, and faulting the
    pages in again, takes half of the producers' time (2026-11-24).

    Args:
        admission: The charges.
        size_bytes: Bytes to be charged.
    """
    # glibc walks its free pieces for that: 9 ms for 100,000 of them.
    free_bytes = _free_bytes()
    if free_bytes is not None:
        admission.measured(free_bytes)
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
        admission.returned(_free_bytes() or 0)


def _free_bytes() -> int | None:
    """Return the bytes that glibc holds free, given back or not; None where it does not say."""
    read = _libc_function("mallinfo2")
    if read is None:
        return None
    read.restype = _Mallinfo2  # type: ignore[attr-defined]
    return int(read().fordblks)  # type: ignore[attr-defined]


def in_main_arena() -> bool:
    """Return whether this thread's memory comes from glibc's main arena; True elsewhere.

    That is the one below the program break; other arenas are mapped far above. From now on no more
    of those are made: threads to come take turns among those that there are, so that few need to be
    started until some are in the main one. Where no other thread allocated yet all are; else it
    alone is not enough: 2 of 4 beside torch's, none of 4 beside 40 (glibc 2.36, 2026-12-01).

    Source: sbrk(2); ``arena_get2`` in glibc 2.36 gives each new thread an arena that nobody uses,
    and the next one in turn where there is none.
    """
    sbrk, malloc, free = (_libc_function(name) for name in ("sbrk", "malloc", "free"))
    if sbrk is None or malloc is None or free is None:
        return True
    _set_option(_M_ARENA_MAX, 1)
    for function in (sbrk, malloc):
        function.restype = ctypes.c_void_p  # type: ignore[attr-defined]
    # Larger than what a thread keeps beside its arena (tcache).
    address = malloc(1 << 14)
    free(ctypes.c_void_p(address))
    return address < sbrk(0)


def _set_option(name: int, value: int) -> None:
    mallopt = _libc_function("mallopt")
    if mallopt is not None:
        mallopt(name, value)


def _libc_function(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
