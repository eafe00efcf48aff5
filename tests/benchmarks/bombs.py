"""What it costs to refuse a dataset that is small on disk and would be large in RAM.

Each is a repository made with git's plumbing: one content many times over, or zeros. A child opens
it as a user does, cloned through DataLad, or plain. Measured are the child's peak RSS over that of
one which opened a sound dataset, the largest RSS of any process that it started (git, git-annex,
DataLad), and the seconds until the error, of which imports take none.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
from hostile import Repository, nifti
from rich.console import Console
from rich.table import Table

RUNS = 1
WANTED_MB, WANTED_S = 300.0, 20.0
_MB = 1 << 20
_IMAGE = "sub-01/anat/sub-01_T1w.nii.gz"
_REMOTE = (
    "0f0f0f0f-1111-4222-8333-444444444444 bucket=openneuro.org encryption=none exporttree=yes "
    "host=s3.amazonaws.com name=s3-PUBLIC publicurl=https://s3.amazonaws.com/openneuro.org "
    "type=S3 versioning=yes timestamp=1700000000s\n"
)
_OPEN = """
import json, resource, sys, time
import tio_openneuro as tno
began_s, before_s = time.monotonic(), time.process_time()
said = ""
try:
    dataset = tno.DataladSubjectsDataset(
        sys.argv[1], {"t1": tno.Scalar("**/*_T1w.nii.gz")}, root=sys.argv[2], disk_budget="1 GB"
    )
    with dataset:
        if sys.argv[3:] == ["load"]:
            dataset[0]
        elif sys.argv[3:]:
            dict(dataset.dry_iter()[0]["t1"]["metadata"])
