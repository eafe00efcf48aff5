"""Splits and folds: everything once, nothing divided, sizes and classes even."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
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
    participants = {unit.participant for unit in units}
    homes: dict[object, set[int]] = {}
    holders: dict[object, set[str]] = {}
    for number, part in enumerate(parts):
        for unit in (units[index] for index in part):
            homes.setdefault(unit.participant, set()).add(number)
            if unit.group is not None:
                homes.setdefault(("group", unit.group), set()).add(number)
            for shared in unit.keys:
                homes.setdefault(shared, set()).add(number)
                holders.setdefault(shared, set()).add(unit.participant)
    for tie, numbers in homes.items():
        common = len(participants) > 2 and holders.get(tie) == participants
        assert len(numbers) == 1 or common


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


def test_image_common_to_all_participants_joins_none() -> None:
    """An atlas that everyone has does not make one group; one that two share does."""
    atlas, twin = key(0), key(1)
    units = [
        SplitUnit("sub-1", frozenset({atlas, twin})),
        SplitUnit("sub-2", frozenset({atlas})),
        SplitUnit("sub-3", frozenset({atlas, twin})),
    ]
    assert find_groups(units) == [(0, 2), (1,)]


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


def test_saved_split_is_read_for_its_own_commit_only(tmp_path: Path) -> None:
    """Another commit, or a unit that is gone, is refused by name."""
    file = tmp_path / "split.json"
    save_split(file, {"train": ["sub-3", "sub-1"], "val": ["sub-2"]}, commit="abc")
    units = ["sub-1", "sub-2", "sub-3"]
    assert read_split(file, units, commit="abc") == {"train": (2, 0), "val": (1,)}
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["split.json"]
    with pytest.raises(SplitError, match=r"commit abc.*at def.*version='abc'"):
        read_split(file, units, commit="def")
    with pytest.raises(SplitError, match="1 of its units are not selected, the first sub-3"):
        read_split(file, units[:2], commit="abc")


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"commit": "a", "parts": 3})])
def test_file_that_is_no_split_is_refused(tmp_path: Path, text: str) -> None:
    """The message names the file."""
    file = tmp_path / "split.json"
    file.write_text(text)
    with pytest.raises(SplitError, match=r"split\.json holds no split"):
        read_split(file, [], commit="a")
