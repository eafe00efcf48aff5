"""The threads of a queue, by themselves."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tio_openneuro.queue.threads import Workers

_PROGRAM = """
import threading
from tio_openneuro.ram import allocator
from tio_openneuro.queue.threads import Workers

meet, end = threading.Barrier(8), threading.Event()

def hold():
    bytearray(1 << 14)
    meet.wait(60)
    end.wait(60)

others = [threading.Thread(target=hold) for _ in range(7)]
for other in others:
    other.start()
meet.wait(60)
allocator.reuse_free_memory(1 << 30)
found, told = [], threading.Semaphore(0)

def work():
    found.append(allocator.in_main_arena())
    told.release()
    end.wait(60)

workers = Workers(3, work)
workers.start()
for _ in range(3):
    told.acquire(timeout=60)
print(found, threading.active_count())
end.set()
workers.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's arenas")
def test_workers_use_the_main_arena_whatever_others_threads_use():
    """Beside seven threads with arenas of their own, all workers get the main one; no more stay."""
    run = subprocess.run([sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE, check=True)
    assert run.stdout.split(b"] ") == [b"[True, True, True", b"11\n"]


def count_os_threads():
    """Return the threads of this process, those of C++ libraries too."""
    return len(list(Path("/proc/self/task").iterdir()))


def settles_at(count):
    """Return whether there are that many threads, once those that end have ended."""
    deadline_s = time.monotonic() + 30
    while count_os_threads() != count and time.monotonic() < deadline_s:
        threading.Event().wait(0.01)
    return count_os_threads() == count


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp, /proc")
def test_each_worker_counts_in_libgomp_and_the_users_threads_stay():
    """A team of two was begun by each worker, which then works alone; nothing stays at the end."""
    torch.ones(1 << 20).add_(1)  # the user's own team is there
    threads = torch.get_num_threads()
    torch.set_num_threads(threads)  # so is a pool that torch makes when this is first called
    before = count_os_threads()
    counts, meet, end = [], threading.Barrier(3), threading.Event()

    def work():
        counts.append(torch.get_num_threads())
        meet.wait(60)
        end.wait(60)

    workers = Workers(2, work)
    workers.start()
    meet.wait(60)
    assert counts == [1, 1]
    assert settles_at(before + 2 * 2)
    assert torch.get_num_threads() == threads
    end.set()
    workers.join()
    assert not workers.alive
    assert settles_at(before)
