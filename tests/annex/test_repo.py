"""The index of git objects, and content by key through the real git-annex."""

import multiprocessing
import os
import pickle
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from faulty import Fault, FaultKind, LoopbackOpenNeuro
from web import rewrite_branch

from tio_openneuro.annex.branch import exported_keys, special_remotes
from tio_openneuro.annex.messages import CloneFailure, Failure, Retries, clone_error
from tio_openneuro.annex.processes import run
from tio_openneuro.annex.repo import AnnexRepo
from tio_openneuro.annex.tree import index_tree, read_blobs
from tio_openneuro.content import AnnexKey, TreeFile
from tio_openneuro.errors import (
    ContentMismatchError,
    DropRefusedError,
    FetchError,
    NotAnAnnexError,
    RemoteUnavailableError,
    UnsafeDatasetError,
)
from tio_openneuro.sources.install import install

IMAGE = "sub-01/anat/sub-01_T1w.nii.gz"


def git(folder: Path, *arguments: str, stdin: bytes = b"") -> str:
    """Run git in a folder as the library does."""
    return run(["git", *arguments], cwd=folder, stdin=stdin).decode().strip()


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of clones that the tests copy: making each anew takes a second."""
    return tmp_path_factory.mktemp("templates")


@pytest.fixture
def repo(
    openneuro: LoopbackOpenNeuro,
    templates: Path,
    tmp_path: Path,
    way: str,
) -> Iterator[AnnexRepo]:
    """Return a clone of ours of ds900001, with short deadlines, for each way of fetching."""
    if not (templates / "clones").exists():
        install("ds900001", templates)
    clone = tmp_path / "root" / "clones" / "ds900001"
    shutil.copytree(templates / "clones" / "ds900001", clone, symlinks=True)
    repo = AnnexRepo(clone, stall_timeout_s=1.0, total_timeout_s=20.0)
    yield repo
    repo.close()


def keys_of(repo: AnnexRepo) -> list[AnnexKey]:
    """Return the distinct keys of the newest version, in the order of their paths."""
    files = index_tree(repo.path, "refs/tags/1.0.0")
    return list(dict.fromkeys(file.key for file in files if file.key is not None))


@pytest.fixture
def own(templates: Path, tmp_path: Path) -> Path:
    """Return a user's annex: an annexed image, an unlocked one, and text in git."""
    if not (templates / "own").exists():
        make_annex(templates / "own")
    shutil.copytree(templates / "own", tmp_path / "own", symlinks=True)
    return tmp_path / "own"


def make_annex(folder: Path) -> None:
    """Make the annex that ``own`` gives."""
    (folder / "sub-01").mkdir(parents=True)
    git(folder, "init", "-q", "-b", "main")
    git(folder, "annex", "init", "-q", "here")
    (folder / "sub-01/locked.nii.gz").write_bytes(b"locked" * 5000)
    (folder / "sub-01/unlocked image.nii.gz").write_bytes(b"unlocked" * 5000)
    git(folder, "annex", "add", "-q", "sub-01")
    git(folder, "annex", "unlock", "-q", "sub-01/unlocked image.nii.gz")
    (folder / "notes.json").write_text('"/annex/objects/MD5E-s5--aa.nii.gz"')
    git(folder, "-c", "annex.largefiles=nothing", "add", "-A")
    git(folder, "commit", "-q", "-m", "first")


