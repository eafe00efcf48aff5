"""The loopback OpenNeuro behaves as OpenNeuro does, and as its knobs and faults say.

All real: git, git-annex, HTTP over 127.0.0.1, a server process of its own. Times are compared
with lower bounds only, which a slow machine cannot break.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import nibabel
import numpy as np
import psutil
import pytest
from faulty import Fault, FaultKind, LoopbackOpenNeuro, PathCount
from hypothesis import given
from hypothesis import strategies as st

from tio_openneuro.annex.processes import CommandError, Coprocess, run
from tio_openneuro.errors import TioOpenNeuroError
from tio_openneuro.loopback import Volume
from tio_openneuro.loopback.link import Link

T1W = "sub-01/anat/sub-01_T1w.nii.gz"
LABEL = "derivatives/labels/sub-01/anat/sub-01_dseg.nii.gz"
PLAIN = "sub-01/anat/sub 01+plain.nii"
SMALL = "sub-01/anat/sub-01_small.nii"
ACCESSION = "ds900001"
CONTENT = np.random.default_rng(0).bytes(300_000)
AFFINE = np.diag([1.0, 1.5, 2.0, 1.0])
VOXELS = np.random.default_rng(1).integers(-500, 500, (20, 24, 18)).astype(np.int16)
FILES = {
    T1W: Volume(VOXELS, AFFINE),
    LABEL: Volume(VOXELS > 0, AFFINE),
    PLAIN: CONTENT,
    SMALL: bytes(range(20)),
    "participants.tsv": "participant_id\tsex\nsub-01\tF\n",
    "dataset_description.json": '{"Name": "Loopback", "BIDSVersion": "1.9.0"}',
}


@pytest.fixture(scope="module")
def shared_openneuro(tmp_path_factory):
    """One server with one dataset, for the tests that change nothing on its disk."""
    folder = tmp_path_factory.mktemp("openneuro")
    with LoopbackOpenNeuro(folder, set_environment=False) as openneuro:
        openneuro.publish(ACCESSION, FILES)
        yield openneuro


@pytest.fixture
def openneuro(shared_openneuro):
    """The shared server with a fast link, no faults, and counters at nothing."""
    shared_openneuro.set_rate(None)
    shared_openneuro.set_connection_rate(None)
    shared_openneuro.set_latency(0.0)
    shared_openneuro.clear_faults()
    shared_openneuro.reset_counters()
    return shared_openneuro


class Client:
    """A connection to the server, closed at the end of ``with``."""

    def __init__(self, openneuro, timeout_s=30.0):
        """Connect with the first request."""
        self.connection = http.client.HTTPConnection("127.0.0.1", openneuro.port, timeout=timeout_s)

    def __enter__(self):
        """Return itself."""
        return self

    def __exit__(self, *_):
        """Close the connection."""
        self.connection.close()

    def ask(self, path, *, method="GET", headers=None, query="", bucket="openneuro.org"):
        """Return status, headers and body."""
        target = f"/{bucket}/{ACCESSION}/{path.replace(' ', '%20')}{query}"
        self.connection.request(method, target, headers=headers or {})
        response = self.connection.getresponse()
        with response:
            return response.status, response.headers, response.read()


def ask(openneuro, path=PLAIN, **options):
    """Return status, headers and body of a request on a connection of its own."""
    with Client(openneuro) as client:
        return client.ask(path, **options)


def git(folder, *arguments, stdin=b""):
    """Return what git says."""
    return run(["git", *arguments], cwd=folder, stdin=stdin).decode()


def clone(folder, *, version="main"):
    """Clone by OpenNeuro's own address and let git-annex enable what the repository names."""
    url = f"https://github.com/OpenNeuroDatasets/{ACCESSION}.git"
    git(folder.parent, "clone", "--quiet", "--branch", version, url, str(folder))
    git(folder, "annex", "init", "--quiet")
    return folder


