"""Medians of runs that take turns, so that whatever slows the computer slows all of them."""

import statistics
from collections.abc import Callable, Mapping


def interleaved(
    cases: Mapping[str, Callable[[], float]], runs: int, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """Run each case in turn, as often as asked, and return what each run gave.

    Args:
        cases: Name → one run, which returns its figure.
        runs: Runs of each case.
        progress: Told after each round.
    """
    found: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for number in range(runs):
        # Another one begins each round, so that none is always first.
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(cases[name]())
        progress(f"run {number + 1} of {runs}: " + _latest(found))
    return found


def _latest(found: Mapping[str, list[float]]) -> str:
    return ", ".join(f"{name} {values[-1]:.2f}" for name, values in found.items())


def quantile(values: list[float], share: float) -> float:
    """Return the value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median(values: list[float]) -> float:
    """Return the median."""
    return statistics.median(values)
