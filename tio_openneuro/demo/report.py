"""The demo's picture: what was learnt. What was held meanwhile is in the run's own report.

Owns the look of one PNG; computes nothing but what is needed to draw it. Works without a display
and beside other uses of Matplotlib, since it never touches pyplot.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tio_openneuro.demo.records import DemoResult
from tio_openneuro.sizes import format_size

_INK = "#1c2733"
_FAINT = "#6b7885"
_RULE = "#dfe4e8"
_HELD = "#2f7ebc"
_TRUTH = "#35d07f"
_GUESS = "#ff9d2e"
_TITLE_SIZE, _TEXT_SIZE, _SMALL_SIZE = 11.0, 9.5, 8.5
_DPI = 150
_LEFT = 0.055


def write_report(result: DemoResult) -> None:
    """Write the PNG that the result names, making its folder.

    Args:
        result: The numbers and the picture. The file is replaced whole, never left half written.
    """
    figure = Figure(figsize=(13.2, 5.0), facecolor="white")
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, 12, left=_LEFT, right=0.975, top=0.68, bottom=0.12, wspace=1.6)
    _draw_heading(figure, result)
    _draw_slices([figure.add_subplot(grid[0, at : at + 3]) for at in (0, 3, 6)], result)
    _draw_heads(figure.add_subplot(grid[0, 9:]), result)
    result.report.parent.mkdir(parents=True, exist_ok=True)
    partial = result.report.with_suffix(".part.png")
    canvas.print_figure(str(partial), dpi=_DPI)
    partial.replace(result.report)


def _draw_heading(figure: Figure, result: DemoResult) -> None:
    share = result.dataset_bytes / result.budget_bytes
    note = (
        f"{result.heads} synthetic heads, {format_size(result.dataset_bytes)}, from a loopback "
        f"OpenNeuro, under a disk budget of {format_size(result.budget_bytes)}"
    )
    title = f"A network trained on a dataset {share:.0f} times its disk budget"
    figure.text(_LEFT, 0.905, title, fontsize=19, fontweight="bold", color=_INK)
    figure.text(_LEFT, 0.84, note, fontsize=10.5, color=_FAINT)


def _draw_slices(axes: list[Axes], result: DemoResult) -> None:
    """Draw the slice alone, then with both networks' lesion over the true outline."""
    picture = result.picture
    before, after = (result.epochs[at].scores[picture.head] for at in (0, -1))
    dark, bright = np.percentile(picture.image, (1, 99.95))
    panels: list[tuple[str, str, Any]] = [
        ("Held-out head", f"{after.name}, slice {picture.slice_index}", None),
        ("Before training", f"Dice {before.dice:.2f}", picture.untrained),
        ("After training", f"Dice {after.dice:.2f}", picture.trained),
    ]
    for axis, (title, note, guess) in zip(axes, panels, strict=True):
        axis.imshow(
            picture.image.T, cmap="gray", vmin=dark, vmax=bright, origin="lower",
            aspect=picture.aspect, interpolation="bicubic",
        )  # fmt: skip
        if guess is not None and guess.any():
            overlay = np.where(guess, 1.0, np.nan).T
            axis.imshow(
                overlay, cmap=ListedColormap([_GUESS]), alpha=0.42, origin="lower",
                aspect=picture.aspect, interpolation="nearest", vmin=0, vmax=1,
            )  # fmt: skip
            axis.contour(guess.T.astype(float), [0.5], colors=[_GUESS], linewidths=1.2)
        axis.contour(picture.truth.T.astype(float), [0.5], colors=[_TRUTH], linewidths=1.6)
        axis.set_anchor("NW")
        axis.set_axis_off()
        _title(axis, title, note)
    handles = [
        Line2D([], [], color=_TRUTH, linewidth=1.8, label="true lesion"),
        Line2D([], [], color=_GUESS, linewidth=6, alpha=0.6, label="predicted lesion"),
    ]
    axes[1].legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, frameon=False,
        fontsize=_SMALL_SIZE, labelcolor=_INK, handlelength=1.4, columnspacing=1.6,
    )  # fmt: skip


def _draw_heads(axis: Axes, result: DemoResult) -> None:
    """Draw each held-out head's Dice before and after."""
    before, after = result.epochs[0].scores, result.epochs[-1].scores
    rows = range(len(after))
    for row, old, new in zip(rows, before, after, strict=True):
        axis.plot([old.dice, new.dice], [row, row], color=_RULE, linewidth=3, zorder=1)
    axis.scatter([score.dice for score in before], rows, s=34, color=_FAINT, zorder=2)
    axis.scatter([score.dice for score in after], rows, s=46, color=_HELD, zorder=3)
    axis.set_yticks(list(rows), [score.name for score in after])
    axis.set_ylim(len(after) - 0.4, -0.6)
    axis.set_xlim(-0.04, 1.0)
    axis.set_xlabel("Dice", fontsize=_TEXT_SIZE, color=_INK)
    axis.grid(visible=True, axis="x", color=_RULE, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelsize=_SMALL_SIZE, labelcolor=_FAINT)
    for name, spine in axis.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(_RULE)
    note = f"mean {result.epochs[0].dice:.2f} → {result.epochs[-1].dice:.2f}"
    _title(axis, "All held-out heads", note)


def _title(axis: Axes, title: str, note: str) -> None:
    """Put a bold title over the axes, and a faint note below it."""
    for text, size, color, weight, height in (
        (title, _TITLE_SIZE, _INK, "bold", 20),
        (note, _SMALL_SIZE, _FAINT, "normal", 7),
    ):
        axis.annotate(
            text, (0, 1), xycoords="axes fraction", xytext=(0, height),
            textcoords="offset points", fontsize=size, color=color, fontweight=weight,
        )  # fmt: skip