def fetch(folder, path):
    """Fetch one file by key from s3-PUBLIC, as the library does, and return its bytes."""
    key = (folder / path).readlink().name
    answer = git(
        folder,
        "annex",
        "get",
        "--batch-keys",
        "--json",
        "--from=s3-PUBLIC",
        stdin=f"{key}\n".encode(),
    )
    assert '"success":true' in answer
    return (folder / path).read_bytes()


def test_a_published_dataset_is_cloned_by_accession_and_fetched_anonymously(tmp_path, monkeypatch):
    """Git clones OpenNeuro's own address; git-annex gets keys from publicurl, unsigned."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    with LoopbackOpenNeuro(tmp_path / "openneuro") as openneuro:
        assert openneuro.publish(ACCESSION, FILES) == openneuro.url(ACCESSION)
        assert openneuro.total() == PathCount(0, 0)
        folder = clone(tmp_path / "clone")

        t1w = fetch(folder, T1W)
        image = nibabel.load(folder / T1W)
        np.testing.assert_array_equal(np.asanyarray(image.dataobj), VOXELS)
        np.testing.assert_array_equal(image.affine, AFFINE)
        label = fetch(folder, LABEL)
        assert nibabel.load(folder / LABEL).get_data_dtype() == np.uint8
        assert fetch(folder, PLAIN) == CONTENT
        assert not (folder / "participants.tsv").is_symlink()
        assert (folder / "participants.tsv").read_text() == FILES["participants.tsv"]

        counts = openneuro.counters(ACCESSION)
        assert {path: count.bytes for path, count in counts.items()} == {
            T1W: len(t1w),
            LABEL: len(label),
            PLAIN: len(CONTENT),
        }
        assert git(folder, "tag") == "1.0.0\n"
        config = git(folder, "config", "--list")
        assert "remote.origin.annex-ignore=true" in config


def test_remote_log_says_what_openneuro_says(openneuro):
    """The remote's fields are those of ds004199, but for prefix and publicurl."""
    bare = openneuro.folder / "git" / f"{ACCESSION}.git"
    uuid, *fields, timestamp = git(bare, "show", "git-annex:remote.log").split()
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", uuid)
    assert timestamp.startswith("timestamp=")
    assert " ".join(fields) == (
        "autoenable=true bucket=openneuro.org datacenter=US encryption=none exporttree=yes "
        f"fileprefix={ACCESSION}/ host=s3.amazonaws.com name=s3-PUBLIC partsize=1GiB port=80 "
        f"public=no publicurl=http://127.0.0.1:{openneuro.port}/openneuro.org "
        "storageclass=STANDARD type=S3 versioning=yes"
    )
    logs = git(bare, "ls-tree", "-r", "--name-only", "git-annex").split()
    assert sum(name.endswith(".nii.gz.log.rmet") for name in logs) == 2


def test_an_old_version_stays_fetchable_after_a_changed_file(tmp_path):
    """Publishing again makes new S3 versions; a clone of the old tag still gets the old bytes."""
    with LoopbackOpenNeuro(tmp_path / "openneuro") as openneuro:
        openneuro.publish(ACCESSION, FILES)
        before = clone(tmp_path / "before")
        openneuro.publish(ACCESSION, {PLAIN: CONTENT[::-1], "README": "news"}, tag="1.0.1")
        assert fetch(before, PLAIN) == CONTENT
        git(before, "pull", "--quiet", "--ff-only")
        git(before, "annex", "merge", "--quiet")
        assert fetch(before, PLAIN) == CONTENT[::-1]
        assert (before / "README").read_text() == "news"

        old = clone(tmp_path / "old", version="1.0.0")
        assert fetch(old, PLAIN) == CONTENT
        assert fetch(old, LABEL).startswith(b"\x1f\x8b")
        assert ask(openneuro)[2] == CONTENT[::-1]

        with pytest.raises(CommandError, match=r"already exists"):
            openneuro.publish(ACCESSION, {"README": "again"}, tag="1.0.1")


