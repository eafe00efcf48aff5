"""What stands in for POSIX where there is none, as far as a POSIX system can show it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tio_openneuro"
POSIX = {
    *("fork", "killpg", "getpgid", "setsid", "statvfs", "waitid", "getuid", "geteuid", "mkfifo"),
    *("pidfd_open", "register_at_fork", "sched_getaffinity", "WNOHANG", "WNOWAIT", "WEXITED"),
    *("fcntl", "resource", "termios", "pwd", "grp", "SIGKILL", "SIGALRM", "setitimer", "pause"),
    *("st_blocks", "pass_fds", "start_new_session", "preexec_fn"),
}
WINDOWS = """
import os, sys, types
from pathlib import Path
import fcntl
import tio_openneuro.disk.engine
from fakes import FakeRepo, content_of, make_unit
for name in [name for name in sys.modules if name.partition(".")[0] == "tio_openneuro"]:
    del sys.modules[name]
def locking(descriptor, mode, count):
    fcntl.lockf(descriptor, mode, count)
windows = types.ModuleType("msvcrt")
windows.locking, windows.LK_NBLCK = locking, fcntl.LOCK_EX | fcntl.LOCK_NB
sys.modules |= {"msvcrt": windows, "fcntl": None, "resource": None, "termios": None}
for name in ("fork", "killpg", "waitid", "pidfd_open", "register_at_fork"):
    if hasattr(os, name):
        delattr(os, name)
sys.platform = "win32"
from tio_openneuro.disk.engine import Engine
root = Path(sys.argv[1])
repo = FakeRepo(root / "clones" / "ds1")
units = [make_unit(repo, f"sub-{number}", 1000) for number in range(4)]
with Engine(root, disk_budget=2000, open_repo=FakeRepo.reopen) as engine:
    engine.prefetch(units)
    for unit in units:
        with engine.lease(unit, timeout_s=20) as found:
            for key, path in found.items():
                assert path.read_bytes() == content_of(key)
    statistics = engine.statistics()
    assert (statistics.fetched_files, statistics.evicted_files) == (4, 2)
    assert statistics.peak_bytes == repo.held_bytes() == 2000
    assert engine.check() == []
assert list((root / "ledger" / "owners").iterdir()) == []
print("done")
"""


def guarded(tree: ast.Module) -> set[ast.AST]:
    """Return the nodes below a question for the platform, or for whether something is there."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        asks = isinstance(node, ast.If | ast.IfExp) and (
            "sys.platform" in (words := ast.unparse(node.test)) or "hasattr(os," in words
        )
        if asks or isinstance(node, ast.Try):
            found |= set(ast.walk(node))
    # What follows an early return for Windows counts as its other branch.
    for block in (getattr(node, "body", None) for node in ast.walk(tree)):
        if isinstance(block, list):
            for index, statement in enumerate(block):
                if isinstance(statement, ast.If) and "win32" in ast.unparse(statement.test):
                    found |= {part for rest in block[index:] for part in ast.walk(rest)}
    return found


def names_of(node: ast.AST) -> set[str]:
    """Return the names that a node itself uses or imports."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.Attribute):
        return {node.attr} if isinstance(node.value, ast.Name) else set()
    return {node.arg} if isinstance(node, ast.keyword) and node.arg else set()


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_nothing_needs_posix_without_an_alternative(path: Path) -> None:
    """Names that Windows lacks are used only where the platform was asked before."""
    tree = ast.parse(path.read_text())
    safe = guarded(tree)
    bare = {name for node in ast.walk(tree) if node not in safe for name in names_of(node) & POSIX}
    assert not bare


def test_the_engine_runs_on_what_windows_has(root: Path) -> None:
    """Without ``fcntl``, ``fork``, process groups or inherited locks it fetches and evicts."""
    done = subprocess.run(
        [sys.executable, "-c", WINDOWS, str(root)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": ":".join([*sys.path, str(PACKAGE.parent)])},
    )
    assert done.stdout == "done\n", done.stderr
