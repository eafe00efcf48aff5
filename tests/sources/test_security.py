"""Hostile repositories, through the public dataset: nothing that they name is run or contacted.

Each hostile thing would leave a witness: a line in a file, a connection to a socket, a request.
Where it is cheap, a plain git or git-annex on the same repository shows that it does.
"""

import gzip
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torchio as tio
from conftest import heads
from faulty import LoopbackOpenNeuro
from hostile import (
    Repository,
    Tampered,
    branch_log,
    enable_public,
    nifti,
    peak_bytes,
    remote_line,
    remote_uuid,
    witness,
)

import tio_openneuro as tno
from tio_openneuro.annex.environment import child_environment
from tio_openneuro.annex.processes import run
from tio_openneuro.content import AnnexKey
from tio_openneuro.errors import FetchError, RamBudgetError, TioOpenNeuroError, UnsafeDatasetError
from tio_openneuro.loopback import Volume
from tio_openneuro.volumes.headers import VolumeFile, refuse_bomb

T1 = {"t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz")}
IMAGE = "sub-{:02}/anat/sub-{:02}_T1w.nii.gz"
VOLUME = Volume(np.zeros((8, 8, 8), np.int16), np.eye(4))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Return the file that witnesses write to."""
    return tmp_path / "mark"


@pytest.fixture
def programs(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put witnesses in place of every program that a remote or a key could ask for."""
    folder = tmp_path / "programs"
    names = ("git-annex-remote-odd", "git-annex-backend-XODD", "rsync", "ssh", "bup", "gpg", "odd")
    names += ("git-annex-compute-odd", "borg")
    for name in names:
        witness(folder, name, mark)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