def test_the_same_files_give_the_same_commit(tmp_path):
    """Dates, identities and the bytes of volumes do not depend on the run."""
    commits = set()
    for name in ("one", "two"):
        with LoopbackOpenNeuro(tmp_path / name, set_environment=False) as openneuro:
            openneuro.publish(ACCESSION, {T1W: FILES[T1W], "README": "same"})
            commits.add(git(tmp_path / name / "git" / f"{ACCESSION}.git", "rev-parse", "main"))
    assert len(commits) == 1


def test_a_folder_is_published_whole_but_for_its_git(tmp_path):
    """Every file below a folder is in the dataset, at its path; a ``.git`` there is left out."""
    source = tmp_path / "bids"
    (source / "sub-01" / "anat").mkdir(parents=True)
    (source / PLAIN).write_bytes(CONTENT)
    (source / "README").write_text("readme")
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("its own")
    with LoopbackOpenNeuro(tmp_path / "openneuro") as openneuro:
        openneuro.publish_folder(ACCESSION, source)
        folder = clone(tmp_path / "one")
    assert (folder / PLAIN).is_symlink()
    assert (folder / "README").read_text() == "readme"
    assert "its own" not in (folder / ".git" / "config").read_text()


@pytest.mark.parametrize(
    ("accession", "path"),
    [("../ds1", "README"), (ACCESSION, "../README"), (ACCESSION, ".git/config"), (ACCESSION, "/x")],
)
def test_what_would_lie_outside_is_refused(openneuro, accession, path):
    """Neither an accession nor a path leads out of the folder or into git's own."""
    with pytest.raises(TioOpenNeuroError, match="Cannot publish"):
        openneuro.publish(accession, {path: "text"})


@pytest.mark.parametrize(
    "target",
    [
        f"/git/{ACCESSION}.git/config",
        f"/git/{ACCESSION}.git/HEAD",
        "/git/ds999999.git/info/refs?service=git-upload-pack",
        "/git/../git/info/refs?service=git-upload-pack",
        f"/openneuro.org/{ACCESSION}/../../port",
        f"/openneuro.org/{ACCESSION}/nothing",
    ],
)
def test_everything_else_is_not_found(openneuro, target):
    """As at GitHub, a repository's files are not there; nor is anything outside the store."""
    with Client(openneuro) as client:
        client.connection.request("GET", target)
        with client.connection.getresponse() as response:
            assert response.status == 404


def test_pushing_and_unsigned_uploads_are_forbidden(openneuro):
    """Only the publisher writes."""
    with Client(openneuro) as client:
        client.connection.request("GET", f"/git/{ACCESSION}.git/info/refs?service=git-receive-pack")
        with client.connection.getresponse() as response:
            assert response.status == 403
    assert ask(openneuro, method="PUT")[0] == 403
    assert ask(openneuro, method="DELETE")[0] == 403
    assert ask(openneuro)[2] == CONTENT


@pytest.mark.parametrize(
    ("wanted", "status", "start", "stop"),
    [
        (None, 200, 0, 300_000),
        ("bytes=0-", 206, 0, 300_000),
        ("bytes=100-199", 206, 100, 200),
        ("bytes=299999-", 206, 299_999, 300_000),
        ("bytes=299999-400000", 206, 299_999, 300_000),
        ("bytes=-7", 206, 299_993, 300_000),
        ("bytes=0-1,5-6", 200, 0, 300_000),
        ("bytes=300000-", 416, 0, 0),
        ("bytes=9-3", 416, 0, 0),
    ],
)
def test_ranges_are_answered_as_http_says(openneuro, wanted, status, start, stop):
    """206 with Content-Range, 416 with the size, and the whole where the header is another."""
    headers = {} if wanted is None else {"Range": wanted}
    got, answer, body = ask(openneuro, headers=headers)
    assert got == status
    if status == 416:
        assert answer["Content-Range"] == "bytes */300000"
        return
    assert body == CONTENT[start:stop]
    if status == 206:
        assert answer["Content-Range"] == f"bytes {start}-{stop - 1}/300000"


