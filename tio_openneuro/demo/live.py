"""Show the demo on a console: live on a terminal, and a table at the end.

Owns the look of the demo's text. Computes nothing; the numbers come with the events.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.spinner import Spinner
from rich.table import Table

from tio_openneuro.demo.records import DemoEvent, DemoResult, Stage
from tio_openneuro.display import live
from tio_openneuro.sizes import format_size
from tio_openneuro.watch import board, gauge_bar

Run: TypeAlias = Callable[[Callable[[DemoEvent], None]], DemoResult]


def render(run: Run, console: Console) -> DemoResult:
    """Run the demo and show it; errors pass through, with the live display closed.

    Args:
        run: Takes the callback for events, ``functools.partial(run_demo, folder)`` for example.
        console: Where to; live where it is a terminal, else once at the end.

    Returns:
        What ``run`` returned.
    """
    shown = _Board()
    with live(lambda: shown, console=console):
        result = run(shown.take)
    console.print(_summary(result))
    return result


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
        event = self._event
        if event.stage is not Stage.REPORTING:
            self._spinner.update(text=f" {event.stage.value}  ({event.elapsed_s:.0f} s)")
            parts += [self._spinner, gauge_bar(event.step, event.steps)]
        return Group(*parts, *([] if event.moment is None else [board(event.moment)]))

    def _epochs(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
        for heading in ("epoch", "loss", "held-out Dice"):
            table.add_column(heading, justify="right", no_wrap=True)
        for event in self._scored:
            name = str(event.epoch) if event.epoch else "untrained"
            loss = "-" if event.loss is None else f"{event.loss:.3f}"
            table.add_row(name, loss, f"{event.dice:.3f}")
        return table


def _summary(result: DemoResult) -> RenderableType:
    """Return the closing report: what was learnt, held, fetched, waited for, and the PNG."""
    first, last = result.epochs[0], result.epochs[-1]
    fetched = result.fetched_bytes / result.budget_bytes
    share = result.dataset_bytes / result.budget_bytes
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
    rows.add_row("picture", str(result.report))
    rows.add_row("the run", str(result.report.with_suffix(".html")))
    return Panel(rows, title="tio-openneuro demo", title_align="left", expand=False)
