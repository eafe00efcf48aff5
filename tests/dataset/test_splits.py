"""Splits and folds: everything once, nothing divided, sizes and classes even."""

import itertools
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedKFold

from tio_openneuro.content import AnnexKey
from tio_openneuro.dataset.splits import (
    SplitUnit,
    find_groups,
    k_fold,
    read_split,
    save_split,
    split,
)
from tio_openneuro.errors import SplitError


def key(number: int) -> AnnexKey:
    """Return an annex key that is told by a number."""
    return AnnexKey(f"MD5E-s1--{number}", 1)


units_with_ties = st.lists(
    st.builds(
        SplitUnit,
        st.integers(0, 30).map("sub-{}".format),
        st.frozensets(st.integers(0, 80).map(key), max_size=2),
        st.none() | st.integers(0, 30),
    ),
    min_size=4,
    max_size=60,
)
seeds = st.integers(0, 2**32 - 1)


def assert_sound(units: list[SplitUnit], parts: list[tuple[int, ...]]) -> None:
    """Each unit is in one part, and what ties units ties them to one part."""
    assert sorted(index for part in parts for index in part) == list(range(len(units)))
    homes: dict[object, set[int]] = {}
    for number, part in enumerate(parts):
        for unit in (units[index] for index in part):
            homes.setdefault(unit.participant, set()).add(number)
            if unit.group is not None:
                homes.setdefault(("group", unit.group), set()).add(number)
            for shared in unit.keys:
                homes.setdefault(shared, set()).add(number)
    assert all(len(numbers) == 1 for numbers in homes.values())


@given(units_with_ties, st.integers(2, 5), seeds, st.data())
def test_folds_divide_no_participant_and_no_image(
    units: list[SplitUnit], folds: int, seed: int, data: st.DataObject
) -> None:
    """The folds' union is the dataset, whatever ties its units; the rest of each trains."""
    classes = data.draw(st.lists(st.sampled_from("abc"), min_size=len(units), max_size=len(units)))
    if len(find_groups(units)) < folds:
        with pytest.raises(SplitError, match="stay together"):
            k_fold(units, folds, stratify=classes, seed=seed)
        return
    pairs = k_fold(units, folds, stratify=classes, seed=seed)
    assert_sound(units, [val for _, val in pairs])
    for train, val in pairs:
        assert sorted(train + val) == list(range(len(units)))
    assert pairs == k_fold(units, folds, stratify=classes, seed=seed)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=12), st.integers(2, 5), seeds, st.data())
def test_folds_differ_by_one_where_single_units_can_fill_them(
    sizes: list[int], folds: int, seed: int, data: st.DataObject
) -> None:
    """Enough participants with one unit each even out the others."""
    sizes = sizes + [1] * (4 * folds)
    units = [SplitUnit(f"sub-{n}") for n, size in enumerate(sizes) for _ in range(size)]
    classes = data.draw(st.lists(st.sampled_from("ab"), min_size=len(units), max_size=len(units)))
    lengths = [len(val) for _, val in k_fold(units, folds, stratify=classes, seed=seed)]
    assert max(lengths) - min(lengths) <= 1


@given(
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from("ab")), min_size=2, max_size=12),
    st.sampled_from([(0.8, 0.2), (0.7, 0.15, 0.15), (0.5, 0.5)]),
    st.integers(2, 5),
    seeds,
)
def test_classes_of_groups_are_within_one_where_single_units_can_fill_them(
    people: list[tuple[int, str]], shares: tuple[float, ...], folds: int, seed: int
) -> None:
    """Participants of several units, of one class each: folds and parts have their exact share."""
    people = people + [(1, kind) for kind in "ab"] * 24
    units = [SplitUnit(f"sub-{n}") for n, (size, _) in enumerate(people) for _ in range(size)]
    classes = [kind for size, kind in people for _ in range(size)]
    wanted = {str(number): share for number, share in enumerate(shares)}
    parts = split(units, wanted, stratify=classes, seed=seed)
    vals = [val for _, val in k_fold(units, folds, stratify=classes, seed=seed)]
    for found, exact in (
        (list(parts.values()), shares),
        (vals, [1 / folds] * folds),
    ):
        assert_sound(units, found)
        for part, share in zip(found, exact, strict=True):
            assert abs(len(part) - share * len(units)) < 1 + 1e-3
            for kind, total in Counter(classes).items():
                count = sum(classes[index] == kind for index in part)
                assert abs(count - share * total) < 1 + 1e-3


