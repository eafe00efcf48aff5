"""What it costs to know a dataset's files, against git alone, DataLad and pybids.

Trees are synthetic, of subjects with three annexed images, a sidecar and a table each. "git
alone" is ``git ls-tree -r -z`` and ``git cat-file --batch`` of the very objects that the index
reads, with nothing made of their output. The others' work trees are clones by ``datalad clone``.
pybids is no dependency: give ``PYBIDS_PYTHON``, an interpreter that has it, for its row.
"""

import gc
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from measure import interleaved, median
from rich.console import Console
from rich.table import Table

from tio_openneuro.annex.environment import child_environment
from tio_openneuro.annex.processes import run
from tio_openneuro.annex.tree import index_tree
from tio_openneuro.sources.install import install

RUNS = 5
SIZES = (1_000, 10_000, 50_000)
COMPARED = (1_000, 10_000)
WANTED_RATIO = 2.0
WANTED_BYTES = 1_000
_PER_SUBJECT = 5
UUID = "0f0f0f0f-1111-4222-8333-444444444444"
_TIMEOUT_S = 1800.0
_PYBIDS = """
import sys, time, warnings
warnings.simplefilter("ignore")
from bids import BIDSLayout
began_s = time.perf_counter()
layout = BIDSLayout(sys.argv[1], validate=False)
print(time.perf_counter() - began_s, len(layout.files))
"""


def measure(runs: int, folder: Path, console: Console) -> dict[str, object]:
    """Run it, print its tables and return its figures."""
    repositories = {size: make_repository(folder / f"tree-{size}", size) for size in SIZES}
    _count_processes()
    alone = {size: _index(repository, runs, console) for size, repository in repositories.items()}
    slopes = [
        math.log(alone[b]["index_s"] / alone[a]["index_s"]) / math.log(b / a)
        for a, b in itertools.pairwise(SIZES)
    ]
    table = Table(title=f"Index of a commit, medians of {runs}; wanted: ratio ≤ 2, < 1 kB a file")
    names = ("files", "index s", "µs a file", "git alone s", "ratio", "kept B a file",
             "peak B a file", "processes", "slope")  # fmt: skip
    for name in names:
        table.add_column(name, justify="right")
    for size, slope in zip(SIZES, ["", *(f"{slope:.2f}" for slope in slopes)], strict=True):
        found = alone[size]
        table.add_row(
            str(size),
            f"{found['index_s']:.3f}",
            f"{1e6 * found['index_s'] / size:.1f}",
            f"{found['git_s']:.3f}",
            f"{found['ratio']:.2f}",
            f"{found['kept_bytes_per_file']:.0f}",
            f"{found['peak_bytes_per_file']:.0f}",
            f"{found['processes']:.0f}",
            slope,
        )
    console.print(table)
    compared = {
        size: _compare(repositories[size], folder / f"clones-{size}", runs, console)
        for size in COMPARED
    }
    table = Table(title=f"Seconds side by side, medians of {runs}")
    for name in ("", *(f"{size} files" for size in COMPARED)):
        table.add_column(name, justify="right" if name else "left")
    for name in compared[COMPARED[0]]:
        table.add_row(name, *(f"{compared[size][name]:.2f}" for size in COMPARED))
    console.print(table)
    return {
        "runs": runs,
        "index": alone,
        "slopes": slopes,
        "side_by_side_s": compared,
        "wanted": {"ratio": WANTED_RATIO, "bytes_per_file": WANTED_BYTES},
    }


def make_repository(folder: Path, files: int) -> Path:
    """Commit a BIDS tree of about that many files, and a git-annex branch, with one process."""
    folder.mkdir()
    run(["git", "init", "-q", "--bare", "-b", "main", "."], cwd=folder)
    remote = (
        f"{UUID} bucket=openneuro.org encryption=none exporttree=yes host=s3.amazonaws.com "
        "name=s3-PUBLIC publicurl=https://s3.amazonaws.com/openneuro.org type=S3 versioning=yes "
        "timestamp=1700000000s\n"
    )
    head = "commit refs/heads/{}\ncommitter t <t@t> 1700000000 +0000\ndata 0\n"
    annex = [head.format("git-annex"), inline("remote.log", remote)]
    annex.append(inline("uuid.log", f"{UUID} s3-PUBLIC timestamp=1700000000s\n"))
    main = [head.format("main"), *map(inline, *zip(*tree(files), strict=True))]
    stream = "".join([*main, "\n", *annex]).encode()
    run(["git", "fast-import", "--quiet"], cwd=folder, stdin=stream, timeout_s=_TIMEOUT_S)
    return folder