def test_head_etag_and_version_id_name_the_object(openneuro):
    """HEAD tells size and MD5; the version id it gives leads to the same bytes."""
    status, headers, body = ask(openneuro, method="HEAD")
    assert (status, headers["Content-Length"], body) == (200, "300000", b"")
    md5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
    assert headers["ETag"] == f'"{md5}"'
    version_id = headers["x-amz-version-id"]
    assert re.fullmatch(r"[A-Za-z0-9._]{32}", version_id)
    assert ask(openneuro, query=f"?versionId={version_id}")[2] == CONTENT
    status, _, refusal = ask(openneuro, query="?versionId=another")
    assert status == 404
    assert b"<Code>NoSuchVersion</Code>" in refusal
    expected = PathCount(3, len(CONTENT) + len(refusal))
    assert openneuro.counters() == {f"{ACCESSION}/{PLAIN}": expected}


def test_counters_are_exact_on_a_kept_connection(openneuro):
    """Requests and bytes are counted by path, before the client can see them."""
    with Client(openneuro) as client:
        client.ask(PLAIN)
        opened = client.connection.sock
        client.ask(PLAIN, method="HEAD")
        client.ask(PLAIN, headers={"Range": "bytes=0-99"})
        client.ask(SMALL)
        assert client.connection.sock is opened
    expected = {PLAIN: PathCount(3, 300_100), SMALL: PathCount(1, 20)}
    assert openneuro.counters(ACCESSION) == expected
    assert openneuro.total() == PathCount(4, 300_120)
    assert openneuro.counters("ds900002") == {}
    openneuro.reset_counters()
    assert openneuro.total() == PathCount(0, 0)


@given(
    rate=st.floats(1e3, 1e9),
    steps=st.lists(
        st.tuples(st.floats(0.0, 0.5), st.integers(1, 1 << 17)), min_size=1, max_size=50
    ),
)
def test_a_link_never_lets_more_through_than_its_rate(rate, steps):
    """Whoever asks whenever: after T seconds at most rate x T bytes have gone, and 20 ms' more."""
    link = Link(rate)
    link.begin(100.0)
    first_s = now_s = 100.0
    gone = 0
    for pause_s, size_bytes in steps:
        now_s += pause_s
        at_s = link.reserve(size_bytes, now_s)
        gone += size_bytes
        assert at_s >= now_s
        assert gone <= rate * (at_s - first_s + 0.02) * (1 + 1e-6)


def test_the_shared_rate_holds_over_all_connections(openneuro):
    """Four connections together take at least the time of their bytes at the shared rate."""
    openneuro.set_rate(2e6)
    begin_s = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: ask(openneuro)[2], range(4)))
    assert time.monotonic() - begin_s >= 4 * 300_000 / 2e6 - 0.02
    assert answers == [CONTENT] * 4


def test_the_rate_of_a_connection_and_the_latency_hold_for_each(openneuro):
    """A connection is as slow as it is set, and each request waits for its latency."""
    openneuro.set_connection_rate(2e6)
    openneuro.set_latency(0.1)
    with Client(openneuro) as client:
        begin_s = time.monotonic()
        for _ in range(2):
            assert client.ask(PLAIN)[2] == CONTENT
    assert time.monotonic() - begin_s >= 2 * (300_000 / 2e6 + 0.1) - 0.02


def test_a_transfer_under_way_follows_a_change_of_the_rate(openneuro):
    """At ten bytes per second it would take hours; without limit it ends."""
    openneuro.set_rate(10.0)
    with Client(openneuro) as client:
        client.connection.request("GET", f"/openneuro.org/{ACCESSION}/{PLAIN}".replace(" ", "%20"))
        with client.connection.getresponse() as response:
            begin = response.read(1)
            openneuro.set_rate(None)
            assert begin + response.read() == CONTENT


