"""The index of a commit: which paths it has, and which annex keys they stand for.

Reads git objects only: no work tree, no network, no git-annex. Everything that is read is taken
for hostile: names that leave the dataset are refused, and no link is ever followed on disk. Sizes
are asked before contents, and what is listed is counted while it comes
(:mod:`~tio_openneuro.bounds`).
"""

from __future__ import annotations

import contextlib
import gc
import io
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tio_openneuro import bounds
from tio_openneuro.annex.processes import reading
from tio_openneuro.bounds import LOG_BYTES, LOGS_BYTES, refuse_above
from tio_openneuro.content import AnnexKey, TreeFile
from tio_openneuro.errors import UnsafeDatasetError

_INDEX_TIMEOUT_S = 600.0
# Mode, type and id of an entry, with an id of SHA-256.
_FACTS_BYTES = 77
_POINTER_START = b"/annex/objects/"
# A key is a file name, at most 255 bytes, so that a plain pointer is no longer than this.
_PLAIN_POINTER_BYTES = 288
# git-annex takes a blob up to this size for a pointer, if more lines follow the first.
_LARGEST_POINTER_BYTES = 32 * 1024
# Read only where small: text that datasets have by the ten thousand, and never unlocked.
_TEXT_SUFFIXES = (".json", ".tsv", ".txt", ".md", ".bval", ".bvec", ".csv", ".html", ".svg", ".py")
_LONGEST_LINK_CHAIN = 8
_LINK_MODE = b"120000"
_FILE_MODES = frozenset({b"100644", b"100755", b"100664", _LINK_MODE})
_ABSENT = (b" missing", b" ambiguous")
_FORBIDDEN_PARTS = frozenset({"", ".", "..", ".git"})


def index_tree(clone: Path, commit: str) -> list[TreeFile]:
    """List the files of a commit with their annex keys.

    Symlinks into an annex and unlocked pointer files have a key. Any other link stands for the
    file of the dataset that it names, and is left out where it names none.
    Submodules are left out.

    Args:
        clone: The clone's folder, or a bare repository.
        commit: Any name of a commit or tree.

    Returns:
        The files in git's order (bytewise by path).

    Raises:
        CommandError: The commit is not there, or git cannot read it.
        UnsafeDatasetError: A path would leave the dataset's folder; or there are more paths, or
            longer paths or links, than datasets have.
    """
    with _without_collection():
        paths: list[str] = []
        blobs: list[str] = []
        links: list[int] = []
        regular: list[int] = []
        for mode, blob, path in list_files(clone, commit):
            _refuse_unsafe(path)
            (links if mode == _LINK_MODE else regular).append(len(paths))
            paths.append(path)
            blobs.append(blob)
        # Not by `ls-tree -l`, which takes six times as long to tell the links' sizes too.
        facts = object_facts(clone, "objectsize", [blobs[n] for n in regular])
        sizes = {n: int(_required(blobs[n], fact)) for n, fact in zip(regular, facts, strict=True)}
        candidates = [n for n, size in sizes.items() if _may_be_pointer(paths[n], size)]
        keys, plain_links = _find_keys(clone, blobs, links, candidates)
        files = [
            TreeFile(path, blob, key, sizes.get(n) if key is None else key.size_bytes)
            for n, (path, blob, key) in enumerate(zip(paths, blobs, keys, strict=True))
        ]
    return _resolve_links(files, plain_links) if plain_links else files


def list_files(clone: Path, tree: str, times: int = 1) -> Iterator[tuple[bytes, str, str]]:
    """Yield mode, object id and path of each file and link of a commit or tree, in git's order.

    Args:
        clone: The clone's folder, or a bare repository.
        tree: Any name of a commit or tree.
        times: How many times as large as a dataset it may be.

    Raises:
        CommandError: It is not there, or git cannot read it.
        UnsafeDatasetError: It has more entries than datasets have, or longer ones.
    """
    # With the folders themselves: a few trees make endless ones that hold no file.
    command = ["git", "ls-tree", "-r", "-t", "-z", "--full-tree", tree]
    count = listed_bytes = 0
    where, rest = f"{clone} at {tree}", b""
    with reading(command, cwd=clone, timeout_s=_INDEX_TIMEOUT_S) as output:
        while block := output.read1():
            *entries, rest = (rest + block).split(b"\0")
            count, listed_bytes = count + len(entries), listed_bytes + len(block)
            refuse_above(bounds.ENTRIES * times, count, where, "files, links and folders")
            refuse_above(bounds.LISTING_BYTES * times, listed_bytes, where, "bytes of paths")
            longest_bytes = max(map(len, [*entries, rest])) - _FACTS_BYTES
            refuse_above(bounds.PATH_BYTES, longest_bytes, where, "bytes in one path")
            for entry in entries:
                # MODE, a space, TYPE, a space, the object's id, a tab, the path.
                facts, _, path = entry.partition(b"\t")
                mode = facts[:6]
                if mode in _FILE_MODES:
                    yield mode, facts[12:].decode(), path.decode(errors="surrogateescape")


