"""The threads of a queue, by themselves."""

import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tio_openneuro.workers import Workers


def count_os_threads():
    """Return the threads of this process, those of C++ libraries too."""
    return len(list(Path("/proc/self/task").iterdir()))


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
    assert count_os_threads() == before + 2 * 2
    assert torch.get_num_threads() == threads
    end.set()
    workers.join()
    assert not workers.alive
    deadline_s = time.monotonic() + 30
    while count_os_threads() > before and time.monotonic() < deadline_s:
        threading.Event().wait(0.01)  # a thread's team ends a little after it
    assert count_os_threads() == before
