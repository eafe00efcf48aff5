"""A small OpenNeuro on this machine: the context manager that starts, feeds and ends it."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from tio_openneuro.annex import Coprocess
from tio_openneuro.errors import TioOpenNeuroError
from tio_openneuro.loopback.publish import Publisher, annexed_by_default

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from tio_openneuro.loopback.volume import Content

_ANSWER_TIMEOUT_S = 30.0
_END_TIMEOUT_S = 10.0
# The package's own __init__ would import torch: seconds and 200 MB that serving does not need.
_START = """
import runpy, sys, types
package = types.ModuleType("tio_openneuro")
package.__path__ = [sys.argv.pop(1)]
sys.modules["tio_openneuro"] = package
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


class LoopbackOpenNeuro:
    """An OpenNeuro on 127.0.0.1: git over HTTP, a versioned S3 bucket, a link with a rate.

    It serves from a process of its own between ``with`` and its end, and ends with this process
    however that ends. Safe to share by threads, not by forked processes.

    Attributes:
        program: What runs in the server's process; given the folder and this process's id.
        folder: Where all that it holds lies.
        port: Port of the server on 127.0.0.1; 0 before it runs.

    Example:
        >>> with LoopbackOpenNeuro(folder, rate_bytes_per_s=20e6) as openneuro:  # doctest: +SKIP
        ...     openneuro.publish("ds900001", {"sub-01/anat/sub-01_T1w.nii.gz": volume})
        ...     dataset = tio_openneuro.DataladSubjectsDataset("ds900001", ...)
    """

    program: ClassVar[Path] = Path(__file__).with_name("server.py")

    def __init__(
        self,
        folder: Path,
        *,
        rate_bytes_per_s: float | None = None,
        latency_s: float = 0.0,
        set_environment: bool = True,
    ) -> None:
        """Prepare; nothing is started before ``with``.

        Args:
            folder: Where all that it holds lies; made where it is missing.
            rate_bytes_per_s: Rate that all connections share; None: not limited.
            latency_s: Seconds from each request to its answer's first byte.
            set_environment: Whether ``with`` puts :attr:`environment` into ``os.environ``, so
                that git children of this process find it, and takes it out again.
        """
        self.folder = Path(folder).absolute()
        self.port = 0
        self._link = {"rate_bytes_per_s": rate_bytes_per_s, "latency_s": latency_s}
        self._set_environment = set_environment
        self._saved: dict[str, str | None] = {}
        self._lock = threading.Lock()
        self._server: Coprocess | None = None

    def __enter__(self) -> Self:
        """Start to serve."""
        self.folder.mkdir(parents=True, exist_ok=True)
        arguments = [Path(__file__).parent.parent, self.program, self.folder, os.getpid()]
        self._server = Coprocess([sys.executable, "-P", "-c", _START, *map(str, arguments)])
        try:
            self.port = int(self._answer(self._server)["port"])
            self.ask(self._link)
            self._git_config.write_text(self._git_configuration(), encoding="utf-8")
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
    def environment(self) -> dict[str, str]:
        """Variables with which git and git-annex reach this OpenNeuro, by accession too."""
        return {"GIT_CONFIG_GLOBAL": str(self._git_config)}

    def url(self, accession: str) -> str:
        """Return the git URL of a dataset."""
        return f"http://127.0.0.1:{self.port}/git/{accession}.git"

    def publish(
        self,
        accession: str,
        files: Mapping[str, Content],
        *,
        tag: str | None = "1.0.0",
        annexed: Callable[[str], bool] = annexed_by_default,
    ) -> str:
        """Publish a dataset, or a new version of one, and return its git URL.

        Args:
            accession: Its name, ``ds900001``.
            files: Path from the dataset's root → a :class:`Volume` (written as NIfTI), bytes,
                text, or the path of a file to copy. Over a version that is there already, they
                are added or put in place; other files stay.
            tag: Tag of the version, another one each time; None: no tag.
            annexed: Which paths are annexed; default: NIfTI. The others go into git.

        Raises:
            TioOpenNeuroError: The accession, a path or the tag cannot be used, or this is not
                running.
        """
        self.running()
        publisher = Publisher(self.folder, self.port, self._git_config)
        publisher.publish(accession, files, tag=tag, annexed=annexed)
        return self.url(accession)

    def content_bytes(self) -> int:
        """Return how many bytes of annexed content went to readers so far."""
        return int(self.ask({})["content_bytes"])

    def ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Have the server carry out a command, and return its answer.

        Args:
            command: What JSON can say, and ``obey`` of the server understands.
        """
        server = self.running()
        with self._lock:
            server.write_line(json.dumps(command).encode())
            return self._answer(server)

    def running(self) -> Coprocess:
        """Return the server's process.

        Raises:
            TioOpenNeuroError: There is none.
        """
        if self._server is None:
            message = (
                "Cannot reach the loopback OpenNeuro: it runs only between 'with' and its end."
            )
            raise TioOpenNeuroError(message)
        return self._server

    @property
    def _git_config(self) -> Path:
        return self.folder / "gitconfig"

    def _git_configuration(self) -> str:
        """Return the git configuration of everything that is to reach this OpenNeuro."""
        return (
            '[annex "security"]\n\tallowed-ip-addresses = 127.0.0.1\n'
            f'[url "http://127.0.0.1:{self.port}/git/"]\n'
            "\tinsteadOf = https://github.com/OpenNeuroDatasets/\n"
        )

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
        if self._server is not None:
            self._server.finish(_END_TIMEOUT_S)
        self._server = None