class Listener:
    """A server on 127.0.0.1 that nobody should connect to; it hangs up on whoever does."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.contacts = 0
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._server.accept()
            with connection:
                if connection.recv(4) == b"end!":
                    return
                self.contacts += 1

    def close(self) -> None:
        """End it."""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(b"end!")
        self._thread.join()
        self._server.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    """Return a server that nobody should connect to."""
    server = Listener()
    yield server
    server.close()


def use_everything(source: str) -> list[Path]:
    """Construct, load, iterate, evict and fetch again; return what was left on disk."""
    with tno.DataladSubjectsDataset(source, T1) as dataset:
        assert dataset[0].t1.data.numel() > 0
        assert len(list(dataset)) == len(dataset)
        assert dataset.evict() > 0
        assert dataset.fetch() > 0
        assert dataset.check() == []
        return sorted(path for path in (dataset._root / "clones").glob("*/*") if path.is_dir())


class TestRemotes:
    """Of all remotes that a repository names, OpenNeuro's bucket alone is used."""

    @pytest.fixture
    def hostile(self, openneuro: LoopbackOpenNeuro, listener: Listener, tmp_path: Path) -> Tampered:
        """Return ds900601: beside the sound remote one of each kind, said to have all content."""
        if (openneuro.folder / "git" / "ds900601.git").exists():
            pytest.fail("published twice")
        openneuro.publish("ds900601", heads(2))
        tampered = Tampered(openneuro, "ds900601")
        keys = tampered.annex_keys()
        store = tmp_path / "store"
        for key in keys:
            # What a directory remote would give: right in size, and wrong.
            path = store / key.object_paths()[1].removeprefix("annex/objects/")
            path.parent.mkdir(parents=True)
            path.write_bytes(bytes(key.size_bytes or 0))
        port = listener.port
        lines = [
            "type=external externaltype=odd encryption=none name=s3-BACKUP",
            f"type=directory directory={store} encryption=none name=disk",
            "type=rsync rsyncurl=odd.example:/data encryption=none name=mirror",
            "type=hook hooktype=odd encryption=none name=tape",
            "type=bup buprepo=odd.example:/data encryption=none name=backup",
            "type=git location=ssh://odd.example/data name=twin",
            "type=git location=ext::odd name=ext",
            f"type=git location=http://127.0.0.1:{port}/data.git name=http",
            (
                f"type=S3 host=127.0.0.1 port={port} protocol=http bucket=private name=s3-PRIVATE "
                f"encryption=none requeststyle=path exporttree=yes versioning=yes public=yes "
                f"publicurl=http://127.0.0.1:{port}/private"
            ),
            f"type=webdav url=http://127.0.0.1:{port}/dav encryption=none name=dav",
            f"type=httpalso url=http://127.0.0.1:{port}/also encryption=none name=also",
            f"type=git-lfs url=http://127.0.0.1:{port}/lfs encryption=none name=lfs",
            "type=compute program=git-annex-compute-odd encryption=none name=derived",
            "type=borg borgrepo=odd.example:/data encryption=none name=archive",
            (
                "type=S3 bucket=openneuro.org encryption=shared cipher=b2Rk cipherkeys=odd "
                "name=gpg host=s3.amazonaws.com"
            ),
        ]
        everywhere = "".join(
            f"1700000000s 1 {remote_uuid(number)}\n" for number in range(1, len(lines) + 1)
        )
        web = "00000000-0000-0000-0000-000000000001"
        secret = tmp_path / "secret"
        secret.write_text("secret")
        tampered.append(
            {
                "remote.log": "".join(remote_line(n, line) for n, line in enumerate(lines, 1)),
                "uuid.log": "".join(
                    f"{remote_uuid(n)} odd timestamp=1700000000s\n"
                    for n in range(1, len(lines) + 1)
                ),
                **{branch_log(key): everywhere + f"1700000000s 1 {web}\n" for key in keys},
                **{
                    branch_log(key, ".log.web"): f"1700000000s 1 http://127.0.0.1:{port}/x\n"
                    f"1700000000s 1 {secret.as_uri()}\n"
                    for key in keys
                },
                "numcopies.log": "1700000000s 99\n",
                "mincopies.log": "1700000000s 99\n",
                "config.log": "".join(
                    f"1700000000s {name} {value}\n"
                    for name, value in {
                        "annex.synccontent": "true",
                        "annex.addunlocked": "true",
                        "annex.autocommit": "true",
                        "annex.largefiles": "nothing",
                        "annex.securehashesonly": "true",
                        "annex.freezecontent-command": "odd",
                        "core.sshCommand": "odd",
                    }.items()
                ),
            }
        )
        return tampered

    def test_no_remote_that_asks_for_it_is_enabled_contacted_or_run(
        self,
        openneuro: LoopbackOpenNeuro,
        hostile: Tampered,
        programs: Path,
        mark: Path,
        listener: Listener,
        tmp_path: Path,
        root: Path,
    ) -> None:
        """Fifteen kinds of remote, web URLs and odd settings: none is of effect."""
        use_everything("ds900601")
        clone = root / "clones" / "ds900601"
        assert not mark.exists()
        assert listener.contacts == 0
        remotes = run(["git", "remote"], cwd=clone).decode().split()
        assert sorted(remotes) == ["origin", "s3-PUBLIC"]
        config = (clone / ".git" / "config").read_text()
        assert "odd" not in config
        assert "store" not in config
        with tno.DataladSubjectsDataset("ds900601", T1) as dataset:
            assert float(dataset[0].t1.data.float().std()) > 0

        # The control: git-annex as anybody runs it does start and contact them.
        control = tmp_path / "control"
        command = ["git", "clone", "-q", openneuro.url("ds900601"), str(control)]
        run(command, cwd=tmp_path)
        run(["git", "annex", "init", "-q"], cwd=control, timeout_s=30.0)
        assert "git-annex-remote-odd" in mark.read_text()
        assert listener.contacts > 0

    def test_content_that_only_odd_remotes_have_is_not_fetched_from_them(
        self,
        openneuro: LoopbackOpenNeuro,
        programs: Path,
        mark: Path,
        listener: Listener,
    ) -> None:
        """A unit of which OpenNeuro's bucket knows nothing is skipped, with its reason."""
        openneuro.publish("ds900602", heads(1))
        tampered = Tampered(openneuro, "ds900602")
        key = AnnexKey.parse("MD5E-s5000--5d41402abc4b2a76b9719d911017c592.nii.gz")
        assert key is not None
        port = listener.port
        line = "type=external externaltype=odd encryption=none name=odd"
        tampered.append(
            {
                "remote.log": remote_line(1, line),
                branch_log(key): f"1700000000s 1 {remote_uuid(1)}\n",
                branch_log(key, ".log.web"): f"1700000000s 1 http://127.0.0.1:{port}/x\n",
            }
        )
        path = IMAGE.format(2, 2)
        link = f"../../.git/annex/objects/aa/bb/{key.name}/{key.name}".encode()
        tampered.tag(tampered.write("main", {path: ("120000", link)}))
        with tno.DataladSubjectsDataset("ds900602", T1) as dataset:
            assert dataset.fetch() > 0
            assert [skip.unit for skip in dataset.skipped] == ["sub-02"]
            assert "cannot be fetched" in dataset.skipped[0].reason
            repo = dataset._rows[0].content.files[0].repo
            with pytest.raises(FetchError):
                repo.get(key)
        assert not mark.exists()
        assert listener.contacts == 0

    def test_key_of_an_external_backend_starts_no_program(
        self, openneuro: LoopbackOpenNeuro, programs: Path, mark: Path, root: Path
    ) -> None:
        """A backend that is a program of its own, ``X…``, is never asked; its unit is skipped."""
        openneuro.publish("ds900603", heads(1))
        tampered = Tampered(openneuro, "ds900603")
        sound = tampered.annex_keys()[0]
        key = AnnexKey(f"XODD-s{sound.size_bytes}--abc.nii.gz", sound.size_bytes)
        log = tampered.git("show", f"refs/heads/git-annex:{branch_log(sound)}") + "\n"
        rmet = tampered.git("show", f"refs/heads/git-annex:{branch_log(sound, '.log.rmet')}")
        tampered.append({branch_log(key): log, branch_log(key, ".log.rmet"): rmet + "\n"})
        link = f"../../.git/annex/objects/aa/bb/{key.name}/{key.name}".encode()
        tampered.tag(tampered.write("main", {IMAGE.format(2, 2): ("120000", link)}))
        with tno.DataladSubjectsDataset("ds900603", T1) as dataset:
            assert [skip.unit for skip in dataset.skipped] == ["sub-02"]
            assert "XODD" in dataset.skipped[0].reason
            repo = dataset._rows[0].content.files[0].repo
            with pytest.raises(UnsafeDatasetError, match="XODD"):
                repo.get(key)
        assert not mark.exists()
        clone = root / "clones" / "ds900603"
        command = ["git", "annex", "get", "--key", key.name, "--from", "s3-PUBLIC"]
        with pytest.raises(TioOpenNeuroError):
            run(command, cwd=clone)
        assert "git-annex-backend-XODD" in mark.read_text()


