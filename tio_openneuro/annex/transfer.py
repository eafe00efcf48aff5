"""One ``git annex get`` coprocess, asked for one key at a time and watched while it answers.

Owns the watchdog: a child that stands still, or stands because the disk is full, is killed with
its process group; what it downloaded stays as a partial, which the next one resumes. Never
retries: that is :mod:`tio_openneuro.annex`'s.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tio_openneuro.annex.branch import git_folder
from tio_openneuro.annex.environment import child_environment, scripts_folder
from tio_openneuro.annex.messages import Failure, classify
from tio_openneuro.annex.processes import CommandError, Coprocess
from tio_openneuro.errors import FetchError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_POLL_S = 0.1
_SPACE_CHECK_S = 1.0
_SPACE_LEFT_BYTES = 1 << 20
_HASHED_BYTES_PER_S = 1e8
_CRAWL_BYTES_PER_S = 1024.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request for content ended.

    Attributes:
        failure: Why it failed; None where git-annex says that it is there.
        said: git-annex's own words.
    """

    failure: Failure | None
    said: str = ""


def annex_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a coprocess, in which git finds git-annex's binary itself.

    What the wheel puts into the scripts folder is a Python script that starts the binary. That
    start costs a coprocess as much again as git-annex's own.

    Args:
        extra: Variables that go over all others.
    """
    environment = child_environment(extra)
    found = shutil.which("git-annex", path=environment["PATH"])
    wheel = importlib.util.find_spec("git_annex")
    if found is None or wheel is None or wheel.origin is None:
        return environment
    folder = Path(wheel.origin).parent
    binary = shutil.which("git-annex", path=str(folder))
    if binary is not None and Path(found).parent == Path(scripts_folder()):
        environment["PATH"] = os.pathsep.join((str(folder), environment["PATH"]))
        # As the script does.
        if (folder / "magic.mgc").exists():
            environment["MAGIC"] = str(folder / "magic.mgc")
    return environment


class Transfer:
    """A coprocess that gets keys from one remote. Used by one thread at a time."""

    def __init__(self, clone: Path, remote: str, *, keep_fds: tuple[int, ...] = ()) -> None:
        """Start the child.

        Args:
            clone: The clone's folder.
            remote: Name of the annex remote.
            keep_fds: Descriptors that the child inherits.

        Raises:
            FetchError: The clone cannot be written to.
        """
        self._clone = clone
        own = (git_folder(clone) or clone) / "annex" / "tio-openneuro"
        try:
            own.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"Cannot fetch into {clone}: it cannot be written to ({error})."
            raise FetchError(message) from error
        self._child = Coprocess(
            [
                "git",
                # With an index and databases of our own git-annex knows of no unlocked file in
                # the work tree, and does not put a second copy of the content there.
                *("-c", f"annex.dbdir={own}"),
                *("-c", "annex.verify=true", "-c", f"remote.{remote}.annex-verify=true"),
                # The floor of free space is the engine's; git-annex's own reserve is 100 MB.
                *("-c", "annex.diskreserve=0"),
                # In a user's clone: no commit of ours, none in the middle of an epoch.
                *("-c", "annex.alwayscommit=false"),
                # It leaves an orphan that holds the transfer lock: the watchdog is here.
                *("-c", "annex.stalldetection=false"),
                *("annex", "get", "--batch-keys", "--from", remote),
                *("--json", "--json-progress", "--json-error-messages"),
            ],
            cwd=clone,
            environment=annex_environment({"GIT_INDEX_FILE": str(own / "index")}),
            keep_fds=keep_fds,
        )

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._child.alive

    def kill(self) -> None:
        """Kill the child and all that it started."""
        self._child.kill()

    def abandon(self) -> None:
        """Leave the child to the process that this one was forked from."""
        self._child.abandon()

    def get(
        self,
        key_text: str,
        size_bytes: int | None,
        *,
        stopped: Callable[[], bool],
        stall_timeout_s: float,
        deadline_s: float,
    ) -> Outcome:
        """Ask for one key and wait for the end; the child is dead after a failure to answer.

        Args:
            key_text: The key as git-annex writes it.
            size_bytes: Its size, where known.
            stopped: Polled; once true, the child is killed.
            stall_timeout_s: Seconds in which something must arrive.
            deadline_s: When to give up, in ``time.monotonic()``'s seconds.
        """
        try:
            self._child.write_line(key_text.encode(errors="surrogateescape"))
        except CommandError as error:
            self.kill()
            return Outcome(classify([error.stderr]) if error.stderr else Failure.DIED, error.stderr)
        watch = _Watch(self._clone, stall_timeout_s, size_bytes or 0)
        while True:
            try:
                line = self._child.read_line(_POLL_S)
            except TimeoutError:
                line = b"{}"
            if line is None:
                self.kill()
                said = self._child.stderr
                failure = classify([said]) if said else Failure.DIED
                return Outcome(Failure.DIED if failure is Failure.UNKNOWN else failure, said)
            if not line:
                return Outcome(Failure.NOT_RECORDED)
            answer = _parse(line)
            if "success" in answer:
                return self._finished(answer, key_text)
            watch.note(answer.get("byte-progress"))
            reason = watch.complaint(deadline_s)
            if reason is not None or stopped():
                self.kill()
                return reason or Outcome(Failure.STALLED, "cancelled")

    def _finished(self, answer: dict[str, Any], key_text: str) -> Outcome:
        if answer.get("key") not in {None, key_text}:
            self.kill()
            return Outcome(Failure.DIED, f"it answered for {answer.get('key')} instead")
        if answer["success"]:
            return Outcome(None)
        messages = [str(message) for message in answer.get("error-messages", [])]
        if answer.get("note"):
            messages.append(str(answer["note"]))
        return Outcome(classify(messages), " ".join(messages))


class _Watch:
    """Tells a transfer that goes on from one that stands."""

    def __init__(self, folder: Path, stall_timeout_s: float, size_bytes: int) -> None:
        self._folder = folder
        # Before a resumed download, and after any, git-annex hashes in silence.
        self._stall_s = stall_timeout_s + size_bytes / _HASHED_BYTES_PER_S
        self._bytes = 0
        self._since_s = time.monotonic()
        self._window_bytes = 0
        self._space_checked_s = self._since_s

    def note(self, progress: object) -> None:
        """Take in the bytes that a progress line tells of."""
        if isinstance(progress, int):
            self._bytes = max(self._bytes, progress)
        now_s = time.monotonic()
        # A crawl is as good as a stall: each window must bring a little.
        if self._bytes - self._window_bytes >= _CRAWL_BYTES_PER_S * self._stall_s:
            self._window_bytes = self._bytes
            self._since_s = now_s

    def complaint(self, deadline_s: float) -> Outcome | None:
        """Return why to give up, or None."""
        now_s = time.monotonic()
        if now_s - max(self._since_s, self._space_checked_s) >= _SPACE_CHECK_S:
            self._space_checked_s = now_s
            # git-annex hangs on a full disk and says nothing.
            with contextlib.suppress(OSError):
                free_bytes = shutil.disk_usage(self._folder).free
                if free_bytes < _SPACE_LEFT_BYTES:
                    return Outcome(Failure.DISK_FULL, f"{free_bytes} bytes are free")
        if now_s - self._since_s >= self._stall_s:
            silent_s = now_s - self._since_s
            got_bytes = self._bytes - self._window_bytes
            return Outcome(Failure.STALLED, f"{got_bytes} bytes in {silent_s:.0f} s")
        if now_s >= deadline_s:
            return Outcome(Failure.STALLED, "it is past its deadline")
        return None


def _parse(line: bytes) -> dict[str, Any]:
    """Return an answer; a line that is no JSON object tells nothing."""
    try:
        answer = json.loads(line)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}
