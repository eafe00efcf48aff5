"""Child processes: their environment, their deadlines, and that nothing of them stays."""

import contextlib
import os
import random
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from ends import ENDS, end, still_there
from workers import Nursery

from tio_openneuro.annex.environment import child_environment, scripts_folder
from tio_openneuro.annex.processes import CommandError, Coprocess, MissingProgramError, run

# Forks again and again, as a loader with workers does, while other threads start programs; says
# how many of these ended. What is forked lives on, with whatever descriptors it inherited.
FORKER = """
import os, threading
from tio_openneuro.annex.processes import run
ended = []
def work():
    for _ in range(20):
        assert run(["cat"], stdin=b"text", timeout_s=20) == b"text"
        ended.append(1)
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
kept, end = os.pipe()
for _ in range(300):
    if any(thread.is_alive() for thread in threads) and os.fork() == 0:
        os.close(end)
        os.read(kept, 1)
        os._exit(0)
for thread in threads:
    thread.join()
print(len(ended))
"""
# Starts a grandchild that would outlive it, says its process id, and waits.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
# The same, and the grandchild leaves the process group.
LEAVING = PARENT.replace('(600)"]', '(600)"], start_new_session=True')
ECHO = """
import sys
for line in sys.stdin.buffer:
    sys.stdout.buffer.write(line.upper())
    sys.stdout.flush()
"""


def gone(pid: int, timeout_s: float = 10.0) -> bool:
    """Return whether the process ends (or is a zombie whose parent is gone) in time."""
    deadline_s = time.monotonic() + timeout_s
    try:
        process = psutil.Process(pid)
        while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline_s:
            try:
                process.wait(0.05)
            except psutil.TimeoutExpired:
                continue
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_run_gives_the_output_and_passes_the_input() -> None:
    """What the child reads is what it was given, and its output is returned whole."""
    text = b"line\n" * 100_000
    command = [
        sys.executable,
        "-c",
        "import sys, shutil; shutil.copyfileobj(sys.stdin, sys.stdout)",
    ]
    assert run(command, stdin=text) == text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_programs_end_although_others_fork_while_they_start() -> None:
    """A forked process never keeps a program waiting for the end of its input, or of its start."""
    said = run([sys.executable, "-W", "ignore", "-c", FORKER], timeout_s=120)
    assert said.split() == [b"40"]


def test_failure_carries_command_status_and_stderr() -> None:
    """A child that fails raises with its status and what it said."""
    command = [sys.executable, "-c", "import sys; sys.exit('no such thing')"]
    with pytest.raises(CommandError, match="no such thing") as caught:
        run(command)
    assert caught.value.returncode == 1
    assert caught.value.stderr == "no such thing"
    assert str(caught.value).startswith(f"Cannot run '{' '.join(command)}'")


def test_missing_program_is_named() -> None:
    """A program that is not installed is named, with how to install it."""
    with pytest.raises(MissingProgramError, match=r"no-such-program.*not installed"):
        run(["no-such-program"])


def test_missing_folder_is_not_taken_for_a_missing_program(tmp_path: Path) -> None:
    """A working folder that is not there is what the message names."""
    with pytest.raises(CommandError, match="no such folder"):
        run(["git", "--version"], cwd=tmp_path / "absent")


def test_deadline_kills_the_grandchildren_too(tmp_path: Path) -> None:
    """At the deadline the whole process group ends, with what the child started."""
    note = tmp_path / "pid"
    script = PARENT.replace("flush=True)", f"file=open({str(note)!r}, 'w'), flush=True)")
    with pytest.raises(CommandError, match="killed"):
        run([sys.executable, "-c", script], timeout_s=2.0)
    assert gone(int(note.read_text()))


def test_environment_finds_git_annex_and_hides_credentials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Children find this environment's git-annex, and no AWS credentials or hook's variables."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "GIT_DIR"):
        monkeypatch.setenv(name, "odd")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    environment = child_environment({"EXTRA": "1"})
    assert environment["PATH"] == f"{scripts_folder()}{os.pathsep}/usr/bin:/bin"
    assert environment["EXTRA"] == "1"
    assert not [name for name, value in environment.items() if value == "odd"]
    assert b"10." in run(["git", "annex", "version", "--raw"])


def test_identity_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """An identity in the environment is kept; where there is none, commits work all the same."""
    assert run(["git", "var", "GIT_AUTHOR_IDENT"]).startswith(b"tio-openneuro <")
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Ada")
    assert run(["git", "var", "GIT_AUTHOR_IDENT"]).startswith(b"Ada <")