class TestIndex:
    """What a commit holds, from git objects alone."""

    def test_symlinks_and_unlocked_pointers_have_their_keys(self, own: Path) -> None:
        """Locked and unlocked content is recognised, with its size; text in git is not."""
        files = {file.path: file for file in index_tree(own, "main")}
        locked, unlocked = files["sub-01/locked.nii.gz"], files["sub-01/unlocked image.nii.gz"]
        assert locked.key is not None
        assert (locked.key.size_bytes, locked.size_bytes) == (30_000, 30_000)
        assert unlocked.key is not None
        assert unlocked.size_bytes == 40_000
        assert files["notes.json"] == TreeFile("notes.json", files["notes.json"].blob, None, 35)
        assert list(read_blobs(own, [files["notes.json"].blob])) == [
            b'"/annex/objects/MD5E-s5--aa.nii.gz"'
        ]

    def test_pointer_with_more_lines_is_a_pointer(self, own: Path) -> None:
        """git-annex lets more lines follow the key, up to 32 kB; so do we."""
        pointer = b"/annex/objects/MD5E-s7--ab.nii.gz\n" + b"more\n" * 2000
        (own / "long.nii.gz").write_bytes(pointer)
        blob = git(own, "hash-object", "-w", "--no-filters", "long.nii.gz")
        git(own, "update-index", "--add", "--cacheinfo", f"100644,{blob},long.nii.gz")
        files = {file.path: file for file in index_tree(own, git(own, "write-tree"))}
        assert files["long.nii.gz"].key == AnnexKey("MD5E-s7--ab.nii.gz", 7)

    def test_links_inside_are_resolved_and_others_are_empty(self, own: Path) -> None:
        """A link to a file of the dataset stands for it; one that leads out has no content."""
        for name, target in {
            "sub-01/again.nii.gz": "locked.nii.gz",
            "second.nii.gz": "sub-01/again.nii.gz",
            "passwd.nii.gz": "../../../../etc/passwd",
            "absolute.nii.gz": "/etc/passwd",
            "circle.nii.gz": "circle.nii.gz",
        }.items():
            (own / name).symlink_to(target)
        git(own, "-c", "annex.largefiles=nothing", "add", "-A")
        files = {file.path: file for file in index_tree(own, git(own, "write-tree"))}
        assert files["second.nii.gz"].key == files["sub-01/locked.nii.gz"].key
        assert files["sub-01/again.nii.gz"].size_bytes == 30_000
        for name in ("passwd.nii.gz", "absolute.nii.gz", "circle.nii.gz"):
            assert files[name] == TreeFile(name, "", None, None)

    @pytest.mark.parametrize("name", [b"..", b".git", b".GIT", b"a\\..\\b"])
    def test_path_that_leaves_the_dataset_is_refused(self, own: Path, name: bytes) -> None:
        """A tree that git itself would not make, with a name that leads elsewhere, is refused."""
        blob = bytes.fromhex(git(own, "hash-object", "-w", "notes.json"))
        inner = git(
            own,
            *("hash-object", "-t", "tree", "--literally", "-w", "--stdin"),
            stdin=b"100644 image.nii.gz\0" + blob,
        )
        outer = git(
            own,
            *("hash-object", "-t", "tree", "--literally", "-w", "--stdin"),
            stdin=b"40000 " + name + b"\0" + bytes.fromhex(inner),
        )
        with pytest.raises(UnsafeDatasetError, match="leaves the dataset's folder"):
            index_tree(own, outer)

    def test_submodules_are_left_out(self, own: Path) -> None:
        """A submodule is no file, wherever its URL leads."""
        head = git(own, "rev-parse", "HEAD")
        git(own, "update-index", "--add", "--cacheinfo", f"160000,{head},sub-99")
        tree = git(own, "write-tree")
        assert "sub-99" not in {file.path for file in index_tree(own, tree)}


