"""Divide units into parts or folds, without dividing what belongs together; keep them as JSON.

Units of one participant, units that share the annex key of an intensity image, and units with one
value of the user's own group form a group, which is never divided. Where every group is one unit,
folds are scikit-learn's. Else each part gets a whole number of units of each class, rounded from
its exact share so that no cell, row or column of that table is off by one; groups, the largest
first, go where the most of their units are still wanted, and are then moved and exchanged while
that brings the parts closer to the table. All draws come from the seed, alike on every machine.
Saved parts are bound to the commit that they were made of.
"""

from __future__ import annotations

import json
import logging
import os
import random
import tempfile
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, product
from math import ceil, floor, isclose, isnan
from pathlib import Path

from tio_openneuro.content import AnnexKey
from tio_openneuro.errors import SplitError

_LOG = logging.getLogger(__name__)
_MOST_CLASSES = 10
_FEWEST_FOLDS = 2
_MOST_EXCHANGES = 2_000
_FORMAT = 1


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

    A key that three participants or more have, and all of them (an atlas), joins nothing.

    Returns:
        The groups, in the order of their first unit.
    """
    parents = list(range(len(units)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    participants = {unit.participant for unit in units}
    holders: dict[AnnexKey, set[str]] = {}
    for unit in units:
        for key in unit.keys:
            holders.setdefault(key, set()).add(unit.participant)
    common = {k for k, who in holders.items() if len(who) == len(participants) > 2}  # noqa: PLR2004
    first: dict[tuple[str, Hashable], int] = {}
    for index, unit in enumerate(units):
        marks: list[tuple[str, Hashable]] = [("participant", unit.participant)]
        marks += [("key", key) for key in unit.keys - common]
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
            different values are taken by quartile; a missing value is a class of its own.
        seed: Decides the draw.

    Returns:
        Sorted indices of units by part; every unit is in one.

    Raises:
        SplitError: The shares do not sum to 1, or a part would be empty.
    """
    shares = list(parts.values())
    if not shares or min(shares) <= 0 or not isclose(sum(shares), 1, abs_tol=1e-6):
        raise SplitError(f"Cannot split by {dict(parts)}: shares must be positive and sum to 1.")
    groups = _groups(units, len(parts), "parts")
    exact = [Fraction(share).limit_denominator(1_000_000) for share in shares]
    total = sum(exact)
    exact = [share / total for share in exact]
    assigned = _assign(groups, _classes(stratify, len(units)), exact, seed)
    found = {name: assigned[n] for n, name in enumerate(parts)}
    empty = [name for name, indices in found.items() if not indices]
    if empty:
        largest = max(len(group) for group in groups)
        raise SplitError(
            f"Cannot split {len(units)} units: {empty[0]!r} with a share of {parts[empty[0]]}"
            f" would get none. They form {len(groups)} groups that stay together, the largest"
            f" of {largest} units. Give {empty[0]!r} a larger share."
        )
    return found


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
        seed: Decides the draw.

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
        validation = _assign(groups, classes, [Fraction(1, folds)] * folds, seed)
    everything = set(range(len(units)))
    return [(tuple(sorted(everything - set(fold))), fold) for fold in validation]


def save_split(
    path: str | os.PathLike[str], parts: Mapping[str, Sequence[str]], *, commit: str
) -> None:
    """Write a split as JSON, whole or not at all.

    Args:
        path: The file.
        parts: Names of the units of each part.
        commit: The dataset's commit; with several datasets, all of them as one text.
    """
    content = {"format": _FORMAT, "commit": commit, "parts": {n: list(u) for n, u in parts.items()}}
    target = Path(path)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=target.parent, prefix=target.name, suffix=".tmp", delete=False
    ) as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
    Path(file.name).replace(target)


def read_split(
    path: str | os.PathLike[str], units: Sequence[str], *, commit: str
) -> dict[str, tuple[int, ...]]:
    """Read a split that was saved.

    Args:
        path: The file.
        units: Names of the dataset's units.
        commit: The dataset's commit, which must be the split's.

    Returns:
        Indices of units by part, in the order saved.

    Raises:
        SplitError: The file is no split, is of another commit, or names units that are not there.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        saved, parts = content["commit"], dict(content["parts"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SplitError(f"{path} holds no split: {error}. Save one with save_split.") from error
    if saved != commit:
        raise SplitError(
            f"Cannot use the split in {path}: it was made of commit {saved}, the dataset is at"
            f" {commit}. Open the dataset with version={saved!r}, or make a new split."
        )
    index = {name: number for number, name in enumerate(units)}
    unknown = [name for names in parts.values() for name in names if name not in index]
    if unknown:
        raise SplitError(
            f"Cannot use the split in {path}: {len(unknown)} of its units are not selected, the"
            f" first {unknown[0]}. Select the images that it was made with."
        )
    return {part: tuple(index[name] for name in names) for part, names in parts.items()}


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
    if len(values) != count:
        raise SplitError(f"stratify has {len(values)} values for {count} units.")
    numbers = sorted(v for v in values if isinstance(v, int | float) and not _is_missing(v))
    if len(set(numbers)) > _MOST_CLASSES:
        cuts = [numbers[len(numbers) * quarter // 4] for quarter in (1, 2, 3)]
        quartiles: dict[object, int] = {n: sum(n >= cut for cut in cuts) for n in numbers}
        values = [quartiles.get(value, value) for value in values]
    names = [str(value) for value in values]
    order = {name: number for number, name in enumerate(sorted(set(names)))}
    return [order[name] for name in names]


def _is_missing(value: object) -> bool:
    """Tell whether a participant has no value: None, an empty text or nan."""
    return value is None or value == "" or (isinstance(value, float) and isnan(value))


def _singles(classes: Sequence[int], folds: int, seed: int) -> list[tuple[int, ...]]:
    """Return scikit-learn's stratified folds of units that stand alone."""
    from sklearn.model_selection import StratifiedKFold

    folder = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return [tuple(map(int, fold)) for _, fold in folder.split([[0]] * len(classes), classes)]


