"""A training loop seen live: one board of eight lines, on a terminal or in a notebook."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tio_openneuro.display import live
from tio_openneuro.queue import BudgetedQueue
from tio_openneuro.sizes import format_size
from tio_openneuro.watch.gauge import HELD_UP, Gauge, Moment

_BAR_WIDTH = 28
_FULL = 0.995


@contextmanager
def progress(queue: BudgetedQueue) -> Iterator[None]:
    """Show what a queue does while the block runs: on a terminal, or in a notebook.

    Epoch, patches per second, share of the time waiting, disk and RAM held against their budgets,
    the link's rate, subjects in flight, and what holds the training up now. Rates are those of the
    last ten seconds. Where the output is a file, the last state is written there at the end.

    Args:
        queue: Of the training loop in the block.

    Raises:
        TypeError: It is no queue of this library.

    Example:
        >>> import torch, torchio as tio, tio_openneuro as tno
        >>> image = tio.ScalarImage(tensor=torch.zeros(1, 16, 16, 16))
        >>> dataset = tio.SubjectsDataset([tio.Subject(t1=image)])
        >>> with tno.BudgetedQueue(dataset, 10, 3, tio.UniformSampler(8)) as queue:
        ...     with tno.progress(queue):
        ...         seen = sum(1 for patch in queue)  # doctest: +ELLIPSIS
        epoch 0 ...
    """
    require_queue(queue, "show the progress of")
    gauge = Gauge(queue)
    with live(lambda: board(gauge.read())):
        yield


def require_queue(queue: object, wish: str) -> None:
    """Refuse what is no queue of ours, such as the loader over it.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(queue, BudgetedQueue):
        message = (
            f"Cannot {wish} a {type(queue).__name__}: only a tno.BudgetedQueue tells what it does. "
            f"Give the queue itself, not its loader or its dataset."
        )
        raise TypeError(message)


def board(moment: Moment) -> RenderableType:
    """Return what a queue does, in eight lines of 80 columns."""
    queue, disk = moment.reading.queue, moment.reading.disk
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", min_width=9)
    rows.add_column(width=_BAR_WIDTH, no_wrap=True)
    rows.add_column(overflow="fold")
    of_epoch = f"{queue.epoch_patches} of {queue.epoch_total} patches"
    rows.add_row(
        f"epoch {queue.epoch}", gauge_bar(queue.epoch_patches, queue.epoch_total), of_epoch
    )
    waited = f"{moment.wait_share:.0%} of the time waiting"
    rows.add_row("patches", f"{moment.patches_per_s:.1f} per second", waited)
    for name, held, budget in (
        ("disk", disk.used_bytes, disk.budget_bytes),
        ("RAM", queue.ram_charged_bytes, queue.ram_budget_bytes),
    ):
        if budget:
            shown = f"{format_size(held)} of {format_size(budget)}"
            rows.add_row(f"{name} held", gauge_bar(held, budget, is_budget=True), shown)
    rate = f"{format_size(moment.link_bytes_per_s)} per second"
    rows.add_row("link", rate, f"{format_size(disk.fetched_bytes)} fetched")
    fetching = f"{disk.fetching_files} files being fetched"
    rows.add_row("in flight", f"{queue.in_work} subjects in work", fetching)
    if queue.skipped:
        rows.add_row("skipped", f"{queue.skipped} subjects", "reasons: queue.skipped")
    held_up = Text(moment.held_up_by, style="bold")
    rows.add_row("held up by", held_up, HELD_UP[moment.held_up_by])
    return rows


def gauge_bar(done: float, total: float, *, is_budget: bool = False) -> ProgressBar:
    """Return a bar; a budget's turns yellow when it is full, and red beyond."""
    share = done / total if total else 0.0
    style = "cyan"
    if is_budget:
        style = "red" if share > 1 else "green" if share <= _FULL else "yellow"
    return ProgressBar(
        total=total, completed=done, width=_BAR_WIDTH, complete_style=style, finished_style=style
    )
