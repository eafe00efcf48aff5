"""A training loop seen live: one board of eight lines, on a terminal or in a notebook."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
        raise TypeError(
            f"Cannot {wish} a {type(queue).__name__}: only a tno.BudgetedQueue tells what it does. "
            f"Give the queue itself, not its loader or its dataset."
        )


def board(moment: Moment) -> Text:
    """Return what a queue does, in eight lines of 80 columns."""
    queue, disk = moment.reading.queue, moment.reading.disk
    # Not a table: measuring its cells took 14 ms of processor time, this takes 1 (2026-12-01).
    shown = Text(no_wrap=True, overflow="ellipsis")

    def row(name: str, middle: str | Text, note: str) -> None:
        shown.append(f"\n{name:<12}"[not shown :], "dim").append(middle)
        shown.append(" " * (_BAR_WIDTH + 2 - len(middle)) + note)

    def budget(name: str, held: int, most: int) -> None:
        bar = gauge_bar(held, most, is_budget=True)
        row(f"{name} held", bar, f"{format_size(held)} of {format_size(most)}")

    done, total = queue.epoch_patches, queue.epoch_total
    row(f"epoch {queue.epoch}", gauge_bar(done, total), f"{done} of {total} patches")
    waited = f"{moment.wait_share:.0%} of the time waiting"
    row("patches", f"{moment.patches_per_s:.1f} per second", waited)
    budget("disk", disk.used_bytes, disk.budget_bytes)
    budget("RAM", queue.ram_charged_bytes, queue.ram_budget_bytes)
    rate = f"{format_size(moment.link_bytes_per_s)} per second"
    row("link", rate, f"{format_size(disk.fetched_bytes)} fetched")
    fetching = f"{disk.fetching_files} files being fetched"
    row("in flight", f"{queue.in_work} subjects in work", fetching)
    row("skipped", f"{queue.skipped} subjects", "reasons: queue.skipped")
    row("held up by", Text(moment.held_up_by, "bold"), HELD_UP[moment.held_up_by])
    return shown


def gauge_bar(done: float, total: float, *, is_budget: bool = False) -> Text:
    """Return a bar; a budget's turns yellow when it is full, and red beyond."""
    share = done / total if total else 0.0
    style = "cyan"
    if is_budget:
        style = "red" if share > 1 else "green" if share <= _FULL else "yellow"
    filled = round(_BAR_WIDTH * min(share, 1.0))
    return Text("━" * filled, style).append("·" * (_BAR_WIDTH - filled), "bright_black")
