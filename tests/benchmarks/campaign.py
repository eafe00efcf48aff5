"""What lies on disk, whatever happens to it: moved, shared, lost, hostile, killed.

Real git-annex on the loopback OpenNeuro, by both ways of fetching. Each attempt has a root of its
own, an observer in a process of its own, and a user who works with git-annex in the same clone.
The observer looks twice and counts what both looks saw, the smaller size of each file: that was
certainly there at one instant between them, so that more than the budget is proof. Files are told
by inode. The user's git-annex works with another umask, so that each file tells from its first byte
who made it, and theirs are not counted: it also says "success" where ours was there first.
``--runs 1`` makes each attempt once (the test of ``tests/disk``).
"""

import contextlib
import ctypes
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil
from faulty import Fault, FaultKind, LoopbackOpenNeuro
from rich.console import Console
from rich.table import Table
from workers import Nursery, Worker

import tio_openneuro as tno
from tio_openneuro.annex.environment import child_environment
from tio_openneuro.annex.repo import AnnexRepo
from tio_openneuro.annex.tree import index_tree
from tio_openneuro.cli import main as command_line
from tio_openneuro.content import ContentFile, ContentUnit
from tio_openneuro.disk.engine import Engine
from tio_openneuro.errors import LedgerError, TioOpenNeuroError
from tio_openneuro.sources.install import install

RUNS = 20
WAYS = ("http", "git-annex")
ACCESSION = "ds900090"
FILES, FILE_BYTES = 8, 60_000
BUDGET_BYTES = 3 * FILE_BYTES
_END_S = 10.0

_OBSERVE = """
import json, os, re, select, sys, time
content = re.compile(r'.*/annex/(objects|bad|tmp[^/]*)/|.*/prepared/')
metadata = {'objects', 'refs', 'logs', 'hooks'}
def scan():
    found, stack = {}, [sys.argv[1]]
    while stack:
        folder = stack.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError:
            continue
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    if not (folder.endswith('.git') and entry.name in metadata):
                        stack.append(entry.path)
                elif content.match(entry.path) and not entry.name.endswith('.lck'):
                    info = entry.stat(follow_symlinks=False)
                    if info.st_mode & 0o044:
                        found[info.st_ino] = info.st_size
            except OSError:
                pass
    return found
before, told = scan(), None
print('ready', flush=True)
while True:
    time_s, now = time.time(), scan()
    both = {i: min(size, now[i]) for i, size in before.items() if i in now}
    if both != told:
        print(json.dumps([time_s, list(both.items())]), flush=True)
        told = both
    before = now
    if select.select([sys.stdin], [], [], 0.005)[0]:
        break
"""


class Watch:
    """All content below a folder, as a process of its own sees it; context manager."""

    def __init__(self, folder: Path, log: Path) -> None:
        self._command = [sys.executable, "-I", "-c", _OBSERVE, str(folder)]
        self._log = log

    def __enter__(self) -> Self:
        with self._log.open("w") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=log)
        while not self._log.stat().st_size:
            assert self._process.poll() is None
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(b"end\n", timeout=30)
        lines = self._log.read_text().splitlines()[1:]
        self.looks = [json.loads(line) for line in lines]

    def peak_bytes(self, theirs: Sequence["Theirs"]) -> int:
        """Return the most that was held at one instant, less what was the user's then."""
        peak = 0
        for time_s, files in self.looks:
            users = {file.inode for file in theirs if file.since_s <= time_s}
            peak = max(peak, sum(size for inode, size in files if inode not in users))
        return peak


@dataclass(frozen=True)
class Theirs:
    """A file of the user's: which one, since when, and what is in it."""

    path: Path
    inode: int
    since_s: float
    digest: str

    def is_there(self) -> bool:
        """Return whether it is the same file with the same content still."""
        with contextlib.suppress(FileNotFoundError):
            return self.path.stat().st_ino == self.inode and digest(self.path) == self.digest
        return False


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Row:
    """What attempts of one kind came to."""

    attempt: str
    way: str
    runs: int = 0
    held: float = 0.0
    lost: int = 0
    wrong: list[str] = field(default_factory=list)
    children: int = 0

    def add(self, other: "Row") -> None:
        self.runs += 1
        self.held = max(self.held, other.held)
        self.lost += other.lost
        self.wrong += other.wrong
        self.children = max(self.children, other.children)

    @property
    def holds(self) -> bool:
        """Whether all that was promised held; children are another matter."""
        return self.held <= 1 and not self.lost and not self.wrong


