"""What git and git-annex say, what it means to us, and how often each is tried again.

The only place that reads their words. Reads the clock and the system's randomness, nothing else.

Neither has error codes; git-annex's messages were provoked with git-annex 10.20261026 against the
loopback OpenNeuro. What no words match is tried again as unknown, and reported whole.
"""

from __future__ import annotations

import json
import random
import re
import time
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

from tio_openneuro.errors import (
    ContentMismatchError,
    FetchError,
    NotAnAnnexError,
    RemoteUnavailableError,
    TioOpenNeuroError,
)

_PROGRESS_BYTES = 1 << 20
_LATER = "Try again later, or look at the network."
_SKIP = "Skip this file, or ask the dataset's owners."
_MISSING = {"git-annex": "'annex' is not a git command", "datalad": "No module named 'datalad'"}
# A number is a status only where HTTP says it: it may be a size, a path or a request's id.
_STATUS = r"(?:^|HTTP/[\d.]+ |error: |[Ss]tatus ?[Cc]ode\W{1,4})"
_VERIFY = re.compile(r"verifyremote \S+ --safe (\S+)")


@dataclass(frozen=True, slots=True)
class Policy:
    """How a class of failure is told, and what is done about it.

    Attributes:
        error: What is raised in the end.
        cause: The likely cause, as a clause.
        advice: What to do next, as a sentence.
        words: A regular expression for the words that tell of it; empty where none do.
        attempts: Tries at one remote in all, unless bytes arrive in between.
        backoff_s: Pause before the second try in seconds; it doubles.
        longest_backoff_s: Up to this.
    """

    error: type[TioOpenNeuroError]
    cause: str
    advice: str
    words: str = ""
    attempts: int = 1
    backoff_s: float = 0.5
    longest_backoff_s: float = 30.0


class _Told(Enum):
    """Classes of failure, told by what a program says; the values are policies."""

    @classmethod
    def of(cls, said: str, otherwise: Self) -> Self:
        """Return the first class of which these words tell.

        Args:
            said: Error messages of a JSON answer, or standard error.
            otherwise: What words mean that are not known.

        Example:
            >>> Failure.of("download failed: Service Unavailable", Failure.UNKNOWN)
            <Failure.THROTTLED: ...>
        """
        known = (each for each in cls if each.value.words)
        return next((each for each in known if re.search(each.value.words, said)), otherwise)

    def error(self, act: str, program: str, said: str, *, key: str = "") -> TioOpenNeuroError:
        """Return what is to be raised.

        Args:
            act: What could not be done, ``"clone ds004199"``.
            program: Who failed.
            said: The program's own words, or an empty string.
            key: Name of the annex key concerned.
        """
        policy: Policy = self.value
        quoted = f" {program} said: {said[:500]}" if said else ""
        return policy.error(f"Cannot {act}: {policy.cause}.{quoted} {policy.advice}", key=key)


