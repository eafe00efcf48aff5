"""Show the demo on a console: live on a terminal, plain lines elsewhere, a table at the end.

Owns the look of the demo's text. Computes nothing; the numbers come with the events.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from tio_openneuro.demo.records import DemoEvent, DemoResult, Stage
from tio_openneuro.sizes import format_size

Run: TypeAlias = Callable[[Callable[[DemoEvent], None]], DemoResult]

_BAR_WIDTH = 32
_REFRESH_PER_S = 8
_FULL = 0.995


def render(run: Run, console: Console) -> DemoResult:
    """Run the demo and show it; errors pass through, with the live display closed.

    Args:
        run: Takes the callback for events, ``functools.partial(run_demo, folder)`` for example.
        console: Where to; live where it is a terminal, else one line for each event of weight.

    Returns:
        What ``run`` returned.
    """
    if console.is_terminal:
        board = _Board()
        with Live(board, console=console, refresh_per_second=_REFRESH_PER_S):
            result = run(board.take)
    else:
        result = _run_plain(run, console)
    console.print(_summary(result))
    return result


def _run_plain(run: Run, console: Console) -> DemoResult:
    """Print each stage once, and each scored epoch."""
    said: set[Stage] = set()

    def say(event: DemoEvent) -> None:
        scored = event.stage is Stage.SCORED
        if scored or event.stage not in said:
            line = _scored_line(event) if scored else event.stage.value
            console.print(f"{event.elapsed_s:5.0f} s  {line}", highlight=False, soft_wrap=True)
        said.add(event.stage)

    return run(say)


def _scored_line(event: DemoEvent) -> str:
    if event.epoch == 0:
        return f"untrained: held-out Dice {event.dice:.2f}"
    return (
        f"epoch {event.epoch}/{event.epochs}: loss {_number(event.loss)}, "
        f"held-out Dice {event.dice:.2f}, disk held {format_size(event.held_bytes)} of "
        f"{format_size(event.budget_bytes)}, fetched {format_size(event.fetched_bytes)}, "
        f"waited {event.wait_s:.1f} s"
    )


class _Board:
    """The live display; rich asks for it several times a second."""

    def __init__(self) -> None:
        """Begin with nothing to show but the first stage."""
        self._event = DemoEvent(Stage.HEADS)
        self._scored: list[DemoEvent] = []
        self._spinner = Spinner("dots", style="cyan")

    def take(self, event: DemoEvent) -> None:
        """Show this event from the next refresh on."""
        if event.stage is Stage.SCORED:
            self._scored = [*self._scored, event]
        self._event = event

    def __rich__(self) -> RenderableType:
        """Return the epochs so far, and what is being done."""
        parts: list[RenderableType] = [self._epochs()] if self._scored else []
        if self._event.stage is not Stage.REPORTING:
            parts.append(self._now(self._event))
        return Group(*parts)

    def _epochs(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
        for heading in ("epoch", "loss", "held-out Dice", "disk held", "fetched", "waited"):
            table.add_column(heading, justify="right", no_wrap=True)
        for event in self._scored:
            table.add_row(
                str(event.epoch) if event.epoch else "untrained",
                _number(event.loss),
                f"{event.dice:.3f}",
                format_size(event.held_bytes),
                format_size(event.fetched_bytes),
                f"{event.wait_s:.1f} s",
            )
        return table

    def _now(self, event: DemoEvent) -> RenderableType:
        doing = event.stage.value
        if event.stage in (Stage.TRAINING, Stage.SCORED):
            doing = f"epoch {max(event.epoch, 1)} of {event.epochs}"
        self._spinner.update(text=Text(f" {doing}  ({event.elapsed_s:.0f} s)", style="bold"))
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim", min_width=14)
        rows.add_column(width=_BAR_WIDTH)
        rows.add_column()
        if event.steps:
            rows.add_row("progress", _bar(event.step, event.steps), f"{event.step}/{event.steps}")
        if self._scored:
            share = event.held_bytes / event.budget_bytes
            style = "red" if share > 1 else "green" if share <= _FULL else "yellow"
            shown = f"{format_size(event.held_bytes)} of {format_size(event.budget_bytes)}"
            rows.add_row("disk held", _bar(event.held_bytes, event.budget_bytes, style), shown)
            shown = f"{format_size(event.link_bytes_per_s)}/s"
            rows.add_row("link", shown, f"{format_size(event.fetched_bytes)} fetched")
            rows.add_row("loss", _number(event.loss), f"held-out Dice {event.dice:.3f}")
            rows.add_row("waited", f"{event.wait_s:.1f} s for patches")
        return Group(self._spinner, rows)


def _bar(done: float, total: float, style: str = "cyan") -> ProgressBar:
    return ProgressBar(
        total=total, completed=done, width=_BAR_WIDTH, complete_style=style, finished_style=style
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _summary(result: DemoResult) -> RenderableType:
    """Return the closing report: what was learnt, held, fetched, waited for, and the PNG."""
    first, last = result.epochs[0], result.epochs[-1]
    fetched = result.fetched_bytes / result.budget_bytes
    share = result.dataset_bytes / result.budget_bytes
    ram_peak, ram_budget = format_size(last.ram_peak_bytes), format_size(result.ram_budget_bytes)
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim")
    rows.add_column()
    rows.add_row(
        "held-out Dice",
        f"{first.dice:.2f} untrained, [bold]{last.dice:.2f}[/bold] after "
        f"{last.epoch} epochs ({len(last.scores)} of {result.heads} heads)",
    )
    rows.add_row(
        "disk held",
        f"at most [bold]{result.peak_held_bytes:,}[/bold] of the budget's "
        f"{result.budget_bytes:,} bytes, in {len(result.samples):,} samples by another process",
    )
    rows.add_row(
        "fetched",
        f"{format_size(result.fetched_bytes)}, {fetched:.0f} times the budget; the dataset has "
        f"{format_size(result.dataset_bytes)}, {share:.0f} times the budget",
    )
    rows.add_row("RAM", f"budget of the queue {ram_budget}, at most {ram_peak} charged to it")
    rows.add_row(
        "time",
        f"{result.wall_s:.0f} s in all, {result.train_s:.0f} s of training, of which "
        f"{last.wait_s:.1f} s waiting for patches",
    )
    rows.add_row("picture", str(result.report))
    return Panel(rows, title="tio-openneuro demo", title_align="left", expand=False)