def units_in(repo: AnnexRepo, version: str = "1.0.0") -> list[ContentUnit]:
    files = index_tree(repo.path, f"refs/tags/{version}")
    return [
        ContentUnit(f.path, (ContentFile(repo, f.key, f.path),)) for f in files if f.key is not None
    ]


def use(engine: Engine, units: Sequence[ContentUnit]) -> None:
    for unit in units:
        with engine.lease(unit, timeout_s=60) as paths:
            for key, path in paths.items():
                assert key.name.endswith(f"--{digest(path)}.nii.gz")


def train(root: Path, repo: AnnexRepo, rounds: int, seed: int) -> int:
    """Lease everything in turn, fetching ahead, in a process of its own."""
    units = units_in(repo)
    with Engine(root, disk_budget=BUDGET_BYTES, jobs=3) as engine:
        for number in range(rounds):
            order = random.Random(seed + number).sample(units, len(units))
            engine.prefetch(order)
            use(engine, order)
        return engine.statistics().fetched_files


def fetch_and_evict(root: Path, repo: AnnexRepo, rounds: int) -> None:
    """Fetch as much as there is room for, and drop it all, again and again."""
    with Engine(root, disk_budget=BUDGET_BYTES, jobs=3) as engine:
        for _ in range(rounds):
            engine.fetch(units_in(repo)[:3])
            engine.evict_all()


