"""A small OpenNeuro on this machine: the context manager that starts, feeds and ends it."""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tio_openneuro.annex import Coprocess
from tio_openneuro.errors import TioOpenNeuroError
from tio_openneuro.loopback.link import LinkSpeed, PathCount
from tio_openneuro.loopback.publish import BUCKET, Publisher, annexed_by_default

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import TracebackType

    from tio_openneuro.loopback.faults import Fault
    from tio_openneuro.loopback.volume import Content

_ANSWER_TIMEOUT_S = 30.0
_END_TIMEOUT_S = 10.0
# The package's own __init__ would import torch: seconds and 200 MB that serving does not need.
_START = """
import sys, types
package = types.ModuleType("tio_openneuro")
package.__path__ = [sys.argv[1]]
sys.modules["tio_openneuro"] = package
from tio_openneuro.loopback.server import main
main(sys.argv[2:])
"""


class LoopbackOpenNeuro:
    """An OpenNeuro on 127.0.0.1: git over HTTP, a versioned S3 bucket, a link with knobs.

    It serves from a process of its own between ``with`` and its end, and ends with this process
    however that ends. What was published stays in the folder, and can be served again by another
    instance. Safe to share by threads, not by forked processes.

    Example:
        >>> with LoopbackOpenNeuro(folder, rate_bytes_per_s=20e6) as openneuro:  # doctest: +SKIP
        ...     openneuro.publish("ds900001", {"sub-01/anat/sub-01_T1w.nii.gz": volume})
        ...     dataset = tio_openneuro.DataladSubjectsDataset("ds900001", ...)
    """

    def __init__(
        self,
        folder: Path,
        *,
        rate_bytes_per_s: float | None = None,
        connection_rate_bytes_per_s: float | None = None,
        latency_s: float = 0.0,
        set_environment: bool = True,
    ) -> None:
        """Prepare; nothing is started before ``with``.

        Args:
            folder: Where all that it holds lies; made where it is missing.
            rate_bytes_per_s: Rate that all connections share; None: not limited.
            connection_rate_bytes_per_s: Rate of each connection; None: not limited.
            latency_s: Seconds from each request to its answer's first byte.
            set_environment: Whether ``with`` puts :attr:`environment` into ``os.environ``, so
                that git children of this process find it, and takes it out again.
        """
        self.folder = Path(folder).absolute()
        self._speed = LinkSpeed(rate_bytes_per_s, connection_rate_bytes_per_s, latency_s)
        self._set_environment = set_environment
        self._saved: dict[str, str | None] = {}
        self._lock = threading.Lock()
        self._publishing = threading.Lock()
        self._server: Coprocess | None = None
        self._server_owner = 0
        self._port = 0

    def __enter__(self) -> Self:
        """Start to serve, at the port that the folder was served at before if it is free."""
        self.folder.mkdir(parents=True, exist_ok=True)
        package = Path(__file__).parent.parent
        port_file = self.folder / "port"
        last_port = port_file.read_text(encoding="ascii") if port_file.exists() else "0"
        arguments = [str(package), str(self.folder), last_port, str(os.getpid())]
        self._server = Coprocess([sys.executable, "-P", "-c", _START, *arguments])
        self._server_owner = os.getpid()
        try:
            self._port = int(self._answer(self._server)["port"])
            port_file.write_text(str(self._port), encoding="ascii")
            self._change_speed(self._speed)
            self._git_config.write_text(self._git_configuration(), encoding="utf-8")
            for bare in sorted(self.folder.glob("git/*.git")):
                self._publisher.refresh(bare.stem)
        except BaseException:
            self._end()
            raise
        if self._set_environment:
            self._saved = {name: os.environ.get(name) for name in self.environment}
            os.environ.update(self.environment)
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the server and take the environment back."""
        for name, value in self._saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._saved = {}
        self._end()

    @property
    def port(self) -> int:
        """Port of the server on 127.0.0.1."""
        return self._port

    @property
    def server_pid(self) -> int:
        """Process id of the server."""
        return self._running().pid

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which git and git-annex reach this OpenNeuro, by accession too."""
        return {"GIT_CONFIG_GLOBAL": str(self._git_config)}

    def url(self, accession: str) -> str:
        """Return the git URL of a dataset."""
        return f"http://127.0.0.1:{self._port}/git/{accession}.git"

    def object_url(self, accession: str, path: str) -> str:
        """Return the address of a file's newest version in the bucket."""
        return f"http://127.0.0.1:{self._port}/{BUCKET}/{accession}/{path}"

    def publish(
        self,
        accession: str,
        files: Mapping[str, Content],
        *,
        removed: Iterable[str] = (),
        tag: str | None = "1.0.0",
        annexed: Callable[[str], bool] | None = None,
    ) -> str:
        """Publish a dataset, or a new version of one, and return its git URL.

        Args:
            accession: Its name, ``ds900001``.
            files: Path from the dataset's root → a :class:`Volume` (written as NIfTI), bytes,
                text, or the path of a file to copy. Over a version that is there already, they
                are added or put in place; other files stay.
            removed: Files that the new version has no more.
            tag: Tag of the version, another one each time; None: no tag.
            annexed: Which paths are annexed; default: NIfTI. The others go into git.

        Raises:
            TioOpenNeuroError: The accession, a path or the tag cannot be used, or this is not
                running.
        """
        self._running()
        choose = annexed or annexed_by_default
        with self._publishing:
            self._publisher.publish(accession, files, removed=removed, tag=tag, annexed=choose)
        return self.url(accession)

    def publish_folder(self, accession: str, folder: Path, *, tag: str | None = "1.0.0") -> str:
        """Publish all files of a folder, and return the git URL.

        Args:
            accession: Its name, ``ds900001``.
            folder: A BIDS folder; ``.git`` in it is left out.
            tag: Tag of the version; None: no tag.
        """
        files = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_file() and ".git" not in path.relative_to(folder).parts
        }
        return self.publish(accession, files, tag=tag)

    def set_rate(self, rate_bytes_per_s: float | None) -> None:
        """Change the rate that all connections share; transfers under way follow at once.

        Args:
            rate_bytes_per_s: The rate; None: not limited.
        """
        self._change_speed(replace(self._speed, rate_bytes_per_s=rate_bytes_per_s))

    def set_connection_rate(self, connection_rate_bytes_per_s: float | None) -> None:
        """Change the rate of each connection; transfers under way follow at once.

        Args:
            connection_rate_bytes_per_s: The rate; None: not limited.
        """
        self._change_speed(
            replace(self._speed, connection_rate_bytes_per_s=connection_rate_bytes_per_s)
        )

    def set_latency(self, latency_s: float) -> None:
        """Change the seconds from each request to its answer's first byte."""
        self._change_speed(replace(self._speed, latency_s=latency_s))

    def set_faults(self, *faults: Fault) -> None:
        """Put these faults in the place of all others, the first that applies striking."""
        self._ask({"faults": [fault.as_json() for fault in faults]})

    def clear_faults(self) -> None:
        """Let everything work again; a hang under way lasts its time."""
        self.set_faults()

    def faults_struck(self) -> list[int]:
        """Return how often each fault struck, in the order in which they were set."""
        struck: list[int] = self._ask({"report": True})["struck"]
        return struck

    def counters(self, accession: str | None = None, *, area: str = "s3") -> dict[str, PathCount]:
        """Return what was asked of each path since the last reset; publishing is not counted.

        Args:
            accession: Count this dataset only, by path from its root; None: all, by
                ``accession/path``.
            area: ``"s3"`` for content, ``"git"`` for clones and fetches.
        """
        counts = self._ask({"report": True})["counters"].get(area, {})
        prefix = "" if accession is None else f"{accession}/"
        return {
            name.removeprefix(prefix): PathCount(*count)
            for name, count in counts.items()
            if name.startswith(prefix)
        }

    def total(self, accession: str | None = None, *, area: str = "s3") -> PathCount:
        """Return the sum of :meth:`counters`."""
        return sum(self.counters(accession, area=area).values(), start=PathCount())

    def reset_counters(self) -> None:
        """Begin to count from nothing."""
        self._ask({"reset_counters": True})

    @property
    def _git_config(self) -> Path:
        return self.folder / "gitconfig"

    @property
    def _publisher(self) -> Publisher:
        return Publisher(self.folder, self._port, self._git_config)

    def _git_configuration(self) -> str:
        """Return the git configuration of everything that is to reach this OpenNeuro."""
        return (
            '[annex "security"]\n\tallowed-ip-addresses = 127.0.0.1\n'
            f'[url "http://127.0.0.1:{self._port}/git/"]\n'
            "\tinsteadOf = https://github.com/OpenNeuroDatasets/\n"
        )

    def _change_speed(self, speed: LinkSpeed) -> None:
        self._ask({"speed": asdict(speed)})
        self._speed = speed

    def _running(self) -> Coprocess:
        if self._server is None or self._server_owner != os.getpid():
            message = (
                "Cannot reach the loopback OpenNeuro: it runs only between 'with' and its end, "
                "and only the process that started it can steer it."
            )
            raise TioOpenNeuroError(message)
        return self._server

    def _ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        server = self._running()
        with self._lock:
            server.write_line(json.dumps(command).encode())
            return self._answer(server)

    @staticmethod
    def _answer(server: Coprocess) -> dict[str, Any]:
        try:
            line = server.read_line(_ANSWER_TIMEOUT_S)
        except TimeoutError as error:
            message = (
                f"The loopback server (process {server.pid}) did not answer within "
                f"{_ANSWER_TIMEOUT_S:g} s. Is the machine overloaded, or the process stopped?"
            )
            raise TioOpenNeuroError(message) from error
        if line is None:
            message = f"The loopback server ended on its own. It said: {server.stderr}"
            raise TioOpenNeuroError(message)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _end(self) -> None:
        if self._server is not None and self._server_owner == os.getpid():
            self._server.finish(_END_TIMEOUT_S)
        self._server = None
