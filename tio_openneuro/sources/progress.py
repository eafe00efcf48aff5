"""A progress bar where somebody looks: on a terminal or in a notebook, else nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

Advance = Callable[[str], None]


@contextmanager
def showing(title: str, steps: int) -> Iterator[Advance]:
    """Show a bar while the block runs, gone when it ends.

    Args:
        title: What is being done.
        steps: How many steps it takes.

    Yields:
        A function to call when a step begins, with its name.
    """
    console = rich.get_console()
    if not (console.is_terminal or console.is_jupyter):
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=steps)
        done = itertools.count()
        yield lambda step: progress.update(
            task, description=f"{title}: {step}", completed=next(done)
        )
