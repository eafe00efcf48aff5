"""Publish datasets as OpenNeuro does: a git repository whose annexed files lie in versioned S3.

Each accession has a publisher's clone, which exports every version to the loopback S3 with
git-annex itself, and a bare repository that readers clone. In the latter ``remote.log`` says what
OpenNeuro's says, with ``publicurl`` at the loopback server.

Source: ``remote.log`` of ds004199 and its like; https://git-annex.branchable.com/special_remotes/S3/
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from tio_openneuro.annex import child_environment, run
from tio_openneuro.errors import TioOpenNeuroError
from tio_openneuro.loopback.volume import Content, write_content

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

REMOTE = "s3-PUBLIC"
BUCKET = "openneuro.org"
BRANCH = "main"
_ATTRIBUTES = """\
* annex.backend=SHA256E
**/.git* annex.largefiles=nothing
*.bval annex.largefiles=nothing
*.bvec annex.largefiles=nothing
*.json annex.largefiles=largerthan=1mb
*.tsv annex.largefiles=largerthan=1mb
dataset_description.json annex.largefiles=nothing
.bidsignore annex.largefiles=nothing
CHANGES annex.largefiles=nothing
README* annex.largefiles=nothing
LICENSE annex.largefiles=nothing
"""
_REMOTE_FIELDS = (
    "autoenable=true",
    f"bucket={BUCKET}",
    "datacenter=US",
    "encryption=none",
    "exporttree=yes",
    "host=s3.amazonaws.com",
    f"name={REMOTE}",
    "partsize=1GiB",
    "port=80",
    "public=no",
    "storageclass=STANDARD",
    "type=S3",
    "versioning=yes",
)
_ACCESSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_TIMEOUT_S = 600.0
_DAY_S = 86_400
_FIRST_COMMIT_S = 1_704_067_200  # 2024-01-01: fixed dates give the same commits every time


def annexed_by_default(path: str) -> bool:
    """Say whether OpenNeuro would annex a file of that path: NIfTI yes, small text no."""
    return path.endswith((".nii", ".nii.gz"))


@dataclass(frozen=True, slots=True)
class Publisher:
    """Publishes under one folder, to a server that runs.

    Attributes:
        folder: Holds ``publisher/ACCESSION`` (clones), ``git/ACCESSION.git`` (bare).
        port: Port of the server on 127.0.0.1.
        git_config: Global git configuration of the children.
    """

    folder: Path
    port: int
    git_config: Path

    def publish(
        self,
        accession: str,
        files: Mapping[str, Content],
        *,
        tag: str | None,
        annexed: Callable[[str], bool],
    ) -> None:
        """Commit files over what is there, export them to S3, and make both public.

        Args:
            accession: Name of the dataset, ``ds900001``.
            files: Path from the dataset's root → content; added, or put in place of what is
                there. Other files stay.
            tag: Tag of the new version; None: no tag.
            annexed: Which paths are annexed; the others go into git.

        Raises:
            TioOpenNeuroError: The accession or a path is not one, or the tag is taken.
            CommandError: git or git-annex failed.
        """
        self._check(accession, files)
        clone = self.folder / "publisher" / accession
        bare = self.folder / "git" / f"{accession}.git"
        if not (bare / "HEAD").is_file():
            files = {**self._own_files(accession), **files}
            self._begin(accession, clone, bare)
        self._add(clone, {path: files[path] for path in files if annexed(path)}, "--force-large")
        self._add(
            clone, {path: files[path] for path in files if not annexed(path)}, "--force-small"
        )
        self._commit(clone, tag)
        self._run(clone, "git", "annex", "export", "--quiet", BRANCH, "--to", REMOTE)
        self._make_public(accession, clone, bare)

    def _check(self, accession: str, paths: Iterable[str]) -> None:
        if _ACCESSION.fullmatch(accession) is None:
            message = f"Cannot publish {accession!r}: use a name like 'ds900001'."
            raise TioOpenNeuroError(message)
        for path in paths:
            parts = PurePosixPath(path)
            if parts.is_absolute() or not parts.parts or {"..", ".git"} & set(parts.parts):
                message = f"Cannot publish {path!r} in {accession}: give a path inside it."
                raise TioOpenNeuroError(message)

    @staticmethod
    def _own_files(accession: str) -> dict[str, Content]:
        """Return what every dataset of OpenNeuro's carries beside its BIDS files."""
        identity = uuid.uuid5(uuid.NAMESPACE_URL, f"https://openneuro.org/datasets/{accession}")
        return {
            ".gitattributes": _ATTRIBUTES,
            ".datalad/config": f'[datalad "dataset"]\n\tid = {identity}\n',
        }

    def _begin(self, accession: str, clone: Path, bare: Path) -> None:
        """Make both repositories and the special remote."""
        clone.mkdir(parents=True, exist_ok=True)
        self._run(clone, "git", "init", "--quiet", f"--initial-branch={BRANCH}")
        self._run(clone, "git", "annex", "init", "--quiet", "OpenNeuro")
        self._run(
            clone,
            *("git", "annex", "initremote", "--quiet", REMOTE, "type=S3", "encryption=none"),
            *("exporttree=yes", "versioning=yes", "protocol=http", "requeststyle=path"),
            *("host=127.0.0.1", f"port={self.port}", f"bucket={BUCKET}", "datacenter=US"),
            f"fileprefix={accession}/",
        )
        bare.mkdir(parents=True, exist_ok=True)
        self._run(bare, "git", "init", "--quiet", "--bare", f"--initial-branch={BRANCH}")
        self._run(bare, "git", "config", "transfer.hideRefs", "refs/loopback")
        for repository in (clone, bare):
            self._run(repository, "git", "config", "gc.auto", "0")

    def _add(self, clone: Path, files: Mapping[str, Content], option: str) -> None:
        """Write files and stage them, with one process for all."""
        if not files:
            return
        for path, content in files.items():
            target = clone / path
            target.parent.mkdir(parents=True, exist_ok=True)
            # An annexed file's link would be written through, into its object.
            target.unlink(missing_ok=True)
            write_content(content, target)
        names = "".join(f"{path}\0" for path in files).encode()
        self._run(clone, "git", "annex", "add", "--quiet", option, "--batch", "-z", stdin=names)

    def _commit(self, clone: Path, tag: str | None) -> None:
        self._run(clone, "git", "add", "--update")
        # With the star it is a pattern, which may match nothing: then it is the first commit.
        number = int(self._run(clone, "git", "rev-list", "--count", f"--branches={BRANCH}*"))
        date = f"{_FIRST_COMMIT_S + number * _DAY_S} +0000"
        dates = {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
        message = "[OpenNeuro] Recorded changes"
        command = ["git", "commit", "--quiet", "--allow-empty", "--no-verify", "-m", message]
        self._run(clone, *command, environment=dates)
        if tag is not None:
            self._run(clone, "git", "tag", tag)

    def _make_public(self, accession: str, clone: Path, bare: Path) -> None:
        """Bring commits, tags and the git-annex branch into the bare repository.

        The branch gets one commit on top, on both the public and the publisher's history, in
        which ``remote.log`` is as OpenNeuro's. Clones made before can fetch it.
        """
        self._run(
            bare,
            *("git", "fetch", "--quiet", str(clone), f"+refs/heads/{BRANCH}:refs/heads/{BRANCH}"),
            *("+refs/tags/*:refs/tags/*", "+refs/heads/git-annex:refs/loopback/git-annex"),
        )
        published = self._run(bare, "git", "rev-parse", "refs/loopback/git-annex").decode().strip()
        entries = self._run(bare, "git", "ls-tree", "-z", published).split(b"\0")
        log = self._run(bare, "git", "show", f"{published}:remote.log").decode()
        public_log = self._rewrite(accession, log).encode()
        blob = self._run(bare, "git", "hash-object", "-w", "--stdin", stdin=public_log).strip()
        kept = [entry for entry in entries if entry and not entry.endswith(b"\tremote.log")]
        listing = b"\0".join([*kept, b"100644 blob %b\tremote.log" % blob, b""])
        tree = self._run(bare, "git", "mktree", "-z", stdin=listing).decode().strip()
        old = self._run(
            bare, "git", "for-each-ref", "--format=%(objectname)", "refs/heads/git-annex"
        )
        parents = [*old.decode().split(), published]
        options = [option for parent in parents for option in ("-p", parent)]
        commit = self._run(bare, "git", "commit-tree", tree, *options, "-m", "update")
        self._run(bare, "git", "update-ref", "refs/heads/git-annex", commit.decode().strip())

    def _rewrite(self, accession: str, log: str) -> str:
        """Return ``remote.log`` with OpenNeuro's fields for the one remote that it names."""
        words = log.splitlines()[-1].split()
        public_url = f"publicurl=http://127.0.0.1:{self.port}/{BUCKET}"
        fields = [*_REMOTE_FIELDS, f"fileprefix={accession}/", public_url]
        return " ".join([words[0], *sorted(fields), words[-1]]) + "\n"

    def _run(
        self,
        folder: Path,
        *arguments: str,
        stdin: bytes = b"",
        environment: Mapping[str, str] | None = None,
    ) -> bytes:
        """Run git in a folder, with the publisher's credentials and configuration."""
        own = {
            "AWS_ACCESS_KEY_ID": "loopback",
            "AWS_SECRET_ACCESS_KEY": "loopback",
            "GIT_CONFIG_GLOBAL": str(self.git_config),
            "GIT_AUTHOR_NAME": "Git Worker",
            "GIT_AUTHOR_EMAIL": "git@openneuro.org",
            "GIT_COMMITTER_NAME": "Git Worker",
            "GIT_COMMITTER_EMAIL": "git@openneuro.org",
            **(environment or {}),
        }
        return run(
            arguments,
            cwd=folder,
            stdin=stdin,
            timeout_s=_TIMEOUT_S,
            environment=child_environment(own),
        )