class TestBranch:
    """What the git-annex branch says, as strangers may have written it."""

    def commit(self, own: Path, logs: dict[str, str]) -> str:
        """Make a commit of these logs and return its id."""
        listing = ""
        for name, text in logs.items():
            blob = git(own, "hash-object", "-w", "--stdin", stdin=text.encode())
            listing += f"100644 blob {blob}\t{name}\n"
        return git(own, "commit-tree", "-m", "x", git(own, "mktree", stdin=listing.encode()))

    def test_newest_line_of_an_id_counts_in_any_order(self, own: Path) -> None:
        """A union merge leaves several; a line without words says nothing."""
        lines = ("a name=new type=S3 timestamp=9s\n", "a name=old type=rsync timestamp=8s\n")
        for log in (lines, lines[::-1]):
            trust = "a timestamp=9s\nb X timestamp=1s\ntimestamp=7s\n"
            ref = self.commit(own, {"remote.log": "".join(log), "trust.log": trust})
            (remote,) = special_remotes(own, [ref])
            assert (remote.uuid, remote.name, remote.dead) == ("a", "new", False)
            assert remote.fields["type"] == "S3"

    def test_newest_export_counts_in_any_order(self, own: Path) -> None:
        """Of the trees that were exported to a remote, the last one is there."""
        whole = git(own, "rev-parse", "main^{tree}")
        none = git(own, "mktree")
        keys = {file.key for file in index_tree(own, "main") if file.key}
        lines = (f"9.5s x:a {whole}\n", f"8s x:a {none}\n")
        for log in (lines, lines[::-1]):
            ref = self.commit(own, {"export.log": "".join(log)})
            assert exported_keys(own, [ref], {"a"}) == keys
            assert exported_keys(own, [ref], {"x"}) == set()