def refused_without_rights(root: Path, repo: AnnexRepo) -> str:
    """Return how a process is refused that may do no more than modes allow, root or not."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    ctypes.CDLL(None).capset(header, none)
    try:
        train(root, repo, 1, 0)
    except TioOpenNeuroError as error:
        return str(error)
    return ""


def doctor(root: Path, options: Sequence[str]) -> int:
    """Run ``tio-openneuro doctor``; return its exit code."""
    sys.argv = ["tio-openneuro", "doctor", "--root", str(root), *options]
    try:
        command_line()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


class Scene:
    """The place of one attempt: a root with a clone, its user, and what is expected."""

    def __init__(
        self, server: LoopbackOpenNeuro, nursery: Nursery, folder: Path, way: str, number: int
    ) -> None:
        self.server, self.nursery, self.way = server, nursery, way
        self.folder = folder
        self.random = random.Random(number)
        self.hangs = number % 5 == 0
        self.number = number
        self.theirs: list[Theirs] = []
        self.expected: list[str] = []
        self.allowed = ""
        self.options = ["--repair"]
        self.wrong: list[str] = []
        self.budget_bytes = BUDGET_BYTES
        folder.mkdir(parents=True)
        self.root = folder / "root"
        self.mounts: list[Path] = []
        template = server.folder / "template"
        if not template.exists():
            install(ACCESSION, template)
        subprocess.run(["cp", "-a", template, self.root], check=True)
        self.repo = AnnexRepo(self.root / "clones" / ACCESSION)
        self.units = units_in(self.repo)

    def install(self, accession: str, version: str = "1.0.0") -> None:
        """Have the attempt work on a dataset."""
        dataset = install(accession, self.root, version=version)
        self.repo = AnnexRepo(dataset.path, remotes=dataset.remotes)
        self.units = units_in(self.repo, version)

    def at(self, root: Path) -> "AnnexRepo":
        """Return the clone as it is seen under another path of the root."""
        where = root / self.repo.path.relative_to(self.root)
        return AnnexRepo(where, remotes=self.repo.remotes)

    def engine(self, root: Path | None = None) -> Engine:
        return Engine(root or self.root, disk_budget=self.budget_bytes, jobs=3)

    def path(self, number: int) -> Path:
        """Return the object of a unit, which is there."""
        found = self.repo.locate(self.units[number].files[0].key)
        assert found is not None
        return found

    def fill(self, *numbers: int) -> None:
        """Use units in an engine that then ends."""
        with self.engine() as engine:
            use(engine, [self.units[number] for number in numbers or (0, 1, 2)])

    @contextlib.contextmanager
    def refuses(self, words: str) -> Iterator[None]:
        """Note where something is not refused, or not with these words."""
        try:
            yield
        except TioOpenNeuroError as error:
            if not re.search(words, str(error)):
                self.wrong.append(f"said: {error}")
        else:
            self.wrong.append(f"not refused: {words}")

    def slowly(self) -> None:
        """Have a file take a third of a second; or stand in its middle, now and then."""
        self.server.set_connection_rate(3 * FILE_BYTES)
        if self.hangs:
            self.server.set_faults(Fault(FaultKind.HANG, seconds=_END_S + 5, count=3))

    def start(self, function: Callable[..., object], *arguments: object) -> Worker:
        return self.nursery.start(function, *arguments)

    def wait_until_held(self, worker: Worker) -> None:
        """Wait until something of a process came to the disk."""
        while not list(self.repo.stored()):
            assert worker.process.is_running()

    def seen_at(self, folder: Path) -> Path:
        """Show the root under another path too: a mount where that is permitted, else a link."""
        folder.mkdir()
        command = ["mount", "--bind", str(self.root), str(folder)]
        if subprocess.run(command, check=False, capture_output=True).returncode == 0:
            self.mounts.append(folder)
        else:
            folder.rmdir()
            folder.symlink_to(self.root)
        return folder

    def mount(self, size_bytes: int) -> bool:
        """Put the root on a small disk of its own; return whether that is permitted."""
        small = self.folder / "small"
        small.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(small)]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            return False
        self.mounts.append(small)
        subprocess.run(["cp", "-a", self.root, small / "root"], check=True)
        shutil.rmtree(self.root)
        self.repo, self.root = self.at(small / "root"), small / "root"
        self.units = units_in(self.repo)
        return True

    # The user

    def user(self, *command: str, check: bool = True) -> str:
        """Run git as the clone's user; return what it says."""
        trusted = "remote.s3-PUBLIC.annex-trustlevel=trusted"
        done = subprocess.run(
            ["git", "-c", trusted, *command],
            cwd=self.repo.path,
            env=child_environment(),
            check=check,
            capture_output=True,
            text=True,
        )
        return done.stdout

    def user_begins_to_get(self, number: int) -> subprocess.Popen[bytes]:
        """Start the user's own ``git annex get`` of a unit."""
        text = self.units[number].files[0].key.text
        command = ["git", "annex", "get", "--json", "--from", "s3-PUBLIC", "--key", text]
        return subprocess.Popen(
            command,
            cwd=self.repo.path,
            env=child_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            umask=0o077,
        )

    def user_has_got(self, number: int, process: subprocess.Popen[bytes]) -> bool:
        """Keep whose file it is: theirs where their git-annex made it, and not one of ours."""
        process.communicate()
        path = self.repo.locate(self.units[number].files[0].key)
        if path is None or path.stat().st_mode & 0o044:
            return False
        self.theirs.append(Theirs(path, path.stat().st_ino, time.time(), digest(path)))
        return True

    def user_gets(self, number: int) -> None:
        assert self.user_has_got(number, self.user_begins_to_get(number))

    def user_drops(self, number: int) -> bool:
        """Drop as the user does, and return whether nothing is there then."""
        key = self.units[number].files[0].key
        self.user("annex", "drop", "-q", "--key", key.text, check=False)
        return self.repo.locate(key) is None

    # The end

    def alive(self) -> list[psutil.Process]:
        """Return the processes that work in this place or have it as their home."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if Path(process.cwd()).is_relative_to(self.folder):
                    found.append(process)
        return found

    def end(self) -> None:
        """See that all that is wrong is told and mended, and that the root goes on to serve."""
        with self.engine() as engine:
            found = engine.check()
        left = list(found)
        for words in self.expected:
            told = next((finding for finding in left if re.search(words, finding)), None)
            if told is None:
                self.wrong.append(f"not told: {words}; but: {found}")
            else:
                left.remove(told)
        left = [each for each in left if not (self.allowed and re.search(self.allowed, each))]
        self.wrong += [f"told: {finding}" for finding in left]
        if self.start(doctor, self.root, self.options).result() != 0:
            self.wrong.append(f"doctor {' '.join(self.options)} failed")
        with self.engine() as engine:
            self.wrong += [f"after doctor: {finding}" for finding in engine.check()]
            use(engine, self.units[::2])
            engine.evict_all()
            self.wrong += [f"in the end: {finding}" for finding in engine.check()]
            if engine.statistics().used_bytes:
                self.wrong.append(f"not evicted: {engine.statistics().used_bytes} bytes")


ATTEMPTS: dict[str, Callable[[Scene], None]] = {}
RACES: set[str] = set()


def attempt(name: str, *, race: bool = False) -> Callable[..., Callable[[Scene], None]]:
    def enter(function: Callable[[Scene], None]) -> Callable[[Scene], None]:
        ATTEMPTS[name] = function
        RACES.update({name} if race else ())
        return function

    return enter


# Moved, and seen from elsewhere


@attempt("root moved while nobody runs")
def _(scene: Scene) -> None:
    scene.fill()
    moved = scene.root.rename(scene.folder / "moved")
    scene.repo, scene.root = scene.at(moved), moved
    scene.units = units_in(scene.repo)
    scene.fill(3, 4, 5, 6)


@attempt("root under another path, then back")
def _(scene: Scene) -> None:
    scene.fill()
    other = scene.seen_at(scene.folder / "other")
    with scene.engine(other) as engine:
        use(engine, units_in(scene.at(other))[2:6])
    scene.fill(6, 7, 0, 1)


@attempt("two processes, two paths of one root", race=True)
def _(scene: Scene) -> None:
    other = scene.seen_at(scene.folder / "other")
    ends = ((scene.root, scene.repo, 2, 1), (other, scene.at(other), 2, 2))
    with scene.start(train, *ends[0]) as one, scene.start(train, *ends[1]) as two:
        assert one.result() + two.result() >= FILES


@attempt("clone outside the root, moved between uses")
def _(scene: Scene) -> None:
    scene.repo = AnnexRepo(
        scene.repo.path.rename(scene.folder / "mine"), remotes=scene.repo.remotes, root=scene.root
    )
    scene.units = units_in(scene.repo)
    scene.user_gets(0)
    scene.fill(0, 1, 2, 3, 4)
    moved = scene.repo.path.rename(scene.folder / "moved")
    scene.theirs = [
        Theirs(moved / t.path.relative_to(scene.folder / "mine"), t.inode, t.since_s, t.digest)
        for t in scene.theirs
    ]
    scene.repo = AnnexRepo(moved, remotes=scene.repo.remotes, root=scene.root)
    scene.units = units_in(scene.repo)
    scene.fill(5, 6, 7, 0, 1)


@attempt("second root on one clone")
def _(scene: Scene) -> None:
    with scene.engine() as first, scene.engine(scene.folder / "second") as second:
        use(first, scene.units[:2])
        with scene.refuses("under another root"):
            use(second, scene.units[2:3])
    with scene.engine(scene.folder / "second") as second:
        use(second, scene.units[:2])
        assert second.evict_all() == 0


@attempt("clone not mounted for a while")
def _(scene: Scene) -> None:
    scene.fill()
    with scene.engine() as engine:
        away = scene.repo.path.rename(scene.folder / "away")
        with scene.refuses("charged"):
            use(engine, scene.units[3:4])
        assert engine.evict_all() == 0
        told = engine.check(repair=True)
        if ["cannot be seen" in finding for finding in told] != [True] * 3:
            scene.wrong.append(f"told: {told}")
        away.rename(scene.repo.path)


# A lost ledger


def lose(scene: Scene, spoil: Callable[[Path], object]) -> None:
    """Spoil the ledger of a full root: it serves, and fetches nothing beside what lies there."""
    scene.fill()
    spoil(scene.root / "ledger" / "ledger.sqlite")
    with scene.engine() as engine:
        use(engine, scene.units[:3])
        with scene.refuses("doctor --repair --adopt"):
            use(engine, scene.units[3:4])
    scene.options += ["--adopt"]


def set_version(path: Path, number: int) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {number}")


for _name, _spoil in {
    "of 0 bytes": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "garbage": lambda path: path.write_bytes(random.Random(1).randbytes(40_000)),
    "deleted": lambda path: shutil.rmtree(path.parent),
    "of an older version": lambda path: set_version(path, 1),
    "of a newer version": lambda path: set_version(path, 99),
}.items():
    attempt(f"ledger {_name}")(lambda scene, spoil=_spoil: lose(scene, spoil))


@attempt("ledger deleted in use", race=True)
def _(scene: Scene) -> None:
    scene.server.set_connection_rate(10 * FILE_BYTES)
    with scene.start(train, scene.root, scene.repo, 9, scene.number) as worker:
        scene.wait_until_held(worker)
        worker.wait(scene.random.uniform(0, 0.4))
        shutil.rmtree(scene.root / "ledger")
        # Refused beside the other; once that has noticed, what lies there is counted again.
        with contextlib.suppress(LedgerError):
            scene.engine().close()
        assert worker.wait(60)
        with contextlib.suppress(AssertionError):
            worker.result()
            scene.wrong.append("went on without a ledger")
    scene.server.set_connection_rate(None)
    scene.options += ["--adopt"]


@attempt("ledger without permission")
def _(scene: Scene) -> None:
    scene.fill()
    path = scene.root / "ledger" / "ledger.sqlite"
    path.chmod(0)
    with scene.start(refused_without_rights, scene.root, scene.repo) as worker:
        if "May you read and write it?" not in (said := worker.result()):
            scene.wrong.append(f"said: {said}")
    path.chmod(0o600)


# The user beside us


@attempt("user's get beside our fetch", race=True)
def _(scene: Scene) -> None:
    scene.server.set_latency(scene.random.choice((0, 0.05, 0.2)))
    begins = scene.random.uniform(0, 0.3)
    with scene.engine() as engine:
        theirs = scene.user_begins_to_get(0)
        with contextlib.suppress(subprocess.TimeoutExpired):
            theirs.wait(begins)
        use(engine, scene.units[:1])
        theirs.wait(60)
    scene.user_has_got(0, theirs)
    scene.server.set_latency(0)
    scene.fill(1, 2, 3, 4)


@attempt("user drops ours and gets theirs, beside a training", race=True)
def _(scene: Scene) -> None:
    with scene.start(train, scene.root, scene.repo, 4, scene.number) as worker:
        scene.wait_until_held(worker)
        for number in range(3):
            if scene.user_drops(number):
                scene.user_has_got(number, scene.user_begins_to_get(number))
        assert worker.result() > 0
    # The training may have ended before it came to that file.
    scene.allowed = "replaced by a file that is not this library's"


@attempt("user drops ours and gets theirs, while nobody runs")
def _(scene: Scene) -> None:
    scene.fill()
    for number in (0, 1):
        assert scene.user_drops(number)
        scene.user_gets(number)
    scene.expected = ["replaced by a file that is not this library's"] * 2


@attempt("user's fsck beside a training", race=True)
def _(scene: Scene) -> None:
    with scene.start(train, scene.root, scene.repo, 3, scene.number) as worker:
        scene.wait_until_held(worker)
        scene.user("annex", "fsck", "-q", "--all", check=False)
        assert worker.result() > 0


@attempt("user unlocks ours, and changes one")
def _(scene: Scene) -> None:
    scene.user("checkout", "-q", "main")
    scene.fill()
    names = [scene.units[number].name for number in (0, 1)]
    scene.user("annex", "unlock", "-q", *names)
    changed = scene.repo.path / names[0]
    changed.write_bytes(b"the user's work")
    scene.theirs.append(Theirs(changed, changed.stat().st_ino, time.time(), digest(changed)))
    scene.fill(3, 4, 5)


@attempt("user moves ours to a remote of theirs")
def _(scene: Scene) -> None:
    scene.fill()
    (away := scene.folder / "away").mkdir()
    directory = ("type=directory", f"directory={away}", "encryption=none")
    scene.user("annex", "initremote", "-q", "away", *directory)
    key = scene.units[0].files[0].key
    if scene.way == "http":
        scene.user("annex", "fsck", "-q", "--fast", "--key", key.text)
    scene.user("annex", "move", "-q", "--to", "away", "--key", key.text)
    (moved,) = [path for path in away.rglob(key.name) if path.is_file()]
    scene.theirs.append(Theirs(moved, moved.stat().st_ino, time.time(), digest(moved)))
    scene.expected = ["is recorded as present and is absent"]


# Nothing that is stated is believed


@attempt("key of 1 MB, object of 14 MB")
def _(scene: Scene) -> None:
    accession = "ds900091"
    stored = scene.server.folder / "s3" / "openneuro.org" / accession
    if not stored.exists():
        data = {f"sub-0{n}/anat/sub-0{n}_T1w.nii.gz": bytes([n]) * 1_000_000 for n in (1, 2)}
        scene.server.publish(accession, data)
        for path in stored.rglob("*-*"):
            if path.is_file():
                path.write_bytes(bytes(14_000_000))
    scene.server.set_connection_rate(20e6)
    sound, scene.budget_bytes = (scene.repo, scene.units), 1_100_000
    scene.install(accession)
    with scene.engine() as engine, scene.refuses("more than 1000000 bytes"):
        use(engine, scene.units[:1])
    scene.repo, scene.units = sound


@attempt("annex of a tuned layout")
def _(scene: Scene) -> None:
    scene.user("config", "annex.tune.objecthash1", "true")
    with scene.refuses(r"annex\.tune"):
        install(ACCESSION, scene.root)
    scene.user("config", "--unset", "annex.tune.objecthash1")


def put_elsewhere(scene: Scene, where: Callable[[Path], Path], *expected: str) -> None:
    """Have an object lie where it is not looked for; it is fetched again, and used on."""
    scene.fill()
    path = scene.path(0)
    path.parent.chmod(0o755)
    other = where(path)
    other.parent.mkdir(parents=True, exist_ok=True)
    path.rename(other)
    scene.expected = list(expected)
    with scene.engine() as engine:
        found = engine.check()
    if len(found) != len(expected):
        scene.wrong.append(f"told: {found}")
    scene.fill(0, 3, 1, 4)
    scene.expected = []


_ABSENT = "recorded as present and is absent"
for _name, _where, _expected in (
    ("in the other hash directory", None, ()),
    ("in annex/bad", lambda path: path.parents[4] / "bad" / path.name, (_ABSENT,)),
    ("under another name", lambda path: path.with_name("another"), (_ABSENT,)),
    ("one folder higher", lambda path: path.parents[2] / path.name, (_ABSENT,)),
    ("right in annex/objects", lambda path: path.parents[3] / path.name, (_ABSENT,)),
    ("one folder deeper", lambda path: path.parent / "deeper" / path.name, (_ABSENT,)),
):

    def _elsewhere(scene: Scene, where=_where, expected=_expected) -> None:
        lower = scene.repo.path / ".git" / scene.units[0].files[0].key.object_paths()[1]
        put_elsewhere(scene, where or (lambda _: lower), *expected)

    attempt(f"object {_name}")(_elsewhere)


@attempt("object cut short")
def _(scene: Scene) -> None:
    scene.fill()
    scene.path(0).chmod(0o644)
    os.truncate(scene.path(0), FILE_BYTES // 2)
    scene.expected = [_ABSENT]


# New versions


@attempt("new snapshot in a clone that is there, a tag moved")
def _(scene: Scene) -> None:
    accession = f"ds90{len(scene.way)}{scene.number:03}"
    data = {f"sub-0{n}/anat/sub-0{n}_T1w.nii.gz": bytes([n]) * FILE_BYTES for n in (1, 2, 3)}
    scene.server.publish(accession, data)
    scene.install(accession)
    scene.fill(0, 1, 2)
    data = {f"sub-0{n}/anat/sub-0{n}_T1w.nii.gz": bytes([n]) * FILE_BYTES for n in (4, 5)}
    scene.server.publish(accession, data, tag="1.1.0")
    bare = scene.server.folder / "git" / f"{accession}.git"
    tag = ["git", "tag", "-f", "1.0.0", "1.1.0"]
    subprocess.run(tag, cwd=bare, check=True, capture_output=True)
    scene.install(accession, "1.1.0")
    assert len(scene.units) == 5
    scene.fill(3, 4, 0)
    t1 = {"t1": tno.Scalar(suffix="T1w")}
    with tno.DataladSubjectsDataset(accession, t1, version="1.0.0", root=scene.root) as dataset:
        assert len(dataset) == 5


# Killed


def kill(scene: Scene, number: int, work: Callable[..., object], *arguments: object) -> None:
    """End a process by a signal, at any instant of its work, and see what is left."""
    with scene.start(work, scene.root, scene.repo, *arguments) as worker:
        scene.wait_until_held(worker)
        worker.wait(scene.random.uniform(0, 0.5))
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.process.send_signal(number)
        assert worker.wait(30)
    scene.server.set_connection_rate(None)
    # Whose it is what came in the instant of its death, nobody knows.
    scene.options += ["--adopt"]


for _name, _signal in {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM}.items():

    @attempt(f"{_name} in mid-fetch", race=True)
    def _(scene: Scene, number=_signal) -> None:
        scene.slowly()
        kill(scene, number, train, 9, scene.number)

    @attempt(f"{_name} in mid-eviction", race=True)
    def _(scene: Scene, number=_signal) -> None:
        kill(scene, number, fetch_and_evict, 99)


@attempt("disk full in mid-fetch")
def _(scene: Scene) -> None:
    used = sum(p.lstat().st_blocks * 512 for p in scene.root.rglob("*"))
    if not scene.mount(used + 4_000_000):
        return
    small = scene.root.parent
    free = os.statvfs(small).f_bavail * os.statvfs(small).f_frsize
    with (small / "others").open("wb") as file:
        file.write(bytes(free - FILE_BYTES // 2))
    with contextlib.suppress(TioOpenNeuroError):
        scene.fill()
        scene.wrong.append("a full disk was not told")
    (small / "others").unlink()


def make(
    name: str, server: LoopbackOpenNeuro, nursery: Nursery, folder: Path, way: str, number: int = 0
) -> Row:
    """Make an attempt once, and return what it came to.

    Args:
        name: Of the attempt.
        server: It has the dataset.
        nursery: Starts processes.
        folder: Not there yet.
        way: By which content comes, as the environment says.
        number: Of the run, from which its random instants follow.
    """
    os.environ["TIO_OPENNEURO_FETCH"] = way
    scene = Scene(server, nursery, folder, way, number)
    row = Row(name, way, 1)
    try:
        with Watch(folder, folder.with_suffix(".log")) as watch:
            ATTEMPTS[name](scene)
            deadline_s = time.monotonic() + _END_S
            while (alive := scene.alive()) and time.monotonic() < deadline_s:
                time.sleep(0.05)
            row.children = len(alive)
            server.clear_faults()
            scene.end()
    finally:
        server.clear_faults()
        server.set_connection_rate(None)
        server.set_latency(0)
        for mounted in scene.mounts:
            subprocess.run(["umount", "-l", str(mounted)], check=True)
    row.held = watch.peak_bytes(scene.theirs) / scene.budget_bytes
    row.lost = sum(not file.is_there() for file in scene.theirs)
    row.wrong = scene.wrong
    return row


def publish(server: LoopbackOpenNeuro) -> None:
    """Publish the dataset of all attempts: files of random bytes."""
    names = [f"sub-{n:02}/anat/sub-{n:02}_T1w.nii.gz" for n in range(1, FILES + 1)]
    server.publish(ACCESSION, {name: random.Random(name).randbytes(FILE_BYTES) for name in names})


def measure(runs: int, folder: Path, console: Console) -> dict[str, object]:
    """Run it, print its table and return its figures."""
    rows = {(name, way): Row(name, way) for name in ATTEMPTS for way in WAYS}
    (folder / "results").mkdir()
    with (
        LoopbackOpenNeuro(folder / "openneuro") as server,
        Nursery(folder / "results") as nursery,
        contextlib.suppress(KeyboardInterrupt),
    ):
        publish(server)
        for run in range(runs):
            for number, (name, way) in enumerate(rows):
                if run and name not in RACES:
                    continue
                row, place = Row(name, way), folder / f"{number}-{run}"
                try:
                    row = make(name, server, nursery, place, way, run)
                except Exception as error:  # noqa: BLE001 - the others are made all the same
                    row.wrong = [f"{type(error).__name__}: {error}"]
                rows[name, way].add(row)
                if not row.holds:
                    console.print(f"run {run}: {row}")
            console.print(f"run {run + 1} of {runs}, the races alone from the second on")
    table = Table(title="What lies on disk")
    for column in ("attempt", "way", "runs", "held / budget", "lost", "told, mended", "children"):
        table.add_column(column)
    for row in rows.values():
        told = f"{len(row.wrong)} wrong" if row.wrong else "yes"
        cells = (row.attempt, row.way, row.runs, f"{row.held:.3f}", row.lost, told, row.children)
        table.add_row(*map(str, cells))
    console.print(table)
    console.print(f"{sum(row.holds for row in rows.values())} of {len(rows)} rows hold.")
    return {"rows": [vars(row) for row in rows.values()]}
