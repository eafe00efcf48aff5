"""Requests and responses as the loopback server's parts hand them on. Pure; sends nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request.

    Attributes:
        method: ``"GET"``, in capitals.
        path: Decoded path without the leading slash.
        query: The first value of each query parameter; ``""`` where it has none.
        headers: Names in lower case.
        body: The whole body, uploads of objects excepted.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = b""

    @classmethod
    def parse(
        cls, method: str, target: str, headers: Mapping[str, str], body: bytes = b""
    ) -> Request:
        """Return the request of that request line and those headers."""
        parts = urlsplit(target)
        query = {
            name: values[0]
            for name, values in parse_qs(parts.query, keep_blank_values=True).items()
        }
        lower = {name.lower(): value for name, value in headers.items()}
        return cls(method, unquote(parts.path).lstrip("/"), query, lower, body)

    @property
    def signed(self) -> bool:
        """Whether it carries credentials, as only the publisher's requests do."""
        return "authorization" in self.headers


@dataclass(frozen=True, slots=True)
class FileSlice:
    """Some bytes of a file.

    Attributes:
        path: The file.
        start: Offset of the first byte.
        size_bytes: How many.
    """

    path: Path
    start: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Response:
    """One HTTP response.

    Attributes:
        status: HTTP status.
        body: What follows the headers; a HEAD request gets its length alone.
        headers: Beyond Content-Length, Date and Server.
        area: What its bytes count as, ``"s3"`` or ``"git"``; ``""``: not counted, and neither
            slowed down nor hit by faults.
        name: Path that its bytes count under: the object's key, or the repository's request.
    """

    status: int
    body: bytes | FileSlice = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    area: str = ""
    name: str = ""

    @property
    def size_bytes(self) -> int:
        """Bytes of the body."""
        return len(self.body) if isinstance(self.body, bytes) else self.body.size_bytes


def s3_error(status: int, code: str, *, area: str = "", name: str = "") -> Response:
    """Return a refusal as S3 words it, ``404`` and ``"NoSuchKey"``."""
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code></Error>'
    headers = {"Content-Type": "application/xml"}
    return Response(status, body.encode(), headers, area, name)