def test_what_came_before_a_transfer_was_ended_is_its_own(
    repo: AnnexRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """git-annex, killed once the content lies there and before it says so, has brought it."""
    monkeypatch.setenv("TIO_OPENNEURO_FETCH", "git-annex")
    pause = threading.Event()
    for key in keys_of(repo)[:2]:
        asked: list[AnnexKey] = []

        def is_placed(key: AnnexKey = key, asked: list[AnnexKey] = asked) -> bool:
            asked.append(key)
            while repo.locate(key) is None and 1 < len(asked) < 3000:
                pause.wait(0.01)
                asked.append(key)
            return len(asked) > 1

        made: list[Path] = []
        with pytest.raises(FetchError, match="cancelled"):
            repo.get(key, cancelled=is_placed, made=made.append)
        assert made == [repo.locate(key)]
        assert made != [None]


class TestGet:
    """Content from OpenNeuro's bucket, on a bad day too."""

    def test_content_is_what_was_published(
        self, repo: AnnexRepo, openneuro: LoopbackOpenNeuro
    ) -> None:
        """Fetched once, found again, and gone after the drop; no commit tells of it."""
        key = keys_of(repo)[0]
        before = git(repo.path, "rev-parse", "git-annex")
        assert repo.locate(key) is None
        path = repo.get(key)
        assert path.stat().st_size == key.size_bytes
        assert repo.get(key) == repo.locate(key) == path
        assert [(stored.key_name, stored.partial) for stored in repo.stored()] == [
            (key.name, False)
        ]
        assert openneuro.total("ds900001").requests == 1
        repo.drop(key)
        repo.drop(key)
        assert list(repo.stored()) == []
        assert openneuro.total("ds900001").requests == 1
        assert git(repo.path, "rev-parse", "git-annex") == before

    def test_more_than_the_key_states_is_not_waited_for(
        self, repo: AnnexRepo, openneuro: LoopbackOpenNeuro
    ) -> None:
        """git-annex would go on to the end of whatever comes; it is ended soon after."""
        key = keys_of(repo)[0]
        stored = openneuro.folder / "s3/openneuro.org/ds900001"
        (file,) = [
            path
            for path in stored.rglob("*-*")
            if path.is_file() and path.stat().st_size == key.size_bytes
        ]
        right = file.read_bytes()
        openneuro.set_connection_rate(1_000_000)
        try:
            file.write_bytes(right + bytes(14_000_000))
            with pytest.raises(ContentMismatchError, match=f"more than {key.size_bytes} bytes"):
                repo.get(key)
        finally:
            file.write_bytes(right)
            openneuro.set_connection_rate(None)
        assert openneuro.total("ds900001").bytes < 14_000_000

    def test_credentials_in_the_environment_change_nothing(
        self, repo: AnnexRepo, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With AWS variables set, the public URL is still what is asked."""
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        key = keys_of(repo)[0]
        assert repo.get(key).stat().st_size == key.size_bytes

    @pytest.mark.parametrize(
        "fault",
        [
            Fault(FaultKind.UNAVAILABLE, count=3),
            Fault(FaultKind.NOT_FOUND, count=1),
            Fault(FaultKind.BAD_RANGE, count=2),
            Fault(FaultKind.TRUNCATE, count=3),
            Fault(FaultKind.RESET, count=3),
            Fault(FaultKind.RESET_REUSED, count=1),
            Fault(FaultKind.FLIP, count=1),
            Fault(FaultKind.HANG, count=1),
            Fault(FaultKind.SLOW, count=1, seconds=0.05),
        ],
        ids=lambda fault: fault.kind.value,
    )
    def test_passing_fault_is_recovered_from(
        self, repo: AnnexRepo, openneuro: LoopbackOpenNeuro, fault: Fault
    ) -> None:
        """Whatever goes wrong for a while, right content arrives."""
        warm, key = keys_of(repo)[:2]
        repo.get(warm)
        openneuro.set_faults(fault)
        path = repo.get(key)
        assert openneuro.faults_struck() != [0]
        assert path.stat().st_size == key.size_bytes
        assert git(repo.path, "annex", "fsck", "--quiet", "--key", key.name) == ""

    @pytest.mark.parametrize(
        ("fault", "error", "words"),
        [
            (Fault(FaultKind.NOT_FOUND), RemoteUnavailableError, "404"),
            (Fault(FaultKind.FORBIDDEN), RemoteUnavailableError, "403"),
            (Fault(FaultKind.BAD_RANGE), RemoteUnavailableError, "416"),
            (Fault(FaultKind.FLIP), ContentMismatchError, "checksum"),
            pytest.param(
                Fault(FaultKind.HANG, at=0.0),
                RemoteUnavailableError,
                "sent nothing more",
                marks=pytest.mark.slow,
            ),
        ],
        ids=lambda value: value.kind.value if isinstance(value, Fault) else "",
    )
    def test_lasting_fault_is_reported_as_what_it_is(
        self,
        repo: AnnexRepo,
        openneuro: LoopbackOpenNeuro,
        fault: Fault,
        error: type[FetchError],
        words: str,
    ) -> None:
        """What does not pass raises its own error, naming the key, and the next file works."""
        bad, good = keys_of(repo)[:2]
        openneuro.set_faults(fault)
        with pytest.raises(error, match=words) as caught:
            repo.get(bad)
        assert caught.value.key == bad.name
        assert repo.locate(bad) is None
        openneuro.set_faults()
        assert repo.get(good).stat().st_size == good.size_bytes

    def test_cancelling_ends_a_transfer_that_hangs(
        self, repo: AnnexRepo, openneuro: LoopbackOpenNeuro
    ) -> None:
        """Once cancelled, git-annex is killed; what arrived stays until it is discarded."""
        key = keys_of(repo)[0]
        openneuro.set_faults(Fault(FaultKind.HANG, at=0.5))
        cancel = threading.Event()
        patient = AnnexRepo(repo.path, remotes=repo.remotes, stall_timeout_s=60.0)
        with ThreadPoolExecutor(1) as pool:
            fetching = pool.submit(patient.get, key, cancelled=cancel.is_set)
            while not any(stored.partial for stored in patient.stored()):
                assert not fetching.done()
            cancel.set()
            with pytest.raises(FetchError, match="cancelled"):
                fetching.result(timeout=10)
        assert [stored.partial for stored in patient.stored()] == [True]
        patient.discard_partial(key)
        patient.discard_partial(key)
        assert list(patient.stored()) == []
        patient.close()

    def test_closing_ends_fetches_under_way(
        self, repo: AnnexRepo, openneuro: LoopbackOpenNeuro
    ) -> None:
        """A fetch in another thread ends when the clone is closed, which can be used again."""
        key = keys_of(repo)[0]
        openneuro.set_faults(Fault(FaultKind.HANG, at=0.5))
        patient = AnnexRepo(repo.path, remotes=repo.remotes, stall_timeout_s=60.0)
        with ThreadPoolExecutor(1) as pool:
            fetching = pool.submit(patient.get, key)
            while not any(stored.partial for stored in patient.stored()):
                assert not fetching.done()
            patient.close()
            with pytest.raises(FetchError, match="closed"):
                fetching.result(timeout=10)
        openneuro.set_faults()
        assert patient.get(key).stat().st_size == key.size_bytes
        patient.close()

    def test_threads_and_processes_fetch_side_by_side(self, repo: AnnexRepo) -> None:
        """Four threads here, a forked and a spawned process: every key arrives."""
        keys = keys_of(repo)
        with ThreadPoolExecutor(4) as pool:
            sizes = [path.stat().st_size for path in pool.map(repo.get, keys[:4])]
        assert sizes == [key.size_bytes for key in keys[:4]]
        for method, part in (("fork", keys[4:6]), ("spawn", keys[6:8])):
            child = multiprocessing.get_context(method).Process(
                target=fetch_and_close, args=(repo, part)
            )
            child.start()
            child.join(60)
            assert child.exitcode == 0
        assert sum(repo.locate(key) is not None for key in keys) == 8
        copy = pickle.loads(pickle.dumps(repo))
        assert copy.get(keys[8]) == repo.locate(keys[8])
        copy.close()

    def test_two_who_fetch_one_key_get_it_once(
        self, repo: AnnexRepo, openneuro: LoopbackOpenNeuro
    ) -> None:
        """Who finds the key in transfer elsewhere waits for it, and does not fetch it again."""
        key = keys_of(repo)[0]
        openneuro.set_faults(Fault(FaultKind.HANG, at=0.5, seconds=2.0, count=1))
        first, second = (
            AnnexRepo(repo.path, remotes=repo.remotes, stall_timeout_s=30.0) for _ in range(2)
        )
        with ThreadPoolExecutor(2) as pool:
            paths = list(pool.map(lambda who: who.get(key), (first, second)))
        assert paths == [repo.locate(key)] * 2
        assert openneuro.total("ds900001").requests == 1
        first.close()
        second.close()

    @pytest.mark.parametrize("way", ["git-annex"], indirect=True)
    def test_forked_process_keeps_no_pipe_of_its_parents_child(self, repo: AnnexRepo) -> None:
        """The parent's git-annex ends with its input, though a forked process still fetches."""
        first, second = keys_of(repo)[:2]
        repo.get(first)
        context = multiprocessing.get_context("fork")
        ready, done = context.Event(), context.Event()
        forked = context.Process(target=fetch_and_wait, args=(repo, second, ready, done))
        forked.start()
        assert ready.wait(60)
        (transfer,) = repo._by_process[os.getpid()]._transfers
        assert transfer.finish(20.0)
        done.set()
        forked.join(60)
        assert forked.exitcode == 0

    def test_without_a_remote_the_message_says_so(self, own: Path) -> None:
        """A clone with no trusted remote fetches nothing, and says what to give."""
        repo = AnnexRepo(own, remotes=())
        with pytest.raises(FetchError, match="no remote is trusted"):
            repo.get(AnnexKey("MD5E-s5--aa.nii.gz", 5))
        repo.close()

    def test_remotes_are_asked_in_turn(self, own: Path, tmp_path: Path) -> None:
        """What the first remote does not have comes from the second."""
        (tmp_path / "store").mkdir()
        store = f"directory={tmp_path / 'store'}"
        git(own, "annex", "initremote", "-q", "store", "type=directory", store, "encryption=none")
        git(own, "annex", "initremote", "-q", "empty", "type=directory", store, "encryption=none")
        git(own, "annex", "copy", "-q", "--to", "store")
        repo = AnnexRepo(own, remotes=("empty", "store"))
        key = next(file.key for file in index_tree(own, "main") if file.key)
        repo.drop(key)
        assert repo.locate(key) is None
        assert repo.get(key).read_bytes() == b"locked" * 5000
        repo.close()


def fetch_and_close(repo: AnnexRepo, keys: list[AnnexKey]) -> None:
    """Fetch in another process, which ends with an error if anything is wrong."""
    for key in keys:
        assert repo.get(key).stat().st_size == key.size_bytes
    repo.close()


def fetch_and_wait(repo: AnnexRepo, key: AnnexKey, ready: Event, done: Event) -> None:
    """Fetch in a forked process, and keep all its descriptors until it may end."""
    repo.get(key)
    ready.set()
    assert done.wait(60)
    repo.close()


class TestDrop:
    """Only what can come back goes."""

    def test_remote_that_is_dead_gives_nothing_back(self, repo: AnnexRepo) -> None:
        """What only a remote has that was declared dead is not available."""
        key = keys_of(repo)[0]
        assert repo.unavailable([key]) == {}
        git(repo.path, "annex", "dead", "-q", "s3-PUBLIC")
        assert set(repo.unavailable([key])) == {key}

    def test_content_that_no_remote_has_stays(self, repo: AnnexRepo) -> None:
        """What the user added to the clone and nobody else has is not dropped."""
        file = repo.path / "mine.nii.gz"
        file.write_bytes(b"mine" * 1000)
        git(repo.path, "annex", "add", "-q", "mine.nii.gz")
        key = AnnexKey.from_pointer(str(file.readlink()))
        assert key is not None
        with pytest.raises(DropRefusedError, match=r"mine|Cannot drop") as caught:
            repo.drop(key)
        assert caught.value.key == key.name
        assert repo.locate(key) is not None

    def test_content_without_a_recorded_version_stays(self, replaced: AnnexRepo) -> None:
        """Content that is recorded at the bucket, but could not be asked for, is kept."""
        key, other = keys_of(replaced)
        replaced.get(key)
        forget_version(replaced.path, key)
        again = AnnexRepo(replaced.path, remotes=replaced.remotes)
        assert set(again.unavailable([key, other])) == {key}
        with pytest.raises(DropRefusedError, match="no S3 version id"):
            again.drop(key)
        assert again.locate(key) is not None
        again.close()

    def test_key_without_a_version_is_refused_before_any_network(
        self, replaced: AnnexRepo, openneuro: LoopbackOpenNeuro
    ) -> None:
        """Fetching such a key fails at once, with the reason."""
        key = keys_of(replaced)[0]
        forget_version(replaced.path, key)
        with pytest.raises(FetchError, match="records no S3 version"):
            replaced.get(key)
        assert openneuro.total("ds900008").requests == 0

    def test_key_without_a_version_that_is_still_there_is_available(
        self, replaced: AnnexRepo
    ) -> None:
        """What was exported last can be asked for by its path, without a version."""
        key = keys_of(replaced)[1]
        forget_version(replaced.path, key)
        assert replaced.unavailable([key]) == {}
        assert replaced.get(key).stat().st_size == key.size_bytes
        replaced.close()
        again = AnnexRepo(replaced.path, remotes=replaced.remotes)
        again.drop(key)
        assert again.locate(key) is None
        again.close()


@pytest.fixture
def replaced(openneuro: LoopbackOpenNeuro, root: Path) -> Iterator[AnnexRepo]:
    """Return a clone of a dataset whose first image another has replaced since 1.0.0."""
    if "ds900008" not in {path.stem for path in (openneuro.folder / "git").iterdir()}:
        openneuro.publish("ds900008", {IMAGE: b"old" * 999, "sub-02.nii.gz": b"kept" * 999})
        openneuro.publish("ds900008", {IMAGE: b"new" * 999}, tag="1.0.1")
        openneuro.reset_counters()
    installed = install("ds900008", root)
    repo = AnnexRepo(installed.path, remotes=installed.remotes)
    yield repo
    repo.close()


def forget_version(clone: Path, key: AnnexKey) -> None:
    """Take a key's S3 version out of the git-annex branch, as if it was never recorded."""
    folders = key.object_paths()[1].removeprefix("annex/objects/")[:8]
    rewrite_branch(clone, {f"{folders}{key.name}.log.rmet": None})


class TestClonesOfUsers:
    """Clones as they are found."""

    def test_unlocked_clone_holds_no_second_copy(self, own: Path, tmp_path: Path) -> None:
        """Fetching into an adjusted, unlocked clone leaves the pointers in its work tree."""
        clone = tmp_path / "adjusted"
        git(tmp_path, "clone", "-q", str(own), str(clone))
        git(clone, "annex", "init", "-q", "there")
        git(clone, "annex", "adjust", "-q", "--unlock")
        key = next(file.key for file in index_tree(clone, "HEAD") if file.key)
        repo = AnnexRepo(clone, remotes=("origin",))
        size_before = (clone / "sub-01/locked.nii.gz").stat().st_size
        assert repo.get(key).read_bytes() == b"locked" * 5000
        assert (clone / "sub-01/locked.nii.gz").stat().st_size == size_before < 200
        repo.drop(key)
        assert list(repo.stored()) == []
        git(clone, "annex", "get", "-q", "sub-01/locked.nii.gz")
        assert (clone / "sub-01/locked.nii.gz").read_bytes() == b"locked" * 5000
        repo.close()

    def test_linked_worktree_finds_the_common_annex(self, own: Path, tmp_path: Path) -> None:
        """A linked worktree has its content in the main clone, by link or by git's file."""
        linked = tmp_path / "linked"
        git(own, "worktree", "add", "-q", str(linked), "HEAD", "--detach")
        key = next(file.key for file in index_tree(linked, "HEAD") if file.key)
        found = AnnexRepo(own, remotes=()).locate(key)
        assert found is not None
        # git-annex makes git's file a link when it first runs in there.
        assert AnnexRepo(linked, remotes=()).locate(key) == found
        folder = (linked / ".git").resolve()
        (linked / ".git").unlink()
        (linked / ".git").write_text(f"gitdir: {folder}\n")
        assert AnnexRepo(linked, remotes=()).locate(key) == found

    def test_folder_without_git_is_refused(self, tmp_path: Path) -> None:
        """A folder that is no repository is no annex."""
        with pytest.raises(NotAnAnnexError, match="not a git repository"):
            AnnexRepo(tmp_path)

    @pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
    def test_read_only_clone_is_named(self, repo: AnnexRepo) -> None:
        """A clone that cannot be written to is reported as such."""
        key = keys_of(repo)[0]
        (repo.path / ".git/annex").chmod(0o500)
        try:
            with pytest.raises(FetchError, match="cannot be written to"):
                repo.get(key)
        finally:
            (repo.path / ".git/annex").chmod(0o700)


def tmpfs(folder: Path, size_bytes: int) -> bool:
    """Mount a small file system; say whether this machine lets us."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.usefixtures("way")
def test_full_disk_is_reported_and_recovered_from(
    openneuro: LoopbackOpenNeuro, tmp_path: Path
) -> None:
    """A disk that fills up in mid-transfer is named, and the fetch works once there is room."""
    small = tmp_path / "small"
    if os.name == "nt" or not tmpfs(small, 8_000_000):
        pytest.skip("needs the right to mount a tmpfs")
    if not (openneuro.folder / "git/ds900009.git").exists():
        openneuro.publish("ds900009", {IMAGE: os.urandom(4_000_000)})
    try:
        installed = install("ds900009", small)
        repo = AnnexRepo(installed.path, remotes=installed.remotes)
        key = keys_of(repo)[0]
        openneuro.set_faults(Fault(FaultKind.HANG, at=0.5, seconds=2.0, count=1))
        with ThreadPoolExecutor(1) as pool:
            fetching = pool.submit(repo.get, key)
            while not any(stored.partial for stored in repo.stored()):
                assert not fetching.done()
            fill(small / "others")
            with pytest.raises(FetchError, match="disk is full"):
                fetching.result(timeout=60)
        (small / "others").unlink()
        assert repo.get(key).stat().st_size == 4_000_000
        repo.close()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(65536))
        except OSError:
            return


@pytest.mark.parametrize(
    ("message", "failure"),
    [
        ("transfer already in progress, or unable to take transfer lock", Failure.BUSY),
        ("download failed: Service Unavailable", Failure.THROTTLED),
        ("download failed: Not Found", Failure.NOT_FOUND),
        ("download failed: Forbidden", Failure.FORBIDDEN),
        ("download failed: Requested Range Not Satisfiable", Failure.BAD_RANGE),
        ("download failed: ResponseBodyTooShort 4000001 0", Failure.CONNECTION),
        (
            "Network.Socket.recvBuf: resource vanished (Connection reset by peer)",
            Failure.CONNECTION,
        ),
        ("Verification of content failed", Failure.CORRUPT),
        ("not enough free space, need 3.16 MB more", Failure.DISK_FULL),
        (
            "Remote is configured to use versioning, but no S3 version ID is recorded for this key",
            Failure.NO_VERSION,
        ),
        ("This special remote cannot be used since it's not verified.", Failure.NOT_ALLOWED),
        ("Configuration does not allow accessing 10.0.0.1", Failure.NOT_ALLOWED),
        ("something new", Failure.UNKNOWN),
        ("404 Not Found", Failure.NOT_FOUND),
        ("StatusCodeException: statusCode = 503", Failure.THROTTLED),
        ("HTTP/1.1 403 ", Failure.FORBIDDEN),
        ("The requested URL returned error: 416", Failure.BAD_RANGE),
        ("it broke after 404 bytes", Failure.UNKNOWN),
        ("<RequestId>7-503-a</RequestId>", Failure.UNKNOWN),
        ("no room in /data/416/500", Failure.UNKNOWN),
        ("at line 403: unexpected", Failure.UNKNOWN),
        ("git-annex-shell: command not found", Failure.UNKNOWN),
    ],
)
def test_words_of_git_annex_are_understood(message: str, failure: Failure) -> None:
    """Each message that was provoked belongs to one class of failure."""
    assert Failure.of(message, Failure.UNKNOWN) is failure


@pytest.mark.parametrize(
    ("message", "failure"),
    [
        ("fatal: 'x' does not appear to be a git repository", CloneFailure.NO_REPOSITORY),
        ("remote: Repository not found.\nfatal: unable to access", CloneFailure.NO_DATASET),
        ("fatal: could not read Username for 'https://github.com'", CloneFailure.NO_DATASET),
        ("fatal: unable to access 'http://x/': Failed to connect", CloneFailure.UNREACHABLE),
        ("error: RPC failed\nfatal: early EOF", CloneFailure.UNREACHABLE),
        ("fatal: something new", CloneFailure.UNKNOWN),
    ],
)
def test_words_of_git_are_understood(message: str, failure: CloneFailure) -> None:
    """What tells of an unknown dataset goes before what tells of the network."""
    error = clone_error("clone ds000001", message)
    assert type(error) is failure.value.error
    assert str(error).startswith(f"Cannot clone ds000001: {failure.value.cause}. git said: ")


def test_tries_are_counted_by_failure_and_renewed_by_bytes() -> None:
    """Pauses grow until the tries are used up; a MiB that arrived begins the count anew."""
    retries = Retries(time.monotonic() + 600.0)
    first, second, third = (retries.pause_s(Failure.CORRUPT, 0) for _ in range(3))
    assert first is not None
    assert second is not None
    assert 0.1 <= first <= 0.2 <= second <= 0.4
    assert third is None
    assert retries.pause_s(Failure.STALLED, 0) is not None
    assert retries.pause_s(Failure.CORRUPT, (1 << 20) - 1) is None
    assert retries.pause_s(Failure.CORRUPT, 1 << 20) is not None
    assert Retries(time.monotonic()).pause_s(Failure.CORRUPT, 0) is None
