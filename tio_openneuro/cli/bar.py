"""What a fetch shows on a terminal: bytes, rate and time left.

Owns no state. On standard error, so that what is printed for programs stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn


@contextmanager
def transferring(title: str, told: list[int]) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the block runs, where somebody looks; it is gone at the end.

    Args:
        title: What is fetched.
        told: Keeps what was told last.

    Yields:
        A function to call with the bytes that are there, and those of all.
    """
    console = Console(stderr=True)
    columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    progress = Progress(
        *Progress.get_default_columns()[:2], *columns, console=console, transient=True
    )
    progress.disable = not console.is_terminal
    with progress:
        task = progress.add_task(title, total=None)

        def show(done: int, total: int) -> None:
            told[:] = done, total
            progress.update(task, completed=done, total=total)

        yield show
