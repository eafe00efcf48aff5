"""What changes in this process or in another one, and waiting for it.

Owns the one number that every wait for room or content looks at. No wait outlasts its deadline,
and dead owners are reaped meanwhile.
"""

from __future__ import annotations

import random
import threading
import time

from tio_openneuro.closing import wait_in_steps
from tio_openneuro.ledger.ledger import Ledger

Moment = tuple[int, int]

_REAP_S = 1.0
_FEW_OWNERS = 8
_SHORTEST_PAUSE_S = 0.002
_LONGEST_PAUSE_S = 0.25
_PAUSE_SHARE = 8


def growing_pause_s(waited_s: float) -> float:
    """Return how long to wait before looking again at what other processes change.

    What they do is found out late by an eighth of the wait at most, and a long wait costs next to
    no processor time: four looks a second.

    Args:
        waited_s: Seconds since the wait began.
    """
    return min(max(_SHORTEST_PAUSE_S, waited_s / _PAUSE_SHARE), _LONGEST_PAUSE_S)


class Changes:
    """A number that rises whenever something changes in this process, beside the ledger's own."""

    def __init__(self, ledger: Ledger) -> None:
        """Start from zero.

        Args:
            ledger: Tells of other processes' changes.
        """
        self.value = 0
        self._ledger = ledger
        self._condition = threading.Condition()
        self._reaped_s = time.monotonic()

    def notify(self) -> None:
        """Wake everybody who waits in this process."""
        with self._condition:
            self.value += 1
            self._condition.notify_all()

    def wait_here(self, seen: int, timeout_s: float) -> bool:
        """Return whether the number differs from the one seen, waiting for it at most so long."""
        with self._condition:

            def differs(timeout_s: float) -> bool:
                return self._condition.wait_for(lambda: self.value != seen, timeout_s)

            return wait_in_steps(differs, timeout_s)

    def moment(self) -> Moment:
        """Return what changes whenever anything does, here or in another process."""
        return self.value, self._ledger.changes()

    def wait(self, since: Moment, deadline_s: float) -> None:
        """Wait until something differs from then; reap dead owners meanwhile."""
        begun_s = time.monotonic()
        while (now_s := time.monotonic()) < deadline_s:
            if now_s - self._reaped_s > _REAP_S:
                self._reaped_s = now_s
                # Of many owners each second others, by a chance that is not the user's.
                others = self._ledger.other_owners()
                few = random.SystemRandom().sample(others, min(len(others), _FEW_OWNERS))
                if self._ledger.reap(few):
                    return
            # Within the process a notification wakes us; other processes can only be looked at,
            # the more rarely the longer it takes.
            pause_s = min(growing_pause_s(now_s - begun_s), deadline_s - now_s)
            if self.wait_here(since[0], pause_s) or self._ledger.changes() != since[1]:
                return
