"""The git-annex children that one process has for one clone: a pool for get, one for drop.

Owns their life: started when asked for, used again, killed with everything that they started.
"""

from __future__ import annotations

import contextlib
import json
import threading
from typing import TYPE_CHECKING

from tio_openneuro.annex.processes import CommandError, Coprocess
from tio_openneuro.annex.transfer import Outcome, Transfer, annex_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

_DROP_TIMEOUT_S = 60.0


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
        self.closing = threading.Event()

    def get(
        self,
        key_text: str,
        size_bytes: int | None,
        *,
        remote: str,
        keep_fds: tuple[int, ...],
        stopped: Callable[[], bool],
        stall_timeout_s: float,
        deadline_s: float,
    ) -> Outcome:
        """Ask a coprocess once for a key; see :meth:`Transfer.get`."""
        with self._borrowed(remote, keep_fds) as transfer:
            return transfer.get(
                key_text,
                size_bytes,
                stopped=stopped,
                stall_timeout_s=stall_timeout_s,
                deadline_s=deadline_s,
            )

    def drop(self, key_text: str) -> str:
        """Ask once to drop a key, and return what git-annex complains of."""
        with self._drop_lock:
            if self.closing.is_set():
                return "the clone was closed"
            if self._dropper is None or not self._dropper.alive:
                self._dropper = self._start_dropper()
            dropper = self._dropper
            if self.closing.is_set():
                # Closed while it was started: whoever closed may not have seen it.
                dropper.kill()
                return "the clone was closed"
            try:
                dropper.write_line(key_text.encode(errors="surrogateescape"))
                line = dropper.read_line(_DROP_TIMEOUT_S)
            except (CommandError, TimeoutError):
                line = None
            if line is None:
                dropper.kill()
                self._dropper = None
                return dropper.stderr or "git-annex ended, or did not answer"
        answer = json.loads(line) if line else {}
        return " ".join(str(message) for message in answer.get("error-messages", ()))

    def close(self) -> None:
        """Kill all children; a request under way fails."""
        self.closing.set()
        with self._lock:
            transfers = tuple(self._transfers)
            self._idle.clear()
        for transfer in transfers:
            transfer.kill()
        dropper = self._dropper
        if dropper is not None:
            dropper.kill()

    def abandon(self) -> None:
        """Let go of children that belong to the process that this one was forked from."""
        # No lock: it may have been held by a thread that does not exist here.
        for transfer in tuple(self._transfers):
            transfer.abandon()
        if self._dropper is not None:
            self._dropper.abandon()

    @contextlib.contextmanager
    def _borrowed(self, remote: str, keep_fds: tuple[int, ...]) -> Iterator[Transfer]:
        """Give out an idle coprocess or a new one; take it back if it lives."""
        slot = (remote, keep_fds)
        with self._lock:
            idle = self._idle.get(slot, [])
            transfer = idle.pop() if idle else None
        if transfer is not None and not transfer.alive:
            self._forget(transfer)
            transfer = None
        if transfer is None:
            transfer = Transfer(self._clone, remote, keep_fds=keep_fds)
            with self._lock:
                self._transfers.add(transfer)
        kept = False
        try:
            yield transfer
            with self._lock:
                kept = transfer.alive and not self.closing.is_set()
                if kept:
                    self._idle.setdefault(slot, []).append(transfer)
        finally:
            if not kept:
                self._forget(transfer)

    def _forget(self, transfer: Transfer) -> None:
        transfer.kill()
        with self._lock:
            self._transfers.discard(transfer)

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
