"""Child processes: start, feed, watch and kill them. The only user of :mod:`subprocess`.

Every child leads a process group of its own, so that it ends together with whatever it started,
and runs in :func:`~tio_openneuro.annex.environment.child_environment`. Every wait has a deadline.
However this process ends, also by ``kill -9`` or a crash in native code, its children and whatever
they started end within seconds (:class:`Supervisor`; on Linux, where what they carry can be read).
Never prints, installs no signal handler, nor hands a child a descriptor that was not asked for.

The module-level state keeps forks apart from starts: a process that another thread forks meanwhile,
as loaders with workers do, would inherit the ends of pipes whose closing is waited for, and keep
them open as long as it lives. And it knows which children live.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from tio_openneuro.annex.environment import child_environment
from tio_openneuro.annex.messages import missing_program
from tio_openneuro.bounds import OUTPUT_BYTES, refuse_above
from tio_openneuro.errors import TioOpenNeuroError
from tio_openneuro.forks import at_fork

_READ_BYTES = 1 << 16
_STDERR_LINES = 40
_KILL_WAIT_S = 10.0
GATE = threading.Lock()

# It reads on until this process is gone. What was between its fork and its program in the first
# round carries the mark in the second.
_SUPERVISE = """
trap '' HUP INT QUIT TERM
read -r _
for _ in 1 2 3; do
    for file in $(grep -lsF "$1" /proc/[0-9]*/environ); do
        file=${file%/environ}
        kill -9 "${file#/proc/}"
    done
    sleep 0.5
done
"""


class CommandError(TioOpenNeuroError):
    """A child process failed, or passed its deadline."""

    def __init__(
        self, message: str = "", *, returncode: int | None = None, stderr: str = ""
    ) -> None:
        """Keep the message and what the child left.

        Args:
            message: The whole message.
            returncode: Exit status; None where the child was killed at its deadline.
            stderr: What the child wrote to standard error.
        """
        super().__init__(message)
        self.returncode = returncode
        self.stderr = stderr


class MissingProgramError(TioOpenNeuroError):
    """A program that this library needs is not installed."""

    @classmethod
    def of(cls, program: str) -> MissingProgramError:
        """Return the error that names a program and how to install it."""
        return cls(
            f"Cannot run {program}: it is not installed, or not on the path. Install it with your "
            f"system's packages (git-annex and DataLad also with 'pip install {program}')."
        )


class Supervisor:
    """What ends this process's children, however it ends itself: a shell that reads a pipe.

    The pipe ends with the process, since only that holds its other end: forked processes close it,
    and get a shell of their own with their first child. The shell then kills whatever carries the
    process's mark in its environment, in whichever process group, however often it was forked. It
    is there while a child is: started with the first, ended after the last, and replaced where it
    was killed. Measured on 2026-11-30: 1.3 ms of processor time where a program runs alone, none
    beside another child; 0.26 MB of PSS while it is there.

    Rejected: ``PR_SET_PDEATHSIG``, which follows the thread; a list of numbers, in which a child is
    missing in the instant after its start, and which others may bear once it has ended; one shell
    for each child; a process of Python's, which takes longer to start than git.
    """

    def __init__(self) -> None:
        """Start nothing."""
        self.mark = os.urandom(16).hex()
        self._children: set[object] = set()
        self._shell: subprocess.Popen[bytes] | None = None
        at_fork(
            "gate",
            self,
            before=lambda _: GATE.acquire(),
            in_parent=lambda _: GATE.release(),
            in_child=Supervisor._after_fork,
        )

    def _after_fork(self) -> None:
        """Let go of what is the parent's."""
        if self._shell is not None:
            _close(self._shell.stdin)
            self._shell.returncode = 0
        self.mark, self._children, self._shell = os.urandom(16).hex(), set(), None
        GATE.release()

    def start(self, arguments: Sequence[str], how: Mapping[str, Any]) -> subprocess.Popen[bytes]:
        """Start a child that ends with this process; :meth:`let_go` must be told of its end."""
        with GATE:
            if self._shell is None or self._shell.poll() is not None:
                self._start_shell()
            try:
                child = subprocess.Popen(arguments, bufsize=0, **how)
            except (KeyboardInterrupt, SystemExit):
                # There may be a child that nobody knows: the shell stays.
                self._children.add(self)
                raise
            self._children.add(child)
            return child

    def _start_shell(self) -> None:
        if sys.platform == "win32":
            return
        if self._shell is not None:
            self._shell.communicate()
        with contextlib.suppress(OSError):  # There may be none on this system.
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", _SUPERVISE, "sh", self.mark],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={},
                start_new_session=True,
            )

    def let_go(self, child: subprocess.Popen[bytes] | None) -> None:
        """Forget a child that has ended, and end the shell after the last one."""
        with GATE:
            self._children.discard(child)
            if self._children or self._shell is None:
                return
            shell, self._shell = self._shell, None
            shell.kill()
        shell.communicate()


