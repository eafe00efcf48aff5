"""Datasets as a stranger might write them: a sound one, published first, and then tampered with."""

import gzip
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path

from faulty import LoopbackOpenNeuro

from tio_openneuro.annex.environment import child_environment
from tio_openneuro.annex.processes import run
from tio_openneuro.annex.tree import index_tree
from tio_openneuro.content import AnnexKey


class Tampered:
    """The public repository of a published accession, rewritten commit by commit."""

    def __init__(self, server: LoopbackOpenNeuro, accession: str) -> None:
        self.bare = server.folder / "git" / f"{accession}.git"

    def git(self, *arguments: str, stdin: bytes = b"", index: str = "index") -> str:
        """Run git in the bare repository."""
        path = str(self.bare / f"tamper-{index}")
        command = ["git", *arguments]
        environment = child_environment({"GIT_INDEX_FILE": path})
        return run(command, cwd=self.bare, stdin=stdin, environment=environment).decode().strip()

    def write(self, branch: str, files: Mapping[str, tuple[str, bytes]]) -> str:
        """Put files, ``path -> (mode, content)``, on top of a branch; return the commit."""
        index = branch.replace("/", "-")
        self.git("read-tree", f"refs/heads/{branch}", index=index)
        for path, (mode, content) in files.items():
            blob = content.decode()
            if mode != "160000":
                blob = self.git("hash-object", "-w", "--stdin", stdin=content)
            entry = f"{mode},{blob},{path}"
            self.git("update-index", "--add", "--cacheinfo", entry, index=index)
        tree = self.git("write-tree", index=index)
        commit = self.git("commit-tree", tree, "-p", f"refs/heads/{branch}", "-m", "update")
        self.git("update-ref", f"refs/heads/{branch}", commit)
        return commit

    def append(self, texts: Mapping[str, str]) -> None:
        """Append lines to files of the git-annex branch."""
        files = {}
        for path, text in texts.items():
            try:
                old = self.git("show", f"refs/heads/git-annex:{path}") + "\n"
            except Exception as error:
                if "does not exist" not in str(getattr(error, "stderr", "")):
                    raise
                old = ""
            files[path] = ("100644", (old + text).encode())
        self.write("git-annex", files)

    def tag(self, commit: str, tag: str = "6.6.6") -> None:
        """Make a commit the newest snapshot."""
        self.git("tag", tag, commit)

    def annex_keys(self) -> list[AnnexKey]:
        """Return the annex keys of the branch ``main``."""
        files = index_tree(self.bare, "refs/heads/main")
        return list(dict.fromkeys(file.key for file in files if file.key is not None))


def branch_log(key: AnnexKey, suffix: str = ".log") -> str:
    """Return where the git-annex branch has a log of a key."""
    return f"{key.object_paths()[1].removeprefix('annex/objects/')[:8]}{key.name}{suffix}"


def remote_line(number: int, fields: str) -> str:
    """Return a line of ``remote.log`` of a remote that asks to be enabled."""
    return f"{remote_uuid(number)} autoenable=true {fields} timestamp=1700000000s\n"


def remote_uuid(number: int) -> str:
    """Return the id of a remote of that number."""
    return f"{number:08}-1111-4222-8333-444444444444"


def witness(folder: Path, name: str, mark: Path, *, then: str = "exit 1") -> None:
    """Write a program that leaves a mark when it is run."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / name
    script.write_text(f"#!/bin/sh\necho {name} >> '{mark}'\n{then}\n")
    script.chmod(0o755)


def nifti(
    shape: tuple[int, ...], body: bytes = b"", *, extension_bytes: int = 0, inflated: int = 0
) -> bytes:
    """Return a compressed NIfTI-1 file whose header says what it is told to.

    Args:
        shape: What the header states.
        body: What follows.
        extension_bytes: Length of an extension of the header, all zeros.
        inflated: Zeros at the end.
    """
    header = bytearray(348)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, len(shape), *shape, *[1] * (7 - len(shape)))
    struct.pack_into("<hh", header, 70, 4, 16)
    struct.pack_into("<8f", header, 76, *[1.0] * 8)
    struct.pack_into("<ff", header, 108, 352.0 + extension_bytes, 1.0)
    struct.pack_into("<hh", header, 252, 0, 1)
    for row in range(3):
        struct.pack_into("<4f", header, 280 + 16 * row, *[float(n == row) for n in range(4)])
    header[344:348] = b"n+1\0"
    extender = (
        struct.pack("<4sii", b"\1\0\0\0", extension_bytes, 6) if extension_bytes else bytes(4)
    )
    parts = [gzip.compress(bytes(header) + extender, 1)]
    block = gzip.compress(bytes(1 << 24), 9)
    parts += [block] * (max(extension_bytes, inflated) >> 24)
    return b"".join([*parts, gzip.compress(body, 1)]) if body else b"".join(parts)


def peak_bytes() -> int:
    """Return the largest resident memory that this process ever had."""
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def enable_public(clone: Path) -> None:
    """Enable OpenNeuro's bucket in a clone, as its user does, who looks at it first."""
    said = run(["git", "annex", "enableremote", "s3-PUBLIC"], cwd=clone).decode()
    number = re.search(r"verifyremote \S+ --safe (\S+)", said)
    if number is not None:
        run(["git", "annex", "verifyremote", "s3-PUBLIC", "--safe", number[1]], cwd=clone)


class Repository:
    """A bare repository that is written object by object."""

    def __init__(self, path: Path) -> None:
        self.path = path
        run(["git", "init", "-q", "--bare", "-b", "main", str(path)])

    def git(self, *arguments: str, stdin: bytes = b"") -> str:
        """Run git in it; an object of any size may be written."""
        environment = child_environment()
        del environment["GIT_ALLOC_LIMIT"]
        command = ["git", *arguments]
        return run(command, cwd=self.path, stdin=stdin, environment=environment).decode().strip()

    def blob(self, content: bytes) -> str:
        """Write a blob and return its id."""
        return self.git("hash-object", "-w", "--stdin", stdin=content)

    def tree(self, entries: Mapping[str, tuple[str, str]]) -> str:
        """Write a folder of names with mode and id, and return its own."""
        kinds = {"40000": "tree", "160000": "commit"}
        lines = [f"{m} {kinds.get(m, 'blob')} {i}\t{name}\0" for name, (m, i) in entries.items()]
        return self.git("mktree", "-z", stdin="".join(lines).encode())

    def endless(self, leaf: Mapping[str, tuple[str, str]]) -> str:
        """Write a folder in which there are ten thousand million of these."""
        tree = self.tree(leaf)
        for _ in range(10):
            tree = self.tree({f"{number}": ("40000", tree) for number in range(10)})
        return tree

    def commit(self, tree: str, message: bytes = b"made") -> str:
        """Write a commit and return its id."""
        return self.git("commit-tree", tree, stdin=message)

    def branch(self, name: str, files: Mapping[str, bytes]) -> str:
        """Make a branch of these files, by path, and return its commit."""
        stream = [
            f"commit refs/heads/{name}\ncommitter t <t@t> 1700000000 +0000\ndata 0\n".encode()
        ]
        for path, content in files.items():
            stream.append(
                f"M 100644 inline {path}\ndata {len(content)}\n".encode() + content + b"\n"
            )
        self.git("fast-import", "--quiet", stdin=b"".join(stream))
        return self.git("rev-parse", name)
