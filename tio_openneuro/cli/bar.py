"""What a fetch shows on the terminal: bytes, rate, time left, and at its end why it stopped.

Owns no state. On standard error, so that what is printed for programs stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class Bar:
    """A bar of what has come.

    Attributes:
        is_whole: Whether all has come, as far as was shown.
    """

    def __init__(self, progress: Progress, title: str) -> None:
        """Begin at nothing."""
        self._progress = progress
        self._task = progress.add_task(title, total=None)
        self.is_whole = True

    def show(self, done_bytes: int, total_bytes: int) -> None:
        """Show that so many bytes of all are there."""
        self.is_whole = done_bytes >= total_bytes
        self._progress.update(self._task, completed=done_bytes, total=total_bytes)


@contextmanager
def transferring(title: str) -> Iterator[Bar]:
    """Show a bar while the block runs, where somebody looks; it is gone at the end.

    Args:
        title: What is fetched.
    """
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        yield Bar(progress, title)
