"""One contract for content in a clone, kept by the fake, over HTTP and by git-annex alike.

``openneuro`` is real: a clone by :func:`install`, and its remote over HTTP on 127.0.0.1. What a
``Source`` does to its remote is all that differs; every test reads the same for both.
"""

import hashlib
import os
import pickle
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from fakes import FailingRepo, content_of, make_key
from faulty import Fault, FaultKind, LoopbackOpenNeuro

from tio_openneuro.annex.processes import run
from tio_openneuro.annex.repo import AnnexRepo
from tio_openneuro.annex.tree import index_tree
from tio_openneuro.content import AnnexKey, ContentFile, ContentRepo, ContentUnit, StoredContent
from tio_openneuro.disk.engine import Engine
from tio_openneuro.errors import (
    ContentMismatchError,
    DropRefusedError,
    FetchError,
    RemoteUnavailableError,
)
from tio_openneuro.sources.install import install

SOON_S = 10.0


class Source(ABC):
    """A clone, three keys that its remote has, and what can go wrong with the remote."""

    repo: ContentRepo
    keys: list[AnnexKey]

    @abstractmethod
    def is_right(self, key: AnnexKey, content: bytes) -> bool:
        """Return whether these bytes are the key's."""

    @abstractmethod
    def halt(self) -> None:
        """Have the next fetch stand still halfway."""

    @abstractmethod
    def halt_a_while(self) -> None:
        """Have the next fetch stand still halfway, until :meth:`go_on` at the latest."""

    @abstractmethod
    def go_on(self) -> None:
        """End a halt."""

    @abstractmethod
    def refuse(self) -> None:
        """Have every fetch refused."""

    @abstractmethod
    def corrupt(self, key: AnnexKey) -> None:
        """Have other bytes than the key's sent."""

    @abstractmethod
    def stumble(self, times: int) -> None:
        """Have the next fetch fail so many times, in a way that passes."""

    @abstractmethod
    def recover(self) -> None:
        """Have nothing go wrong any more."""

    @abstractmethod
    def add_own(self) -> AnnexKey:
        """Put content there that no remote has; return its key."""

    def partial_bytes(self, key: AnnexKey) -> int:
        """Return what lies of an unfinished download, as the disk has it."""
        folder = self.repo.path / ".git" / "annex" / "tmp"
        return sum(path.stat().st_size for path in folder.glob(f"*{key.name}"))


class FakeSource(Source):
    """The fake clone."""

    def __init__(self, path: Path) -> None:
        self.fake = FailingRepo(path, share=0.0)
        self.repo = self.fake
        self.keys = [make_key(f"key-{place}", 40_000) for place in range(3)]

    def is_right(self, key: AnnexKey, content: bytes) -> bool:
        return content == content_of(key)

    def halt(self) -> None:
        self.fake.gate = threading.Event()

    def halt_a_while(self) -> None:
        self.halt()

    def go_on(self) -> None:
        assert self.fake.gate is not None
        self.fake.gate.set()

    def refuse(self) -> None:
        self.fake.share = 1.0

    def corrupt(self, key: AnnexKey) -> None:
        self.fake.corrupt.add(key.name)

    def stumble(self, times: int) -> None:
        self.fake.hiccups = times

    def recover(self) -> None:
        self.fake.gate = None
        self.fake.share = 0.0
        self.fake.corrupt.clear()

    def add_own(self) -> AnnexKey:
        key = make_key("own", 5000)
        self.fake.place(key)
        self.fake.undroppable.add(key.name)
        return key


