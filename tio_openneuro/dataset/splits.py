"""Divide units into parts or folds, without dividing what belongs together; keep them as JSON.

Units of one participant, units that share the annex key of an intensity image, and units with one
value of the user's own group form a group, which is never divided. Where every group is one unit,
folds are scikit-learn's. Else each part gets the whole number of units that is nearest to its
share, over all parts at once, and of each class one less than a whole unit off; groups, the largest
first, go where the most of their units are still wanted, and are then moved and exchanged while
that brings the parts closer to those numbers. All draws come from the seed, alike on every machine.
The cost grows with the number of units, however many values a column has. Saved parts name each
unit with its dataset and commit.
"""

from __future__ import annotations

import json
import logging
import operator
import os
import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, product
from math import floor, isclose, isnan
from pathlib import Path

from tio_openneuro.content import AnnexKey
from tio_openneuro.errors import SplitError

_LOG = logging.getLogger(__name__)
_MOST_CLASSES = 10
_FEWEST_FOLDS = 2
_MOST_EXCHANGES = 2_000
# Of one part, the smallest, which fill gaps best: more would cost their square each time.
_MOST_ALIKE = 50
# A class of fewer units than one in so many is rare.
_RARE = 50
_SIZE = -1
_FORMAT = 2


@dataclass(frozen=True, slots=True)
class SplitUnit:
    """What a split needs to know of one unit.

    Attributes:
        participant: Id of its participant; with several datasets, unique among them.
        keys: Annex keys of its intensity images.
        group: Value of the user's own group, or None.
    """

    participant: str
    keys: frozenset[AnnexKey] = frozenset()
    group: Hashable = None


