"""What closes when nobody does: outside of the collection, once, in its own process alone."""

import gc
import logging
import os
import threading

import pytest

from tio_openneuro.closing import Closing


class Owner:
    """Something that knows itself, so that a collection frees it."""

    def __init__(self, close):
        """Be closed by a function."""
        self.itself = self
        self.closing = Closing(self, close)


def test_a_collection_inside_a_lock_closes_what_needs_the_lock():
    """The closing waits for the lock in a thread of its own, and the collection goes on."""
    lock, closed = threading.Lock(), threading.Event()

    def close():
        with lock:
            closed.set()

    with lock:
        Owner(close)
        gc.collect()
        assert not closed.is_set()
    assert closed.wait(10)


def test_it_closes_once_by_hand_or_by_itself():
    """A second call does nothing, nor does the owner's end."""
    calls = []
    owner = Owner(lambda: calls.append(1))
    owner.closing()
    owner.closing()
    del owner
    gc.collect()
    other = threading.Event()
    Owner(other.set)
    gc.collect()
    assert other.wait(10)
    assert calls == [1]


def test_an_interrupted_closing_is_made_up_for():
    """Ctrl-C comes through, and the next call closes."""
    calls = []

    def close():
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    owner = Owner(close)
    with pytest.raises(KeyboardInterrupt):
        owner.closing()
    owner.closing()
    owner.closing()
    assert calls == [1, 1]


def test_what_goes_wrong_is_logged_and_not_raised(caplog):
    """Closing never raises; an error is said once."""

    def close():
        raise OSError("gone")

    owner = Owner(close)
    with caplog.at_level(logging.ERROR):
        owner.closing()
        owner.closing()
    assert [record.exc_info[1].args for record in caplog.records] == [("gone",)]


def test_a_child_does_not_close_what_is_its_parents():
    """Neither by hand nor by a collection."""
    read, write = os.pipe()
    owner = Owner(lambda: os.write(write, b"closed"))
    pid = os.fork()
    if pid == 0:
        owner.closing()
        del owner
        gc.collect()
        threading.Event().wait(0.2)
        os._exit(0)
    os.waitpid(pid, 0)
    owner.closing()
    assert os.read(read, 20) == b"closed"
    os.close(write)
    os.close(read)
