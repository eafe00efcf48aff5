"""What git and git-annex say, what it means to us, and how often each is tried again.

The only place that reads their words: tables, each tried in order. Reads the clock and the
system's randomness, nothing else.

Neither has error codes; git-annex's messages were provoked with git-annex 10.20261026 against the
loopback OpenNeuro. What no row matches is tried again as unknown, and reported whole.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from tio_openneuro.errors import (
    ContentMismatchError,
    FetchError,
    NotAnAnnexError,
    RemoteUnavailableError,
    TioOpenNeuroError,
)

_Meaning = TypeVar("_Meaning")


@dataclass(frozen=True, slots=True)
class Policy:
    """What is done about a class of failure.

    Attributes:
        error: What is raised in the end.
        cause: The likely cause, as a clause.
        advice: What to do next, as a sentence.
        attempts: Tries at one remote in all, unless bytes arrive in between.
        backoff_s: Pause before the second try in seconds; it doubles.
        longest_backoff_s: Up to this.
    """

    error: type[TioOpenNeuroError]
    cause: str
    advice: str
    attempts: int = 1
    backoff_s: float = 0.5
    longest_backoff_s: float = 30.0


_PROGRESS_BYTES = 1 << 20
_LATER = "Try again later, or look at the network."
_SKIP = "Skip this file, or ask the dataset's owners."


class Failure(Enum):
    """Why a clone, or content, did not arrive; the value is the policy."""

    # Content, by git-annex.
    BUSY = Policy(
        FetchError,
        "another process transfers the same content",
        "Wait for it, or end it.",
        attempts=1000,
        backoff_s=0.1,
        longest_backoff_s=1.0,
    )
    STALLED = Policy(
        RemoteUnavailableError, "the remote sent nothing more, or next to nothing", _LATER, 4
    )
    NO_VERSION = Policy(
        FetchError,
        "the dataset records no S3 version of this file, so that it cannot be asked for",
        _SKIP,
    )
    NOT_RECORDED = Policy(
        FetchError,
        "the dataset does not record that this remote has it",
        "Name a remote that has it with remotes=, or skip this file.",
    )
    NOT_USABLE = Policy(
        RemoteUnavailableError,
        "git-annex does not let the remote be used here",
        "Follow what git-annex says, in the clone.",
    )
    NOT_FOUND = Policy(RemoteUnavailableError, "the remote does not have it (404)", _SKIP, 2)
    FORBIDDEN = Policy(
        RemoteUnavailableError,
        "the remote refuses access (403)",
        "Look whether the dataset is still public; skip this file if not.",
        attempts=2,
    )
    THROTTLED = Policy(
        RemoteUnavailableError,
        "the remote is overloaded",
        "Try again later, or with fewer jobs.",
        attempts=8,
    )
    CONNECTION = Policy(RemoteUnavailableError, "the connection failed", _LATER, 6)
    BAD_RANGE = Policy(
        RemoteUnavailableError,
        "the remote does not send the part of the file that was asked for (416)",
        _LATER,
        attempts=3,
    )
    CORRUPT = Policy(
        ContentMismatchError,
        "what arrived has another size or checksum than the annex key says",
        "Report it to the dataset's owners, or skip this file.",
        attempts=3,
        backoff_s=0.2,
    )
    DISK_FULL = Policy(
        FetchError,
        "the disk is full",
        "Free space on the clone's disk, or lower disk_budget.",
        attempts=4,
        backoff_s=1.0,
    )
    READ_ONLY = Policy(
        FetchError,
        "the clone cannot be written to",
        "Use a clone of your own, or give the accession.",
    )
    DIED = Policy(
        FetchError,
        "git-annex ended in the middle",
        "Run 'git annex fsck --fast' in the clone.",
        attempts=3,
        backoff_s=0.2,
    )
    UNKNOWN = Policy(
        FetchError,
        "git-annex failed, for a reason that is not known here",
        "Run 'git annex get --key' in the clone to see more.",
        attempts=3,
    )
    # A clone and its new versions, by git.
    NO_REPOSITORY = Policy(
        NotAnAnnexError,
        "there is no git repository",
        "Give an accession like 'ds004199', a git URL, or the path of a clone.",
    )
    NO_DATASET = Policy(
        RemoteUnavailableError,
        "there is no such dataset, or it is not public (404)",
        "Look at the accession on openneuro.org.",
    )
    UNREACHABLE = Policy(
        RemoteUnavailableError,
        "the server cannot be reached",
        "Look at the network, and try again; a dataset that was cloned before works without.",
    )
    GIT = Policy(RemoteUnavailableError, "git failed, for a reason that is not known here", _LATER)

    def error(
        self, act: str, said: str, *, program: str = "git-annex", key: str = ""
    ) -> TioOpenNeuroError:
        """Return what is to be raised.

        Args:
            act: What could not be done, ``"clone ds004199"``.
            said: The program's own words, or an empty string.
            program: Who said them.
            key: Name of the annex key concerned.
        """
        quoted = f" {program} said: {said[:500]}" if said else ""
        message = f"Cannot {act}: {self.value.cause}.{quoted} {self.value.advice}"
        return self.value.error(message, key=key)


_ANNEX = (
    (r"transfer already in progress|unable to take transfer lock", Failure.BUSY),
    (r"no S3 version ID is recorded", Failure.NO_VERSION),
    (
        r"cannot be used since it's not verified|[Cc]onfiguration does not allow accessing",
        Failure.NOT_USABLE,
    ),
    (
        r"not enough free space|No space left|disk full|ResourceExhausted|resource exhausted",
        Failure.DISK_FULL,
    ),
    (r"Verification of content failed|incorrect size|checksum|bad content", Failure.CORRUPT),
    (r"Read-only file system|[Pp]ermission denied|readonly database", Failure.READ_ONLY),
    (r"\b416\b|Range Not Satisfiable", Failure.BAD_RANGE),
    (r"\b(404|[Nn]ot ?[Ff]ound|NoSuchKey|NoSuchVersion)\b", Failure.NOT_FOUND),
    (r"\b(403|401|Forbidden|AccessDenied)\b", Failure.FORBIDDEN),
    (
        r"\b(429|500|502|503|504|SlowDown|Service Unavailable|Too Many Requests)\b",
        Failure.THROTTLED,
    ),
    (
        (
            r"[Cc]onnection|[Tt]imed? ?out|getAddrInfo|resolve|NoResponseDataReceived|"
            r"ResponseTimeout|TlsException|TLS|IncompleteHeaders|InvalidChunk|"
            r"ResponseBodyTooShort|Network|unreachable|reset by peer|does not exist"
        ),
        Failure.CONNECTION,
    ),
    (
        r"unable to access|not available|not configured|unable to use special remote",
        Failure.NOT_USABLE,
    ),
)
_GIT = (
    (r"not appear to be a git repository|not valid: is this a git repo", Failure.NO_REPOSITORY),
    (
        (
            r"not found|could not read Username|Authentication failed|does not exist|"
            r"returned error: 40[134]|[Pp]ermission denied"
        ),
        Failure.NO_DATASET,
    ),
    (
        (
            r"[Cc]ould not resolve|[Ff]ailed to connect|Connection|timed out|unable to access|"
            r"[Cc]ould not read from remote|returned error: 5\d\d|early EOF|hung up"
        ),
        Failure.UNREACHABLE,
    ),
)
_MISSING = (
    (r"'annex' is not a git command", "git-annex"),
    (r"No module named 'datalad'", "datalad"),
)
_VERIFY = re.compile(r"verifyremote \S+ --safe (\S+)")


def _first(table: Sequence[tuple[str, _Meaning]], said: str, otherwise: _Meaning) -> _Meaning:
    """Return the meaning of the first row that matches."""
    return next((meaning for pattern, meaning in table if re.search(pattern, said)), otherwise)


def why_not_fetched(said: str, otherwise: Failure = Failure.UNKNOWN) -> Failure:
    """Return the class of failure that git-annex's words tell of.

    Args:
        said: Error messages of its JSON answer, or its standard error.
        otherwise: What words mean that are not known.

    Example:
        >>> why_not_fetched("download failed: Service Unavailable")
        <Failure.THROTTLED: ...>
    """
    return _first(_ANNEX, said, otherwise)


def git_error(act: str, said: str) -> TioOpenNeuroError:
    """Return the error that git's words mean, where a clone or new versions did not arrive.

    Args:
        act: What could not be done, ``"clone ds004199"``.
        said: Its standard error.
    """
    telling = [line for line in said.splitlines() if "fatal" in line or "error" in line.lower()]
    short = " ".join(telling or said.splitlines()[-3:])
    return _first(_GIT, said, Failure.GIT).error(act, short, program="git")


def missing_program(said: str) -> str:
    """Return the program that a child says is not installed; empty where it says no such thing."""
    return _first(_MISSING, said, "")


def verification(said: str) -> str:
    """Return the number by which ``enableremote`` wants the remote verified; empty without one."""
    found = _VERIFY.search(said)
    return found[1] if found else ""


def parse_answer(line: bytes) -> dict[str, Any]:
    """Return git-annex's answer; a line that is no JSON object tells nothing."""
    try:
        answer = json.loads(line)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def complaints(answer: dict[str, Any]) -> str:
    """Return git-annex's own words about what failed."""
    said = [*answer.get("error-messages", ()), answer.get("note") or ""]
    return " ".join(str(message) for message in said).strip()


