"""What a subject may need in RAM, and whether the budget has room for it.

Owns bounds, admission, and what the C library keeps of freed memory. Promises an upper bound before
a step starts. Never loads anything.
"""

from tio_openneuro.ram.admission import (
    BASE_BYTES,
    THREAD_BYTES,
    Admission,
    Need,
    bound_subject,
    read_budget,
    refuse_subject,
)
from tio_openneuro.ram.allocator import (
    FreedMemory,
    give_back,
    in_main_arena,
    make_room,
)
from tio_openneuro.ram.machine import ResidentPeak, available_bytes

__all__ = [
    "BASE_BYTES",
    "THREAD_BYTES",
    "Admission",
    "FreedMemory",
    "Need",
    "ResidentPeak",
    "available_bytes",
    "bound_subject",
    "give_back",
    "in_main_arena",
    "make_room",
    "read_budget",
    "refuse_subject",
]