def find_groups(units: Sequence[SplitUnit]) -> list[tuple[int, ...]]:
    """Return the groups of units that must stay together, as sorted indices.

    Returns:
        The groups, in the order of their first unit.
    """
    parents = list(range(len(units)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    first: dict[tuple[str, Hashable], int] = {}
    for index, unit in enumerate(units):
        marks: list[tuple[str, Hashable]] = [("participant", unit.participant)]
        marks += [("key", key) for key in unit.keys]
        if not _is_missing(unit.group):
            marks.append(("group", unit.group))
        for mark in marks:
            parents[root(index)] = root(first.setdefault(mark, index))
    members: dict[int, list[int]] = {}
    for index in range(len(units)):
        members.setdefault(root(index), []).append(index)
    return [tuple(indices) for indices in members.values()]


def split(
    units: Sequence[SplitUnit],
    parts: Mapping[str, float],
    *,
    stratify: Sequence[object] | None = None,
    seed: int = 0,
) -> dict[str, tuple[int, ...]]:
    """Divide units into named parts.

    Args:
        units: The units.
        parts: Name and share of each part; shares are positive and sum to 1.
        stratify: A value per unit, whose proportions each part keeps. Numbers of more than ten
            different values, also as text, are taken by quartile; a missing value is a class of
            its own. Of more than ten classes those with less than 1/50 of the units are one.
        seed: Decides the draw; any integer.

    Returns:
        Sorted indices of units by part; every unit is in one. Sizes are the nearest whole numbers
        over all parts, where groups allow; a share of half a unit or more is never empty.

    Raises:
        SplitError: The shares do not sum to 1, there are fewer groups than parts, or a part's
            share is less than half a unit.
    """
    shares = list(parts.values())
    if not shares or min(shares) <= 0 or not isclose(sum(shares), 1, abs_tol=1e-6):
        raise SplitError(f"Cannot split by {dict(parts)}: shares must be positive and sum to 1.")
    groups = _groups(units, len(parts), "parts")
    fractions = [Fraction(share).limit_denominator(1_000_000) for share in shares]
    exact = [len(units) * share / sum(fractions) for share in fractions]
    sizes = _apportion(exact, len(units), [int(2 * size >= 1) for size in exact])
    for name, size in zip(parts, sizes, strict=True):
        if not size:
            raise SplitError(
                f"Cannot split {len(units)} units: {name!r} with a share of {parts[name]} would"
                f" get none, which is nearer to {parts[name] * len(units):.3g} than one is. Give"
                f" {name!r} a larger share."
            )
    assigned = _assign(groups, _classes(stratify, len(units)), exact, sizes, seed)
    return dict(zip(parts, assigned, strict=True))


def k_fold(
    units: Sequence[SplitUnit],
    folds: int,
    *,
    stratify: Sequence[object] | None = None,
    seed: int = 0,
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Divide units into folds, each the validation set once.

    Args:
        units: The units.
        folds: Number of folds, 2 or more.
        stratify: As for :func:`split`.
        seed: Decides the draw; any integer.

    Returns:
        Sorted indices of units for training and for validation, fold by fold. Sizes of folds
        differ by one at most, and so do the numbers of each class, where groups allow.

    Raises:
        SplitError: Fewer than 2 folds, or fewer groups than folds.
    """
    if folds < _FEWEST_FOLDS:
        raise SplitError(f"Cannot make {folds} folds: at least {_FEWEST_FOLDS} are needed.")
    groups = _groups(units, folds, "folds")
    classes = _classes(stratify, len(units))
    if len(groups) == len(units) and min(Counter(classes).values()) >= folds:
        validation = _singles(classes, folds, seed)
    else:
        exact = [Fraction(len(units), folds)] * folds
        sizes = _apportion(exact, len(units), [0] * folds)
        validation = _assign(groups, classes, exact, sizes, seed)
    everything = set(range(len(units)))
    return [(tuple(sorted(everything - set(fold))), fold) for fold in validation]


def save_split(path: str | os.PathLike[str], parts: Mapping[str, Sequence[str]]) -> None:
    """Write a split as JSON, whole or not at all, for whom the umask lets read.

    Args:
        path: The file.
        parts: Names of the units of each part, as ``dataset@commit/unit``.
    """
    content = {"format": _FORMAT, "parts": {name: list(units) for name, units in parts.items()}}
    target = Path(path)
    written = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        written.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        written.replace(target)
    finally:
        written.unlink(missing_ok=True)


def read_split(path: str | os.PathLike[str], units: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Read a split that was saved.

    Args:
        path: The file.
        units: Names of the dataset's units, as ``dataset@commit/unit``; one that it has several
            times (drawn with replacement) is found as often.

    Returns:
        Indices of units by part, in the order saved.

    Raises:
        SplitError: The file is no split, has a unit in two parts, or names units that are not
            there, such as those of another commit.
    """
    homes: dict[str, list[str]] = {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        for part, names in content["parts"].items():
            for name in names:
                homes.setdefault(name, []).append(part)
        named = content["format"] == _FORMAT and all("/" in name for name in homes)
        why = "" if named else "its format is another one"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = repr(error)
    if why:
        raise SplitError(
            f"{path} holds no split of format {_FORMAT}: {why}. Make the split again, and save it"
            " with save_split."
        )
    places: dict[str, list[int]] = {}
    for number, unit in enumerate(units):
        places.setdefault(unit, []).append(number)
    unknown = [name for name in homes if name not in places]
    if unknown:
        here = ", ".join(sorted({unit.partition("/")[0] for unit in units})) or "nothing"
        raise SplitError(
            f"Cannot use the split in {path}: {len(unknown)} of its units are not selected, the"
            f" first {unknown[0]}; the dataset has units of {here}. Open that version, select the"
            " images that it was made with, or make a new split."
        )
    for name, parts in homes.items():
        if len(set(parts)) > 1 or len(parts) > len(places[name]):
            raise SplitError(
                f"Cannot use the split in {path}: {name} is in it {len(parts)} times, in"
                f" {' and '.join(dict.fromkeys(parts))}, and {len(places[name])} times in the"
                " dataset. Make the split again, and save it with save_split."
            )
    left = {name: iter(numbers) for name, numbers in places.items()}
    return {part: tuple(next(left[n]) for n in names) for part, names in content["parts"].items()}


def _groups(units: Sequence[SplitUnit], wanted: int, what: str) -> list[tuple[int, ...]]:
    """Return the groups; refuse too few of them, and report the largest."""
    groups = find_groups(units)
    largest = max(groups, key=len, default=())
    if len(groups) < wanted:
        message = (
            f"Cannot make {wanted} {what} of {len(units)} units: they form {len(groups)} groups"
            " that stay together (one participant, a shared image, or one value of group)."
            f" Make fewer {what}."
        )
        if largest:
            message += f" The largest is {len(largest)} units of {units[largest[0]].participant}."
        raise SplitError(message)
    if len(largest) > 1:
        text = "%d units form %d groups; the largest has %d units, the first of %s"
        first = units[largest[0]].participant
        _LOG.info(text, len(units), len(groups), len(largest), first)
    return groups


def _classes(values: Sequence[object] | None, count: int) -> list[int]:
    """Return each unit's class as a number; many-valued numbers are taken by quartile."""
    if values is None:
        return [0] * count
    read = [_number(value) for value in values]
    numbers = sorted(number for number in read if number is not None)
    if len(set(numbers)) > _MOST_CLASSES:
        cuts = [numbers[len(numbers) * quarter // 4] for quarter in (1, 2, 3)]
        pairs = zip(read, values, strict=True)
        values = [v if n is None else sum(n >= cut for cut in cuts) for n, v in pairs]
    names = [str(value) for value in values]
    sizes = Counter(names)
    if len(sizes) > _MOST_CLASSES:
        names = [name if sizes[name] * _RARE >= count else "\n" for name in names]
    order = {name: number for number, name in enumerate(sorted(set(names)))}
    return [order[name] for name in names]


def _number(value: object) -> float | None:
    """Return the number that a value is, also as text, or None."""
    with suppress(ValueError):
        if isinstance(value, int | float | str) and not isnan(number := float(value)):
            return number
    return None


def _is_missing(value: object) -> bool:
    """Tell whether a participant has no value: None, an empty text or nan."""
    return value is None or value == "" or (isinstance(value, float) and isnan(value))


def _singles(classes: Sequence[int], folds: int, seed: int) -> list[tuple[int, ...]]:
    """Return scikit-learn's stratified folds of units that stand alone."""
    from sklearn.model_selection import StratifiedKFold

    state = operator.index(seed)
    if not 0 <= state < 2**32:  # What it takes; the same seed still gives the same folds.
        state = random.Random(state).getrandbits(32)  # noqa: S311 - no secret
    folder = StratifiedKFold(folds, shuffle=True, random_state=state)
    return [tuple(map(int, fold)) for _, fold in folder.split([[0]] * len(classes), classes)]


# The kinds of units of a group with their numbers, and all of them as the kind _SIZE.
_Counts = tuple[tuple[int, int], ...]


def _assign(
    groups: Sequence[tuple[int, ...]],
    classes: Sequence[int],
    exact: Sequence[Fraction],
    sizes: Sequence[int],
    seed: int,
) -> list[tuple[int, ...]]:
    """Give each group to a part, so that sizes and classes come close; no part stays empty."""
    totals = [number for _, number in sorted(Counter(classes).items())]
    table = _round(totals, [share / len(classes) for share in exact], sizes)
    columns = zip(sizes, zip(*table, strict=True), strict=True)
    wanted = [{_SIZE: size, **dict(enumerate(column))} for size, column in columns]
    counts: list[_Counts] = [
        ((_SIZE, len(group)), *sorted(Counter(classes[index] for index in group).items()))
        for group in groups
    ]
    order = list(range(len(groups)))
    random.Random(operator.index(seed)).shuffle(order)  # noqa: S311 - no secret
    order.sort(key=lambda group: -len(groups[group]))
    held: list[list[int]] = [[] for _ in sizes]
    for number, group in enumerate(order):
        empty = [part for part, own in enumerate(held) if not own]
        free = empty if len(order) - number <= len(empty) else range(len(sizes))
        part = min(free, key=lambda n: (*_growth(counts[group], wanted[n], 2)[::-1], n))
        held[part].append(group)
        for kind, count in counts[group]:
            wanted[part][kind] -= count
    if any(number for missing in wanted for number in missing.values()):
        _improve(held, counts, wanted)
    return [tuple(sorted(index for group in part for index in groups[group])) for part in held]


def _improve(
    held: list[list[int]], counts: Sequence[_Counts], wanted: Sequence[dict[int, int]]
) -> None:
    """Move and exchange groups between parts, the best first, while it lowers the squares.

    Sizes go before classes. Groups with the same numbers are alike, so one of each kind per part
    is tried.
    """
    for _ in range(_MOST_EXCHANGES):
        kinds = [sorted({counts[group] for group in part})[:_MOST_ALIKE] for part in held]
        best: tuple[tuple[int, int], int, int, _Counts, _Counts] = ((0, 0), -1, -1, (), ())
        for a, b in combinations(range(len(held)), 2):
            pull = {kind: wanted[b][kind] - wanted[a][kind] for kind in wanted[a]}
            # Nothing for something is a move, which leaves no part empty.
            gifts = [*kinds[a], ()] if len(held[b]) > 1 else kinds[a]
            for given, taken in product(gifts, [*kinds[b], ()] if len(held[a]) > 1 else kinds[b]):
                moved = {_SIZE: 0, **dict(given)}
                for kind, number in taken:
                    moved[kind] = moved.get(kind, 0) - number
                best = min(best, (_growth(tuple(moved.items()), pull), a, b, given, taken))
        _, a, b, given, taken = best
        if a < 0:
            return
        for source, target, count in ((a, b, given), (b, a, taken)):
            if count:
                group = next(g for g in held[source] if counts[g] == count)
                held[source].remove(group)
                held[target].append(group)
            for kind, number in count:
                wanted[source][kind] += number
                wanted[target][kind] -= number


def _growth(moved: _Counts, pull: Mapping[int, int], times: int = 1) -> tuple[int, int]:
    """Return how the squares of what parts miss grow by a move, in size and in classes."""
    size, *kinds = (number * (number - times * pull[kind]) for kind, number in moved)
    return size, sum(kinds)


def _apportion(exact: Sequence[Fraction], total: int, least: Sequence[int]) -> list[int]:
    """Return the whole numbers of that sum which are nearest to exact ones; ties go to the small.

    Source: largest remainders (Hamilton's method).
    """
    found = [max(floor(value), low) for value, low in zip(exact, least, strict=True)]
    parts = range(len(found))
    while sum(found) < total:
        found[max(parts, key=lambda n: (exact[n] - found[n], -exact[n], n))] += 1
    while sum(found) > total:
        found[max(parts, key=lambda n: (found[n] > least[n], found[n] - exact[n]))] -= 1
    return found


def _round(
    totals: Sequence[int], shares: Sequence[Fraction], sizes: Sequence[int]
) -> list[list[int]]:
    """Return whole numbers of each class in each part, less than one off where sizes allow.

    Rows are rounded each for itself. Then a unit at a time goes from a part with too many to one
    with too few, by a path through rows that were rounded up in one part and down in the next.
    """
    exact = [[total * share for share in shares] for total in totals]
    table = [_apportion(row, n, [0] * len(row)) for row, n in zip(exact, totals, strict=True)]
    while any(
        off := [sum(col) - n for col, n in zip(zip(*table, strict=True), sizes, strict=True)]
    ):
        for kind, source, target in _path(table, exact, off):
            table[kind][source] -= 1
            table[kind][target] += 1
    return table


def _path(
    table: Sequence[Sequence[int]], exact: Sequence[Sequence[Fraction]], off: Sequence[int]
) -> list[tuple[int, int, int]]:
    """Return moves (row, from part, to part) that even out two parts, the fewest there are."""
    came: dict[int, list[tuple[int, int, int]]] = {n: [] for n, much in enumerate(off) if much > 0}
    reached = list(came)
    for a in reached:
        if off[a] < 0:
            return came[a]
        for b in set(range(len(off))) - set(came):
            for kind, (row, wish) in enumerate(zip(table, exact, strict=True)):
                if row[a] > wish[a] and row[b] < wish[b]:
                    came[b] = [*came[a], (kind, a, b)]
                    reached.append(b)
                    break
    # None: a size was rounded up to one unit, at the cost of the others.
    a, b = off.index(max(off)), off.index(min(off))
    over = [
        (row[a] > 0, row[a] - w[a] - row[b] + w[b]) for row, w in zip(table, exact, strict=True)
    ]
    return [(over.index(max(over)), a, b)]