def _assign(
    groups: Sequence[tuple[int, ...]], classes: Sequence[int], shares: Sequence[Fraction], seed: int
) -> list[tuple[int, ...]]:
    """Give each group to a part, so that classes and sizes come close to their shares."""
    kinds = max(classes) + 1
    totals = Counter(classes)
    table = _round([[totals[kind] * share for share in shares] for kind in range(kinds)])
    wanted = [tuple(row[part] for row in table) for part in range(len(shares))]
    counts = [tuple(map(Counter(classes[i] for i in g).__getitem__, range(kinds))) for g in groups]
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)  # noqa: S311 - no secret
    order.sort(key=lambda group: -len(groups[group]))
    held: list[list[int]] = [[] for _ in shares]
    for group in order:
        falls = [_less(_cost(_less(missing, counts[group])), _cost(missing)) for missing in wanted]
        part = min(range(len(shares)), key=lambda n: (*reversed(falls[n]), n))
        held[part].append(group)
        wanted[part] = _less(wanted[part], counts[group])
    _improve(held, counts, wanted)
    return [tuple(sorted(index for group in part for index in groups[group])) for part in held]


_Counts = tuple[int, ...]


def _cost(missing: _Counts) -> _Counts:
    """Return how far a part that misses these numbers of each class is from its size and classes.

    Sizes go before classes where costs are compared.
    """
    return sum(missing) ** 2, sum(number**2 for number in missing)


def _plus(counts: _Counts, more: _Counts) -> _Counts:
    return tuple(a + b for a, b in zip(counts, more, strict=True))


def _less(counts: _Counts, fewer: _Counts) -> _Counts:
    return tuple(a - b for a, b in zip(counts, fewer, strict=True))


def _improve(held: list[list[int]], counts: Sequence[_Counts], wanted: list[_Counts]) -> None:
    """Move and exchange groups between parts, the best first, while it lowers the cost.

    Groups with the same numbers are alike, so one of each kind per part is tried; an empty group
    stands for a move.
    """
    nothing = (0,) * len(wanted[0])
    for _ in range(_MOST_EXCHANGES):
        kinds = [sorted({counts[group] for group in part} | {nothing}) for part in held]
        best: tuple[_Counts, int, int, _Counts, _Counts] = ((0, 0), -1, -1, nothing, nothing)
        for a, b in combinations(range(len(held)), 2):
            before = _plus(_cost(wanted[a]), _cost(wanted[b]))
            for given, taken in product(kinds[a], kinds[b]):
                moved = _less(given, taken)
                after = _plus(_cost(_plus(wanted[a], moved)), _cost(_less(wanted[b], moved)))
                best = min(best, (_less(after, before), a, b, given, taken))
        _, a, b, given, taken = best
        if a < 0:
            return
        for source, target, count in ((a, b, given), (b, a, taken)):
            if count != nothing:
                group = next(g for g in held[source] if counts[g] == count)
                held[source].remove(group)
                held[target].append(group)
                wanted[source] = _plus(wanted[source], count)
                wanted[target] = _less(wanted[target], count)


def _round(exact: Sequence[Sequence[Fraction]]) -> list[list[int]]:
    """Round a table whose rows sum to integers, keeping each row's sum.

    Every entry, and every column's sum, becomes its floor or its ceiling. Entries with a fraction
    are taken along closed paths that turn at each entry, up and down in turn, until none is left.

    Source: L. H. Cox, "A constructive procedure for unbiased controlled rounding", JASA 1987.
    """
    table = [list(row) for row in exact]
    sums = [sum(column, Fraction(0)) for column in zip(*table, strict=True)]
    table.append([ceil(total) - total for total in sums])
    while path := _closed_path(table):
        up, down = path[0::2], path[1::2]
        room = [ceil(table[i][j]) - table[i][j] for i, j in up]
        room += [table[i][j] - floor(table[i][j]) for i, j in down]
        step = min(room)
        for i, j in up:
            table[i][j] += step
        for i, j in down:
            table[i][j] -= step
    return [[int(value) for value in row] for row in table[:-1]]


def _closed_path(table: Sequence[Sequence[Fraction]]) -> list[tuple[int, int]]:
    """Return entries with a fraction, alternately in one row and in one column; none if none."""
    open_entries = [
        (i, j)
        for i, row in enumerate(table)
        for j, value in enumerate(row)
        if value.denominator > 1
    ]
    path = open_entries[:1]
    while path:
        along = len(path) % 2  # 1: the next lies in the row of the last, 0: in its column
        last = path[-1]
        path.append(next(e for e in open_entries if e != last and e[1 - along] == last[1 - along]))
        for start in range(len(path) - 2):
            if (len(path) - start) % 2 == 0 and path[-1][along] == path[start][along]:
                return path[start:]
    return []
