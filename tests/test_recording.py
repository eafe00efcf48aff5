"""Seconds by what threads do, and readings that stay few."""

import threading
import time
import tracemalloc
from dataclasses import fields

import pytest

from tio_openneuro.disk import DiskStatistics
from tio_openneuro.queue.state import QueueStatistics, Reading
from tio_openneuro.recording import Activity, History, counted_by, doing


def test_each_second_of_a_thread_is_counted_once() -> None:
    """What is done inside of something else counts alone, also where it raises."""
    activity = Activity()
    begun_s = time.monotonic()
    with counted_by(activity), doing("content"):
        with doing("decode"):
            assert (activity.threads("content"), activity.threads("decode")) == (0, 1)
            while activity.seconds("decode") < 0.02:
                pass
        with pytest.raises(ValueError, match="cut"), doing("transform"):
            raise ValueError("cut")
        assert (activity.threads("content"), activity.threads("transform")) == (1, 0)
    whole_s = time.monotonic() - begun_s
    told = [activity.seconds(what) for what in ("content", "decode", "transform")]
    assert told[1] >= 0.02
    assert sum(told) <= whole_s
    assert activity.threads("content") == 0
    with doing("decode"):
        assert activity.threads("decode") == 0  # Nobody counts this thread any more.
    assert [activity.seconds(what) for what in ("content", "decode", "transform")] == told


def test_threads_count_apart() -> None:
    """Two threads that do the same are two, for as long as each does it."""
    activity, inside, end = Activity(), threading.Barrier(3), threading.Event()

    def work() -> None:
        with activity.doing("fetch"):
            inside.wait(30)
            end.wait(30)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    inside.wait(30)
    assert activity.threads("fetch") == 2
    end.set()
    for thread in threads:
        thread.join()
    assert activity.threads("fetch") == 0


def test_a_day_of_readings_is_a_few_megabytes() -> None:
    """Of two a second for a day, the first and the last stay, and 20 MB are far away."""
    count = 2 * 86_400
    history: History[Reading] = History(most=1024)
    tracemalloc.start()
    try:
        for number in range(count):
            queue = QueueStatistics(
                *(number + index for index, _ in enumerate(fields(QueueStatistics)))
            )
            disk = DiskStatistics(*(number + index for index in range(14)))
            history.add(Reading(float(number), queue, disk))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    readings = history.readings()
    times = [reading.time_s for reading in readings]
    assert 512 <= len(readings) <= 1024
    assert times == sorted(times)
    assert (times[0], times[-1]) == (0.0, count - 1.0)
    assert peak_bytes < 5_000_000
