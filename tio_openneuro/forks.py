"""What happens at a fork: one registry, one fixed order, and no lock of ours held in the child.

A fork can come at any time, from any thread of the user's. Before it, the gate closes first and
the ledger last; after it, in parent and child, they open in reverse. Owners are held weakly: who
is gone is not called. A descriptor that holds a lock is opened here, and closed in the child, which
would hold the lock as long as it lives, also after its parent. The only user of
``os.register_at_fork``, and the one piece of module-level state beside the gate itself.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

Place = Literal["gate", "queue", "engine", "ledger"]
_ORDER: tuple[Place, ...] = ("gate", "queue", "engine", "ledger")
_T = TypeVar("_T")
_Act = Callable[[Any], object]
_Entry = tuple["weakref.ref[Any]", _Act, _Act, _Act]

# Held from before a fork until after it: who is registered meanwhile is not called halfway.
_MUTEX = threading.Lock()
_ENTRIES: dict[Place, list[_Entry]] = {place: [] for place in _ORDER}
_FORKING: list[tuple[Any, _Act, _Act]] = []
_APART: set[int] = set()


def _nothing(_: object) -> None:
    """Do nothing."""


def at_fork(
    place: Place,
    owner: _T,
    *,
    before: Callable[[_T], object] = _nothing,
    in_parent: Callable[[_T], object] = _nothing,
    in_child: Callable[[_T], object] = _nothing,
) -> None:
    """Call these with an owner around every fork, as long as it lives.

    Args:
        place: Its place in the order; those of one place come in the order of their registration.
        owner: What they act on; held weakly.
        before: Called before the fork.
        in_parent: Called after it in the process that forked.
        in_child: Called after it in the new process, which has the forking thread alone.
    """
    with _MUTEX:
        alive = [entry for entry in _ENTRIES[place] if entry[0]() is not None]
        _ENTRIES[place] = [*alive, (weakref.ref(owner), before, in_parent, in_child)]


def open_apart(path: Path, flags: int, mode: int = 0o600) -> int:
    """Open a file to lock it, so that no forked process ever holds the lock; return it."""
    with _MUTEX:
        descriptor = os.open(path, flags, mode)
        _APART.add(descriptor)
    return descriptor


def close_apart(descriptor: int) -> None:
    """Close what :func:`open_apart` opened in this process, unless it is closed."""
    with _MUTEX:
        if descriptor in _APART:
            _APART.remove(descriptor)
            os.close(descriptor)


def _before() -> None:
    _MUTEX.acquire()
    for place in _ORDER:
        for reference, before, in_parent, in_child in _ENTRIES[place]:
            owner = reference()
            if owner is not None:
                before(owner)
                _FORKING.append((owner, in_parent, in_child))


def _in_parent() -> None:
    while _FORKING:
        owner, act, _ = _FORKING.pop()
        act(owner)
    _MUTEX.release()


def _in_child() -> None:
    while _APART:
        os.close(_APART.pop())
    while _FORKING:
        owner, _, act = _FORKING.pop()
        act(owner)
    _MUTEX.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