class AnnexSource(Source):
    """A clone of ds900001, made by :func:`install`."""

    def __init__(self, openneuro: LoopbackOpenNeuro, path: Path) -> None:
        self.openneuro = openneuro
        self.repo = AnnexRepo(path, stall_timeout_s=30.0, total_timeout_s=60.0)
        files = index_tree(path, "refs/tags/1.0.0")
        found = dict.fromkeys(file.key for file in files if file.key is not None)
        self.keys = sorted(found, key=lambda key: -(key.size_bytes or 0))[:3]

    def is_right(self, key: AnnexKey, content: bytes) -> bool:
        digest = hashlib.new(key.backend.removesuffix("E"), content).hexdigest()
        return f"--{digest}." in key.name

    def halt(self) -> None:
        self.openneuro.set_faults(Fault(FaultKind.HANG, at=0.5))

    def halt_a_while(self) -> None:
        self.openneuro.set_faults(Fault(FaultKind.HANG, at=0.5, seconds=2.0, count=1))

    def go_on(self) -> None:
        """The server goes on by itself."""

    def refuse(self) -> None:
        self.openneuro.set_faults(Fault(FaultKind.FORBIDDEN))

    def corrupt(self, key: AnnexKey) -> None:
        self.openneuro.set_faults(Fault(FaultKind.FLIP))

    def stumble(self, times: int) -> None:
        self.openneuro.set_faults(Fault(FaultKind.FLIP, count=times))

    def recover(self) -> None:
        self.openneuro.set_faults()

    def add_own(self) -> AnnexKey:
        file = self.repo.path / "own.nii.gz"
        file.write_bytes(b"own" * 1000)
        run(["git", "annex", "add", "-q", "own.nii.gz"], cwd=self.repo.path)
        key = AnnexKey.from_pointer(str(file.readlink()))
        assert key is not None
        return key


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the root of a clone that the tests copy: making each anew takes a second."""
    return tmp_path_factory.mktemp("template")


@pytest.fixture(params=["fake", "http", "git-annex"])
def source(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    template: Path,
    openneuro: LoopbackOpenNeuro,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Source]:
    """Return a clone with nothing in it: fake, and real in both ways of fetching."""
    monkeypatch.setenv("TIO_OPENNEURO_FETCH", request.param)
    clone = tmp_path / "root" / "clones" / "ds900001"
    found: Source
    if request.param == "fake":
        found = FakeSource(clone)
    else:
        if not (template / "clones").exists():
            install("ds900001", template)
        shutil.copytree(template / "clones" / "ds900001", clone, symlinks=True)
        found = AnnexSource(openneuro, clone)
    yield found
    found.repo.close()


@pytest.fixture
def owner_fd(tmp_path: Path) -> Iterator[int]:
    """Return a descriptor to inherit, as an owner's lock is."""
    descriptor = os.open(tmp_path / "owner.lock", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def wait_for_partial(source: Source, fetching: Future[Path]) -> None:
    """Return once some of a download lies in the clone."""
    tick = threading.Event()
    while not any(stored.partial for stored in source.repo.stored()):
        assert not fetching.done()
        tick.wait(0.01)


def leave_partial(source: Source, key: AnnexKey) -> int:
    """Cancel a fetch halfway; return the bytes of what is left of it."""
    source.halt()
    cancel = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(source.repo.get, key, cancelled=cancel.is_set)
        wait_for_partial(source, fetching)
        cancel.set()
        with pytest.raises(FetchError) as caught:
            fetching.result(timeout=SOON_S)
    assert caught.value.key == key.name
    source.recover()
    assert source.repo.locate(key) is None
    size_bytes = source.partial_bytes(key)
    assert size_bytes < (key.size_bytes or 0)
    assert list(source.repo.stored()) == [StoredContent(key.name, size_bytes, partial=True)]
    return size_bytes


class TestFetch:
    """Content comes, whole and right, or an error does."""

    def test_content_is_right_and_where_get_and_locate_say(
        self, source: Source, owner_fd: int
    ) -> None:
        """Absent before, the key's own bytes after; what is present is returned again."""
        key, other = source.keys[:2]
        assert source.repo.locate(key) is None
        path = source.repo.get(key, owner_fd=owner_fd)
        assert source.is_right(key, path.read_bytes())
        assert source.repo.locate(key) == path == source.repo.get(key)
        assert source.repo.locate(other) is None
        assert path.is_relative_to(source.repo.path)

    def test_key_fetched_by_two_threads_arrives_once_for_both(self, source: Source) -> None:
        """Who comes second waits, and gets the same file."""
        key = source.keys[0]
        source.halt_a_while()
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(source.repo.get, key)
            wait_for_partial(source, first)
            second = pool.submit(source.repo.get, key)
            source.go_on()
            paths = [first.result(timeout=30), second.result(timeout=30)]
        assert paths == [source.repo.locate(key)] * 2
        assert source.is_right(key, paths[0].read_bytes())
        assert [stored.partial for stored in source.repo.stored()] == [False]

    def test_fetch_that_is_cancelled_before_it_begins_leaves_nothing(self, source: Source) -> None:
        """A question that says yes at once ends the fetch at once."""
        with pytest.raises(FetchError):
            source.repo.get(source.keys[0], cancelled=lambda: True)
        assert source.repo.locate(source.keys[0]) is None

    def test_cancelled_fetch_leaves_a_partial_that_the_next_one_completes(
        self, source: Source
    ) -> None:
        """What is left is listed with its size, and gone once the content is whole."""
        key = source.keys[0]
        leave_partial(source, key)
        assert source.is_right(key, source.repo.get(key).read_bytes())
        assert list(source.repo.stored()) == [
            StoredContent(key.name, key.size_bytes or 0, partial=False)
        ]

    @pytest.mark.parametrize("way", ["discard_partial", "drop"])
    def test_partial_is_removed(self, source: Source, way: str) -> None:
        """Discarding it removes it, and so does dropping the key; twice is no error."""
        key = source.keys[0]
        leave_partial(source, key)
        getattr(source.repo, way)(key)
        getattr(source.repo, way)(key)
        assert list(source.repo.stored()) == []

    def test_discarding_a_partial_leaves_whole_content(self, source: Source) -> None:
        """Only downloads that are not finished are discarded."""
        key = source.keys[0]
        path = source.repo.get(key)
        source.repo.discard_partial(key)
        assert source.repo.locate(key) == path

    def test_remote_that_refuses_is_unavailable(self, source: Source) -> None:
        """The error names the key; once the remote has recovered, the content comes."""
        key = source.keys[0]
        source.refuse()
        with pytest.raises(RemoteUnavailableError) as caught:
            source.repo.get(key)
        assert caught.value.key == key.name
        assert source.repo.locate(key) is None
        source.recover()
        assert source.is_right(key, source.repo.get(key).read_bytes())

    def test_corrupted_content_is_never_given_out(self, source: Source) -> None:
        """Bytes that are not the key's end in an error, and leave no object."""
        key = source.keys[0]
        source.corrupt(key)
        with pytest.raises(ContentMismatchError) as caught:
            source.repo.get(key)
        assert caught.value.key == key.name
        assert source.repo.locate(key) is None
        assert [stored for stored in source.repo.stored() if not stored.partial] == []
        source.recover()
        assert source.is_right(key, source.repo.get(key).read_bytes())

    def test_retries_are_counted_and_never_forgotten(self, source: Source) -> None:
        """Each try after the first counts, in this process alone, also once it was closed."""
        assert source.repo.counts["retries"] == 0
        source.stumble(2)
        source.repo.get(source.keys[0])
        assert source.repo.counts["retries"] == 2
        source.recover()
        source.repo.get(source.keys[1])
        source.repo.close()
        assert source.repo.counts["retries"] == 2


class TestDrop:
    """Content goes only where it can come back."""

    def test_dropped_content_is_gone_and_can_come_back(self, source: Source) -> None:
        """The other content stays; a second drop, and one of what never was, are no errors."""
        key, other, never = source.keys
        source.repo.get(key)
        kept = source.repo.get(other)
        for absent in (key, key, never):
            source.repo.drop(absent)
        assert source.repo.locate(key) is None
        assert source.repo.locate(other) == kept
        assert [stored.key_name for stored in source.repo.stored()] == [other.name]
        assert source.is_right(key, source.repo.get(key).read_bytes())

    def test_content_that_no_remote_has_is_not_dropped(self, source: Source) -> None:
        """It stays, whole, and the error names it."""
        key = source.add_own()
        path = source.repo.locate(key)
        assert path is not None
        content = path.read_bytes()
        with pytest.raises(DropRefusedError) as caught:
            source.repo.drop(key)
        assert caught.value.key == key.name
        assert path.read_bytes() == content


class TestClone:
    """What else a clone tells, and how it ends and travels."""

    def test_stored_lists_objects_and_partials_with_their_sizes(self, source: Source) -> None:
        """Everything that takes room is listed once, and nothing else."""
        whole, half = source.keys[:2]
        assert list(source.repo.stored()) == []
        size_bytes = leave_partial(source, half)
        source.repo.get(whole)
        found = sorted(source.repo.stored(), key=lambda stored: stored.partial)
        assert found == [
            StoredContent(whole.name, whole.size_bytes or 0, partial=False),
            StoredContent(half.name, size_bytes, partial=True),
        ]

    def test_object_of_another_size_is_not_located(self, source: Source) -> None:
        """A file that was cut short is not taken for the content."""
        key = source.keys[0]
        path = source.repo.get(key)
        path.parent.chmod(0o700)
        path.chmod(0o600)
        path.write_bytes(path.read_bytes()[:-1])
        assert source.repo.locate(key) is None

    def test_pickled_clone_fetches_as_the_first_does(self, source: Source) -> None:
        """A copy works on the same folder, from the same remotes, and has retried nothing yet."""
        key, other = source.keys[:2]
        source.repo.get(key)
        copy: ContentRepo = pickle.loads(pickle.dumps(source.repo))
        assert (copy.path, copy.remotes, copy.counts) == (source.repo.path, source.repo.remotes, {})
        with closing(copy):
            assert copy.locate(key) == source.repo.locate(key)
            assert source.is_right(other, copy.get(other).read_bytes())
            copy.drop(key)
        assert source.repo.locate(key) is None

    def test_closed_clone_can_be_used_again(self, source: Source) -> None:
        """Closing ends children, not the clone; closing twice is no error."""
        key, other = source.keys[:2]
        source.repo.get(key)
        source.repo.close()
        source.repo.close()
        assert source.is_right(other, source.repo.get(other).read_bytes())
        source.repo.drop(key)
        assert source.repo.locate(key) is None

    def test_closing_ends_a_fetch_under_way(self, source: Source) -> None:
        """Whoever waits for it gets an error soon."""
        source.halt()
        with ThreadPoolExecutor(1) as pool:
            fetching = pool.submit(source.repo.get, source.keys[0])
            wait_for_partial(source, fetching)
            source.repo.close()
            with pytest.raises(FetchError):
                fetching.result(timeout=SOON_S)
        source.recover()
        source.repo.discard_partial(source.keys[0])

    def test_it_names_its_remotes_and_what_they_can_give(self, source: Source) -> None:
        """The keys of the dataset can be fetched."""
        assert source.repo.remotes
        assert source.repo.path.is_absolute()
        assert source.repo.unavailable(source.keys) == {}


def test_engine_reports_retries_of_its_own_time(source: Source, root: Path) -> None:
    """What a clone retried before an engine came to use it is not counted as the engine's."""
    first, second = (
        ContentUnit(key.name, (ContentFile(source.repo, key, "image.nii.gz"),))
        for key in source.keys[:2]
    )
    source.stumble(1)
    with Engine(root, disk_budget="1 MB") as engine, engine.lease(first):
        assert engine.statistics().retries == 1
    source.recover()
    with Engine(root, disk_budget="1 MB") as engine:
        with engine.lease(second):
            assert engine.statistics().retries == 0
        engine.evict([first, second])
