"""A source's files at one commit, wherever the source is: accession, URL, clone, plain folder.

Owns the choice between an annex clone and a plain BIDS folder. Reads git objects and folder
entries, never image content.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tio_openneuro.annex import AnnexRepo, index_tree, read_blobs
from tio_openneuro.bounds import FILE_BYTES, TEXT_BYTES, TEXTS_BYTES, refuse_above
from tio_openneuro.content import AnnexKey, TreeFile
from tio_openneuro.errors import SelectionError
from tio_openneuro.sources.install import install, local_path


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
        plain = [file for file in self.files if file.key is None and file.size_bytes is not None]
        files = [file for file in plain if file.path in wanted]
        return read_texts(self.folder, files, most, most_all)


def read_texts(
    folder: Path, files: Sequence[TreeFile], most: int = TEXT_BYTES, most_all: int = TEXTS_BYTES
) -> dict[str, bytes]:
    """Return the bytes of tables or sidecars by their paths, in the order asked for.

    Args:
        folder: The clone, or the plain BIDS folder.
        files: Files of it that are not annexed.
        most: Bytes that one may have.
        most_all: Bytes that they may have together, equal ones counted once.

    Raises:
        UnsafeDatasetError: They have more.
        SelectionError: A file is not there any more.
    """
    sizes = {file.blob or file.path: file.size_bytes or 0 for file in files}
    for file in files:
        refuse_above(most, file.size_bytes or 0, f"{file.path} of {folder.name}", "bytes")
    where = f"{', '.join(file.path for file in files[:2])}, … of {folder.name}"
    refuse_above(most_all, sum(sizes.values()), where, "bytes")
    ids = list(dict.fromkeys(file.blob for file in files if file.blob))
    try:
        found = zip(ids, read_blobs(folder, ids, most, most_all), strict=True)
        blobs = {blob: content for blob, content in found if content is not None}
        return {f.path: blobs[f.blob] if f.blob else (folder / f.path).read_bytes() for f in files}
    except (KeyError, OSError) as error:
        gone = f"it is gone since the dataset was opened ({error}). Open the dataset anew."
        raise SelectionError(f"Cannot read {files[0].path} of {folder}: {gone}") from error


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
        source: Accession (or what names one: a page's URL, a DOI, ``ds004199@1.0.6``), git URL,
            path of a clone, or path of a plain BIDS folder.
        root: Folder of clones and ledger.
        version: Tag or commit; None for the newest snapshot.
        remotes: Names of further annex remotes to trust.
        on_step: Told of each step when it begins.

    Raises:
        NotAnAnnexError: The source is neither an annex dataset nor a BIDS folder.
        RemoteUnavailableError: The source cannot be reached.
    """
    folder = local_path(source)
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
    """Yield a plain folder's files, also behind links; one that leads nowhere has no size.

    A link to a folder is followed wherever it leads, unless it is one of those above it.
    """
    for parent, folders, names in os.walk(folder, onerror=_warn_of_folder, followlinks=True):
        here = Path(parent).resolve()
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and Path(parent, name).resolve() not in (here, *here.parents)
        )
        for name in sorted(names):
            path = Path(parent, name)
            if path.is_file() or not path.exists():
                size_bytes = path.stat().st_size if path.exists() else None
                yield TreeFile(path.relative_to(folder).as_posix(), "", None, size_bytes)


def _warn_of_folder(error: OSError) -> None:
    """Say that a folder cannot be listed."""
    warning = f"Left out {error.filename}, a folder that cannot be listed: {error.strerror}."
    warnings.warn(warning, stacklevel=6)
