"""The git-annex children that one process has for one clone: a pool for get, one for drop.

Owns their life: started when asked for, used again, killed with everything that they started once
nobody has asked for a while.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tio_openneuro.annex.environment import annex_environment
from tio_openneuro.annex.messages import complaints, parse_answer
from tio_openneuro.annex.processes import CommandError, Coprocess
from tio_openneuro.annex.transfer import FailedTransfer, Transfer, TransferRequest
from tio_openneuro.content import AnnexKey

_DROP_TIMEOUT_S = 60.0
_IDLE_S = 2.0


class AnnexChildren:
    """Coprocesses of one process. Safe to share by its threads, not by a forked process."""

    def __init__(self, clone: Path, remotes: Sequence[str]) -> None:
        """Start nothing yet.

        Args:
            clone: The clone's folder.
            remotes: Remotes that drops trust.
        """
        self._clone = clone
        self._remotes = tuple(remotes)
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, tuple[int, ...]], list[Transfer]] = {}
        self._transfers: set[Transfer] = set()
        self._drop_lock = threading.Lock()
        self._dropper: Coprocess | None = None
        self._watched = False
        self.closing = threading.Event()

    def get(self, request: TransferRequest) -> FailedTransfer | None:
        """Ask a coprocess once for a key; see :meth:`Transfer.get`."""
        with self._lock:
            idle = self._idle.setdefault((request.remote, request.keep_fds), [])
            transfer = idle.pop() if idle else None
        if transfer is None or not transfer.alive:
            self._end(transfer)
            transfer = Transfer(self._clone, request.remote, request.keep_fds)
            with self._lock:
                self._transfers.add(transfer)
            self._watch()
        answered = False
        try:
            failed = transfer.get(request)
            answered = True
        finally:
            with self._lock:
                kept = answered and transfer.alive and not self.closing.is_set()
                if kept:
                    idle.append(transfer)
            if not kept:
                self._end(transfer)
        return failed

    def drop(self, key: AnnexKey) -> str:
        """Ask once to drop a key, and return what git-annex complains of."""
        with self._drop_lock:
            dropper = self._dropper
            if dropper is None or not dropper.alive:
                dropper = self._dropper = self._start_dropper()
                self._watch()
            if self.closing.is_set():
                # Whoever closed may not have seen it, if it was started meanwhile.
                dropper.kill()
                return "the clone was closed"
            try:
                dropper.write_line(key.text.encode(errors="surrogateescape"))
                line = dropper.read_line(_DROP_TIMEOUT_S)
            except (CommandError, TimeoutError):
                line = None
            if line is None:
                dropper.kill()
                return dropper.stderr or "git-annex ended, or did not answer"
        return complaints(parse_answer(line))

    def close(self) -> None:
        """Kill all children; a request under way fails."""
        self.closing.set()
        with self._lock:
            transfers = tuple(self._transfers)
            self._idle.clear()
        for child in (*transfers, self._dropper):
            if child is not None:
                child.kill()

    def abandon(self) -> None:
        """Let go of children that belong to the process that this one was forked from."""
        # No lock: it may have been held by a thread that does not exist here.
        for child in (*self._transfers, self._dropper):
            if child is not None:
                child.abandon()

    def _end(self, transfer: Transfer | None) -> None:
        if transfer is not None:
            transfer.kill()
            with self._lock:
                self._transfers.discard(transfer)

    def _watch(self) -> None:
        """Begin to look for children that are not used any more, unless a thread does."""
        with self._lock:
            watched, self._watched = self._watched, True
        if not watched:
            name = "tio-openneuro-children"
            threading.Thread(target=self._end_unused, name=name, daemon=True).start()

    def _end_unused(self) -> None:
        """End children that are not used any more, until none is left."""
        while self._watched and not self.closing.wait(_IDLE_S / 2):
            since_s = time.monotonic() - _IDLE_S
            with self._drop_lock:
                if self._dropper is not None and self._dropper.used_s < since_s:
                    self._dropper.kill()
                    self._dropper = None
            with self._lock:
                # Each was put behind those that were used before it.
                lists = self._idle.values()
                unused = [
                    idle.pop(0) for idle in lists for _ in idle[:] if idle[0].used_s < since_s
                ]
            for transfer in unused:
                self._end(transfer)
            with self._lock:
                self._watched = bool(self._transfers or self._dropper)

    def _start_dropper(self) -> Coprocess:
        trusted = [f"remote.{name}.annex-trustlevel=trusted" for name in self._remotes]
        options = [word for setting in trusted for word in ("-c", setting)]
        return Coprocess(
            [
                *("git", *options, "-c", "annex.alwayscommit=false"),
                *("annex", "drop", "--batch-keys", "--json", "--json-error-messages"),
                *("--numcopies=1", "--mincopies=1"),
            ],
            cwd=self._clone,
            environment=annex_environment(),
        )
