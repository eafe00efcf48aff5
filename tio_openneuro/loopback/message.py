"""Requests and responses as the loopback server's parts hand them on. Pure; sends nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One HTTP request.

    Attributes:
        method: ``"GET"``, in capitals.
        path: Decoded path without the leading slash.
        query: Query parameters; ``""`` where one has no value.
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
    ) -> HttpRequest:
        """Return the request of that request line and those headers."""
        parts = urlsplit(target)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        lower = {name.lower(): value for name, value in headers.items()}
        return cls(method, unquote(parts.path).lstrip("/"), query, lower, body)

    @property
    def area(self) -> str:
        """What its answer goes out as: ``"git"``, ``"s3"``, or ``""`` for the publisher's own.

        The publisher's requests are those that carry credentials. They do not use the link.
        """
        if "authorization" in self.headers:
            return ""
        return "git" if self.path.startswith("git/") else "s3"


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
class HttpResponse:
    """One HTTP response.

    Attributes:
        status: HTTP status.
        body: What follows the headers; a HEAD request gets its length alone.
        headers: Beyond Content-Length, Date and Server.
    """

    status: int
    body: bytes | FileSlice = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Bytes of the body."""
        return len(self.body) if isinstance(self.body, bytes) else self.body.size_bytes

    def part(self, start: int, stop: int) -> bytes:
        """Return the bytes of the body from ``start`` to before ``stop``."""
        if isinstance(self.body, bytes):
            return self.body[start:stop]
        with self.body.path.open("rb") as file:
            file.seek(self.body.start + start)
            return file.read(stop - start)


def s3_error(status: int, code: str) -> HttpResponse:
    """Return a refusal as S3 words it, ``404`` and ``"NoSuchKey"``."""
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code></Error>'
    return HttpResponse(status, body.encode(), {"Content-Type": "application/xml"})