def test_git_settings_of_the_environment_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that the environment gives git are kept beside ours, which rule out hooks."""
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "user.nickname")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "ada")
    assert run(["git", "config", "user.nickname"]) == b"ada\n"
    assert run(["git", "config", "core.hooksPath"]).strip() == os.devnull.encode()
    assert run(["git", "config", "protocol.ext.allow"]) == b"never\n"


def test_coprocess_answers_line_by_line() -> None:
    """Each line gets its answer; without one, the wait ends at its deadline and nothing is lost."""
    child = Coprocess([sys.executable, "-c", ECHO])
    child.write_line(b"one")
    assert child.read_line(10.0) == b"ONE"
    with pytest.raises(TimeoutError):
        child.read_line(0.05)
    child.write_line(b"two")
    assert child.read_line(10.0) == b"TWO"
    assert child.finish(10.0)
    assert not child.alive
    assert child.read_line(1.0) is None
    with pytest.raises(CommandError, match="has ended"):
        child.write_line(b"three")


def test_killed_coprocess_leaves_no_grandchild() -> None:
    """Killing a coprocess kills what it started, and may be done twice."""
    child = Coprocess([sys.executable, "-c", PARENT])
    line = child.read_line(10.0)
    assert line is not None
    child.kill()
    child.kill()
    assert gone(int(line))
    assert gone(child.pid)


def test_what_a_dead_coprocess_left_is_killed() -> None:
    """Where the child was killed and what it started goes on, that ends with :meth:`kill`."""
    child = Coprocess([sys.executable, "-c", PARENT])
    grandchild = int(child.read_line(10.0) or b"0")
    psutil.Process(child.pid).kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not child.alive
    assert psutil.Process(grandchild).is_running()
    child.kill()
    assert gone(grandchild)


def test_pipes_are_closed_however_late_their_end_comes() -> None:
    """What left the group may hold them beyond :meth:`kill`; no descriptor stays open after it."""
    child = Coprocess([sys.executable, "-c", LEAVING])
    grandchild = psutil.Process(int(child.read_line(10.0) or b"0"))
    child.kill()
    grandchild.kill()
    for thread in child._threads:
        thread.join(10.0)
    assert [child._process.stdout.closed, child._process.stderr.closed] == [True, True]


def test_coprocess_that_dies_ends_the_output_and_keeps_its_words() -> None:
    """The end of the child is the end of its lines; what it said on stderr can be read."""
    child = Coprocess([sys.executable, "-c", "import sys; print('last'); sys.exit('broken')"])
    assert child.read_line(10.0) == b"last"
    assert child.read_line(10.0) is None
    child.kill()
    assert child.stderr == "broken"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows inherits no descriptors by number")
def test_lock_is_held_while_a_child_that_inherited_it_lives(tmp_path: Path) -> None:
    """A descriptor handed over keeps its lock until the child ends, whatever we close."""
    import fcntl

    path = tmp_path / "lock"
    path.touch()
    descriptor = os.open(path, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    child = Coprocess([sys.executable, "-c", ECHO], keep_fds=(descriptor,))
    os.close(descriptor)
    with path.open("w") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child.kill()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def note(folder: Path, name: str, *pids: int) -> None:
    """Write process ids into a file that is there wholly or not at all."""
    (folder / f"{name}.new").write_text(" ".join(map(str, pids)))
    (folder / f"{name}.new").rename(folder / name)


def noted(folder: Path, name: str) -> list[psutil.Process]:
    """Wait for the file, and return the processes that are there still."""
    deadline_s = time.monotonic() + 30
    while not (folder / name).exists():
        assert time.monotonic() < deadline_s, f"there is no {name}"
        threading.Event().wait(0.01)
    pids = map(int, (folder / name).read_text().split())
    return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]


def start_both(folder: Path, name: str) -> None:
    """Have a long-lived child and a program that runs to its end; note both and what they start."""
    child = Coprocess([sys.executable, "-c", LEAVING])
    pids = [child.pid, int(child.read_line(20.0) or b"0")]
    script = LEAVING.replace("print(child.pid", f"print(child.pid, file=open({name!r}, 'w')")
    command = [sys.executable, "-c", script]
    threading.Thread(target=run, args=(command,), kwargs={"cwd": folder}, daemon=True).start()
    while len(found := psutil.Process().children(recursive=True)) < 4 + supervisors():
        threading.Event().wait(0.01)
    note(folder, f"{name}-pids", *pids, *[one.pid for one in found])


def supervisors() -> int:
    """Return how many shells this process has for its children's end."""
    return sum(one.cmdline()[:1] == ["/bin/sh"] for one in psutil.Process().children())