class Failure(_Told):
    """Why content did not arrive, from what git-annex says."""

    BUSY = Policy(
        FetchError,
        "another process transfers the same content",
        "Wait for it, or end it.",
        r"transfer already in progress|unable to take transfer lock",
        attempts=1000,
        backoff_s=0.1,
        longest_backoff_s=1.0,
    )
    NO_VERSION = Policy(
        FetchError,
        "the dataset records no S3 version of this file, so that it cannot be asked for",
        _SKIP,
        r"no S3 version ID is recorded",
    )
    NOT_ALLOWED = Policy(
        RemoteUnavailableError,
        "git-annex does not let the remote be used here",
        "Follow what git-annex says, in the clone.",
        r"cannot be used since it's not verified|[Cc]onfiguration does not allow accessing",
    )
    DISK_FULL = Policy(
        FetchError,
        "the disk is full",
        "Free space on the clone's disk, or lower disk_budget.",
        r"not enough free space|No space left|disk full|quota|[Rr]esource ?[Ee]xhausted",
        attempts=4,
        backoff_s=1.0,
    )
    CORRUPT = Policy(
        ContentMismatchError,
        "what arrived has another size or checksum than the annex key says",
        "Report it to the dataset's owners, or skip this file.",
        r"Verification of content failed|incorrect size|checksum|bad content|died of signal 25",
        attempts=3,
        backoff_s=0.2,
    )
    SPOILT = Policy(
        ContentMismatchError,
        "a copy that is not what the annex key says lies where it belongs",
        "Run 'git annex fsck' in the clone, which puts it aside.",
    )
    READ_ONLY = Policy(
        FetchError,
        "the clone cannot be written to",
        "Use a clone of your own, or give the accession.",
        r"Read-only file system|[Pp]ermission denied|readonly database",
    )
    BAD_RANGE = Policy(
        RemoteUnavailableError,
        "the remote does not send the part of the file that was asked for (416)",
        _LATER,
        rf"{_STATUS}416\b|Range Not Satisfiable",
        attempts=3,
    )
    NOT_FOUND = Policy(
        RemoteUnavailableError,
        "the remote does not have it (404)",
        _SKIP,
        rf"{_STATUS}404\b|(?<!command )\b[Nn]ot ?[Ff]ound\b|\bNoSuch(Key|Version)\b",
        attempts=2,
    )
    FORBIDDEN = Policy(
        RemoteUnavailableError,
        "the remote refuses access (403)",
        "Look whether the dataset is still public; skip this file if not.",
        rf"{_STATUS}40[13]\b|\b(Forbidden|AccessDenied)\b",
        attempts=2,
    )
    THROTTLED = Policy(
        RemoteUnavailableError,
        "the remote is overloaded",
        "Try again later, or with fewer jobs.",
        rf"{_STATUS}(429|50[0234])\b|\b(SlowDown|Service Unavailable|Too Many Requests)\b",
        attempts=8,
    )
    CONNECTION = Policy(
        RemoteUnavailableError,
        "the connection failed",
        _LATER,
        r"[Cc]onnection|[Tt]imed? ?out|getAddrInfo|resolve|NoResponseDataReceived|"
        r"ResponseTimeout|TlsException|TLS|IncompleteHeaders|InvalidChunk|"
        r"ResponseBodyTooShort|Network|unreachable|reset by peer|does not exist",
        attempts=6,
    )
    NOT_USABLE = Policy(
        RemoteUnavailableError,
        "git-annex cannot use the remote in this clone",
        "Look at 'git annex info' of the remote, in the clone.",
        r"unable to access|not available|not configured|unable to use special remote",
    )
    REDIRECTED = Policy(
        RemoteUnavailableError, "the remote sends its readers to a host that is not its own", _LATER
    )
    STALLED = Policy(
        RemoteUnavailableError,
        "the remote sent nothing more, or next to nothing",
        _LATER,
        attempts=4,
    )
    NOT_RECORDED = Policy(
        FetchError,
        "the dataset does not record that this remote has it",
        "Name a remote that has it with remotes=, or skip this file.",
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
        "it failed, for a reason that is not known here",
        "Run 'git annex get --key' in the clone to see more.",
        attempts=3,
    )


class CloneFailure(_Told):
    """Why a clone, or its new versions, did not arrive, from what git says."""

    NO_REPOSITORY = Policy(
        NotAnAnnexError,
        "there is no git repository",
        "Give an accession like 'ds004199', a git URL, or the path of a clone.",
        r"not appear to be a git repository|not valid: is this a git repo",
    )
    NO_DATASET = Policy(
        RemoteUnavailableError,
        "there is no such dataset, or it is not public (404)",
        "Look at the accession on openneuro.org.",
        r"not found|could not read Username|Authentication failed|does not exist|"
        r"returned error: 40[134]|[Pp]ermission denied",
    )
    UNREACHABLE = Policy(
        RemoteUnavailableError,
        "the server cannot be reached",
        "Look at the network, and try again; a dataset that was cloned before works without.",
        r"[Cc]ould not resolve|[Ff]ailed to connect|Connection|timed out|unable to access|"
        r"[Cc]ould not read from remote|returned error: 5\d\d|early EOF|hung up",
    )
    UNKNOWN = Policy(
        RemoteUnavailableError, "git failed, for a reason that is not known here", _LATER
    )


def clone_error(act: str, said: str) -> TioOpenNeuroError:
    """Return the error that git's words mean, where a clone or new versions did not arrive.

    Args:
        act: What could not be done, ``"clone ds004199"``.
        said: Its standard error.
    """
    telling = [line for line in said.splitlines() if "fatal" in line or "error" in line.lower()]
    short = " ".join(telling or said.splitlines()[-3:])
    return CloneFailure.of(said, CloneFailure.UNKNOWN).error(act, "git", short)


def missing_program(said: str) -> str:
    """Return the program that a child says is not installed; empty where it says no such thing."""
    return next((program for program, words in _MISSING.items() if words in said), "")


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