def read_blobs(
    clone: Path, blobs: Sequence[str], most: int = LOG_BYTES, total: int = LOGS_BYTES
) -> Iterator[bytes | None]:
    """Yield the contents of git objects, and None for each that is not there.

    git says an object's size before its content, of which no more comes than asked for: what is
    large it does not hold either (:data:`~tio_openneuro.bounds.MEMORY_BYTES`).

    Args:
        clone: The clone's folder.
        blobs: Object ids, or other names of blobs without a newline.
        most: Bytes that one may have.
        total: Bytes that they may have together.

    Raises:
        CommandError: git failed.
        UnsafeDatasetError: They have more bytes; what is too long was not read.
    """
    if not blobs:
        return
    come_bytes = 0
    with _asking_git(clone, "--batch", blobs) as answer:
        for blob in blobs:
            header = answer.readline().rstrip(b"\n")
            if header.endswith(_ABSENT):
                yield None
                continue
            size_bytes = int(header.rpartition(b" ")[2])
            come_bytes += size_bytes
            refuse_above(most, size_bytes, f"{blob} of {clone}", "bytes")
            refuse_above(total, come_bytes, f"{len(blobs)} files like {blob} of {clone}", "bytes")
            yield answer.read(size_bytes + 1)[:-1]


def object_facts(clone: Path, fact: str, names: Sequence[str]) -> list[bytes | None]:
    """Return a fact about each of some git objects, with None for each that is not there.

    Args:
        clone: The clone's folder.
        fact: As git names it: ``"objectsize"``, ``"objectname"``.
        names: Their ids, or other names without a newline.
    """
    with _asking_git(clone, f"--batch-check=%({fact})", names) as answer:
        lines = answer.read().split(b"\n")[:-1]
    return [None if line.endswith(_ABSENT) else line for line in lines]


def _asking_git(
    clone: Path, what: str, blobs: Sequence[str]
) -> contextlib.AbstractContextManager[io.BufferedReader[io.FileIO]]:
    """Have one ``git cat-file`` answer about all these blobs."""
    return reading(
        ["git", "cat-file", what, "--buffer"],
        cwd=clone,
        stdin="".join(f"{blob}\n" for blob in blobs).encode(errors="surrogateescape"),
        timeout_s=_INDEX_TIMEOUT_S,
    )


def _required(blob: str, content: bytes | None) -> bytes:
    if content is None:
        raise KeyError(blob)
    return content


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Keep Python from looking for cycles, of which an index has none, at each 700 files."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _may_be_pointer(path: str, size_bytes: int) -> bool:
    """Return whether a regular file must be read to know that it is no pointer."""
    if size_bytes <= len(_POINTER_START):
        return False
    if size_bytes <= _PLAIN_POINTER_BYTES:
        return True
    return size_bytes <= _LARGEST_POINTER_BYTES and not path.endswith(_TEXT_SUFFIXES)


def _refuse_unsafe(path: str) -> None:
    """Raise UnsafeDatasetError where a path would leave the dataset's folder."""
    # The quick test settles nearly all; ".g" also finds ".GIT" where the parts are compared.
    if (
        "/." not in path
        and not path.startswith((".", "/"))
        and "\\" not in path
        and "//" not in path
    ):
        return
    parts = path.replace("\\", "/").lower().split("/")
    if _FORBIDDEN_PARTS.isdisjoint(parts):
        return
    raise UnsafeDatasetError(
        f"Refused to index the dataset: its tree has the path {path!r}, which leaves the "
        f"dataset's folder or reaches into git's own. No dataset needs that: do not use it."
    )


def _find_keys(
    clone: Path, blobs: list[str], links: list[int], candidates: list[int]
) -> tuple[list[AnnexKey | None], dict[int, str]]:
    """Return the key of each file by its number, and the targets of links that have none."""
    numbers: dict[str, list[int]] = {}
    for number in (*links, *candidates):
        numbers.setdefault(blobs[number], []).append(number)
    is_link = set(links)
    keys: list[AnnexKey | None] = [None] * len(blobs)
    plain_links: dict[int, str] = {}
    contents = read_blobs(clone, list(numbers), _LARGEST_POINTER_BYTES, bounds.IMAGE_BYTES)
    for (blob, same), content in zip(numbers.items(), contents, strict=True):
        text = _required(blob, content)
        key = None
        if b"annex/objects" in text:
            key = AnnexKey.from_pointer(text.decode(errors="surrogateescape"))
        for number in same:
            refuse_above(
                bounds.LINK_BYTES, len(text) * (number in is_link), clone, "bytes in a link"
            )
            if key is not None and (number in is_link or text.startswith(_POINTER_START)):
                keys[number] = key
            elif number in is_link:
                plain_links[number] = text.decode(errors="surrogateescape")
    return keys, plain_links


def _resolve_links(files: list[TreeFile], targets: dict[int, str]) -> list[TreeFile]:
    """Replace links inside the dataset by what they name; the others have no content."""
    by_path = {file.path: number for number, file in enumerate(files)}
    result = []
    for number, file in enumerate(files):
        end: int | None = number
        for _ in range(_LONGEST_LINK_CHAIN):
            if end is None or end not in targets:
                break
            folder = posixpath.dirname(files[end].path)
            end = by_path.get(posixpath.normpath(posixpath.join(folder, targets[end])))
        if end is None or end in targets:
            result.append(TreeFile(file.path, "", None, None))
        else:
            result.append(file if end == number else replace(files[end], path=file.path))
    return result