@pytest.mark.parametrize("status", [503, 404, 403, 416])
def test_a_status_fault_takes_the_answers_place(openneuro, status):
    """The status comes at once, on a connection that stays, for HEAD too."""
    openneuro.set_faults(Fault(FaultKind(str(status)), pattern="*plain.nii", count=2))
    with Client(openneuro) as client:
        assert client.ask(SMALL)[0] == 200
        opened = client.connection.sock
        assert client.ask(PLAIN)[0] == status
        assert client.ask(PLAIN, method="HEAD")[0] == status
        assert client.ask(PLAIN)[0] == 200
        assert client.connection.sock is opened
    assert openneuro.faults_struck() == [2]


def test_a_truncated_answer_has_the_right_length_and_too_few_bytes(openneuro):
    """The client can tell only by counting."""
    openneuro.set_faults(Fault(FaultKind.TRUNCATE, at=0.25))
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(openneuro)
    assert caught.value.partial == CONTENT[:75_000]
    assert caught.value.expected == 225_000
    assert openneuro.total() == PathCount(1, 75_000)


def test_a_reset_breaks_the_connection_in_the_middle(openneuro):
    """The client gets RST, not an end of file."""
    openneuro.set_faults(Fault(FaultKind.RESET))
    with pytest.raises(ConnectionResetError):
        ask(openneuro)
    assert openneuro.total().bytes == 150_000


def test_a_kept_connection_is_reset_on_reuse_and_a_fresh_one_is_not(openneuro):
    """As by a server that forgot the connection while it was idle."""
    openneuro.set_faults(Fault(FaultKind.RESET_REUSED))
    with Client(openneuro) as client:
        assert client.ask(PLAIN)[2] == CONTENT
        with pytest.raises(ConnectionResetError):
            client.ask(PLAIN)
    assert ask(openneuro)[2] == CONTENT
    assert openneuro.faults_struck() == [1]


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_a_flip_turns_over_one_bit(openneuro, at):
    """Length and headers are right, one bit is wrong."""
    openneuro.set_faults(Fault(FaultKind.FLIP, at=at))
    status, _, body = ask(openneuro)
    assert status == 200
    ours, theirs = (int.from_bytes(data, "big") for data in (body, CONTENT))
    assert (ours ^ theirs).bit_count() == 1


@pytest.mark.parametrize("at", [0.0, 0.5])
def test_a_hang_says_nothing_until_it_is_over(openneuro, at):
    """Half an hour of silence outlasts a client's patience; a short one is only late."""
    openneuro.set_faults(Fault(FaultKind.HANG, seconds=1800.0, at=at))
    with Client(openneuro) as client:
        client.connection.request("GET", f"/openneuro.org/{ACCESSION}/{PLAIN}".replace(" ", "%20"))
        if at:
            response = client.connection.getresponse()
            assert response.read(150_000) == CONTENT[:150_000]
            client.connection.sock.settimeout(0.3)
            with response, pytest.raises(TimeoutError):
                response.read(1)
        else:
            client.connection.sock.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.connection.getresponse()
    openneuro.set_faults(Fault(FaultKind.HANG, seconds=0.1, at=at))
    begin_s = time.monotonic()
    assert ask(openneuro)[2] == CONTENT
    assert time.monotonic() - begin_s >= 0.1


def test_a_slow_loris_gives_a_byte_at_a_time(openneuro):
    """Ten bytes, 20 ms before each."""
    openneuro.set_faults(Fault(FaultKind.SLOW, seconds=0.02))
    begin_s = time.monotonic()
    assert ask(openneuro, SMALL)[2] == bytes(range(20))
    assert time.monotonic() - begin_s >= 10 * 0.02


def test_probable_faults_strike_the_same_requests_whatever_the_threads(openneuro):
    """The draw follows from seed, path and request number; another seed draws others."""

    def struck(seed, threads):
        fault = Fault(FaultKind.UNAVAILABLE, probability=0.3, seed=seed)
        openneuro.set_faults(fault)
        with ThreadPoolExecutor(threads) as pool:
            statuses = list(pool.map(lambda _: ask(openneuro, SMALL)[0], range(60)))
        assert openneuro.faults_struck() == [statuses.count(503)]
        return statuses

    serial = struck(1, 1)
    assert serial == struck(1, 1)
    assert serial != struck(2, 1)
    assert 5 <= serial.count(503) <= 31
    assert serial.count(503) == struck(1, 4).count(503)


