"""Which of a unit's files belong together. Pure.

Two files agree when they have one value in each entity that both name: session and run, and where
that is asked for every other one of their acquisition; an entity in which two images agree nowhere
(a pattern for each session) does not count. Where some label of the unit follows the stem of some
intensity image, each label agrees with the images that it follows, and with no other. A combination
is a largest set of files that all agree, at most one for an image unless several are merged or
stacked; that has every required image. It does not depend on the order of images or files.

Sets of files are bits of an integer, the lowest for the first file: 100 images of ten sessions are
combined in milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import combinations, product
from operator import attrgetter, or_

from tio_openneuro.errors import SelectionError
from tio_openneuro.select.patterns import Hit, ImagePattern, Label

Combination = dict[str, tuple[Hit, ...]]
Apart = frozenset[tuple[str, str, str]]
Members = Sequence[tuple[str, Hit]]

# Entities that tell one treatment of an image from another, and not one acquisition.
_DERIVED = frozenset({"space", "description", "label", "resolution", "density", "segmentation"})
# What two files must agree in where both name it, and how a hit names it.
_AGREED = {"session": attrgetter("parsed.session"), "run": attrgetter("run")}
_MOST_COMBINATIONS = 10_000
_DIGITS = re.compile(r"(\d+)")


@dataclass(slots=True)
class Candidate:
    """A unit before its files are combined.

    Attributes:
        subject_id: With its prefix.
        session_id: With its prefix, or an empty string.
        run_id: Likewise.
        hits: Files that may be each image.
        notes: What was found and cannot be used, by image name.
    """

    subject_id: str
    session_id: str = ""
    run_id: str = ""
    hits: dict[str, list[Hit]] = field(default_factory=dict)
    notes: dict[str, list[Hit]] = field(default_factory=dict)


def hits_of(combinations: Iterable[Combination]) -> list[Hit]:
    """Return all files of some combinations, one after another."""
    return [hit for each in combinations for several in each.values() for hit in several]


@dataclass(frozen=True, slots=True)
class UnitCombinations:
    """The combinations of files that a unit allows, or why there is none.

    Attributes:
        combinations: Files by image name, at least one combination unless there is a reason; in
            natural order of their files.
        reason: Why the unit cannot be used, in words; empty otherwise.
        strangers: Of each file's path, the images with none of whose files it agrees.
    """

    combinations: list[Combination]
    reason: str = ""
    strangers: Mapping[str, Sequence[str]] = field(default_factory=dict)


def natural_key(text: str) -> tuple[tuple[int, str], ...]:
    """Return a key that sorts numbers within a text by value: run-2 before run-10."""
    parts = _DIGITS.split(text)
    return tuple((int(part), part) if part.isdecimal() else (-1, part) for part in parts)


def never_together(hits: Mapping[str, Sequence[Hit]]) -> Apart:
    """Return the pairs of images that no subject has of one session, or of one run.

    Args:
        hits: All files by image name, of all units.
    """
    apart: set[tuple[str, str, str]] = set()
    for entity, value_of in _AGREED.items():
        values = {
            name: {(hit.parsed.subject, value_of(hit)) for hit in several if value_of(hit)}
            for name, several in hits.items()
        }
        for one, other in combinations(values, 2):
            if values[one] and values[other] and not values[one] & values[other]:
                apart |= {(one, other, entity), (other, one, entity)}
    return frozenset(apart)


def combine_files(
    images: Mapping[str, ImagePattern],
    unit: Candidate,
    *,
    apart: Apart,
    stack: bool = False,
    strict: bool = False,
) -> UnitCombinations:
    """Combine a unit's files, one per image, or several where they are merged or stacked.

    Args:
        images: Patterns by image name.
        unit: The unit.
        apart: Pairs of images that need not agree, from :func:`never_together`.
        stack: Whether several files of an image are its channels.
        strict: Whether files must agree in each entity of their acquisition, where any
            combination does.

    Returns:
        Every combination; or the reason why there is none.

    Raises:
        SelectionError: There are more combinations than can be meant.
    """
    reason = _missing(images, unit)
    if reason:
        return UnitCombinations([], reason)
    all_hits = [hit for several_hits in unit.hits.values() for hit in several_hits]
    named = [{value_of(hit) for hit in all_hits} - {""} for value_of in _AGREED.values()]
    if len(all_hits) == len(unit.hits) and all(len(values) <= 1 for values in named):
        return UnitCombinations([{name: tuple(unit.hits.get(name, ())) for name in images}])
    several = {n for n, p in images.items() if stack or (isinstance(p, Label) and p.combine)}
    members = [(name, hit) for name in images for hit in unit.hits.get(name, ())]
    members.sort(key=lambda member: natural_key(member[1].file.path))
    bits = dict.fromkeys(images, 0)
    for number, (name, _) in enumerate(members):
        bits[name] |= 1 << number
    near = _agreements(members, bits, apart, strict=strict)
    _separate_stems(images, members, bits, near)
    found: set[int] = {0}
    done: list[str] = []
    for name in sorted(images, key=lambda name: images[name].optional):
        for number in _numbers(bits[name]):
            own = 0 if name in several else bits[name]
            found = _with_file(found, 1 << number, near[number] & ~own)
            if len(found) > _MOST_COMBINATIONS:
                message = f"{unit.subject_id} allows more than {_MOST_COMBINATIONS} combinations of"
                message += f" files for {', '.join(images)}. Narrow the patterns, or pass a finer"
                raise SelectionError(f"{message} unit.", unit=unit.subject_id)
        done += [] if images[name].optional else [name]
        found = {each for each in found if all(each & bits[one] for one in done)}
        if not found and strict:
            return combine_files(images, unit, apart=apart)
        if not found:
            others = ", ".join(map(repr, done[:-1]))
            reason = f"no file for {name!r} agrees with {others} in session, run and stem"
            return UnitCombinations([], reason)
    strangers = {
        hit.file.path: [n for n in images if n != name and bits[n] and not bits[n] & near[number]]
        for number, (name, hit) in enumerate(members)
    }
    sets = _merge(found, _union(bits[name] for name in several)) if several else found
    combinations = [
        {name: tuple(members[n][1] for n in _numbers(each & bits[name])) for name in images}
        for each in sorted(sets, key=_numbers)
    ]
    return UnitCombinations(combinations, "", strangers)


def _numbers(files: int) -> list[int]:
    """Return the files of a set, the first one first."""
    return [number for number, bit in enumerate(bin(files)[:1:-1]) if bit == "1"]


def _union(sets: Iterable[int]) -> int:
    """Return all files of some sets."""
    return reduce(or_, sets, 0)


def _with_file(found: set[int], file: int, near: int) -> set[int]:
    """Return the largest sets of files that agree, now that there is one file more.

    Args:
        found: Those without it.
        file: The set of that file alone.
        near: The files that it agrees with.
    """
    grown = {each & near | file for each in found}
    largest = max(map(int.bit_count, grown))
    smaller = [each for each in grown if each.bit_count() < largest]
    grown -= {each for each in smaller if any(each & other == each != other for other in grown)}
    return grown | {each for each in found if each & ~near}


def _merge(found: Iterable[int], several: int) -> list[int]:
    """Join the sets that differ only in files of images of which several are taken."""
    merged: dict[int, int] = {}
    for each in found:
        merged[each & ~several] = merged.get(each & ~several, 0) | each
    # What some larger set of single files has too, stands there alone.
    return [
        each
        for alone, each in merged.items()
        if each & ~_union(other for one, other in merged.items() if one & alone == alone != one)
    ]


def _agreements(
    members: Members, bits: Mapping[str, int], apart: Apart, *, strict: bool
) -> list[int]:
    """Return of each file the set of the others that agree with it in their entities."""
    facts = [_facts(hit, strict=strict) for _, hit in members]
    alike: dict[str, dict[str, int]] = {}
    for number, named in enumerate(facts):
        for entity, value in named.items():
            same = alike.setdefault(entity, {})
            same[value] = same.get(value, 0) | 1 << number
    naming = {entity: _union(same.values()) for entity, same in alike.items()}
    near: list[int] = []
    for number, ((name, _), named) in enumerate(zip(members, facts, strict=True)):
        far = 1 << number
        for entity, value in named.items():
            others = naming[entity] & ~alike[entity][value] & ~far
            for other in {members[n][0] for n in _numbers(others)}:
                counts = (name, other, entity) not in apart
                if entity not in _AGREED:
                    counts = any(s & bits[name] and s & bits[other] for s in alike[entity].values())
                far |= others & bits[other] if counts else 0
        near.append((1 << len(members)) - 1 & ~far)
    return near


def _facts(hit: Hit, *, strict: bool) -> dict[str, str]:
    """Return what a file names of what it must agree in, numbers without their zeros."""
    facts = {entity: value for entity, value_of in _AGREED.items() if (value := value_of(hit))}
    if strict:
        for entity in hit.parsed.entities.keys() - _DERIVED - _AGREED.keys():
            value = hit.parsed.entities[entity]
            facts[entity] = str(int(value)) if value.isdecimal() else value
    return facts


def _missing(images: Mapping[str, ImagePattern], unit: Candidate) -> str:
    """Say which images the unit lacks; empty when it has what is required."""
    unusable = [
        hit.unusable for n, notes in unit.notes.items() if not unit.hits.get(n) for hit in notes
    ]
    lacked = [name for name, p in images.items() if not unit.hits.get(name) and not p.optional]
    if not lacked and not unusable:
        return "" if any(unit.hits.values()) else "has none of the images"
    words = " and ".join(f"no file for {name!r}" for name in lacked)
    return "; ".join(part for part in (words, *unusable) if part)


def follows(label: Hit, image: Hit) -> bool:
    """Tell whether a label's stem is an image's, or begins with it (``…_FLAIR_roi``)."""
    stem, longer = image.parsed.stem, label.parsed.stem
    return longer.startswith(stem) and not longer[len(stem) : len(stem) + 1].isalnum()


def _separate_stems(
    images: Mapping[str, ImagePattern], members: Members, bits: Mapping[str, int], near: list[int]
) -> None:
    """Let a label agree with images whose stem it follows alone, where it follows any."""
    labels = {name for name, pattern in images.items() if isinstance(pattern, Label)}
    for label, image in product(labels, images.keys() - labels):
        pairs = list(product(_numbers(bits[label]), _numbers(bits[image])))
        far = [(a, b) for a, b in pairs if not follows(members[a][1], members[b][1])]
        for a, b in far if len(far) < len(pairs) else ():
            near[a] &= ~(1 << b)
            near[b] &= ~(1 << a)
