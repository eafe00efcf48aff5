"""A versioned S3 bucket on disk, as much of it as git-annex and anonymous readers use.

Every upload of a key is a version of its own, and stays. The disk is the only state: a store
opened again on the same folder gives the same answers.
"""

from __future__ import annotations

import base64
import hashlib
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tio_openneuro.loopback.message import FileSlice, Request, Response, s3_error

if TYPE_CHECKING:
    from pathlib import Path

_BLOCK_BYTES = 1 << 20
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_DELETED = "deleted"
_LAST_MODIFIED = "Mon, 01 Jan 2024 00:00:00 GMT"


class Readable(Protocol):
    """Where the content of an upload comes from."""

    def read(self, size: int, /) -> bytes:
        """Return that many bytes, or fewer at the end."""


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """One version of an object.

    Attributes:
        path: File that holds it; its name is ``NUMBER-MD5``, or ``NUMBER-deleted``.
        key: Bucket and key, ``openneuro.org/ds000001/README``.
    """

    path: Path
    key: str

    @property
    def deleted(self) -> bool:
        """Whether it marks that the object was deleted."""
        return self.path.name.endswith(_DELETED)

    @property
    def etag(self) -> str:
        """The ETag as S3 gives it: the MD5, in quotes."""
        return f'"{self.path.name.partition("-")[2]}"'

    @property
    def version_id(self) -> str:
        """The id that S3 would have drawn: 32 characters, dots and underscores among them."""
        digest = hashlib.sha256(f"{self.key}\n{self.path.name}".encode()).digest()
        return base64.b64encode(digest[:24], altchars=b"._").decode()


class ObjectStore:
    """Objects with versions, below one folder; safe to share by threads of one process."""

    def __init__(self, folder: Path) -> None:
        """Use that folder, which need not exist yet."""
        self._folder = folder
        self._lock = threading.Lock()

    def versions(self, key: str) -> list[StoredVersion]:
        """Return all versions of an object, oldest first; none where there never was one."""
        folder = self._versions_folder(key)
        if folder is None or not folder.is_dir():
            return []
        names = sorted(path for path in folder.iterdir() if path.suffix != ".part")
        return [StoredVersion(path, key) for path in names]

    def find(self, key: str, version_id: str | None = None) -> StoredVersion | None:
        """Return one version of an object, or the latest, or None where there is none."""
        versions = self.versions(key)
        if version_id is None:
            return versions[-1] if versions and not versions[-1].deleted else None
        for version in versions:
            if version.version_id == version_id and not version.deleted:
                return version
        return None

    def put(self, key: str, stream: Readable, size_bytes: int) -> StoredVersion:
        """Read an object from a stream and keep it as the newest version.

        Args:
            key: Bucket and key.
            stream: Where the content comes from.
            size_bytes: How many bytes of it.

        Raises:
            ConnectionError: The stream ended early; nothing is kept.
            ValueError: The key would lie outside the store.
        """
        folder = self._versions_folder(key)
        if folder is None:
            message = f"Cannot store {key!r}: it would lie outside the store."
            raise ValueError(message)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{threading.get_ident()}.part"
        md5 = hashlib.md5(usedforsecurity=False)
        rest = size_bytes
        with part.open("wb") as file:
            while rest and (block := stream.read(min(rest, _BLOCK_BYTES))):
                md5.update(block)
                file.write(block)
                rest -= len(block)
        if rest:
            part.unlink()
            message = f"Cannot store {key}: {rest} of {size_bytes} bytes did not arrive."
            raise ConnectionError(message)
        return self._append(key, folder, part, md5.hexdigest())

    def delete(self, key: str) -> StoredVersion | None:
        """Mark an object as deleted; its versions stay. None where there never was one."""
        folder = self._versions_folder(key)
        if folder is None or not folder.is_dir():
            return None
        part = folder / f"{threading.get_ident()}.part"
        part.touch()
        return self._append(key, folder, part, _DELETED)

    def _append(self, key: str, folder: Path, part: Path, label: str) -> StoredVersion:
        with self._lock:
            path = folder / f"{len(self.versions(key)):06d}-{label}"
            part.replace(path)
        return StoredVersion(path, key)

    def _versions_folder(self, key: str) -> Path | None:
        """Return the folder of an object's versions, or None for a key that leads out."""
        parts = key.split("/")
        if not all(parts) or not {".", ".."}.isdisjoint(parts):
            return None
        # A key may be a prefix of another one: the sign keeps folder and object apart.
        return self._folder.joinpath(*parts[:-1], parts[-1] + "@")