_SUPERVISOR = Supervisor()


def _start(
    arguments: Sequence[str],
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    keep_fds: tuple[int, ...] = (),
    stdin: IO[bytes] | int = subprocess.PIPE,
    stderr: IO[bytes] | int = subprocess.PIPE,
) -> subprocess.Popen[bytes]:
    """Start a child that leads its own process group, with unbuffered pipes."""
    environment = child_environment() if environment is None else environment
    how: dict[str, Any] = {"start_new_session": True, "pass_fds": keep_fds}
    if sys.platform == "win32":
        how = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    how |= {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": stderr, "cwd": cwd}
    how["env"] = {**environment, "TIO_OPENNEURO_CHILD": _SUPERVISOR.mark}
    try:
        return _SUPERVISOR.start(arguments, how)
    except OSError as error:
        _SUPERVISOR.let_go(None)
        if not isinstance(error, FileNotFoundError):
            raise
        if cwd is not None and not cwd.is_dir():
            message = f"Cannot run {arguments[0]} in {cwd}: there is no such folder."
            raise CommandError(message) from error
        raise MissingProgramError.of(arguments[0]) from error


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Return whether a child has ended, where possible without collecting it.

    Until it is collected no other group gets its number: what it leaves behind can be killed.
    """
    if sys.platform == "linux" and process.returncode is None:
        with contextlib.suppress(ChildProcessError):
            options = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, process.pid, options) is not None
    return process.poll() is not None


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a child and its process group, and wait until the child is gone."""
    if sys.platform == "win32":
        if process.poll() is None:
            subprocess.run(
                ["taskkill", "/T", "/F", "/PID", str(process.pid)],
                check=False,
                capture_output=True,
                timeout=_KILL_WAIT_S,
            )
            process.kill()
    elif process.returncode is None:
        # Not collected yet: the group's number cannot have been given to another one. git may have
        # been killed, while the git-annex that it started goes on.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_KILL_WAIT_S)
        _SUPERVISOR.let_go(process)


def _close(*pipes: IO[bytes] | None) -> None:
    for pipe in pipes:
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


@contextlib.contextmanager
def reading(
    arguments: Sequence[str],
    *,
    stdin: bytes = b"",
    timeout_s: float = 120.0,
    **where: Any,  # noqa: ANN401 - two words
) -> Iterator[io.BufferedReader[io.FileIO]]:
    """Run a program and yield its standard output, to be read to its end inside the block.

    Killed with its process group at the deadline, and when an exception passes through: whoever
    reads says by one that it is enough.

    Args:
        arguments: The program and its arguments; no shell is involved.
        stdin: What the child reads.
        timeout_s: Deadline in seconds.
        where: ``cwd``, the folder to run in, and ``environment``, all of it; by default the
            current one, and :func:`child_environment`.

    Raises:
        MissingProgramError: The program is not installed, or git-annex or DataLad, which it needs.
        CommandError: It failed, or passed its deadline.
    """
    until_s = time.monotonic() + timeout_s
    # From a file and not a pipe, whose other end a process forked meanwhile would keep open; to
    # one, so that nobody needs to read it meanwhile.
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as words:
        source.write(stdin)
        source.seek(0)
        process = _start(arguments, stdin=source, stderr=words, **where)
        timer = threading.Timer(timeout_s, kill_group, [process])
        timer.daemon = True
        timer.start()
        try:
            with io.BufferedReader(cast("io.FileIO", process.stdout), _READ_BYTES) as output:
                yield output
                process.wait()
        finally:
            timer.cancel()
            kill_group(process)
        shown = " ".join(arguments[:6])
        if process.returncode and time.monotonic() >= until_s:
            raise CommandError(f"Cannot finish '{shown}': no end after {timeout_s:g} s; killed.")
        if process.returncode:
            words.seek(max(words.seek(0, os.SEEK_END) - _READ_BYTES, 0))
            said = words.read().decode(errors="replace").strip()
            if missing := missing_program(said):
                raise MissingProgramError.of(missing)
            message = f"Cannot run '{shown}': it exited with {process.returncode}: {said[-2000:]}"
            raise CommandError(message, returncode=process.returncode, stderr=said)


def run(arguments: Sequence[str], **how: Any) -> bytes:  # noqa: ANN401 - as that one takes them
    """Run a program to its end, as :func:`reading` does, and return its standard output.

    Raises:
        UnsafeDatasetError: It wrote more than is believed; it was killed.
    """
    with reading(arguments, **how) as output:
        said = output.read(OUTPUT_BYTES + 1)
        where = f"what '{' '.join(arguments[:2])}' writes in {how.get('cwd')}"
        refuse_above(OUTPUT_BYTES, len(said), where, "bytes")
    return said


class Coprocess:
    """A long-lived child that is asked and answers line by line.

    One thread at a time writes and reads. The pipes are unbuffered and read by daemon threads,
    so that a process forked meanwhile inherits no held lock; it must :meth:`abandon` the copy.

    Attributes:
        used_s: When it was last waited for, in ``time.monotonic()``'s seconds.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        keep_fds: tuple[int, ...] = (),
    ) -> None:
        """Start the child.

        Args:
            arguments: The program and its arguments.
            cwd: Folder to run in; default: the current one.
            environment: The whole environment; default: :func:`child_environment`.
            keep_fds: Descriptors that the child inherits (ignored on Windows).

        Raises:
            MissingProgramError: The program is not installed.
        """
        self._program = arguments[0]
        self._process = _start(arguments, cwd=cwd, environment=environment, keep_fds=keep_fds)
        self.used_s = time.monotonic()
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._stderr: deque[bytes] = deque(maxlen=_STDERR_LINES)
        self._ended = False
        self._threads = (
            threading.Thread(target=self._read_stdout, name="coprocess-out", daemon=True),
            threading.Thread(target=self._read_stderr, name="coprocess-err", daemon=True),
        )
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        """Process id of the child, which is also its group's."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the child runs and its output is open."""
        return not self._ended and not has_ended(self._process)

    @property
    def stderr(self) -> str:
        """The last lines that the child wrote to standard error."""
        return b"".join(self._stderr).decode(errors="replace").strip()

    def write_line(self, line: bytes) -> None:
        """Send one line; the newline is added.

        Raises:
            CommandError: The child is gone.
        """
        assert self._process.stdin is not None  # noqa: S101 - opened as a pipe in _start
        rest = memoryview(line + b"\n")
        try:
            while rest:
                rest = rest[self._process.stdin.write(rest) or 0 :]
        except (OSError, ValueError) as error:
            message = f"Cannot ask '{self._program}' (process {self.pid}): it has ended."
            raise CommandError(message, stderr=self.stderr) from error

    def read_line(self, timeout_s: float) -> bytes | None:
        """Return the next line without its newline, or None at the end of the output.

        Args:
            timeout_s: Longest wait in seconds.

        Raises:
            TimeoutError: No line came in that time; the child still runs.
        """
        self.used_s = time.monotonic()
        if self._ended:
            return None
        try:
            line = self._lines.get(timeout=max(timeout_s, 0.0))
        except queue.Empty:
            raise TimeoutError from None
        self._ended = line is None
        return line

    def unread(self) -> Iterator[bytes]:
        """Yield the lines that came, and were not read when the child was killed."""
        with contextlib.suppress(queue.Empty):
            yield from iter(self._lines.get_nowait, None)

    def finish(self, timeout_s: float) -> bool:
        """Close the child's input and wait for its end; kill it at the deadline.

        Returns:
            Whether it ended by itself.
        """
        _close(self._process.stdin)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        ended = self._process.returncode is not None
        self.kill()
        return ended

    def kill(self) -> None:
        """Kill the child and its process group, and close the pipes. Idempotent."""
        kill_group(self._process)
        for thread in self._threads:
            # A grandchild that left the group may hold the pipe open: the thread is a daemon.
            thread.join(1.0)
        self._ended = True
        _close(self._process.stdin)

    def abandon(self) -> None:
        """Close this process's ends of the pipes and leave the child alone.

        For a forked process, whose copies of the pipes would keep the child waiting.
        """
        self._ended = True
        _close(self._process.stdin, self._process.stdout, self._process.stderr)

    def _read_stdout(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 - opened as a pipe in _start
        rest = b""
        # Closed by its reader, however late that is: nobody else knows when it is read no more.
        with contextlib.suppress(OSError, ValueError), self._process.stdout as pipe:
            while block := pipe.read(_READ_BYTES):
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    self._lines.put(line.removesuffix(b"\r"))
        if rest:
            self._lines.put(rest)
        self._lines.put(None)

    def _read_stderr(self) -> None:
        assert self._process.stderr is not None  # noqa: S101 - opened as a pipe in _start
        with contextlib.suppress(OSError, ValueError), self._process.stderr as pipe:
            while block := pipe.read(_READ_BYTES):
                self._stderr.append(block[-2000:])
