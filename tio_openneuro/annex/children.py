"""What one process has for one clone: its downloads over HTTP, and its git-annex children.

Owns their life: made when asked for, used again, ended with everything that they started once
nobody has asked for a while.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tio_openneuro.annex.branch import PublicUrls
from tio_openneuro.annex.environment import annex_environment
from tio_openneuro.annex.messages import Failure, complaints, parse_answer
from tio_openneuro.annex.processes import GATE, CommandError, Coprocess, run
from tio_openneuro.annex.transfer import (
    OWN_PREFIX,
    NotOverHttpError,
    Transfer,
    TransferError,
    TransferRequest,
    Watch,
    Workplace,
)
from tio_openneuro.content import AnnexKey
from tio_openneuro.errors import FetchError

if TYPE_CHECKING:
    from tio_openneuro.annex.download import Downloads

_LOG = logging.getLogger(__name__)

_DROP_TIMEOUT_S = 60.0
_IDLE_S = 2.0


class AnnexChildren:
    """Downloads and coprocesses of one process. For its threads, not for a forked process."""

    def __init__(
        self,
        clone: Path,
        remotes: Sequence[str],
        count: Callable[[str], None],
        logs: dict[str, bytes],
        *,
        tmp: Path,
        beside: Path | None = None,
        uuids: Mapping[str, str] | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            clone: The clone's folder.
            remotes: Remotes that drops trust.
            count: Told that one more ``"http_files"`` came.
            logs: What is known of keys' versions.
            tmp: Where unfinished downloads lie.
            beside: Folder from which git-annex works on a clone of the user's; None: on ours.
            uuids: Ids of remotes that are perhaps not enabled in the clone.
        """
        self._beside = beside
        self._uuids = uuids or {}
        self._place: Workplace | None = None
        self._clone = clone
        self._remotes = tuple(remotes)
        self._count = count
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, tuple[int, ...]], list[Transfer]] = {}
        self._transfers: set[Transfer] = set()
        self._drop_lock = threading.Lock()
        self._dropper: Coprocess | None = None
        self._tmp = tmp
        self._public = PublicUrls(clone, logs, uuids)
        self._downloads: Downloads | None = None
        self._failed = False
        self._watched = False
        self.closing = threading.Event()

    def get(self, request: TransferRequest) -> TransferError | None:
        """Fetch a key once, over HTTP where that can be; None where it is there."""
        partial = self._tmp / f"{OWN_PREFIX}{request.key.name}"
        urls = self._public.of(request.key, request.remote)
        # What git-annex began, for us or for the user, it also ends.
        if urls and not self._failed and not (self._tmp / request.key.name).exists():
            watch = Watch(self._clone, request)
            try:
                failed = self._over_http().get(request.key, urls, partial, watch)
            except NotOverHttpError as error:
                _LOG.warning("Nothing more comes into %s over HTTP: %s", self._clone, error)
                self._failed = True
            else:
                if failed is None:
                    self._count("http_files")
                return failed
        with contextlib.suppress(OSError):
            partial.unlink()
        failed = self._through_git_annex(request)
        if urls and failed is not None and failed.why is Failure.NOT_RECORDED:
            # It is recorded: it was there just now, and somebody dropped it since.
            return TransferError(Failure.BUSY)
        return failed

    def head(self, key: AnnexKey, size_bytes: int, timeout_s: float) -> bytes:
        """Return the first bytes of a key over HTTP, unchecked; none where that cannot be."""
        for remote in self._remotes:
            urls, until_s = self._public.of(key, remote), time.monotonic() + timeout_s
            how = TransferRequest(key, remote, (), self.closing.is_set, timeout_s, until_s)
            if urls:
                return self._over_http().head(urls[0], size_bytes, Watch(self._clone, how))
        return b""

    def _over_http(self) -> Downloads:
        # urllib3 is imported when it is needed, and no process is forked meanwhile.
        with self._lock, GATE:
            if self._downloads is None:
                from tio_openneuro.annex.download import Downloads

                self._downloads = Downloads(self._tmp.parent.parent, self._public.config)
            return self._downloads

    def _through_git_annex(self, request: TransferRequest) -> TransferError | None:
        """Ask a coprocess once for a key; see :meth:`Transfer.get`."""
        with self._lock:
            idle = self._idle.setdefault((request.remote, request.keep_fds), [])
            transfer = idle.pop() if idle else None
        try:
            for folder in (self._tmp, self._tmp.with_name("objects")):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"Cannot fetch into {self._clone}: it cannot be written to ({error})."
            raise FetchError(message) from error
        if transfer is None or not transfer.alive:
            self._end(transfer)
            transfer = Transfer(self._workplace(), request.remote, request.keep_fds)
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
        """Drop a key, or ask git-annex once to, and return what it complains of."""
        if self._downloads is not None and self._downloads.drop(key):
            return ""
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

    def ask_remote(self, remote: str, keys: Sequence[AnnexKey], timeout_s: float) -> list[bool]:
        """Return of each key whether a remote answers that it has it."""
        place = self._workplace()
        said = run(
            ["git", *place.options, "annex", "checkpresentkey", "--batch", remote],
            cwd=place.folder,
            stdin="".join(f"{key.text}\n" for key in keys).encode(errors="surrogateescape"),
            timeout_s=timeout_s,
            environment=annex_environment(),
        )
        return [answer == b"1" for answer in said.split()]

    def close(self) -> None:
        """Kill all children; a request under way fails."""
        self.closing.set()
        with self._lock:
            transfers = tuple(self._transfers)
            self._idle.clear()
        for child in (*transfers, self._dropper):
            if child is not None:
                child.kill()
        if self._beside is not None:
            with contextlib.suppress(OSError):
                self._tmp.rmdir()

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

    def _workplace(self) -> Workplace:
        with self._lock:
            if self._place is None:
                place = Workplace(self._clone, self._clone)
                if self._beside is not None:
                    known = (self._clone, self._beside, self._tmp, self._uuids, self._remotes)
                    place = Workplace.beside(*known)
                place.merge()
                self._place = place
            return self._place

    def _start_dropper(self) -> Coprocess:
        place = self._workplace()
        trusted = [f"remote.{name}.annex-trustlevel=trusted" for name in self._remotes]
        options = [word for setting in trusted for word in ("-c", setting)]
        return Coprocess(
            [
                *("git", *place.options, *options, "-c", "annex.alwayscommit=false"),
                *("annex", "drop", "--batch-keys", "--json", "--json-error-messages"),
                *("--numcopies=1", "--mincopies=1"),
            ],
            cwd=place.folder,
            environment=annex_environment(),
        )