@given(st.lists(st.sampled_from("abcd"), min_size=6, max_size=80), st.integers(2, 6), seeds)
def test_folds_of_single_units_keep_sizes_and_classes_within_one(
    classes: list[str], folds: int, seed: int
) -> None:
    """Whether a class is common or has fewer units than there are folds."""
    units = [SplitUnit(f"sub-{n}") for n in range(len(classes))]
    found = [val for _, val in k_fold(units, folds, stratify=classes, seed=seed)]
    assert max(map(len, found)) - min(map(len, found)) <= 1
    for kind in set(classes):
        counts = [sum(classes[index] == kind for index in fold) for fold in found]
        assert max(counts) - min(counts) <= 1


@given(
    st.lists(st.sampled_from("abcd"), min_size=20, max_size=120),
    st.lists(st.integers(1, 10), min_size=2, max_size=4),
    seeds,
)
def test_parts_of_single_units_are_within_one_of_their_exact_share(
    classes: list[str], weights: list[int], seed: int
) -> None:
    """Both each part's size, and its number of each class."""
    shares = {str(n): weight / sum(weights) for n, weight in enumerate(weights)}
    units = [SplitUnit(f"sub-{n}") for n in range(len(classes))]
    if min(shares.values()) * len(units) < 1:
        return
    parts = split(units, shares, stratify=classes, seed=seed)
    assert_sound(units, list(parts.values()))
    for name, share in shares.items():
        assert abs(len(parts[name]) - share * len(units)) < 1 + 1e-3
        for kind, total in Counter(classes).items():
            count = sum(classes[index] == kind for index in parts[name])
            assert abs(count - share * total) < 1 + 1e-3


@given(units_with_ties, seeds)
def test_parts_divide_no_participant_and_no_image(units: list[SplitUnit], seed: int) -> None:
    """A split keeps together what folds keep together, or says that it cannot."""
    try:
        parts = split(units, {"train": 0.7, "val": 0.3}, seed=seed)
    except SplitError as error:
        assert "stay together" in str(error)  # noqa: PT017 - either outcome is right
        return
    assert_sound(units, list(parts.values()))


def test_single_units_have_the_folds_of_scikit_learn() -> None:
    """A seed means the same here and there."""
    classes = ["a"] * 12 + ["b"] * 9
    units = [SplitUnit(f"sub-{n}") for n in range(21)]
    theirs = StratifiedKFold(3, shuffle=True, random_state=7).split([[0]] * 21, classes)
    ours = k_fold(units, 3, stratify=classes, seed=7)
    assert [val for _, val in ours] == [tuple(val.tolist()) for _, val in theirs]


def test_groups_of_two_sizes_are_packed_evenly() -> None:
    """Largest first alone would give 7 and 5; exchanging a pair gives 6 and 6."""
    sizes = {"a": 3, "b": 3, "c": 2, "d": 2, "e": 2}
    units = [SplitUnit(name) for name, size in sizes.items() for _ in range(size)]
    assert [len(val) for _, val in k_fold(units, 2)] == [6, 6]


def test_largest_group_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """What stays together for a reason that one may not expect can be seen in the log."""
    shared = frozenset({key(0)})
    units = [SplitUnit(f"sub-{n}", shared if n < 3 else frozenset()) for n in range(6)]
    with caplog.at_level("INFO", logger="tio_openneuro"):
        k_fold(units, 2)
    assert "6 units form 4 groups; the largest has 3 units, the first of sub-0" in caplog.text


def test_missing_group_joins_nothing() -> None:
    """Participants without a value of the group's column are not one group."""
    missing = [None, "", float("nan")]
    units = [SplitUnit(f"sub-{n}", group=missing[n % 3]) for n in range(6)]
    assert len(find_groups(units)) == 6


