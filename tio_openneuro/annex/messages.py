"""git-annex's words, what they mean to us, and how often each is tried again.

One table, tried in order. Reads the clock and the system's randomness, nothing else.

git-annex has no error codes; its messages were provoked with git-annex 10.20261026 against the
loopback OpenNeuro. What no row matches is :attr:`Failure.UNKNOWN`, retried and reported whole.
"""

from __future__ import annotations

import random
import re
import time
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from tio_openneuro.errors import ContentMismatchError, FetchError, RemoteUnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Policy:
    """What is done about a class of failure.

    Attributes:
        error: What is raised in the end.
        attempts: Tries at one remote in all, unless bytes arrive in between.
        backoff_s: Pause before the second try in seconds; it doubles.
        longest_backoff_s: Up to this.
        cause: The likely cause, as a clause.
        advice: What to do next, as a sentence.
    """

    error: type[FetchError]
    attempts: int
    backoff_s: float
    cause: str
    advice: str
    longest_backoff_s: float = 30.0


_PROGRESS_BYTES = 1 << 20
_LATER = "Try again later, or look at the network."
_SKIP = "Skip this file, or ask the dataset's owners."


class Failure(Enum):
    """Why content did not arrive; the value is the policy."""

    BUSY = Policy(
        FetchError,
        attempts=1000,
        backoff_s=0.1,
        cause="another process transfers the same content",
        advice="Wait for it, or end it.",
        longest_backoff_s=1.0,
    )
    STALLED = Policy(
        RemoteUnavailableError,
        attempts=4,
        backoff_s=0.5,
        cause="the remote sent nothing more, or next to nothing",
        advice=_LATER,
    )
    NO_VERSION = Policy(
        FetchError,
        attempts=1,
        backoff_s=0.0,
        cause="the dataset records no S3 version of this file, so that it cannot be asked for",
        advice=_SKIP,
    )
    NOT_RECORDED = Policy(
        FetchError,
        attempts=1,
        backoff_s=0.0,
        cause="the dataset does not record that this remote has it",
        advice="Name a remote that has it with remotes=, or skip this file.",
    )
    NOT_USABLE = Policy(
        RemoteUnavailableError,
        attempts=1,
        backoff_s=0.0,
        cause="git-annex does not let the remote be used here",
        advice="Follow what git-annex says, in the clone.",
    )
    NOT_FOUND = Policy(
        RemoteUnavailableError,
        attempts=2,
        backoff_s=0.5,
        cause="the remote does not have it (404)",
        advice=_SKIP,
    )
    FORBIDDEN = Policy(
        RemoteUnavailableError,
        attempts=2,
        backoff_s=0.5,
        cause="the remote refuses access (403)",
        advice="Look whether the dataset is still public; skip this file if not.",
    )
    THROTTLED = Policy(
        RemoteUnavailableError,
        attempts=8,
        backoff_s=0.5,
        cause="the remote is overloaded",
        advice="Try again later, or with fewer jobs.",
    )
    CONNECTION = Policy(
        RemoteUnavailableError,
        attempts=6,
        backoff_s=0.5,
        cause="the connection failed",
        advice=_LATER,
    )
    BAD_RANGE = Policy(
        RemoteUnavailableError,
        attempts=3,
        backoff_s=0.5,
        cause="the remote does not send the part of the file that was asked for (416)",
        advice=_LATER,
    )
    CORRUPT = Policy(
        ContentMismatchError,
        attempts=3,
        backoff_s=0.2,
        cause="what arrived has another size or checksum than the annex key says",
        advice="Report it to the dataset's owners, or skip this file.",
    )
    DISK_FULL = Policy(
        FetchError,
        attempts=4,
        backoff_s=1.0,
        cause="the disk is full",
        advice="Free space on the clone's disk, or lower disk_budget.",
    )
    READ_ONLY = Policy(
        FetchError,
        attempts=1,
        backoff_s=0.0,
        cause="the clone cannot be written to",
        advice="Use a clone of your own, or give the accession.",
    )
    DIED = Policy(
        FetchError,
        attempts=3,
        backoff_s=0.2,
        cause="git-annex ended in the middle",
        advice="Run 'git annex fsck --fast' in the clone.",
    )
    UNKNOWN = Policy(
        FetchError,
        attempts=3,
        backoff_s=0.5,
        cause="git-annex failed, for a reason that is not known here",
        advice="Run 'git annex get --key' in the clone to see more.",
    )


_TABLE: tuple[tuple[str, Failure], ...] = (
    (r"transfer already in progress|unable to take transfer lock", Failure.BUSY),
    (r"no S3 version ID is recorded", Failure.NO_VERSION),
    (r"cannot be used since it's not verified", Failure.NOT_USABLE),
    (r"[Cc]onfiguration does not allow accessing", Failure.NOT_USABLE),
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
_COMPILED = tuple((re.compile(pattern), failure) for pattern, failure in _TABLE)


def classify(messages: Sequence[str]) -> Failure:
    """Return the class of failure that git-annex's messages tell of.

    Args:
        messages: The ``error-messages`` of its JSON answer, or lines of its standard error.

    Example:
        >>> classify(["download failed: Service Unavailable"])
        <Failure.THROTTLED: ...>
    """
    said = "\n".join(messages)
    return next((failure for row, failure in _COMPILED if row.search(said)), Failure.UNKNOWN)


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