class TestTrees:
    """What a commit holds is data, and never a program or a way out."""

    def test_hooks_filters_procedures_and_submodules_do_nothing(
        self,
        openneuro: LoopbackOpenNeuro,
        mark: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A clone and all that follows runs no filter, no template's hook, and asks nobody else."""
        openneuro.publish("ds900611", heads(2))
        openneuro.publish("ds900612", {IMAGE.format(1, 1): VOLUME})
        other = Tampered(openneuro, "ds900612").git("rev-parse", "refs/heads/main")
        tampered = Tampered(openneuro, "ds900611")
        programs, template = tmp_path / "programs", tmp_path / "template"
        for name in ("post-checkout", "post-merge", "post-index-change", "reference-transaction"):
            witness(template / "hooks", name, mark, then="exit 0")
        for name in ("pre-commit-annex", "post-update-annex"):
            witness(template / "hooks", name, mark, then="exit 0")
        witness(programs, "smudge", mark, then="cat")
        url = openneuro.url("ds900612")
        modules = (
            f'[submodule "sub-77"]\n\tpath = sub-77\n\turl = {url}\n'
            f'[submodule "sub-78"]\n\tpath = sub-78\n\turl = ext::odd\n'
            f'[submodule "sub-79"]\n\tpath = sub-79\n\turl = --upload-pack=odd\n'
        )
        procedure = f"#!/bin/sh\ntouch '{mark}'\n".encode()
        config = (
            '[datalad "dataset"]\n\tid = 0-0\n[datalad "procedures"]\n\todd = .datalad/procedures\n'
            '[datalad "clone"]\n\trun = odd\n[datalad "credentials"]\n\trepeat = odd\n'
        )
        commit = tampered.write(
            "main",
            {
                ".gitattributes": ("100644", b"* filter=odd\n*.nii.gz filter=odd diff=odd\n"),
                ".gitmodules": ("100644", modules.encode()),
                **{f"sub-{n}": ("160000", other.encode()) for n in (77, 78, 79)},
                ".datalad/config": ("100644", config.encode()),
                ".datalad/procedures/cfg_odd.sh": ("100755", procedure),
            },
        )
        tampered.tag(commit)
        git_config = tmp_path / "home" / "gitconfig"
        settings = {
            "include.path": os.environ["GIT_CONFIG_GLOBAL"],
            "init.templateDir": str(template),
            "filter.odd.smudge": str(programs / "smudge"),
            "filter.odd.clean": str(programs / "smudge"),
            "submodule.recurse": "true",
        }
        for name, value in settings.items():
            run(["git", "config", "--file", str(git_config), name, value])
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(git_config))
        openneuro.reset_counters()
        use_everything("ds900611")
        assert not mark.exists()
        assert openneuro.total("ds900612", area="git").requests == 0

        # The control: git as anybody runs it follows the user's settings to the stranger's files.
        plain = child_environment()
        for name in [name for name in plain if name.startswith("GIT_CONFIG_")]:
            if name not in {"GIT_CONFIG_GLOBAL", "GIT_CONFIG_NOSYSTEM"}:
                del plain[name]
        command = ["git", "clone", "-q", "--branch=6.6.6", openneuro.url("ds900611"), "control"]
        run(command, cwd=tmp_path, environment=plain)
        assert {"smudge", "post-checkout"} <= set(mark.read_text().split())
        command = ["git", "submodule", "update", "--init", "sub-77"]
        run(command, cwd=tmp_path / "control", environment=plain)
        assert openneuro.total("ds900612", area="git").requests > 0

    def test_hooks_and_filters_of_a_users_clone_do_not_run(
        self, openneuro: LoopbackOpenNeuro, mark: Path, tmp_path: Path
    ) -> None:
        """Also where the clone itself brings them: an archive that somebody passed on.

        git-annex's own hooks there (``freezecontent-annex`` and the like) are its user's settings.
        """
        clone = tmp_path / "passed-on"
        run(["git", "clone", "-q", openneuro.url("ds900001"), str(clone)])
        run(["git", "annex", "init", "-q", "--no-autoenable"], cwd=clone)
        enable_public(clone)
        for name in ("post-checkout", "post-index-change", "reference-transaction", "pre-commit"):
            witness(clone / ".git" / "hooks", name, mark, then="exit 0")
        witness(tmp_path / "programs", "monitor", mark)
        program = str(tmp_path / "programs" / "monitor")
        for setting in ("core.fsmonitor", "filter.odd.smudge", "filter.odd.clean"):
            run(["git", "config", setting, program], cwd=clone)
        (clone / ".git" / "info" / "attributes").write_text("* filter=odd\n")
        with tno.DataladSubjectsDataset(clone, T1) as dataset:
            assert dataset[0].t1.data.numel() > 0
            assert dataset.evict() > 0
        assert not mark.exists()

    @pytest.mark.parametrize(
        "target", ["/etc/passwd", "../../../../../secret.nii.gz", "../../.git/config"]
    )
    def test_image_whose_link_leaves_the_dataset_is_never_read(
        self, openneuro: LoopbackOpenNeuro, tmp_path: Path, target: str
    ) -> None:
        """Its unit is skipped, with the reason; where it alone is there, construction says so."""
        accession = f"ds90062{len(target) % 10}"
        openneuro.publish(accession, heads(1))
        tampered = Tampered(openneuro, accession)
        commit = tampered.write("main", {IMAGE.format(2, 2): ("120000", target.encode())})
        tampered.tag(commit)
        with tno.DataladSubjectsDataset(accession, T1) as dataset:
            assert [row.subject["subject_id"] for row in dataset._rows] == ["sub-01"]

    def test_path_that_leaves_the_dataset_is_refused(self, openneuro: LoopbackOpenNeuro) -> None:
        """A tree with ``..`` in it is not indexed at all."""
        openneuro.publish("ds900630", heads(1))
        tampered = Tampered(openneuro, "ds900630")
        blob = bytes.fromhex(tampered.git("hash-object", "-w", "--stdin", stdin=b"x"))
        make = ("hash-object", "-t", "tree", "--literally", "-w", "--stdin")
        inner = bytes.fromhex(tampered.git(*make, stdin=b"100644 x_T1w.nii.gz\0" + blob))
        tree = tampered.git(*make, stdin=b"40000 ..\0" + inner)
        commit = tampered.git("commit-tree", tree, "-p", "refs/heads/main", "-m", "update")
        tampered.tag(commit)
        with pytest.raises(UnsafeDatasetError, match="leaves the dataset's folder"):
            tno.DataladSubjectsDataset("ds900630", T1)

    def test_text_that_is_too_long_to_be_a_table_is_refused(
        self, openneuro: LoopbackOpenNeuro
    ) -> None:
        """A table of gigabytes, which git packs into kilobytes, is not read into RAM."""
        openneuro.publish("ds900631", heads(1))
        tampered = Tampered(openneuro, "ds900631")
        text = b"participant_id\n" + b"\n" * (65 << 20)
        tampered.tag(tampered.write("main", {"participants.tsv": ("100644", text)}))
        with pytest.raises(UnsafeDatasetError, match=r"participants\.tsv"):
            tno.DataladSubjectsDataset("ds900631", T1)