def test_numbers_are_stratified_by_quartile() -> None:
    """Parts and folds have small and large alike; missing ones are a class of their own."""
    # Whose order as text is another one: only quartiles put two of each into a fifth.
    volumes = [*(float(n**2) for n in range(40)), *[float("nan")] * 5]
    units = [SplitUnit(f"sub-{n}") for n in range(45)]
    for seed in range(4):
        fifth = split(units, {"a": 0.8, "b": 0.2}, stratify=volumes, seed=seed)["b"]
        assert Counter(n // 10 for n in fifth) == {0: 2, 1: 2, 2: 2, 3: 2, 4: 1}
    for _, val in k_fold(units, 5, stratify=volumes):
        assert Counter(n // 10 for n in val) == {0: 2, 1: 2, 2: 2, 3: 2, 4: 1}


def test_seed_decides_the_split_for_good() -> None:
    """The same seed gives these very units on any machine; another gives others."""
    units = [SplitUnit(f"sub-{n}") for n in range(10)]
    first = split(units, {"train": 0.7, "val": 0.3}, seed=1)
    assert first == {"train": (0, 1, 5, 6, 7, 8, 9), "val": (2, 3, 4)}
    assert first != split(units, {"train": 0.7, "val": 0.3}, seed=2)


@pytest.mark.parametrize("parts", [{}, {"a": 0.5}, {"a": 1.2, "b": -0.2}, {"a": 1.0, "b": 0.0}])
def test_shares_must_be_positive_and_sum_to_one(parts: dict[str, float]) -> None:
    """Otherwise the message names them."""
    with pytest.raises(SplitError, match="sum to 1"):
        split([SplitUnit("a"), SplitUnit("b")], parts)


def test_part_that_would_be_empty_is_refused() -> None:
    """A participant with most of the units, and too few others, is named by number."""
    units = [SplitUnit("sub-1")] * 9 + [SplitUnit("sub-2")]
    with pytest.raises(SplitError, match="10 units: they form 2 groups"):
        split(units, {"a": 0.4, "b": 0.3, "c": 0.3})
    with pytest.raises(SplitError, match=r"'b' with a share of 0\.01 would get none"):
        split([SplitUnit(f"sub-{n}") for n in range(10)], {"a": 0.99, "b": 0.01})


@given(st.integers(2, 200), st.lists(st.integers(1, 40), min_size=2, max_size=5), seeds)
@settings(max_examples=200)
def test_sizes_are_the_nearest_whole_numbers_over_all_parts(
    count: int, weights: list[int], seed: int
) -> None:
    """Each within one of its exact share; nobody with half a unit or more is refused."""
    shares = {str(n): weight / sum(weights) for n, weight in enumerate(weights)}
    exact = {
        name: Fraction(w * count, sum(weights)) for name, w in zip(shares, weights, strict=True)
    }
    units = [SplitUnit(f"sub-{n}") for n in range(count)]
    refused = count < len(shares) or any(share < Fraction(1, 2) for share in exact.values())
    try:
        sizes = {name: len(part) for name, part in split(units, shares, seed=seed).items()}
    except SplitError as error:
        assert refused, str(error)  # noqa: PT017 - either outcome may be right
        return
    assert sum(sizes.values()) == count
    off = {name: abs(sizes[name] - exact[name]) for name in shares}
    # Several halves that are rounded up to one unit are taken from the others.
    halves = sum(share < 1 for share in exact.values())
    assert max(off.values()) < 1 or halves > 1
    for giver, taker in itertools.permutations(shares, 2):
        # No exchange of one unit brings two parts closer, but for one that would be empty then.
        nearer = off[giver] + off[taker]
        after = abs(sizes[giver] - 1 - exact[giver]) + abs(sizes[taker] + 1 - exact[taker])
        assert nearer <= after or sizes[giver] == 1


@pytest.mark.parametrize(
    ("count", "shares", "sizes"),
    [
        (9, (0.9, 0.1), (8, 1)),
        (19, (0.9, 0.1), (17, 2)),
        (3, (0.6, 0.2, 0.2), (1, 1, 1)),
        (16, (0.1, 0.9), (2, 14)),
        (6, (0.75, 0.25), (4, 2)),
        (10, (0.33, 0.33, 0.34), (3, 3, 4)),
    ],
)
def test_sizes_that_people_expect(
    count: int, shares: tuple[float, ...], sizes: tuple[int, ...]
) -> None:
    """The parts are served alike, wherever they stand; also where classes are kept."""
    units = [SplitUnit(f"sub-{n}") for n in range(count)]
    wanted = dict(zip("abc", shares, strict=False))
    for stratify in (None, [n % 2 for n in range(count)], [n % 3 for n in range(count)]):
        for seed in range(5):
            parts = split(units, wanted, stratify=stratify, seed=seed)
            assert tuple(map(len, parts.values())) == sizes


@given(
    st.lists(st.integers(1, 6), min_size=3, max_size=20),
    st.sampled_from([(0.9, 0.1), (0.7, 0.2, 0.1), (0.6, 0.2, 0.2), (0.4, 0.3, 0.2, 0.1)]),
    seeds,
)
def test_part_of_half_a_unit_gets_a_group_where_there_are_enough(
    people: list[int], shares: tuple[float, ...], seed: int
) -> None:
    """Participants of several units fill no part so that another one is left without."""
    units = [SplitUnit(f"sub-{n}") for n, size in enumerate(people) for _ in range(size)]
    if len(people) < len(shares) or min(shares) * len(units) < 0.5:
        return
    parts = split(units, {str(share) + "_" * n: share for n, share in enumerate(shares)}, seed=seed)
    assert_sound(units, list(parts.values()))
    assert min(map(len, parts.values())) >= 1


def test_numbers_in_a_text_column_are_binned_and_rare_values_joined() -> None:
    """One age of "89+" makes a column text; its numbers are still taken by quartile."""
    ages = [*(str(n**2) for n in range(99)), "89+"]
    units = [SplitUnit(f"sub-{n}") for n in range(100)]
    for seed in range(4):
        fifth = split(units, {"a": 0.8, "b": 0.2}, stratify=ages, seed=seed)["b"]
        quarters = Counter(n // 25 for n in fifth)
        assert set(quarters.values()) <= {4, 5, 6}
        assert quarters.keys() == {0, 1, 2, 3}
    # Scanners of which most have one unit: the rare ones are one class, as large as the others.
    scanners = [f"rare {n}" if n < 50 else f"common {n % 2}" for n in range(100)]
    for seed in range(4):
        fifth = split(units, {"a": 0.8, "b": 0.2}, stratify=scanners, seed=seed)["b"]
        assert Counter(scanners[n].split()[0] for n in fifth) == {"rare": 10, "common": 10}


@pytest.mark.parametrize("seed", [2**40, -3, 2**32, np.int64(7)], ids=str)
def test_any_integer_is_a_seed(seed: int) -> None:
    """Of folds as of parts, whether or not scikit-learn makes them; and each is another draw."""
    units = [SplitUnit(f"sub-{n}") for n in range(20)]
    tied = [*units, units[0]]
    for given_units in (units, tied):
        folds = k_fold(given_units, 4, seed=seed)
        assert folds == k_fold(given_units, 4, seed=int(seed))
        assert folds != k_fold(given_units, 4, seed=5)
        split(given_units, {"a": 0.5, "b": 0.5}, seed=seed)


def test_saved_split_is_read_for_its_own_commit_only(tmp_path: Path) -> None:
    """Another commit, or a unit that is gone, is refused by name."""
    file = tmp_path / "split.json"
    saved = {"train": ["ds@abc/sub-3", "ds@abc/sub-1"], "val": ["ds@abc/sub-2"]}
    save_split(file, saved)
    units = ["ds@abc/sub-1", "ds@abc/sub-2", "ds@abc/sub-3"]
    assert read_split(file, units) == {"train": (2, 0), "val": (1,)}
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["split.json"]
    with pytest.raises(SplitError, match=r"ds@abc/sub-3; .*of ds@def\. Open that version"):
        read_split(file, [unit.replace("abc", "def") for unit in units])
    with pytest.raises(SplitError, match="1 of its units are not selected, the first ds@abc/sub-3"):
        read_split(file, units[:2])


def test_unit_in_two_parts_is_refused(tmp_path: Path) -> None:
    """It would be trained and validated on; also where a dataset has it twice."""
    file = tmp_path / "split.json"
    save_split(file, {"train": ["ds@a/1", "ds@a/2"], "val": ["ds@a/2"]})
    for units in (["ds@a/1", "ds@a/2"], ["ds@a/1", "ds@a/2", "ds@a/2"]):
        with pytest.raises(SplitError, match="ds@a/2 is in it 2 times, in train and val"):
            read_split(file, units)
    save_split(file, {"train": ["ds@a/2", "ds@a/2"], "val": ["ds@a/1"]})
    with pytest.raises(SplitError, match=r"2 times, in train, and 1 times in the dataset"):
        read_split(file, ["ds@a/1", "ds@a/2"])
    assert read_split(file, ["ds@a/2", "ds@a/1", "ds@a/2"]) == {"train": (0, 2), "val": (1,)}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "null",
        {"format": 2, "parts": 3},
        {"format": 2, "parts": None},
        {"format": 2, "parts": {"train": None}},
        {"format": 2, "parts": {"train": [None]}},
        {"format": 2, "parts": {"train": [["ds@a/1"]]}},
        {"format": 2, "parts": [["train", ["ds@a/1"]]]},
        {"format": 2, "parts": {"train": "ds@a/1"}},
        {"format": 1, "commit": "a", "parts": {"train": ["1"]}},
        {"format": 3, "parts": {"train": ["ds@a/1"]}},
        {"parts": {"train": ["ds@a/1"]}},
    ],
    ids=str,
)
def test_file_that_is_no_split_is_refused(tmp_path: Path, content: object) -> None:
    """The message names the file, and says what to do."""
    file = tmp_path / "split.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SplitError, match=r"split\.json.*save_split") as caught:
        read_split(file, ["ds@a/1"])
    assert "not selected" not in str(caught.value)


def test_saved_split_is_readable_as_any_new_file_is(tmp_path: Path) -> None:
    """By colleagues, where the umask lets them; also one that took the place of another."""
    (tmp_path / "other").touch()
    for _ in range(2):
        save_split(tmp_path / "split.json", {"train": ["ds@a/1"]})
        assert (tmp_path / "split.json").stat().st_mode == (tmp_path / "other").stat().st_mode
