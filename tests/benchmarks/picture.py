"""Pictures of comparisons, beside the JSON, in ``benchmark-results/``."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent.parent.parent / "benchmark-results"

Line = tuple[Sequence[float], Sequence[float]]


def draw_lines(
    name: str,
    panels: Mapping[str, Mapping[str, Line]],
    *,
    x: str,
    y: str,
    logarithmic: bool = False,
) -> Path:
    """Draw one panel of lines for each title; return the file."""
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    for place, (title, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), place, title=title, xlabel=x, ylabel=y)
        for label, (across, up) in lines.items():
            axes.plot(across, up, marker="o", label=label)
        if logarithmic:
            axes.set_xscale("log")
            axes.set_yscale("log")
        axes.legend(fontsize="small")
    return _write(figure, name)


def draw_bars(name: str, panels: Mapping[str, Mapping[str, float]], *, x: str) -> Path:
    """Draw one panel of horizontal bars for each title; return the file."""
    figure = Figure(figsize=(5.5 * len(panels), 3.2), layout="constrained")
    for place, (title, bars) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), place, title=title, xlabel=x)
        drawn = axes.barh(list(bars)[::-1], list(bars.values())[::-1])
        axes.bar_label(drawn, fmt="%.3g", padding=2)
    return _write(figure, name)


def draw_tables(name: str, figures: object) -> Path | None:
    """Draw every table of numbers that is found in a benchmark's figures; None without any."""
    panels = dict(_tables(figures, name))
    return draw_bars(name, panels, x="") if panels else None


def _tables(figures: object, title: str) -> Iterator[tuple[str, dict[str, float]]]:
    if not isinstance(figures, Mapping):
        return
    numbers = {str(n): v for n, v in figures.items() if isinstance(v, int | float)}
    if len(numbers) > 1 and len(numbers) == len(figures):
        yield title, numbers
    for key, value in figures.items():
        yield from _tables(value, str(key))


def _write(figure: Figure, name: str) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.png"
    FigureCanvasAgg(figure).print_figure(path, dpi=130)
    return path
