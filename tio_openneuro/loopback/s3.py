"""A versioned S3 bucket on disk, as much of it as git-annex and anonymous readers use.

Every upload of a key is a version of its own, and stays. The disk is the only state.
"""

from __future__ import annotations

import base64
import hashlib
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tio_openneuro.loopback.message import FileSlice, HttpRequest, HttpResponse, s3_error

if TYPE_CHECKING:
    from io import BufferedIOBase
    from pathlib import Path

_BLOCK_BYTES = 1 << 20
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_DELETED = "deleted"
_LAST_MODIFIED = "Mon, 01 Jan 2024 00:00:00 GMT"


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
    def version_id(self) -> str:
        """The id that S3 would have drawn: 32 characters, dots and underscores among them."""
        digest = hashlib.sha256(f"{self.key}\n{self.path.name}".encode()).digest()
        return base64.b64encode(digest[:24], altchars=b"._").decode()

    @property
    def headers(self) -> dict[str, str]:
        """What tells it from other versions: the MD5 in quotes, and the id."""
        return {
            "ETag": f'"{self.path.name.partition("-")[2]}"',
            "x-amz-version-id": self.version_id,
        }


class ObjectStore:
    """Objects with versions, below one folder; safe to share by threads of one process."""

    def __init__(self, folder: Path) -> None:
        """Use that folder, which need not exist yet."""
        self._folder = folder
        self._lock = threading.Lock()

    def find(self, key: str, version_id: str | None = None) -> StoredVersion | None:
        """Return one version of an object, or the latest, or None where there is none."""
        versions = self._versions(key)
        if version_id is None:
            gone = not versions or versions[-1].path.name.endswith(_DELETED)
            return None if gone else versions[-1]
        return next((known for known in versions if known.version_id == version_id), None)

    def put(self, key: str, stream: BufferedIOBase, size_bytes: int) -> StoredVersion:
        """Read an object from a stream and keep it as the newest version.

        Args:
            key: Bucket and key; it leads nowhere outside.
            stream: Where the content comes from.
            size_bytes: How many bytes of it.

        Raises:
            ConnectionError: The stream ended early; nothing is kept.
        """
        md5 = hashlib.md5(usedforsecurity=False)
        rest = size_bytes
        part = self._part(key)
        with part.open("wb") as file:
            while rest and (block := stream.read(min(rest, _BLOCK_BYTES))):
                md5.update(block)
                file.write(block)
                rest -= len(block)
        if rest:
            part.unlink()
            message = f"Cannot store {key}: {rest} of {size_bytes} bytes did not arrive."
            raise ConnectionError(message)
        return self._append(key, part, md5.hexdigest())

    def delete(self, key: str) -> StoredVersion:
        """Mark an object as deleted; its versions stay."""
        part = self._part(key)
        part.touch()
        return self._append(key, part, _DELETED)

    def _part(self, key: str) -> Path:
        folder = self._versions_folder(key)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{threading.get_ident()}.part"

    def _append(self, key: str, part: Path, label: str) -> StoredVersion:
        with self._lock:
            path = part.with_name(f"{len(self._versions(key)):06d}-{label}")
            part.replace(path)
        return StoredVersion(path, key)

    def _versions(self, key: str) -> list[StoredVersion]:
        """Return all versions of an object, oldest first; none where there never was one."""
        paths = sorted(self._versions_folder(key).glob("*-*"))
        return [StoredVersion(path, key) for path in paths]

    def _versions_folder(self, key: str) -> Path:
        # A key may be a prefix of another one: the sign keeps folder and object apart.
        return self._folder / f"{key}@"


def answer(store: ObjectStore, request: HttpRequest, stream: BufferedIOBase) -> HttpResponse:
    """Answer a request for the store, as S3 does to one in path style.

    Reading is open to all, writing to requests that carry credentials (of any kind).

    Args:
        store: The objects.
        request: The request.
        stream: Where the body of an upload is read from.
    """
    bucket, _, key = request.path.partition("/")
    parts = key.split("/")
    if not key:
        return _answer_bucket(request, bucket)
    if not all(parts) or not {".", ".."}.isdisjoint(parts):
        return s3_error(404, "NoSuchKey")
    if request.method in ("GET", "HEAD"):
        return _read(store, request)
    if request.area or request.method not in ("PUT", "DELETE"):
        return s3_error(403, "AccessDenied")
    if request.method == "DELETE":
        return HttpResponse(204, headers=store.delete(request.path).headers)
    size_bytes = int(request.headers.get("content-length", "0"))
    return HttpResponse(200, headers=store.put(request.path, stream, size_bytes).headers)


def _read(store: ObjectStore, request: HttpRequest) -> HttpResponse:
    version_id = request.query.get("versionId")
    version = store.find(request.path, version_id)
    if version is None:
        return s3_error(404, "NoSuchKey" if version_id is None else "NoSuchVersion")
    size_bytes = version.path.stat().st_size
    headers = {
        **version.headers,
        "Accept-Ranges": "bytes",
        "Last-Modified": _LAST_MODIFIED,
        "Content-Type": "application/octet-stream",
    }
    wanted = parse_range(request.headers.get("range"), size_bytes)
    if wanted is None:
        return HttpResponse(200, FileSlice(version.path, 0, size_bytes), headers)
    start, stop = wanted
    if start >= stop:
        error = s3_error(416, "InvalidRange")
        unsatisfied = {**error.headers, "Content-Range": f"bytes */{size_bytes}"}
        return HttpResponse(416, error.body, unsatisfied)
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size_bytes}"
    return HttpResponse(206, FileSlice(version.path, start, stop - start), headers)


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


def _answer_bucket(request: HttpRequest, bucket: str) -> HttpResponse:
    """Answer what git-annex asks of a bucket: whether it is there, and to keep versions."""
    if request.area:
        return s3_error(403, "AccessDenied")
    if request.method == "PUT":
        return HttpResponse(200)
    xml = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{bucket}</Name><Prefix></Prefix><Marker></Marker><MaxKeys>1000</MaxKeys>"
        "<IsTruncated>false</IsTruncated></ListBucketResult>"
    )
    return HttpResponse(200, xml.encode(), {"Content-Type": "application/xml"})
