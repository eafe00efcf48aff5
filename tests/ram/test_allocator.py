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