def tree(files: int) -> list[tuple[str, str]]:
    """Return paths and contents; a content that leads into an annex is a link."""
    found = [("dataset_description.json", '{"Name": "Tree", "BIDSVersion": "1.10.0"}\n')]
    for number in range((files - 1) // _PER_SUBJECT):
        stem = f"sub-{number:05}"
        for name in (f"anat/{stem}_T1w", f"anat/{stem}_FLAIR", f"func/{stem}_task-rest_bold"):
            path = f"{stem}/{name}.nii.gz"
            digest = hashlib.sha256(path.encode()).hexdigest()
            key = f"SHA256E-s{7_000_000 + number}--{digest}.nii.gz"
            place = f".git/annex/objects/{digest[:2]}/{digest[2:4]}/{key}/{key}"
            found.append((path, f"../../{place}"))
        sidecar = {"EchoTime": number, "RepetitionTime": 2.0, "Manufacturer": "none"}
        found.append((f"{stem}/func/{stem}_task-rest_bold.json", json.dumps(sidecar)))
        events = f"onset\tduration\n{number}\t1\n"
        found.append((f"{stem}/func/{stem}_task-rest_events.tsv", events))
    while len(found) < files:
        found.append((f"note-{len(found)}.txt", "padding"))
    return found


def inline(path: str, content: str) -> str:
    mode = "120000" if "annex/objects/" in content else "100644"
    return f"M {mode} inline {path}\ndata {len(content.encode())}\n{content}\n"


_started: list[int] = [0]


def _count_processes() -> None:
    def hear(event: str, _: tuple[object, ...]) -> None:
        if event == "subprocess.Popen":
            _started[0] += 1

    sys.addaudithook(hear)


def _index(repository: Path, runs: int, console: Console) -> dict[str, float]:
    """Return the figures of one tree."""
    listing = ["git", "ls-tree", "-r", "-z", "--full-tree", "main"]
    before = _started[0]
    files = index_tree(repository, "main")
    processes = _started[0] - before
    # What the index reads: links, and files small enough to be an unlocked pointer.
    entries = [e.split() for e in run(listing, cwd=repository).split(b"\0") if e]
    sizes = {file.path.encode(): file.size_bytes or 0 for file in files if file.key is None}
    blobs = {
        entry[2]: None
        for entry in entries
        if entry[0] == b"120000" or len(b"/annex/objects/") < sizes[entry[3]] <= 288
    }
    asked = b"".join(blob + b"\n" for blob in blobs)

    def git_alone() -> None:
        run(listing, cwd=repository)
        run(["git", "cat-file", "--batch", "--buffer"], cwd=repository, stdin=asked)

    cases = {
        "index_s": _timed(lambda: index_tree(repository, "main")),
        "git_s": _timed(git_alone),
    }
    found = interleaved(cases, runs, lambda text: console.print(f"{len(files)} files, {text}"))
    kept_bytes, peak_bytes = _memory(repository)
    ratios = [ours / git for ours, git in zip(*found.values(), strict=True)]
    return {
        "files": len(files),
        **{name: median(values) for name, values in found.items()},
        "ratio": median(ratios),
        "kept_bytes_per_file": kept_bytes / len(files),
        "peak_bytes_per_file": peak_bytes / len(files),
        "processes": processes,
    }


def _timed(work: Callable[[], object]) -> Callable[[], float]:
    def once() -> float:
        gc.collect()
        began_s = time.perf_counter()
        work()
        return time.perf_counter() - began_s

    return once


def _memory(repository: Path) -> tuple[int, int]:
    """Return the bytes that an index keeps, and the most while it is made."""
    tracemalloc.start()
    files = index_tree(repository, "main")
    kept_bytes, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del files
    return kept_bytes, peak_bytes


def _compare(repository: Path, folder: Path, runs: int, console: Console) -> dict[str, float]:
    """Return seconds of ours and of the others, by what is done."""
    folder.mkdir()
    worktree = folder / "worktree"
    _datalad("clone", repository.as_uri(), str(worktree))

    def ours() -> None:
        root = folder / "root"
        installed = install(repository.as_uri(), root)
        index_tree(installed.path, installed.commit)
        _remove(root)

    def theirs() -> None:
        _datalad("clone", repository.as_uri(), str(folder / "again"))
        _remove(folder / "again")

    cases = {
        "ours: clone and index": _timed(ours),
        "ours: index": _timed(lambda: index_tree(repository, "main")),
        "datalad clone": _timed(theirs),
        "datalad status --annex=basic": _timed(
            lambda: _datalad("-C", str(worktree), "status", "--annex=basic")
        ),
    }
    python = os.environ.get("PYBIDS_PYTHON")
    if python:
        command = [python, "-W", "ignore", "-c", _PYBIDS, str(worktree)]
        cases["pybids BIDSLayout"] = lambda: float(run(command, timeout_s=_TIMEOUT_S).split()[0])
    found = interleaved(cases, runs, console.print)
    return {name: median(values) for name, values in found.items()}


def _datalad(*arguments: str) -> None:
    """Run DataLad, with an identity, which a new home lacks and it asks for."""
    identity = {f"GIT_{who}_{what}": "t@t" for who in ("AUTHOR", "COMMITTER")
                for what in ("NAME", "EMAIL")}  # fmt: skip
    run(["datalad", *arguments], timeout_s=_TIMEOUT_S, environment=child_environment(identity))


def _remove(folder: Path) -> None:
    for inside in (folder, *folder.rglob("*")):
        if inside.is_dir() and not inside.is_symlink():
            inside.chmod(0o700)
    shutil.rmtree(folder)