class TestBombs:
    """Files that are small, and would not be once they are decoded."""

    def test_tags_without_end_are_refused_before_they_are_cloned(self, tmp_path: Path) -> None:
        """Git would hold them all in RAM, twenty times over; so they are listed first."""
        made = Repository(tmp_path / "tags")
        made.branch("main", {"dataset_description.json": b"{}"})
        made.branch("git-annex", {"uuid.log": b""})
        commit = made.git("rev-parse", "main")
        tags = (f"{commit} refs/tags/{'t' * 60}{number:07}\n" for number in range(200_000))
        (made.path / "packed-refs").write_text("".join(tags))
        with pytest.raises(UnsafeDatasetError, match=r"'git ls-remote' writes in .*tags-.* bytes"):
            tno.DataladSubjectsDataset(f"file://{made.path}", T1, root=tmp_path / "root")

    @pytest.fixture
    def bombs(self, openneuro: LoopbackOpenNeuro) -> str:
        """Publish ds900640: one bomb of a kind per subject."""
        if not (openneuro.folder / "git" / "ds900640.git").exists():
            zeros = bytes(8 * 8 * 8 * 2)
            files: dict[str, bytes] = {
                IMAGE.format(1, 1): nifti((30_000, 30_000, 30_000), zeros),
                IMAGE.format(2, 2): nifti((8, 8, 8), zeros, extension_bytes=1 << 30),
                IMAGE.format(3, 3): nifti((8, 8, 8), zeros, inflated=3 << 30),
                IMAGE.format(4, 4): gzip.compress(b"II*\0" + np.random.default_rng(0).bytes(5000)),
            }
            openneuro.publish("ds900640", files)
        return "ds900640"

    def test_header_that_states_more_than_the_ram_is_refused(self, bombs: str) -> None:
        """Loading it alone raises one clear error instead of ending the process."""
        with tno.DataladSubjectsDataset(bombs, T1) as dataset:
            with pytest.raises(RamBudgetError, match=r"sub-01.*30000|sub-01.*27000") as caught:
                dataset[0]
            assert caught.value.unit == "sub-01"
            lazy = tno.DataladSubjectsDataset(bombs, T1, load_getitem=False)
            subject = lazy[0]
            with pytest.raises(RamBudgetError, match="sub-01"):
                subject.t1.load()
            lazy.close()

    def test_file_that_is_no_image_is_refused(self, bombs: str) -> None:
        """Other formats under an image's name are not handed to readers that would try them."""
        with (
            tno.DataladSubjectsDataset(bombs, T1) as dataset,
            pytest.raises(UnsafeDatasetError, match=r"sub-04.*no header"),
        ):
            dataset[3]

    @pytest.mark.parametrize("index", [0, 1])
    def test_bomb_is_refused_by_the_queue_before_it_is_decoded(
        self, bombs: str, index: int
    ) -> None:
        """What passes the RAM budget raises with the subject's name, and memory does not grow."""
        with tno.DataladSubjectsDataset(bombs, T1) as dataset:
            before = peak_bytes()
            with (
                tno.BudgetedQueue(
                    dataset[[index]],
                    4,
                    2,
                    tio.UniformSampler(4),
                    num_workers=1,
                    ram_budget="200 MB",
                ) as queue,
                pytest.raises(RamBudgetError, match=f"sub-0{index + 1}"),
            ):
                next(iter(queue))
            assert peak_bytes() - before < 100e6

    def test_what_follows_the_stated_voxels_is_not_inflated(self, bombs: str) -> None:
        """A file of small dimensions that inflates to gigabytes costs what it states."""
        with tno.DataladSubjectsDataset(bombs, T1) as dataset:
            before = peak_bytes()
            queue = tno.BudgetedQueue(
                dataset[[2]], 4, 2, tio.UniformSampler(4), num_workers=1, ram_budget="200 MB"
            )
            with queue:
                assert len(list(queue)) == 2
            assert peak_bytes() - before < 100e6

    @pytest.mark.parametrize(
        "content",
        [b"", b"\x1f\x8b", b"\x1f\x8b" + bytes(50), bytes(700), gzip.compress(b"x" * 9)[:-4]],
        ids=["nothing", "magic", "zeros", "no header", "cut off"],
    )
    def test_damaged_header_is_unknown_and_no_error(self, tmp_path: Path, content: bytes) -> None:
        """Whatever stands at the beginning of a file, measuring it does not raise."""
        path = tmp_path / "image.nii.gz"
        path.write_bytes(content)
        assert VolumeFile(path).size is None

    @pytest.mark.parametrize("shape", [(-30_000, 30_000, 30_000), (32_767,) * 7])
    def test_odd_dimensions_are_counted_at_their_worst(
        self, tmp_path: Path, shape: tuple[int, ...]
    ) -> None:
        """Neither signs nor seven dimensions make a header's claim small."""
        path = tmp_path / "image.nii.gz"
        path.write_bytes(nifti(shape))
        with pytest.raises(TioOpenNeuroError, match=r"image\.nii\.gz of sub-01.*(dim|voxels)"):
            refuse_bomb(VolumeFile(path), "image.nii.gz", "sub-01", 10**13)
