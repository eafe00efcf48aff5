"""What two readings say: rates, and what holds a training up."""

from dataclasses import replace

import pytest

from tio_openneuro.disk import DiskStatistics
from tio_openneuro.queue.state import QueueStatistics, Reading
from tio_openneuro.watch.gauge import between

BEFORE = Reading(100.0, QueueStatistics(*19 * [7]), DiskStatistics(*14 * [5]))


def after(seconds: float, *, fetched_bytes: int = 0, **more: float) -> Reading:
    """Return a later reading in which some of the queue's counts have grown."""
    grown = {name: 7 + count for name, count in more.items()}
    disk = replace(BEFORE.disk, fetched_bytes=5 + fetched_bytes)
    return Reading(100.0 + seconds, replace(BEFORE.queue, **grown), disk)


@pytest.mark.parametrize(
    ("grown", "word"),
    [
        ({"wait_s": 0.4, "content_s": 20.0}, "consumer"),
        ({"wait_s": 5.0, "content_s": 12.0, "decode_s": 4.0, "sample_s": 4.0}, "link"),
        ({"wait_s": 5.0, "content_s": 6.0, "decode_s": 4.0, "sample_s": 4.0}, "decoding"),
        ({"wait_s": 5.0, "transform_s": 9.0}, "decoding"),
    ],
)
def test_what_took_longest_holds_a_waiting_training_up(grown: dict[str, float], word: str) -> None:
    """The consumer where it hardly waits; else content, or what is made of it."""
    assert between(BEFORE, after(10.0, **grown)).held_up_by == word


def test_rates_are_those_between_the_readings() -> None:
    """Counts of before do not matter; a second reading at the same instant is no error."""
    moment = between(BEFORE, after(10.0, patches=25, wait_s=2.5, fetched_bytes=1000))
    assert moment.patches_per_s == pytest.approx(2.5)
    assert moment.wait_share == pytest.approx(0.25)
    assert moment.link_bytes_per_s == pytest.approx(100)
    assert between(BEFORE, BEFORE).patches_per_s == 0.0