def answer(store: ObjectStore, request: Request, stream: Readable) -> Response:
    """Answer a request for the store, as S3 does to one in path style.

    Reading is open to all, writing to requests that carry credentials (of any kind).

    Args:
        store: The objects.
        request: The request.
        stream: Where the body of an upload is read from.
    """
    bucket, _, key = request.path.partition("/")
    if not key:
        return _answer_bucket(request, bucket)
    area = "" if request.signed else "s3"
    if request.method in ("GET", "HEAD"):
        return _read(store, request, area, key)
    if not request.signed:
        return s3_error(403, "AccessDenied", area=area, name=key)
    if request.method == "PUT":
        size_bytes = int(request.headers.get("content-length", "0"))
        version = store.put(request.path, stream, size_bytes)
        headers = {"ETag": version.etag, "x-amz-version-id": version.version_id}
        return Response(200, headers=headers)
    if request.method == "DELETE":
        marker = store.delete(request.path)
        headers = {} if marker is None else {"x-amz-version-id": marker.version_id}
        return Response(204, headers=headers)
    return s3_error(405, "MethodNotAllowed")


def _read(store: ObjectStore, request: Request, area: str, key: str) -> Response:
    version_id = request.query.get("versionId")
    version = store.find(request.path, version_id)
    if version is None:
        code = "NoSuchKey" if version_id is None else "NoSuchVersion"
        return s3_error(404, code, area=area, name=key)
    size_bytes = version.path.stat().st_size
    headers = {
        "ETag": version.etag,
        "x-amz-version-id": version.version_id,
        "Accept-Ranges": "bytes",
        "Last-Modified": _LAST_MODIFIED,
        "Content-Type": "application/octet-stream",
    }
    wanted = parse_range(request.headers.get("range"), size_bytes)
    if wanted is None:
        whole = FileSlice(version.path, 0, size_bytes)
        return Response(200, whole, headers, area, key)
    start, stop = wanted
    if start >= stop:
        error = s3_error(416, "InvalidRange", area=area, name=key)
        unsatisfied = {**error.headers, "Content-Range": f"bytes */{size_bytes}"}
        return Response(416, error.body, unsatisfied, area, key)
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size_bytes}"
    return Response(206, FileSlice(version.path, start, stop - start), headers, area, key)


def parse_range(header: str | None, size_bytes: int) -> tuple[int, int] | None:
    """Return the first byte and the one after the last of a Range header.

    Args:
        header: The header's value, or None where there is none.
        size_bytes: Size of the object.

    Returns:
        None: the whole object (no header, or one that asks for something else). An empty or
        inverted range: it cannot be satisfied.
    """
    match = _RANGE.fullmatch(header or "")
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        return max(0, size_bytes - int(match[2])), size_bytes
    start = int(match[1])
    stop = min(int(match[2]) + 1, size_bytes) if match[2] else size_bytes
    return start, stop


def _answer_bucket(request: Request, bucket: str) -> Response:
    """Answer what git-annex asks of a bucket: whether it exists, where it is, its versioning."""
    if not request.signed:
        return s3_error(403, "AccessDenied")
    if request.method in ("PUT", "HEAD"):
        return Response(200)
    if "location" in request.query:
        root, inside = "LocationConstraint", ""
    elif "versioning" in request.query:
        root, inside = "VersioningConfiguration", "<Status>Enabled</Status>"
    else:
        root = "ListBucketResult"
        inside = (
            f"<Name>{bucket}</Name><Prefix></Prefix><Marker></Marker><MaxKeys>1000</MaxKeys>"
            "<IsTruncated>false</IsTruncated>"
        )
    namespace = "http://s3.amazonaws.com/doc/2006-03-01/"
    xml = f'<?xml version="1.0" encoding="UTF-8"?>\n<{root} xmlns="{namespace}">{inside}</{root}>'
    return Response(200, xml.encode(), {"Content-Type": "application/xml"})