class Retries:
    """Counts the tries at one remote, by class of failure, and says how long to pause."""

    def __init__(self, deadline_s: float) -> None:
        """Begin to count.

        Args:
            deadline_s: When no more is tried, in ``time.monotonic()``'s seconds.
        """
        self._deadline_s = deadline_s
        self._tries: dict[Failure, int] = {}
        self._partial_bytes = 0
        # Not the global generator: that one is the consumer's.
        self._random = random.SystemRandom()

    def pause_s(self, failure: Failure, partial_bytes: int) -> float | None:
        """Return seconds to wait before the next try, or None where there is none.

        Args:
            failure: How the last try ended.
            partial_bytes: What has arrived so far; where it grew, the count begins anew.
        """
        if partial_bytes >= self._partial_bytes + _PROGRESS_BYTES:
            self._partial_bytes = partial_bytes
            self._tries.clear()
        tries = self._tries.get(failure, 0) + 1
        self._tries[failure] = tries
        policy: Policy = failure.value
        if tries >= policy.attempts:
            return None
        longest_s = min(policy.backoff_s * 2 ** min(tries - 1, 20), policy.longest_backoff_s)
        pause_s = longest_s * self._random.uniform(0.5, 1.0)
        return pause_s if time.monotonic() + pause_s < self._deadline_s else None
