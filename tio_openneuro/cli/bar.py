"""What a fetch shows on a terminal: bytes, rate and time left.

Owns no state. On standard error, so that what is printed for programs stays as it is.
"""

from __future__ import annotations

from rich.console import Console
from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn


def transfer_bar() -> Progress:
    """Return a bar that is seen where somebody looks, and gone when it ends."""
    console = Console(stderr=True)
    columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    described = Progress.get_default_columns()[:2]
    bar = Progress(*described, *columns, console=console, transient=True)
    bar.disable = not console.is_terminal
    return bar