def fork_and_end(folder: Path, way: str) -> None:
    """Start children, fork a process that lives on, and end."""
    start_both(folder, "own")
    pid = os.fork()
    if pid == 0:
        threading.Event().wait()
    note(folder, "forked", pid)
    end(way)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("way", ENDS)
def test_children_end_with_their_process(way: str, nursery: Nursery, tmp_path: Path) -> None:
    """However it ends, none lives on, nor what they started, while a forked process does."""
    with nursery.start(fork_and_end, tmp_path, way) as worker:
        children, forked = noted(tmp_path, "own-pids"), noted(tmp_path, "forked")[0]
        assert worker.wait(30)
        try:
            assert still_there(children) == []
            assert forked.is_running()
        finally:
            forked.kill()


def fork_and_start(folder: Path) -> None:
    """Start children, and fork a process that starts some of its own; both live on."""
    start_both(folder, "own")
    if os.fork() == 0:
        note(folder, "forked", os.getpid())
        start_both(folder, "other")
    threading.Event().wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_children_of_a_forked_process_are_its_own(nursery: Nursery, tmp_path: Path) -> None:
    """They neither end with the process that it was forked from, nor outlive it."""
    with nursery.start(fork_and_start, tmp_path) as worker:
        forked, others = noted(tmp_path, "forked")[0], noted(tmp_path, "other-pids")
        own = set(noted(tmp_path, "own-pids"))
        worker.kill()
        assert still_there(own) == []
        assert [one for one in others if not one.is_running()] == []
        forked.kill()
        assert still_there(others) == []


def restart_and_end(folder: Path) -> None:
    """Start children, kill what watches over them, start one more, and end."""
    start_both(folder, "own")
    for one in psutil.Process().children():
        if one.cmdline()[:1] == ["/bin/sh"]:
            one.kill()
    assert run(["cat"], stdin=b"text") == b"text"
    late = Coprocess([sys.executable, "-c", LEAVING])
    note(folder, "late", late.pid, int(late.read_line(20.0) or b"0"))
    end("SIGKILL")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_supervisor_that_was_killed_is_replaced(nursery: Nursery, tmp_path: Path) -> None:
    """The next start makes another, which ends the children of before as well."""
    with nursery.start(restart_and_end, tmp_path) as worker:
        children = noted(tmp_path, "own-pids") + noted(tmp_path, "late")
        assert worker.wait(30)
        assert still_there(children) == []


def count_children() -> list[int]:
    """Return how many children there are with one at work, and after each way of its end."""
    counts = []
    for finish in (Coprocess.kill, lambda child: child.finish(10.0)):
        child = Coprocess([sys.executable, "-c", ECHO])
        assert run(["cat"], stdin=b"text") == b"text"
        counts.append(len(psutil.Process().children()))
        finish(child)
        counts.append(len(psutil.Process().children()))
    for refused in (["no-such-program"], ["false"]):
        with pytest.raises((MissingProgramError, CommandError)):
            run(refused)
        counts.append(len(psutil.Process().children()))
    return counts


def test_what_watches_over_children_ends_with_the_last(nursery: Nursery) -> None:
    """No process is left, nor a dead one that nobody collected, once no child is."""
    with nursery.start(count_children) as worker:
        with_one = worker.result()[:4:2]
        assert worker.result() == [with_one[0], 0, with_one[1], 0, 0, 0]
        assert with_one == [2, 2]


def die_while_starting(folder: Path, pause_s: float) -> None:
    """Start programs in two threads until killed."""

    def work() -> None:
        while True:
            child = Coprocess([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
            threading.Event().wait(pause_s)
            child.kill()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    note(folder, "started", os.getpid())
    threading.Event().wait()


def carried(mark: str) -> list[psutil.Process]:
    """Return the processes whose environment has a variable."""
    found = []
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if mark in one.environ():
                found.append(one)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads other processes' environments")
def test_no_child_escapes_in_the_instant_of_its_start(
    nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed twenty times while it starts children and ends them, a process leaves none."""
    chance = random.Random(1)
    for number in range(20):
        mark = f"TEST_OF_ENDS_{number}"
        monkeypatch.setenv(mark, "1")
        folder = tmp_path / str(number)
        folder.mkdir()
        with nursery.start(die_while_starting, folder, 0.001) as worker:
            noted(folder, "started")
            threading.Event().wait(chance.uniform(0.0, 0.1))
            worker.kill()
        assert still_there(carried(mark)) == []