except tno.TioOpenNeuroError as error:
    said = f"{type(error).__name__}: {error}"
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
cpu_s = sum(each.ru_utime + each.ru_stime for each in used) - before_s
# Not getrusage's, which begins with what the process had from which it was forked.
status = open("/proc/self/status").read()
peak_bytes = int(status.partition("VmHWM:")[2].split()[0]) * 1024
print(json.dumps([time.monotonic() - began_s, cpu_s, peak_bytes, said]))
"""


class Bomb(Repository):
    """A dataset with one image, and a git-annex branch, to which something is added."""

    def make(
        self,
        files: Mapping[str, bytes] | None = None,
        logs: Mapping[str, bytes] | None = None,
        more: Mapping[str, tuple[str, str]] | None = None,
        *,
        message: bytes = b"made",
    ) -> None:
        """Write the branches ``main`` and ``git-annex``.

        Args:
            files: Contents by path.
            logs: The same of the git-annex branch.
            more: Mode and id of objects in the dataset's root, by name.
            message: The commit's.
        """
        sound = {
            "dataset_description.json": b"{}",
            _IMAGE: nifti((8, 8, 8), bytes(1024)) + b" " * 99,
        }
        self.branch("main", {**sound, **(files or {})})
        self.branch("git-annex", {"remote.log": _REMOTE.encode(), **(logs or {})})
        if more or message != b"made":
            entries = {}
            for line in self.git("ls-tree", "main").replace("040000", "40000").splitlines():
                facts, _, name = line.partition("\t")
                entries[name] = (facts.split()[0], facts.split()[2])
            tree = self.tree({**entries, **(more or {})})
            self.git("update-ref", "refs/heads/main", self.commit(tree, message))

    def tags(self, count: int) -> None:
        """Give it so many tags."""
        commit = self.git("rev-parse", "main")
        names = (f"{commit} refs/tags/{'t' * 60}{number:07}\n" for number in range(count))
        (self.path / "packed-refs").write_text("".join(names))

    def twins(self, count: int, name: str, content: bytes) -> dict[str, tuple[str, str]]:
        """Return that many folders of subjects with an image and one file of this content."""
        image, blob = self.blob(nifti((8, 8, 8), bytes(1024)) + b" " * 99), self.blob(content)
        found = {}
        for number in range(2, count + 2):
            stem = f"sub-{number:05}"
            files = {f"{stem}_T1w.nii.gz": ("100644", image), f"{stem}_{name}": ("100644", blob)}
            found[stem] = ("40000", self.tree(files))
        return found


def _zeros(count: int) -> bytes:
    return bytes(count * _MB)


BOMBS: dict[str, Callable[[Bomb], None]] = {
    "a tree of 10^10 files": lambda r: r.make(
        more={"e": ("40000", r.endless({"x": ("100644", r.blob(b"x"))}))}
    ),
    "a tree of 10^10 empty folders": lambda r: r.make(more={"e": ("40000", r.endless({}))}),
    "a path of 1 MB": lambda r: r.make(more={"n" * _MB: ("100644", r.blob(b"x"))}),
    "a link of 400 MB": lambda r: r.make(more={"l": ("120000", r.blob(b"a/" * (200 * _MB)))}),
    "remote.log of 400 MB": lambda r: r.make(logs={"remote.log": b"\n" * (400 * _MB)}),
    "uuid.log of 400 MB": lambda r: r.make(logs={"uuid.log": b"\n" * (400 * _MB)}),
    "a key's log of 400 MB": lambda r: r.make(logs={"abc/def/K.log.rmet": b"\n" * (400 * _MB)}),
    "a table of 64 MB, no text": lambda r: r.make({"participants.tsv": b"a\n" * (32 * _MB)}),
    "a table of 16 MB, all tabs": lambda r: r.make({"participants.tsv": b"a" + b"\t" * (15 * _MB)}),
    "a table of 40,000 x 40,000": lambda r: r.make(
        {"participants.tsv": b"a\t" * 40_000 + b"\ns" * 40_000}
    ),
    "2,000 tables of 1 MB": lambda r: r.make(
        more=r.twins(2_000, "sessions.tsv", b"session_id\n" + b"1\n" * (_MB // 2))
    ),
    "a sidecar of 64 MB": lambda r: r.make({"T1w.json": b'{"a":[' + b"[]," * (21 * _MB) + b"1]}"}),
    "a sidecar of 4 MB, nested": lambda r: r.make({"T1w.json": b'{"a":' * (_MB // 2)}),
    "a commit message of 400 MB": lambda r: r.make(message=_zeros(400).replace(b"\0", b"m")),
    "1,000,000 tags": lambda r: (r.make(), r.tags(1_000_000)),  # type: ignore[func-returns-value]
    "an image of 30,000^3": lambda r: r.make({_IMAGE: nifti((30_000,) * 3, bytes(1024))}),
    "an extension of 1 GB": lambda r: r.make(
        {_IMAGE: nifti((8, 8, 8), bytes(1024), extension_bytes=1 << 30)}
    ),
}


def measure(runs: int, folder: Path, console: Console) -> dict[str, object]:
    """Run it, print its table and return its figures."""
    del runs
    sound = Bomb(folder / "sound")
    sound.make()
    base_s, base_cpu_s, base_bytes, base_child_bytes, said = _open(
        sound.path, folder / "root-sound", "load"
    )
    assert not said, said
    title = f"Bombs; wanted: below {WANTED_MB:.0f} MB and {WANTED_S:.0f} s, and an error of ours"
    table = Table(title=title)
    for name in ("", "MB over base", "largest child MB", "s", "CPU s", "error"):
        table.add_column(name, justify="left" if name in {"", "error"} else "right")
    found: dict[str, object] = {
        "base_mb": base_bytes / 1e6,
        "base_child_mb": base_child_bytes / 1e6,
        "base_s": base_s,
        "base_cpu_s": base_cpu_s,
    }
    for number, (name, make) in enumerate(BOMBS.items()):
        bomb = Bomb(folder / f"bomb-{number:02}")
        make(bomb)
        seconds, cpu_s, peak_bytes, child_bytes, said = _open(
            bomb.path,
            folder / f"root-{number}",
            "sidecar" if "sidecar" in name else "load" if name[:3] == "an " else "",
        )
        over_mb, child_mb = (peak_bytes - base_bytes) / 1e6, child_bytes / 1e6
        found[name] = {
            "over_mb": over_mb,
            "child_mb": child_mb,
            "s": seconds,
            "cpu_s": cpu_s,
            "said": said,
        }
        short = said.replace(str(folder), "…")[:70]
        table.add_row(
            name, f"{over_mb:.0f}", f"{child_mb:.0f}", f"{seconds:.1f}", f"{cpu_s:.1f}", short
        )
        console.print(
            f"{name}: {over_mb:.0f} MB, child {child_mb:.0f} MB, {seconds:.1f} s, "
            f"{cpu_s:.1f} of CPU: {said}"
        )
    console.print(table)
    return found


def _open(repository: Path, root: Path, ask: str = "") -> tuple[float, float, int, int, str]:
    """Open a repository in a child of our own, and ask for nothing, the image or its sidecar.

    Returns:
        Seconds, processor seconds of it and all that it started, peak RSS of it and of the largest
        program that it started other than Python, and the error.
    """
    wanted = [repository.as_uri(), str(root), *filter(None, [ask])]
    command = [sys.executable, "-c", _OPEN, *wanted]
    child_bytes = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        opening = psutil.Process(process.pid)
        while process.poll() is None:
            time.sleep(0.02)
            with contextlib.suppress(psutil.Error, OSError):
                for child in opening.children(recursive=True):
                    # Each program's own: it begins with exec, unlike what getrusage tells.
                    status = Path(f"/proc/{child.pid}/status").read_text()
                    if "VmHWM:" in status and child.exe() != opening.exe():
                        kib = int(status.partition("VmHWM:")[2].split()[0])
                        child_bytes = max(child_bytes, kib * 1024)
        seconds, cpu_s, peak_bytes, said = json.loads(process.communicate()[0].splitlines()[-1])
    return seconds, cpu_s, peak_bytes, child_bytes, said
