"""What moves while somebody looks, on a terminal or in a notebook. Knows nothing of data."""

from __future__ import annotations

import io
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import rich
from rich import progress as bars
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn

Advance = Callable[[str], None]

_PER_S = 2.0
_NOTEBOOK_COLUMNS = 90
_HTML = '<pre style="line-height:1.25;font-family:monospace;white-space:pre">{code}</pre>'


@contextmanager
def live(
    render: Callable[[], RenderableType], *, console: Console | None = None, transient: bool = False
) -> Iterator[None]:
    """Show something that changes while the block runs; where nobody looks, once at its end.

    Args:
        render: Returns what is to be seen now, in another thread.
        console: Where to; None for where ``print`` goes.
        transient: Whether it is gone at the end.
    """
    console = console or rich.get_console()
    if console.is_jupyter:
        with _in_notebook(render, transient=transient):
            yield
    elif console.is_terminal:
        how: Any = {"refresh_per_second": _PER_S, "transient": transient}
        with Live(get_renderable=render, console=console, **how):
            yield
    else:
        try:
            yield
        finally:
            console.print(render())


@contextmanager
def _in_notebook(render: Callable[[], RenderableType], *, transient: bool) -> Iterator[None]:
    """Change one output in place; rich alone would need ipywidgets for that."""
    from IPython.display import display

    handle = cast("Any", display)(_for_notebook(render()), raw=True, display_id=True)
    ended = threading.Event()

    def refresh() -> None:
        while not ended.wait(1 / _PER_S):
            handle.update(_for_notebook(render()), raw=True)

    thread = threading.Thread(target=refresh, name="tio-openneuro-display", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        handle.update(_for_notebook("" if transient else render()), raw=True)


def _for_notebook(shown: RenderableType) -> dict[str, str]:
    """Return the same as HTML and as text."""
    how: Any = {"force_jupyter": False, "color_system": "truecolor"}
    console = Console(file=io.StringIO(), record=True, width=_NOTEBOOK_COLUMNS, **how)
    console.print(shown)
    html = console.export_html(inline_styles=True, code_format=_HTML, clear=False)
    return {"text/html": html, "text/plain": console.export_text()}


@contextmanager
def showing(title: str, steps: int) -> Iterator[Advance]:
    """Show a bar of steps where somebody looks while the block runs, gone when it ends.

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
    progress = Progress(TextColumn("{task.description}"), BarColumn(), bars.TimeElapsedColumn())
    task, done = progress.add_task(title, total=steps), itertools.count()
    with live(progress.get_renderable, transient=True):
        yield lambda step: progress.update(
            task, description=f"{title}: {step}", completed=next(done)
        )


@contextmanager
def transferring(
    title: str, console: Console | None = None
) -> Iterator[Callable[[int, int], None]]:
    """Show bytes, rate and time left while the block runs, and at its end why it stopped.

    Args:
        title: What is transferred.
        console: Where to; None for where ``print`` goes.

    Yields:
        A function to call with the bytes done, and those of all.
    """
    told = bars.DownloadColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn()
    progress = Progress(TextColumn("{task.description}"), BarColumn(bar_width=16), *told)
    task = progress.add_task(title, total=None)
    row = progress.tasks[0]
    with live(progress.get_renderable, console=console):
        why = "failed"
        try:
            yield lambda done, total: progress.update(task, completed=done, total=total)
            whole = row.total is None or row.completed >= row.total
            why = "done" if whole else "the disk budget is full"
        finally:
            progress.update(task, description=f"{title}: {why}")
