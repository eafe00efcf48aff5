"""The gate around ITK's files: a fork waits for others, never for itself, and leaves it open.

Beside real reads it is tried in ``tests/queue/test_forks.py``.
"""

import os
import threading

import numpy as np
import pytest
import SimpleITK
from forking import await_children

from tio_openneuro.volumes import install_reading_gate, reading_gate

install_reading_gate()


@pytest.fixture
def path(tmp_path):
    """Return a small image's file."""
    path = tmp_path / "image.nii"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.zeros((4, 4, 4), np.int16)), path)
    return path


def fork_and_read(path):
    """Fork; return the child, which reads."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            SimpleITK.ReadImage(path)
            status = 0
        finally:
            os._exit(status)
    return pid


def test_whoever_forks_inside_waits_for_nobody(path):
    """A callback of a read may fork; its child is inside too, and may leave and read."""
    inside = reading_gate._gated(fork_and_read)
    assert await_children([inside(path), inside(path)]) == (0, 0)
    assert SimpleITK.ReadImage(path).GetSize() == (4, 4, 4)


def test_a_fork_waits_for_all_others_and_keeps_new_ones_out(path):
    """Who is inside may read within; who comes waits until the fork is over."""
    events, entered, leave = [], threading.Event(), threading.Event()
    install_reading_gate()

    def stay():
        entered.set()
        leave.wait(10)
        SimpleITK.ReadImage(path)
        events.append("left")

    def come():
        SimpleITK.ReadImage(path)
        events.append("came")

    def fork():
        child = fork_and_read(path)
        events.append("forked")
        assert await_children([child]) == (0, 0)

    threads = [threading.Thread(target=reading_gate._gated(stay)), threading.Thread(target=fork)]
    threads[0].start()
    assert entered.wait(10)
    threads[1].start()
    while reading_gate._GATE._forking is None:
        threading.Event().wait(0.01)
    threads.append(threading.Thread(target=come))
    threads[2].start()
    leave.set()
    for thread in threads:
        thread.join(10)
    assert events[0] == "left"
    assert sorted(events[1:]) == ["came", "forked"]


def test_a_fork_does_not_wait_for_ever(path, monkeypatch, caplog):
    """A read that hangs, on a file system that does not answer, is named, and the fork goes on."""
    monkeypatch.setattr(reading_gate, "_LONGEST_WAIT_S", 0.1)
    entered, leave = threading.Event(), threading.Event()

    def stay():
        entered.set()
        leave.wait(10)

    thread = threading.Thread(target=reading_gate._gated(stay))
    thread.start()
    assert entered.wait(10)
    assert await_children([fork_and_read(path)]) == (0, 0)
    leave.set()
    thread.join()
    assert "1 threads have read images for" in caplog.text


def test_an_error_inside_leaves_the_gate_open(path):
    """Also an interrupt does."""
    with pytest.raises(RuntimeError, match="does not exist"):
        SimpleITK.ReadImage(path.with_name("none.nii"))

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reading_gate._gated(interrupt)()
    assert await_children([fork_and_read(path)]) == (0, 0)
    assert not reading_gate._GATE._inside


def test_it_is_installed_once():
    """Calls are led through one gate, however often it is installed."""
    before = SimpleITK.ImageFileReader.Execute
    install_reading_gate()
    assert SimpleITK.ImageFileReader.Execute is before
