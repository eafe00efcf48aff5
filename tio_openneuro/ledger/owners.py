"""Who is alive: one locked file per owner of reservations and leases.

An owner is alive while somebody holds the lock of its file: the process itself, or a child that
inherited the descriptor and may still write to disk, but not a forked process. The kernel lets go
of the lock when the last of them ends, however it ends. Never ends a process that is not the orphan
of a dead owner. Locks are the kernel's own: filelock, which keeps others from a clone while it is
made, gives no descriptor that a child could inherit.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import time
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

import psutil

from tio_openneuro.forks import close_apart, open_apart

if sys.platform == "win32":  # pragma: no cover
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def lock_shared(descriptor: int) -> bool:
        """Return true: a folder has no lock on this system."""
        return descriptor >= 0

    lock_alone = lock_shared

    def unlock(descriptor: int) -> None:
        """Do nothing."""
        del descriptor
else:
    import fcntl

    def _try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def lock_shared(descriptor: int) -> bool:
        """Share a folder's lock with others who do; return whether nobody has it alone."""
        return _try_lock(descriptor, fcntl.LOCK_SH)

    def lock_alone(descriptor: int) -> bool:
        """Take a folder's lock alone; return whether nobody else has it."""
        return _try_lock(descriptor)

    def unlock(descriptor: int) -> None:
        """Let go of a folder's lock."""
        fcntl.flock(descriptor, fcntl.LOCK_UN)


_CLOCK_TOLERANCE_S = 2.0
_ORPHAN_TIMEOUT_S = 5.0
_MOST_OFFSET = (1 << 62) - 1
# An orphan may have started a child of its own between being listed and being killed.
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class OwnerRecord:
    """One owner, as the ledger knows it.

    Attributes:
        owner_id: Its unique name; its lock is the file of that name.
        pid: Process that opened it.
        created_s: When that process began, in seconds since the epoch.
        budget_bytes: Disk budget that it stated.
    """

    owner_id: str
    pid: int
    created_s: float
    budget_bytes: int


class OwnerLock:
    """The lock that shows that an owner is alive."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """Keep a descriptor that already holds the lock.

        Args:
            path: The owner's file.
            descriptor: Open, locked, not inherited by children unless passed on.
        """
        self.path = path
        self.descriptor = descriptor

    @classmethod
    def create(cls, path: Path) -> OwnerLock:
        """Make the file and take its lock."""
        lock = cls.try_take(path, create=True)
        if lock is None:
            message = f"Cannot lock {path}: another process took the lock of a new owner."
            raise OSError(message)
        return lock

    @classmethod
    def try_take(cls, path: Path, *, create: bool = False) -> OwnerLock | None:
        """Take the lock if nobody holds it; return None where somebody does.

        Raises:
            FileNotFoundError: There is no such file, and none is to be made.
        """
        flags = os.O_RDWR | (os.O_CREAT if create else 0)
        descriptor = open_apart(path, flags)
        if _try_lock(descriptor):
            return cls(path, descriptor)
        close_apart(descriptor)
        return None

    @property
    def inheritable(self) -> int | None:
        """Descriptor for children to inherit, or None where the system has no such thing."""
        return None if sys.platform == "win32" else self.descriptor

    def show_alive(self) -> None:
        """Note in the file that the owner lives; the time since when it does stays."""
        with contextlib.suppress(OSError):
            os.utime(self.path, ns=(time.time_ns(), self.path.stat().st_mtime_ns))

    def lived_until_ns(self) -> int:
        """Return when the owner last noted that it lives."""
        return os.fstat(self.descriptor).st_atime_ns

    def let_go(self) -> None:
        """Close the descriptor."""
        close_apart(self.descriptor)
        self.descriptor = -1

    def remove(self) -> None:
        """Delete the file, then let go of the lock."""
        if sys.platform == "win32":  # pragma: no cover
            self.let_go()
        self.path.unlink(missing_ok=True)
        self.let_go()


def locked_owners(folder: Path) -> list[Path]:
    """Return the files of owners that somebody holds: a child may outlive its owner."""
    held = []
    for path in folder.glob("*.lock"):
        lock = OwnerLock.try_take(path)
        if lock is None:
            held.append(path)
        else:
            lock.let_go()
    return held


def holding_pids(files: Iterable[Path], kinds: AbstractSet[str]) -> list[int]:
    """Return the processes that hold a lock of these kinds on files, where the system tells."""
    wanted = set()
    for path in files:
        with contextlib.suppress(FileNotFoundError):
            wanted.add(f":{path.stat().st_ino}")
    pids = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            words = line.split()
            if kinds <= set(words) and any(word.endswith(tuple(wanted)) for word in words[5:6]):
                pids.add(int(words[4]))
    return sorted(pids)


def hold_folder(folder: Path, root: Path) -> int:
    """Hold a clone's git folder for one root, as long as the descriptor is open; write nothing.

    Each root has a byte of its own, which its processes share; who holds another one is seen.

    Args:
        folder: The git folder.
        root: Folder of clones and ledger.

    Returns:
        The descriptor, for ``close_apart``; -1 where a process of another root holds the folder.
    """
    if sys.platform == "win32":  # It has no such lock, and opens no folder.
        return open_apart(Path(os.devnull), os.O_RDONLY)
    descriptor = open_apart(folder, os.O_RDONLY)
    own = root.stat().st_ino & _MOST_OFFSET
    with contextlib.suppress(AttributeError, OSError):  # Not there on this system, or on NFS.
        _ask_range(descriptor, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, own, 1)
        for start, length in ((0, own), (own + 1, 0)):
            if _ask_range(descriptor, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, start, length):
                close_apart(descriptor)
                return -1
    return descriptor


def _ask_range(descriptor: int, act: int, kind: int, start: int, length: int) -> bool:
    """Lock bytes of a file, or return whether somebody else has any of them locked."""
    asked = struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0)
    answer: int = struct.unpack("hhqqi4x", fcntl.fcntl(descriptor, act, asked))[0]
    return answer != fcntl.F_UNLCK


def this_process() -> tuple[int, float]:
    """Return this process's id and when it began, in seconds since the epoch."""
    return os.getpid(), psutil.Process().create_time()


