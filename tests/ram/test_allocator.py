"""What the C library keeps of freed memory, in a process of its own: its options are global."""

import json
import subprocess
import sys

import pytest

from tio_openneuro.ram.allocator import FreedMemory, bound_free_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's options, /proc")

_PROGRAM = """
import json, resource
from pathlib import Path
import torch
from tio_openneuro.ram import allocator
from tio_openneuro.ram.admission import Admission

MIB = 2**20

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

def faults_of_volumes():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    volumes = [torch.ones(40 * MIB, dtype=torch.uint8) for _ in range(4)]
    del volumes
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.ones(1).add_(1)
base = resident()
told = {}
def tell(step):
    told[step] = (resident() - base) // MIB

told["faults at first"] = faults_of_volumes()
tell("by default")
allocator.give_back_at_once()
told["faults at once"] = faults_of_volumes()
tell("at once")
allocator.reuse_free_memory(1000 * MIB)
faults_of_volumes()
tell("kept")
told["faults again"] = min(faults_of_volumes() for _ in range(5))
admission = Admission(1000 * MIB, base_bytes=0)
admission.charge(900 * MIB)
admission.release(900 * MIB)
told["fits beside what is free"] = allocator.make_room(admission, 300 * MIB)
tell("beside")
told["fits once it is back"] = allocator.make_room(admission, 990 * MIB)
tell("back")
told["never fits"] = allocator.make_room(admission, 1001 * MIB)
faults_of_volumes()
tell("kept again")
allocator.bound_free_memory()
tell("at the end")
print(json.dumps(told))
"""


def test_freed_memory_is_used_again_until_there_is_no_room_or_an_end():
    """Volumes are mapped once while a queue fills; what is free goes where it stands in the way."""
    run = subprocess.run([sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE, check=True)
    told = json.loads(run.stdout)
    volumes_mib = 150
    assert told["by default"] < volumes_mib / 3
    assert told["kept"] >= volumes_mib
    assert told["faults at first"] > 30_000
    assert told["faults again"] < 3_000
    assert told["fits beside what is free"]
    assert told["beside"] >= volumes_mib
    assert told["fits once it is back"]
    assert told["back"] < volumes_mib / 3
    assert not told["never fits"]
    assert told["kept again"] >= volumes_mib
    assert told["at once"] < volumes_mib / 3
    assert told["faults at once"] > 30_000
    assert told["at the end"] < volumes_mib / 3


def test_freed_memory_is_used_again_where_the_budget_has_room_for_its_pieces():
    """Two threads and a window of patches must fit with half as much again, and a guess is one."""
    freed = FreedMemory(900, 2, 4)
    assert freed.bound(201, 50, known=False) == 201
    try:
        assert freed.bound(200, 50, known=True) == 300  # 4 * 50 + 2 * 300 + 100 = 900
        assert freed.bound(100, 50, known=True) == 150
        # From now on it is not, but pieces of what was lie in between.
        assert freed.bound(201, 50, known=True) == 301
        assert freed.bound(500, 50, known=True) == 700
        assert freed.bound(900, 50, known=True) == 900
    finally:
        bound_free_memory()


_TWO_QUEUES = """
import ctypes, sys
import torch, torchio as tio
import tio_openneuro as tno

class Mallinfo2(ctypes.Structure):
    _fields_ = [("numbers", ctypes.c_size_t * 10)]

def mapped_bytes():
    read = ctypes.CDLL(None).mallinfo2
    read.restype = Mallinfo2
    return read().numbers[4]

def tell(total):
    # Never touched, and more than what is free anywhere: one large piece, and many small ones.
    told = []
    for size in (total, 2**22):
        before = mapped_bytes()
        pieces = [torch.empty(size, dtype=torch.uint8) for _ in range(total // size)]
        told.append(mapped_bytes() - before > total // 4)
        del pieces
    return tuple(told)

def make_queue(budget):
    side = 160
    images = [tio.ScalarImage(tensor=torch.zeros(1, side, side, side)) for _ in range(2)]
    dataset = tio.SubjectsDataset([tio.Subject(t1=image) for image in images])
    return tno.BudgetedQueue(dataset, 2, 1, tio.UniformSampler(8), num_workers=1, ram_budget=budget)

queues = [make_queue(budget) for budget in sys.argv[1:]]
for queue in queues:
    list(queue)
print(tell(2**30))
queues[0].close()
print(tell(3 * 2**30))
queues[1].close()
print(tell(9 * 2**30))
"""
_REUSED, _GIVEN_BACK, _BOUND = "(False, False)", "(True, True)", "(True, False)"


@pytest.mark.parametrize(
    ("budgets", "expected"),
    [
        (["3 GB", "3 GB"], [_REUSED, _REUSED, _BOUND]),
        (["110 MB", "110 MB"], [_GIVEN_BACK, _GIVEN_BACK, _BOUND]),
        (["3 GB", "110 MB"], [_GIVEN_BACK, _GIVEN_BACK, _BOUND]),
        (["110 MB", "3 GB"], [_GIVEN_BACK, _REUSED, _BOUND]),
    ],
)
def test_what_a_queue_relies_on_holds_until_it_is_closed(budgets, expected):
    """Closing another queue changes nothing for it; the last one leaves nothing that it set."""
    command = [sys.executable, "-c", _TWO_QUEUES, *budgets]
    run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    assert run.stdout.splitlines() == expected


def test_memory_is_given_back_at_once_while_one_of_several_needs_that():
    """Whichever decides last; and who is gone without an end needs nothing any more."""
    roomy, tight = FreedMemory(1000, 1, 0), FreedMemory(100, 1, 0)
    roomy.bound(100, 0, known=True)
    assert FreedMemory._needs() == [1000]
    tight.bound(100, 0, known=True)
    roomy.begin()
    assert FreedMemory._needs() == [0, 1000]
    tight.end()
    assert FreedMemory._needs() == [1000]
    del roomy
    assert FreedMemory._needs() == []
    bound_free_memory()
