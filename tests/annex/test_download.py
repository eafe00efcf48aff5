"""Content over HTTP: where it comes from, what is refused, and what git-annex makes of it.

What both ways promise stands in ``test_repo_contract.py`` and ``test_repo.py``, which run on both.
"""

import contextlib
import hashlib
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from faulty import Fault, FaultKind, LoopbackOpenNeuro
from web import Answer, Authority, Proxy, Scripted, rewrite_branch, set_public_url, tls_front

from tio_openneuro.annex.branch import PublicUrls
from tio_openneuro.annex.download import _move
from tio_openneuro.annex.environment import child_environment
from tio_openneuro.annex.processes import run
from tio_openneuro.annex.repo import AnnexRepo
from tio_openneuro.annex.transfer import OWN_PREFIX
from tio_openneuro.annex.tree import index_tree
from tio_openneuro.content import AnnexKey, StoredContent
from tio_openneuro.errors import (
    ContentMismatchError,
    DropRefusedError,
    FetchError,
    RemoteUnavailableError,
)
from tio_openneuro.sources.install import install

ACCESSION = "ds900072"
BUCKET = "openneuro.org"
NAMES = ["a b", "a+b", "a#b", "a%20b", "é", "a'(1)!*~@&=,;$[x]", "plain_T1w"]


def git(folder: Path, *arguments: str) -> str:
    return run(["git", *arguments], cwd=folder).decode().strip()


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of clones that the tests copy, and of the authority."""
    return tmp_path_factory.mktemp("templates")


@pytest.fixture
def repo(
    openneuro: LoopbackOpenNeuro,
    templates: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[AnnexRepo]:
    """Return a clone of ours with short deadlines, where nothing is trusted and no proxy is set."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in ("GIT_SSL_CAINFO", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    if not (templates / "clones").exists():
        files = {f"sub-{n:02}.nii.gz": random.Random(n).randbytes(300_000) for n in range(1, 13)}
        openneuro.publish(ACCESSION, files)
        openneuro.reset_counters()
        install(ACCESSION, templates)
    clone = tmp_path / "root" / "clones" / ACCESSION
    shutil.copytree(templates / "clones" / ACCESSION, clone, symlinks=True)
    repo = AnnexRepo(clone, stall_timeout_s=2.0, total_timeout_s=20.0)
    yield repo
    repo.close()


@pytest.fixture
def authority(templates: Path) -> Authority:
    """Return a local authority, which nobody trusts yet."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make certificates")
    folder = templates / "authority"
    if (folder / "server.pem").exists():
        return Authority(folder / "ca.pem", folder / "server.pem")
    return Authority.make(folder)


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    """Return a server that says what it is told."""
    with Scripted().serving() as server:
        yield server


def keys_of(repo: AnnexRepo) -> list[AnnexKey]:
    files = index_tree(repo.path, "refs/tags/1.0.0")
    return list(dict.fromkeys(file.key for file in files if file.key is not None))


def is_right(key: AnnexKey, path: Path) -> bool:
    return hashlib.sha256(path.read_bytes()).hexdigest() in key.name


def used_git_annex(repo: AnnexRepo) -> bool:
    """Return whether this process started a git-annex to fetch or drop in the clone."""
    children = repo._by_process[os.getpid()]
    return bool(children._transfers) or children._dropper is not None


def own_partial(repo: AnnexRepo, key: AnnexKey) -> Path:
    return repo.path / ".git/annex/tmp" / f"{OWN_PREFIX}{key.name}"


def content_of(openneuro: LoopbackOpenNeuro, key: AnnexKey) -> bytes:
    """Return a key's content, from where it was published."""
    objects = openneuro.folder / "publisher/ds900072/.git"
    return next(objects / p for p in key.object_paths() if (objects / p).exists()).read_bytes()


def record(clone: Path, key: AnnexKey, *versions: tuple[str, str]) -> None:
    """Record versions of a key, each an id and a path, the oldest first."""
    (uuid,) = re.findall(r"annex-uuid=(\S+)", git(clone, "config", "--list"))[-1:]
    lines = "".join(f"{at}s {uuid}:V +{v}#{path}\n" for at, (v, path) in enumerate(versions, 1))
    folders = key.object_paths()[1].removeprefix("annex/objects/")[:8]
    rewrite_branch(clone, {f"{folders}{key.name}.log.rmet": lines.encode()})


