"""A source's files at one commit, wherever the source is: accession, URL, clone, plain folder.

Owns the choice between an annex clone and a plain BIDS folder. Reads git objects and folder
entries, never image content.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tio_openneuro.annex import AnnexRepo, index_tree, read_blobs
from tio_openneuro.bounds import FILE_BYTES, refuse_above
from tio_openneuro.content import AnnexKey, TreeFile
from tio_openneuro.errors import SelectionError
from tio_openneuro.sources.install import install


@dataclass(frozen=True)
class Catalog:
    """One dataset at one commit.

    Attributes:
        dataset_id: Accession, or the name of the repository or folder.
        folder: The clone, or the plain BIDS folder.
        commit: The commit; empty for a plain folder.
        version: Tag or branch that led to it; empty for a plain folder.
        files: Every file of the tree.
        repo: Gives annexed content; None for a plain folder.
    """

    dataset_id: str
    folder: Path
    commit: str
    version: str
    files: tuple[TreeFile, ...]
    repo: AnnexRepo | None

    def read(self, paths: Sequence[str], most: int, most_all: int) -> dict[str, bytes]:
        """Return the bytes of those of the paths that exist and are not annexed.

        Args:
            paths: From the dataset's root.
            most: Bytes that one may have.
            most_all: Bytes that they may have together, equal ones counted once.

        Raises:
            UnsafeDatasetError: They have more.
        """
        wanted = set(paths)
        files = [file for file in self.files if file.path in wanted and file.key is None]
        sizes = {file.blob or file.path: file.size_bytes or 0 for file in files}
        for file in files:
            refuse_above(most, file.size_bytes or 0, f"{file.path} of {self.dataset_id}", "bytes")
        where = f"{', '.join(paths[:2])}, … of {self.dataset_id}"
        refuse_above(most_all, sum(sizes.values()), where, "bytes")
        if self.repo is None:
            return {file.path: (self.folder / file.path).read_bytes() for file in files}
        found = zip(sizes, read_blobs(self.folder, list(sizes), most, most_all), strict=True)
        blobs = {blob: content for blob, content in found if content is not None}
        return {file.path: blobs[file.blob] for file in files}


def open_catalog(
    source: str | Path,
    root: Path,
    *,
    version: str | None = None,
    remotes: tuple[str, ...] | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> Catalog:
    """Clone the source where needed, and list its files at the wanted version.

    Args:
        source: Accession, git URL, path of a clone, or path of a plain BIDS folder.
        root: Folder of clones and ledger.
        version: Tag or commit; None for the newest snapshot.
        remotes: Names of further annex remotes to trust.
        on_step: Told of each step when it begins.

    Raises:
        NotAnAnnexError: The source is neither an annex dataset nor a BIDS folder.
        RemoteUnavailableError: The source cannot be reached.
    """
    folder = Path(source).expanduser()
    if (folder / "dataset_description.json").is_file() and not (folder / ".git").exists():
        folder = folder.resolve()
        return Catalog(folder.name, folder, "", "", tuple(_walk(folder)), None)
    on_step("cloning")
    installed = install(source, root, version=version, remotes=remotes)
    on_step("indexing")
    return Catalog(
        installed.dataset_id,
        installed.path,
        installed.commit,
        installed.version,
        tuple(index_tree(installed.path, installed.commit)),
        AnnexRepo(
            installed.path,
            remotes=installed.remotes,
            root=Path(root).expanduser(),
            uuids=installed.uuids,
        ),
    )


def read_file(folder: Path, commit: str, path: str) -> bytes:
    """Return a file that git itself holds, or that lies in a plain folder.

    Args:
        folder: The clone, or the plain BIDS folder.
        commit: The commit; empty for a plain folder.
        path: Posix, from the dataset's root; may not leave it.

    Raises:
        SelectionError: There is no such file, or it is annexed.
        UnsafeDatasetError: It is longer than 64 MiB.
    """
    inside = not {"..", ""} & set(path.split("/")) and "\n" not in path
    content: bytes | None = None
    if inside and commit:
        (content,) = read_blobs(folder, [f"{commit}:{path}"], FILE_BYTES)
    elif inside and (folder / path).is_file():
        content = (folder / path).read_bytes()
    if content is None:
        raise SelectionError(
            f"Cannot read {path!r} of {folder.name}: there is no such file at {commit or 'it'}. "
            f"Give a path from the dataset's root."
        )
    if AnnexKey.from_pointer(content[:1024].decode(errors="replace")) is not None:
        raise SelectionError(
            f"Cannot read {path!r} of {folder.name}: its content is annexed. Select it as an image."
        )
    return content


def _walk(folder: Path) -> Iterator[TreeFile]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if path.is_file():
                relative = path.relative_to(folder).as_posix()
                yield TreeFile(relative, "", None, path.stat().st_size)