def runs(owner: OwnerRecord) -> bool:
    """Return whether the process that opened the owner seems to run; cheap, may be wrong."""
    try:
        process = psutil.Process(owner.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return bool(abs(process.create_time() - owner.created_s) <= _CLOCK_TOLERANCE_S)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _holds_lock(pid: int, descriptor: int) -> bool:
    """Return whether the descriptor is one that the lock belongs to, as far as can be told."""
    if not Path("/proc/self/fdinfo").is_dir():
        return True
    try:
        return "FLOCK" in Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text(encoding="ascii")
    except OSError:
        return False


def _holders(path: Path, owner: OwnerRecord) -> list[psutil.Process]:
    """Return the processes that hold the lock by an inherited descriptor."""
    found = []
    wanted = os.path.realpath(path)
    for process in psutil.process_iter():
        try:
            if sys.platform == "win32":  # pragma: no cover
                if process.ppid() == owner.pid and process.create_time() >= owner.created_s:
                    found.append(process)
                continue
            for file in process.open_files():
                if file.path == wanted and _holds_lock(process.pid, file.fd):
                    found.append(process)
                    break
        except psutil.Error:
            continue
    return found


def _is_orphan(process: psutil.Process, owner: OwnerRecord) -> bool:
    """Return whether a holder of the lock is certainly not the owner itself.

    In another container the same process has another id, so only this one's are judged. One that
    has ended meanwhile, as idle children do when their parent dies, is nobody's owner any more.
    """
    if process.pid in {owner.pid, os.getpid()}:
        return False
    if not Path("/proc/self/ns/pid").is_symlink():
        return True
    try:
        own = Path("/proc/self/ns/pid").readlink()
        return Path(f"/proc/{process.pid}/ns/pid").readlink() == own
    except OSError:
        try:
            return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        except psutil.Error as error:
            return isinstance(error, psutil.NoSuchProcess)


def take_if_dead(path: Path, owner: OwnerRecord) -> OwnerLock | None:
    """Take over the lock of a dead owner, its orphaned children ended first.

    Call it inside the ledger's transaction: two that reap at once would take each other, holding
    the dead owner's lock, for orphans.

    Args:
        path: The owner's file; made again where it is missing.
        owner: As the ledger knows it.

    Returns:
        The lock, to be removed once the ledger has forgotten the owner; None while it is alive.
    """
    if not path.exists() and runs(owner):
        return None
    for _ in range(_ROUNDS):
        lock = OwnerLock.try_take(path, create=True)
        if lock is not None or runs(owner):
            return lock
        orphans = _holders(path, owner)
        if not all(_is_orphan(process, owner) for process in orphans):
            return None
        for process in orphans:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(orphans, timeout=_ORPHAN_TIMEOUT_S)
    return OwnerLock.try_take(path, create=True)