def fork_and_kill(repo: AnnexRepo, key: AnnexKey, step: int) -> bool:
    """Fetch and drop in a process that is killed before that step on disk; say whether it was."""
    disk = {"open", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}
    left = step
    here = os.fspath(repo.path / ".git" / "annex")

    def kill(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in disk and str(arguments[0]).startswith(here):
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    def fetch_and_drop() -> None:
        sys.addaudithook(kill)
        repo.get(key)
        repo.drop(key)

    child = multiprocessing.get_context("fork").Process(target=fetch_and_drop)
    child.start()
    child.join()
    assert child.exitcode in {0, -signal.SIGKILL}
    return child.exitcode != 0


class TestWhere:
    """Which keys come over HTTP, and from which URL."""

    def test_urls_are_those_that_git_annex_asks_for(
        self, openneuro: LoopbackOpenNeuro, root: Path
    ) -> None:
        """Path and version of each, also where names hold spaces, signs and letters."""
        files = {f"sub-01/{n}.nii.gz": random.Random(n).randbytes(900) for n in NAMES}
        if not (openneuro.folder / "git/ds900071.git").exists():
            openneuro.publish("ds900071", files)
        clone = install("ds900071", root).path
        public = PublicUrls(clone, {})
        for file in index_tree(clone, "refs/tags/1.0.0"):
            if file.key is None:
                continue
            said = subprocess.run(
                ["git", "annex", "get", "--debug", "--from", "s3-PUBLIC", "--key", file.key.text],
                cwd=clone,
                env=child_environment(),
                capture_output=True,
                text=True,
                check=True,
            ).stderr
            asked = dict(re.findall(r'^  (host|path|queryString) += "(.*)"$', said, re.MULTILINE))
            (url,) = public.of(file.key, "s3-PUBLIC")
            parts = urlsplit(url)
            assert (parts.hostname, parts.path, f"?{parts.query}") == (
                asked["host"],
                asked["path"],
                asked["queryString"],
            )

    def test_no_child_is_started_to_fetch_or_to_drop(
        self, repo: AnnexRepo, caplog: pytest.LogCaptureFixture
    ) -> None:
        """In a clone of ours; the log says which way it goes, and one key is dropped like all."""
        caplog.set_level(logging.INFO)
        before = len(psutil.Process().children(recursive=True))
        for key in keys_of(repo)[:3]:
            assert is_right(key, repo.get(key))
            repo.drop(key)
            assert repo.locate(key) is None
            assert is_right(key, repo.get(key))
        assert not used_git_annex(repo)
        assert len(psutil.Process().children(recursive=True)) == before
        assert "over HTTP, from http://127.0.0.1" in caplog.text

    @pytest.mark.parametrize(
        "setting",
        [
            ("annex.tune.objecthashlower", "true"),
            ("core.sharedRepository", "group"),
            ("annex.freezecontent-command", "true"),
            ("annex.crippledfilesystem", "true"),
            ("annex.securehashesonly", "true"),
            ("annex.http-headers", "X-Own: 1"),
            ("annex.version", "11"),
            ("remote.s3-PUBLIC.annex-bwlimit", "1GB"),
        ],
        ids=lambda setting: setting[0],
    )
    def test_settings_that_change_placing_leave_it_to_git_annex(
        self, repo: AnnexRepo, setting: tuple[str, str]
    ) -> None:
        """Whatever would be put elsewhere, otherwise or not at all."""
        key = keys_of(repo)[0]
        assert PublicUrls(repo.path, {}).of(key, "s3-PUBLIC")
        git(repo.path, "config", *setting)
        assert PublicUrls(repo.path, {}).of(key, "s3-PUBLIC") == []

    def test_layouts_that_are_not_plain_are_left_to_git_annex(self, repo: AnnexRepo) -> None:
        """An adjusted branch, a tuned branch, unlocked files, and what the user asks for."""
        key = keys_of(repo)[0]
        rewrite_branch(repo.path, {"difference.log": b"u [ObjectHashLower] timestamp=1s\n"})
        assert PublicUrls(repo.path, {}).of(key, "s3-PUBLIC") == []
        rewrite_branch(repo.path, {"difference.log": None})
        assert PublicUrls(repo.path, {}).of(key, "s3-PUBLIC")
        head = repo.path / ".git/HEAD"
        before = head.read_text()
        head.write_text("ref: refs/heads/adjusted/main(unlocked)\n")
        assert PublicUrls(repo.path, {}).of(key, "s3-PUBLIC") == []
        head.write_text(before)
        pointer = repo.path / "pointer"
        pointer.write_text(f"/annex/objects/{key.name}\n")
        blob = git(repo.path, "hash-object", "-w", "--no-filters", str(pointer))
        git(repo.path, "update-index", "--add", "--cacheinfo", f"100644,{blob},unlocked.nii.gz")
        assert PublicUrls(repo.path, {}).of(key, "s3-PUBLIC") == []

    def test_what_has_no_version_no_size_or_no_checksum_is_left_to_git_annex(
        self, repo: AnnexRepo
    ) -> None:
        """So is a remote that is not public, or is not known."""
        key = keys_of(repo)[0]
        digest = key.name.partition("--")[2]
        others = [f"SHA256E--{digest}", f"WORM-s3-m4--{digest}", f"SHA256E-s9-S3-C1--{digest}"]
        public = PublicUrls(repo.path, {})
        assert public.of(key, "origin") == []
        for name in [*others, f"SHA256E-s9--{digest}"]:
            other = AnnexKey.parse(name)
            assert other is not None
            assert public.of(other, "s3-PUBLIC") == []

    def test_many_keys_are_looked_up_together(self, repo: AnnexRepo) -> None:
        """The answers are the same as one by one."""
        keys = keys_of(repo)
        one_by_one = [PublicUrls(repo.path, {}).of(key, "s3-PUBLIC") for key in keys]
        public = PublicUrls(repo.path, {})
        assert [public.of(key, "s3-PUBLIC") for key in keys] == one_by_one
        assert all(one_by_one)

    def test_versions_are_asked_for_from_the_newest_on(
        self, repo: AnnexRepo, openneuro: LoopbackOpenNeuro, scripted: Scripted
    ) -> None:
        """The next one where one is gone, refused or wrong; only that one's content is kept."""
        key = keys_of(repo)[0]
        right = content_of(openneuro, key)
        versions = [("v1", "right"), ("v2", "gone"), ("v3", "refused"), ("v4", "wrong")]
        record(repo.path, key, *versions)
        set_public_url(repo.path, f"http://127.0.0.1:{scripted.port}/{BUCKET}")
        scripted.answers = {
            "/right": Answer(body=right),
            "/refused": Answer(403),
            "/wrong": Answer(body=right[::-1]),
        }
        assert repo.get(key).read_bytes() == right
        paths = [path for path, _ in scripted.asked]
        assert paths == [f"/{BUCKET}/{path}?versionId={v}" for v, path in reversed(versions)]
        assert not used_git_annex(repo)


class TestRefused:
    """What is not taken from a server."""

    def test_more_than_the_key_states_is_not_written(
        self, repo: AnnexRepo, openneuro: LoopbackOpenNeuro, scripted: Scripted
    ) -> None:
        """The download ends at the stated size, however much is sent."""
        key = keys_of(repo)[0]
        stated_bytes = key.size_bytes or 0
        set_public_url(repo.path, f"http://127.0.0.1:{scripted.port}/{BUCKET}")
        right = content_of(openneuro, key)
        scripted.answers = {"": Answer(body=right + bytes(30_000_000))}
        largest = 0
        done = threading.Event()

        def watch() -> None:
            nonlocal largest
            while not done.wait(0.0005):
                largest = max([largest, *(each.size_bytes for each in repo.stored())])

        watching = threading.Thread(target=watch)
        watching.start()
        with pytest.raises(ContentMismatchError, match="incorrect size: more than"):
            repo.get(key)
        done.set()
        watching.join()
        assert largest <= stated_bytes
        scripted.answers = {"": Answer(body=right[:-1])}
        with pytest.raises(ContentMismatchError, match=f"incorrect size: {stated_bytes - 1} bytes"):
            repo.get(key)
        assert sum(each.size_bytes for each in repo.stored()) == 0

    def test_redirects_lead_to_the_remotes_own_hosts_only(
        self, repo: AnnexRepo, openneuro: LoopbackOpenNeuro, scripted: Scripted
    ) -> None:
        """One on the same host is followed, another one is not even asked; a circle ends."""
        key, other, third = keys_of(repo)[:3]
        set_public_url(repo.path, f"http://127.0.0.1:{scripted.port}/{BUCKET}")
        with Scripted({"": Answer(body=content_of(openneuro, key))}).serving() as elsewhere:
            away = f"http://127.0.0.1:{elsewhere.port}/other"
            scripted.answers = {
                "/here": Answer(body=content_of(openneuro, other)),
                "": Answer(302, headers={"Location": away}),
            }
            with pytest.raises(RemoteUnavailableError, match="sends its readers"):
                repo.get(key)
            assert elsewhere.asked == []
        scripted.answers[""] = Answer(307, headers={"Location": "/here"})
        assert repo.get(other).read_bytes() == content_of(openneuro, other)
        scripted.answers = {"": Answer(302, headers={"Location": "/again"})}
        with pytest.raises(RemoteUnavailableError, match="sends its readers"):
            repo.get(third)
        assert not used_git_annex(repo)

    @pytest.mark.parametrize(
        ("answer", "error", "words"),
        [
            (Answer(404), RemoteUnavailableError, r"does not have it \(404\)"),
            (Answer(403), RemoteUnavailableError, r"refuses access \(403\)"),
            (Answer(416), RemoteUnavailableError, r"the part of the file .* \(416\)"),
            (Answer(206), RemoteUnavailableError, "the part of the file"),
            (Answer(429), RemoteUnavailableError, "overloaded.*429 Too Many Requests"),
            (Answer(500), RemoteUnavailableError, "overloaded.*500"),
            (Answer(301), FetchError, "not known here.*301 Moved"),
            (Answer(299), FetchError, "not known here.*299"),
            (Answer(302, headers={"Location": "http://["}), RemoteUnavailableError, "its readers"),
            (Answer(302, headers={"Location": "ftp://a"}), RemoteUnavailableError, "its readers"),
            (Answer(200), ContentMismatchError, "incorrect size: 0 bytes"),
            (Answer(200, bytes(300_000)), ContentMismatchError, "another checksum"),
        ],
        ids=lambda value: str(value.status) if isinstance(value, Answer) else "",
    )
    def test_each_answer_has_its_own_error(
        self,
        repo: AnnexRepo,
        scripted: Scripted,
        answer: Answer,
        error: type[FetchError],
        words: str,
    ) -> None:
        """One message, which names the key and the remote; nothing is left."""
        key = keys_of(repo)[0]
        scripted.answers = {"": answer}
        set_public_url(repo.path, f"http://127.0.0.1:{scripted.port}/{BUCKET}")
        hasty = AnnexRepo(repo.path, stall_timeout_s=1.0, total_timeout_s=-5.0)
        with pytest.raises(error, match=f"Cannot fetch {key}.* from s3-PUBLIC .*{words}") as caught:
            hasty.get(key)
        assert type(caught.value) is error
        assert "\n" not in str(caught.value)
        assert sum(each.size_bytes for each in repo.stored()) == 0
        assert not used_git_annex(hasty)
        hasty.close()

    @pytest.mark.parametrize("chunked", [False, True])
    def test_bodies_are_taken_as_they_are(
        self, repo: AnnexRepo, openneuro: LoopbackOpenNeuro, scripted: Scripted, chunked: bool
    ) -> None:
        """Never inflated, whatever the server says of their encoding; chunks are put together."""
        key = keys_of(repo)[0]
        encoding = {"Content-Encoding": "gzip"}
        scripted.answers = {"": Answer(200, content_of(openneuro, key), encoding, chunked)}
        set_public_url(repo.path, f"http://127.0.0.1:{scripted.port}/{BUCKET}")
        assert is_right(key, repo.get(key))
        assert not used_git_annex(repo)

    def test_local_addresses_are_refused_as_git_annex_refuses_them(
        self, repo: AnnexRepo, openneuro: LoopbackOpenNeuro
    ) -> None:
        """Nothing is asked of them unless the user's settings allow it, in any form."""
        key = keys_of(repo)[0]
        git(repo.path, "config", "annex.security.allowed-ip-addresses", "::1 10.0.0.1")
        with pytest.raises(FetchError, match="does not allow accessing address 127"):
            repo.get(key)
        assert openneuro.total(ACCESSION).requests == 0
        for allowed in ("10.0.0.1 127.0.0.1", "all", f"[127.0.0.1]:{openneuro.port}"):
            git(repo.path, "config", "annex.security.allowed-ip-addresses", allowed)
            again = AnnexRepo(repo.path)
            assert is_right(key, again.get(key))
            assert not used_git_annex(again)
            again.drop(key)
            again.close()

    def test_no_credentials_are_sent(
        self, repo: AnnexRepo, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Neither netrc's, nor Amazon's, nor git's."""
        home = Path(os.environ["HOME"])
        (home / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
        (home / ".netrc").chmod(0o600)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        git(repo.path, "config", "http.extraHeader", "Authorization: Basic c2VjcmV0")
        set_public_url(repo.path, f"http://127.0.0.1:{scripted.port}/{BUCKET}")
        with pytest.raises(RemoteUnavailableError, match="404"):
            repo.get(keys_of(repo)[0])
        assert scripted.asked
        for _, headers in scripted.asked:
            assert set(headers) == {"Host", "Accept-Encoding", "User-Agent"}


class TestConnections:
    """TLS and proxies, as the environment says."""

    @pytest.mark.parametrize("trust", ["GIT_SSL_CAINFO", "http.sslCAInfo", "SSL_CERT_FILE"])
    def test_tls_trusts_what_git_trusts(
        self,
        repo: AnnexRepo,
        openneuro: LoopbackOpenNeuro,
        authority: Authority,
        trust: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A local authority is trusted where git was told to; faults are recovered from as ever."""
        if trust == "http.sslCAInfo":
            git(repo.path, "config", trust, str(authority.certificate))
        else:
            monkeypatch.setenv(trust, str(authority.certificate))
        faults = [FaultKind.TRUNCATE, FaultKind.RESET, FaultKind.FLIP, FaultKind.HANG]
        if trust != "SSL_CERT_FILE":
            del faults[1:]
        with tls_front(authority, openneuro.port) as port:
            set_public_url(repo.path, f"https://127.0.0.1:{port}/{BUCKET}")
            for key, kind in zip(keys_of(repo), faults, strict=False):
                openneuro.set_faults(Fault(kind, count=1))
                assert is_right(key, repo.get(key))
                assert openneuro.faults_struck() == [1]
        assert not used_git_annex(repo)

    def test_the_next_address_is_tried(
        self, repo: AnnexRepo, openneuro: LoopbackOpenNeuro, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where one cannot be reached; where none can, that is said."""
        git(repo.path, "config", "annex.security.allowed-ip-addresses", "all")
        key, other = keys_of(repo)[:2]
        addresses = [("255.255.255.255", 9), ("127.0.0.1", 9), ("127.0.0.1", openneuro.port)]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
        monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: found)
        set_public_url(repo.path, f"http://several.invalid/{BUCKET}")
        assert is_right(key, repo.get(key))
        hasty = AnnexRepo(repo.path, stall_timeout_s=1.0, total_timeout_s=-5.0)
        found.pop()
        with pytest.raises(RemoteUnavailableError, match=r"several\.invalid failed: .*refused"):
            hasty.get(other)
        found.pop()
        with pytest.raises(RemoteUnavailableError, match=r"several\.invalid failed: .*unreachable"):
            hasty.get(other)
        assert not used_git_annex(repo)
        hasty.close()

    @pytest.mark.parametrize("scheme", ["http", "https"])
    def test_hosts_that_do_not_answer_are_given_up_at_once(
        self, repo: AnnexRepo, monkeypatch: pytest.MonkeyPatch, scheme: str
    ) -> None:
        """A connection, or TLS, that does not come about ends when the fetch is cancelled."""
        monkeypatch.setattr("tio_openneuro.annex.download._CONNECT_S", 1e9)
        with contextlib.ExitStack() as stack:
            silent = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
            port = silent.getsockname()[1]
            if scheme == "http":  # Where nobody accepts, one more finds no room in the queue.
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            set_public_url(repo.path, f"{scheme}://127.0.0.1:{port}/{BUCKET}")
            patient = AnnexRepo(repo.path, stall_timeout_s=1e9, total_timeout_s=1e9)
            asked = iter([False] * 6 + [True] * 1000)
            with pytest.raises(FetchError, match="Stopped fetching"):
                patient.get(keys_of(repo)[0], cancelled=lambda: next(asked))
            assert not used_git_annex(patient)
            patient.close()

    def test_tls_that_is_not_trusted_is_left_to_git_annex(
        self,
        repo: AnnexRepo,
        openneuro: LoopbackOpenNeuro,
        authority: Authority,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """After our partial is gone, and for good; nothing is taken from there."""
        key, other = keys_of(repo)[:2]
        own_partial(repo, key).parent.mkdir(exist_ok=True)
        own_partial(repo, key).write_bytes(content_of(openneuro, key)[:100])
        with tls_front(authority, openneuro.port) as port:
            set_public_url(repo.path, f"https://127.0.0.1:{port}/{BUCKET}")
            for each in (key, other):
                with pytest.raises(FetchError):
                    repo.get(each)
        assert not own_partial(repo, key).exists()
        assert caplog.text.count("over HTTP: ") == 1
        assert used_git_annex(repo)
        assert openneuro.total(ACCESSION).requests == 0

    def test_proxies_of_the_environment_are_used(
        self,
        repo: AnnexRepo,
        openneuro: LoopbackOpenNeuro,
        authority: Authority,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """For plain HTTP and for TLS, but not for hosts that the environment leaves out."""
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
        key, other, third = keys_of(repo)[:3]
        with Proxy().serving() as proxy, tls_front(authority, openneuro.port) as port:
            monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
            monkeypatch.setenv("https_proxy", f"127.0.0.1:{proxy.port}")
            assert is_right(key, repo.get(key))
            assert [line.split("/")[0] for line in proxy.asked] == ["GET http:"]
            monkeypatch.setenv("no_proxy", "127.0.0.1")
            assert is_right(other, repo.get(other))
            assert len(proxy.asked) == 1
            monkeypatch.delenv("no_proxy")
            set_public_url(repo.path, f"https://127.0.0.1:{port}/{BUCKET}")
            again = AnnexRepo(repo.path)
            assert is_right(third, again.get(third))
            assert [line[:-1] for line in proxy.asked[1:]] == [f"CONNECT 127.0.0.1:{port} HTTP/1."]
            assert not used_git_annex(again)
            again.close()
        assert not used_git_annex(repo)

    @pytest.mark.parametrize("url", ["http://me:secret@127.0.0.1:{}", "socks5://127.0.0.1:{}"])
    def test_proxies_that_need_more_are_left_to_git_annex(
        self, repo: AnnexRepo, monkeypatch: pytest.MonkeyPatch, url: str
    ) -> None:
        """One with a password, or of another kind."""
        with Proxy().serving() as proxy:
            monkeypatch.setenv("http_proxy", url.format(proxy.port))
            with contextlib.suppress(FetchError):
                repo.get(keys_of(repo)[0])
        assert used_git_annex(repo)


class TestResume:
    """What an earlier download left."""

    @pytest.mark.parametrize("damaged", [False, True])
    def test_the_rest_alone_is_asked_for_unless_it_does_not_fit(
        self, repo: AnnexRepo, openneuro: LoopbackOpenNeuro, damaged: bool
    ) -> None:
        """The checksum goes over both parts; where it is wrong, all is fetched anew."""
        key = keys_of(repo)[0]
        content = bytearray(content_of(openneuro, key))
        half = len(content) // 2
        content[5] ^= damaged
        own_partial(repo, key).parent.mkdir(exist_ok=True)
        own_partial(repo, key).write_bytes(content[:half])
        assert list(repo.stored()) == [StoredContent(key.name, half, partial=True)]
        assert is_right(key, repo.get(key))
        assert openneuro.total(ACCESSION).bytes == len(content) - half + len(content) * damaged
        assert list(repo.stored()) == [StoredContent(key.name, len(content), partial=False)]

    def test_what_git_annex_began_it_ends(
        self, repo: AnnexRepo, openneuro: LoopbackOpenNeuro
    ) -> None:
        """Its unfinished download is not fetched a second time beside."""
        key = keys_of(repo)[0]
        content = content_of(openneuro, key)
        theirs = repo.path / ".git/annex/tmp" / key.name
        theirs.parent.mkdir(exist_ok=True)
        theirs.write_bytes(content[: len(content) // 2])
        assert is_right(key, repo.get(key))
        assert used_git_annex(repo)
        assert openneuro.total(ACCESSION).bytes == len(content) - len(content) // 2

    def test_killed_download_is_counted_and_gone_on_with(
        self, repo: AnnexRepo, openneuro: LoopbackOpenNeuro
    ) -> None:
        """Nothing is left locked; the partial is charged to its key."""
        key = keys_of(repo)[0]
        openneuro.set_faults(Fault(FaultKind.HANG, at=0.5))
        child = multiprocessing.get_context("spawn").Process(target=repo.get, args=(key,))
        child.start()
        deadline_s = time.monotonic() + 60
        while not any(each.size_bytes for each in repo.stored()):
            assert time.monotonic() < deadline_s
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        (left,) = repo.stored()
        assert left.key_name == key.name
        assert left.partial
        assert 0 < left.size_bytes < (key.size_bytes or 0)
        openneuro.set_faults()
        before = openneuro.total(ACCESSION).bytes
        assert is_right(key, repo.get(key))
        assert openneuro.total(ACCESSION).bytes - before == (key.size_bytes or 0) - left.size_bytes


class TestPlaced:
    """What git-annex and DataLad make of it."""

    def test_content_is_as_git_annex_would_have_put_it(self, repo: AnnexRepo) -> None:
        """Write-protected, found, sound, not unused, and dropped like any other."""
        key, other = keys_of(repo)[:2]
        path = repo.get(key)
        assert path.stat().st_mode & 0o777 == 0o444
        assert path.parent.stat().st_mode & 0o777 == 0o555
        own_partial(repo, other).write_bytes(b"half")
        git(repo.path, "checkout", "-q", "1.0.0")
        assert "sub-01" in git(repo.path, "annex", "find", "--in=here")
        assert git(repo.path, "annex", "fsck", "--quiet") == ""
        assert other.name not in git(repo.path, "annex", "unused")
        status = ["datalad", "status", "--annex", "all"]
        assert "(293.0 KB/3.4 MB present" in run(status, cwd=repo.path).decode()
        assert git(repo.path, "status", "--porcelain") == ""
        git(repo.path, "annex", "drop", "--quiet", "--key", key.name, "--numcopies=1")
        assert repo.locate(key) is None
        assert is_right(key, repo.get(key))

    def test_folders_have_the_rights_that_the_user_gives(self, repo: AnnexRepo) -> None:
        """Where the umask hides all from others, so does the content."""
        key, other = keys_of(repo)[:2]
        before = os.umask(0o077)
        try:
            paths = [repo.get(key)]
            git(repo.path, "annex", "get", "-q", "--from", "s3-PUBLIC", "--key", other.text)
        finally:
            os.umask(before)
        theirs = repo.locate(other)
        assert theirs is not None
        for path in (*paths, theirs):
            assert [p.stat().st_mode & 0o777 for p in (path, path.parent)] == [0o400, 0o500]

    def test_what_git_annex_has_recorded_it_also_drops(self, repo: AnnexRepo) -> None:
        """Its records stay right, whether or not they were committed."""
        for committed, key in zip(("false", "true"), keys_of(repo), strict=False):
            repo.get(key)
            setting = f"annex.alwayscommit={committed}"
            git(repo.path, "-c", setting, "annex", "fsck", "--quiet", "--key", key.name)
            assert "[here]" in git(repo.path, "annex", "whereis", "--key", key.name)
            repo.drop(key)
            assert "[here]" not in git(repo.path, "annex", "whereis", "--key", key.name)
            assert git(repo.path, "annex", "fsck", "--quiet", "--key", key.name) == ""
            again = AnnexRepo(repo.path)
            again.get(key)
            again.drop(key)
            assert not used_git_annex(again)
            again.close()

    def test_what_somebody_put_there_is_not_replaced(self, tmp_path: Path) -> None:
        """It is seen in the same step in which the file gets its place."""
        file, target = tmp_path / "file", tmp_path / "target"
        file.write_text("ours")
        target.write_text("theirs")
        with pytest.raises(FileExistsError):
            _move(file, target)
        assert (file.read_text(), target.read_text()) == ("ours", "theirs")
        target.unlink()
        _move(file, target)
        assert target.read_text() == "ours"
        assert not file.exists()

    def test_killed_at_any_step_nothing_is_lost_or_uncounted(self, repo: AnnexRepo) -> None:
        """Of all that touches the disk, on the way in and out: what is left is used or removed."""
        key = keys_of(repo)[0]
        steps = 0
        while fork_and_kill(repo, key, steps):
            steps += 1
            stored = list(repo.stored())
            assert {each.key_name for each in stored} <= {key.name}
            assert sum(each.size_bytes for each in stored) <= (key.size_bytes or 0)
            assert is_right(key, repo.get(key))
            assert git(repo.path, "annex", "fsck", "--fast", "--quiet", "--key", key.name) == ""
            repo.drop(key)
            assert list(repo.stored()) == []
        assert steps > 10

    def test_bare_repositories_have_it_where_theirs_is(self, repo: AnnexRepo) -> None:
        """In folders of three letters."""
        git(repo.path, "config", "core.bare", "true")
        key = keys_of(repo)[0]
        path = repo.get(key)
        assert path == repo.path / ".git" / key.object_paths()[1]
        assert git(repo.path, "annex", "fsck", "--quiet", "--key", key.name) == ""

    def test_content_that_somebody_keeps_locked_is_not_dropped(self, repo: AnnexRepo) -> None:
        """As git-annex keeps it while it copies it elsewhere."""
        key = keys_of(repo)[0]
        path = repo.get(key)
        path.parent.chmod(0o755)
        lock = path.with_name(f"{path.name}.lck")
        code = (
            "import fcntl, sys; file = open(sys.argv[1], 'a+b'); fcntl.lockf(file, fcntl.LOCK_SH);"
            "print(flush=True); sys.stdin.read()"
        )
        holding = subprocess.Popen(
            [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with holding:
            assert holding.stdout is not None
            holding.stdout.readline()
            with pytest.raises(DropRefusedError):
                repo.drop(key)
            assert is_right(key, path)
        repo.drop(key)
        assert repo.locate(key) is None

    def test_object_of_another_size_is_named(self, repo: AnnexRepo) -> None:
        """It is not written over."""
        key = keys_of(repo)[0]
        path = repo.path / ".git" / key.object_paths()[0]
        path.parent.mkdir(parents=True)
        path.write_bytes(b"cut")
        with pytest.raises(ContentMismatchError, match="git annex fsck"):
            repo.get(key)
        assert path.read_bytes() == b"cut"

    def test_forked_process_keeps_no_download_locked(
        self, repo: AnnexRepo, openneuro: LoopbackOpenNeuro
    ) -> None:
        """A download that ended while a worker was forked can be gone on with."""
        key = keys_of(repo)[0]
        openneuro.set_faults(Fault(FaultKind.HANG, at=0.5))
        cancel = threading.Event()
        failed: list[Exception] = []

        def fetch() -> None:
            try:
                repo.get(key, cancelled=cancel.is_set)
            except FetchError as error:
                failed.append(error)

        fetching = threading.Thread(target=fetch)
        fetching.start()
        while not any(each.size_bytes for each in repo.stored()):
            assert fetching.is_alive()
        stay = multiprocessing.get_context("fork").Event()
        worker = multiprocessing.get_context("fork").Process(target=stay.wait)
        worker.start()
        cancel.set()
        fetching.join()
        assert failed
        openneuro.set_faults()
        assert is_right(key, repo.get(key))
        stay.set()
        worker.join()

    @pytest.mark.parametrize("seconds", [3.0, pytest.param(30.0, marks=pytest.mark.slow)])
    def test_a_users_own_get_and_drop_beside_do_no_harm(
        self, repo: AnnexRepo, seconds: float
    ) -> None:
        """Nothing wrong, nothing lost, and git-annex finds all sound."""
        key = keys_of(repo)[0]
        loop = (
            "while :; do git annex get -q --from s3-PUBLIC --key $0; "
            "git -c remote.s3-PUBLIC.annex-trustlevel=trusted annex drop -q --key $0; done"
        )
        user = subprocess.Popen(
            ["sh", "-c", loop, key.text],
            cwd=repo.path,
            env=child_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        patient = AnnexRepo(repo.path, total_timeout_s=60.0)
        until_s = time.monotonic() + seconds
        rounds = 0
        try:
            while time.monotonic() < until_s:
                path = patient.get(key)
                with contextlib.suppress(FileNotFoundError):
                    assert is_right(key, path)
                rounds += 1
                # Each time that it was gone, the user had it back at once.
                with contextlib.suppress(DropRefusedError):
                    patient.drop(key)
        finally:
            os.killpg(user.pid, signal.SIGTERM)
            user.wait()
            patient.close()
        assert rounds >= seconds
        assert is_right(key, repo.get(key))
        assert git(repo.path, "annex", "fsck", "--quiet", "--key", key.name) == ""
        assert [each for each in repo.stored() if each.partial] == []
