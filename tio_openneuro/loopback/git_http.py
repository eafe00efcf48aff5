"""Git over smart HTTP, for reading, as GitHub serves it.

Two requests only: the advertisement of the references and the pack. Everything else, a
repository's ``config`` above all, is not found, which is what tells git-annex that no annex is
behind the address.
"""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING

from tio_openneuro.annex import child_environment, reading
from tio_openneuro.loopback.message import HttpRequest, HttpResponse

if TYPE_CHECKING:
    from pathlib import Path

_SERVICE = "git-upload-pack"


def answer(repositories: Path, request: HttpRequest) -> HttpResponse:
    """Answer a request below ``/git/``.

    Args:
        repositories: Folder of the bare repositories, ``NAME.git``.
        request: The request; its path is ``git/NAME.git/…`` (``.git`` may be left out).
    """
    _, _, rest = request.path.partition("/")
    name, _, service = rest.partition("/")
    folder = repositories / f"{name.removesuffix('.git')}.git"
    known = name not in ("", ".", "..") and (folder / "HEAD").is_file()
    if known and request.method == "GET" and service == "info/refs":
        if request.query.get("service") != _SERVICE:
            return _plain(403, "Only git-upload-pack is served here.")
        return _advertise(folder, request)
    if known and request.method == "POST" and service == _SERVICE:
        return _upload_pack(folder, request)
    return _plain(404, "Not Found")


def _advertise(folder: Path, request: HttpRequest) -> HttpResponse:
    advertisement = _run_upload_pack(folder, request, b"", "--http-backend-info-refs")
    if "version=2" not in request.headers.get("git-protocol", ""):
        line = f"# service={_SERVICE}\n".encode()
        advertisement = b"%04x%b0000%b" % (len(line) + 4, line, advertisement)
    return _git(advertisement, "advertisement")


def _upload_pack(folder: Path, request: HttpRequest) -> HttpResponse:
    body = request.body
    if request.headers.get("content-encoding") == "gzip":
        body = gzip.decompress(body)
    return _git(_run_upload_pack(folder, request, body), "result")


def _run_upload_pack(folder: Path, request: HttpRequest, body: bytes, *options: str) -> bytes:
    environment = child_environment({"GIT_PROTOCOL": request.headers.get("git-protocol", "")})
    command = ["git", "upload-pack", "--stateless-rpc", *options, str(folder)]
    with reading(command, stdin=body, environment=environment) as output:
        return output.read()


def _git(body: bytes, kind: str) -> HttpResponse:
    headers = {"Content-Type": f"application/x-{_SERVICE}-{kind}", "Cache-Control": "no-cache"}
    return HttpResponse(200, body, headers)


def _plain(status: int, text: str) -> HttpResponse:
    return HttpResponse(status, text.encode(), {"Content-Type": "text/plain"})
