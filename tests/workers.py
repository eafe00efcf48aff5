"""Processes of the tests: an observer that trusts nobody, and workers that can be killed.

``Observer`` sums what lies in clones. ``Nursery`` has imported everything once and forks workers
from there, since an import takes seconds; each has the environment of the test that asks for it.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import psutil

from tio_openneuro.content import ContentRepo

_OBSERVE = """
import os, sys, select
def scan():
    found = {}
    for base in sys.argv[1:]:
        stack = [base]
        while stack:
            try:
                entries = list(os.scandir(stack.pop()))
            except FileNotFoundError:
                continue
            for entry in entries:
                try:
                    if entry.is_dir(follow_symlinks=False):
                        stack.append(entry.path)
                    else:
                        info = entry.stat(follow_symlinks=False)
                        found[info.st_ino] = info.st_size
                except FileNotFoundError:
                    pass
    return found
peak, before = 0, {}
print('ready', flush=True)
while True:
    now = scan()
    # What both scans saw was there at once in between, and a download only grows.
    peak = max(peak, sum(min(size, now[ino]) for ino, size in before.items() if ino in now))
    before = now
    if select.select([sys.stdin], [], [], 0.0005)[0]:
        break
print(peak, flush=True)
"""


class Observer:
    """A process that watches the bytes of content in clones; context manager."""

    def __init__(self, *repos: ContentRepo) -> None:
        """Watch the content of these clones, whole and partial, and not git's metadata."""
        annexes = [repo.path / ".git" / "annex" for repo in repos]
        self._folders = [str(annex / name) for annex in annexes for name in ("objects", "tmp")]
        self.peak_bytes = 0

    def __enter__(self) -> Self:
        """Begin."""
        self._process = subprocess.Popen(
            [sys.executable, "-c", _OBSERVE, *self._folders],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        """End, and keep the peak: the most bytes that were certainly held at one instant."""
        out, _ = self._process.communicate("end\n", timeout=30)
        self.peak_bytes = int(out)


_NURSERY = """
import os, pickle, signal, sys, traceback
sys.path[:0] = pickle.load(sys.stdin.buffer)
import tio_openneuro.dataset, tio_openneuro.queue
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    try:
        environment, function, args, result = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)
        status = 1
        os.environ.clear()
        os.environ.update(environment)
        try:
            found = function(*args)
            with open(result, 'wb') as file:
                pickle.dump(found, file)
            status = 0
        except BaseException:
            # torch's handler raises again for each worker that ends.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            with open(result + '.error', 'w') as file:
                traceback.print_exc(file=file)
        finally:
            os._exit(status)
    print(pid, flush=True)
"""


class Worker:
    """A process that runs one function; context manager, killed at the end if it runs still."""

    def __init__(self, pid: int, result: Path) -> None:
        """Keep its id, and the file of what it returns."""
        self.process = psutil.Process(pid)
        self.pid = pid
        self._result = result

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def wait(self, timeout_s: float) -> bool:
        """Return whether it ended within that time."""
        try:
            self.process.wait(timeout_s)
        except psutil.TimeoutExpired:
            return False
        return True

    def result(self, timeout_s: float = 120.0) -> Any:
        """Wait for the function, and return what it returned."""
        assert self.wait(timeout_s), f"process {self.pid} did not end"
        error = Path(f"{self._result}.error")
        assert not error.exists(), error.read_text()
        return pickle.loads(self._result.read_bytes())

    def kill(self) -> None:
        """End it at once, as kill -9 does."""
        if self.process.is_running():
            self.process.kill()
            assert self.wait(30)

    def __exit__(self, *_: object) -> None:
        """End it, if it runs still."""
        self.kill()


class Nursery:
    """Forks workers from a process that has imported everything once; context manager."""

    def __init__(self, folder: Path) -> None:
        """Keep results in a folder."""
        self._folder = folder
        self._count = 0

    def __enter__(self) -> Self:
        """Start it."""
        self._process = subprocess.Popen(
            [sys.executable, "-c", _NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._send(sys.path)
        return self

    def _send(self, message: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(pickle.dumps(message))
        self._process.stdin.flush()

    def start(self, function: Callable[..., object], *args: object) -> Worker:
        """Run a function of a module that can be imported, in a process of its own."""
        self._count += 1
        result = self._folder / str(self._count)
        self._send((dict(os.environ), function, args, str(result)))
        assert self._process.stdout is not None
        return Worker(int(self._process.stdout.readline()), result)

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._process.communicate(timeout=30)