def test_git_is_struck_only_by_faults_that_name_it(tmp_path, monkeypatch, openneuro):
    """A pattern over everything spares git; one over git spares the content."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", openneuro.environment["GIT_CONFIG_GLOBAL"])
    openneuro.set_faults(Fault(FaultKind.UNAVAILABLE))
    git(tmp_path, "clone", "--quiet", "--bare", openneuro.url(ACCESSION), "works")
    assert openneuro.total(area="git").requests >= 2
    openneuro.set_faults(Fault(FaultKind.UNAVAILABLE, pattern=f"git/{ACCESSION}/*"))
    assert ask(openneuro)[0] == 200
    with pytest.raises(CommandError, match="503"):
        git(tmp_path, "clone", "--quiet", "--bare", openneuro.url(ACCESSION), "fails")


def test_git_annex_resumes_a_truncated_transfer(tmp_path, monkeypatch, openneuro):
    """The partial download is kept and only the rest is asked for again."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", openneuro.environment["GIT_CONFIG_GLOBAL"])
    folder = clone(tmp_path / "clone")
    openneuro.set_faults(Fault(FaultKind.TRUNCATE, count=1))
    assert fetch(folder, PLAIN) == CONTENT
    assert openneuro.faults_struck() == [1]
    assert openneuro.counters(ACCESSION) == {PLAIN: PathCount(2, 300_000)}


def test_nothing_is_left_when_it_ends(tmp_path):
    """No process, thread or variable stays, even while a client hangs."""
    children = set(psutil.Process().children(recursive=True))
    threads = set(threading.enumerate())
    environment = dict(os.environ)
    with LoopbackOpenNeuro(tmp_path) as openneuro:
        openneuro.publish(ACCESSION, {PLAIN: CONTENT})
        openneuro.set_faults(Fault(FaultKind.HANG, seconds=1800.0, at=0.0))
        assert os.environ["GIT_CONFIG_GLOBAL"].startswith(str(tmp_path))
        server = psutil.Process(openneuro.server_pid)
        hanging = socket.create_connection(("127.0.0.1", openneuro.port))
        target = f"/openneuro.org/{ACCESSION}/{PLAIN.replace(' ', '%20')}"
        hanging.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    with hanging:
        assert not server.is_running()
        assert set(psutil.Process().children(recursive=True)) <= children
        assert set(threading.enumerate()) <= threads
        assert dict(os.environ) == environment
    with pytest.raises(TioOpenNeuroError, match="runs only between 'with' and its end"):
        openneuro.set_latency(1.0)


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and asks Linux for its processes")
def test_the_server_ends_with_its_parent_even_if_a_fork_lives_on(tmp_path):
    """A kill -9 of the parent ends the server, though a fork holds the pipe to it."""
    script = (
        "import os, signal, sys\n"
        f"sys.path[:] = {sys.path!r}\n"
        "from pathlib import Path\n"
        "from faulty import LoopbackOpenNeuro\n"
        "with LoopbackOpenNeuro(Path(sys.argv[1])) as openneuro:\n"
        "    fork = os.fork()\n"
        "    if fork == 0:\n"
        "        signal.pause()\n"
        "    print(openneuro.server_pid, fork, flush=True)\n"
        "    signal.pause()\n"
    )
    parent = Coprocess([sys.executable, "-W", "ignore", "-c", script, str(tmp_path)])
    try:
        line = parent.read_line(60.0)
        assert line is not None, parent.stderr
        server, fork = (psutil.Process(int(pid)) for pid in line.split())
        assert server.is_running()
        os.kill(parent.pid, signal.SIGKILL)
        server.wait(30.0)
        assert fork.is_running()
    finally:
        parent.kill()
    fork.wait(30.0)
