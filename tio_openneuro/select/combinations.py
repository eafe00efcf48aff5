"""Which of a unit's files belong together. Pure.

Two files of a unit can stand in one combination when they agree in session and run, where both
name them; images that are never of one session (a pattern for each) are combined all the same.
Where some label of the unit follows the stem of some intensity image, each label belongs to
the images that it follows, and to no other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from operator import attrgetter

from tio_openneuro.errors import SelectionError
from tio_openneuro.select.patterns import Hit, ImagePattern, Label, Scalar

Combination = dict[str, tuple[Hit, ...]]
Apart = frozenset[tuple[str, str, str]]

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
    notes: dict[str, list[str]] = field(default_factory=dict)


def hits_of(combinations: Iterable[Combination]) -> list[Hit]:
    """Return all files of some combinations, one after another."""
    return [hit for each in combinations for several in each.values() for hit in several]


@dataclass(frozen=True, slots=True)
class UnitCombinations:
    """The combinations of files that a unit allows, or why there is none.

    Attributes:
        combinations: Files by image name, at least one combination unless there is a reason.
        reason: Why the unit cannot be used, in words; empty otherwise.
    """

    combinations: list[Combination]
    reason: str = ""

    def agreeing(self) -> list[Combination]:
        """Return the combinations whose files agree in every entity of their acquisition.

        An entity in which two images agree nowhere (an image and its label that differ in
        ``acq-``) does not count.
        """
        verdicts = [_verdicts(combination) for combination in self.combinations]
        counting = {ask for verdict in verdicts for ask, agrees in verdict.items() if agrees}
        kept = [
            combination
            for combination, verdict in zip(self.combinations, verdicts, strict=True)
            if all(verdict.get(ask, True) for ask in counting)
        ]
        return kept or self.combinations

    def paths_outside(self, kept: Sequence[Combination]) -> list[str]:
        """Return the paths that stand in some combination, but in none of those kept."""
        inside = {hit.file.path for hit in hits_of(kept)}
        every = dict.fromkeys(hit.file.path for hit in hits_of(self.combinations))
        return [path for path in every if path not in inside]


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
    images: Mapping[str, ImagePattern], unit: Candidate, *, apart: Apart, stack: bool
) -> UnitCombinations:
    """Combine a unit's files, one per image, or several where they are merged or stacked.

    Args:
        images: Patterns by image name.
        unit: The unit.
        apart: Pairs of images that need not agree, from :func:`never_together`.
        stack: Whether several files of an image are its channels.

    Returns:
        Every combination that agrees, in natural order of the files; or the reason why there is
        none.

    Raises:
        SelectionError: There are more combinations than can be meant.
    """
    reason = _missing(images, unit)
    if reason:
        return UnitCombinations([], reason)
    rules = _Rules(_linked(images, unit), apart)
    several = {n for n, p in images.items() if stack or (isinstance(p, Label) and p.combine)}
    order = sorted(images, key=lambda name: (name in several, images[name].optional))
    found: list[Combination] = [{}]
    for name in order:
        hits = sorted(unit.hits.get(name, ()), key=lambda hit: natural_key(hit.file.path))
        longer: list[Combination] = []
        for chosen in found:
            fitting = [hit for hit in hits if rules.fit(name, hit, chosen)]
            if name in several and fitting:
                longer.append({**chosen, name: tuple(fitting)})
            elif fitting:
                longer += [{**chosen, name: (hit,)} for hit in fitting]
            elif images[name].optional:
                longer.append({**chosen, name: ()})
        if not longer:
            others = ", ".join(repr(other) for other in order[: order.index(name)])
            reason = f"no file for {name!r} agrees with {others} in session, run and stem"
            return UnitCombinations([], reason)
        if len(longer) > _MOST_COMBINATIONS:
            message = (
                f"{unit.subject_id} allows more than {_MOST_COMBINATIONS} combinations of files"
                f" for {', '.join(images)}. Narrow the patterns, or pass a finer unit."
            )
            raise SelectionError(message, unit=unit.subject_id)
        found = longer
    return UnitCombinations([{name: combination[name] for name in images} for combination in found])


def _missing(images: Mapping[str, ImagePattern], unit: Candidate) -> str:
    """Say which images the unit lacks; empty when it has what is required."""
    unusable = [
        note for name, notes in unit.notes.items() if not unit.hits.get(name) for note in notes
    ]
    lacked = [name for name, p in images.items() if not unit.hits.get(name) and not p.optional]
    if not lacked and not unusable:
        return "" if any(unit.hits.values()) else "has none of the images"
    words = " and ".join(f"no file for {name!r}" for name in lacked)
    return "; ".join(part for part in (words, *unusable) if part)


def follows(label: Hit, image: Hit) -> bool:
    """Tell whether a label's stem is an image's, or begins with it (``…_FLAIR_roi``)."""
    stem, longer = image.parsed.stem, label.parsed.stem
    rest = longer[len(stem) :]
    return longer.startswith(stem) and not rest[:1].isalnum()


def _linked(images: Mapping[str, ImagePattern], unit: Candidate) -> frozenset[tuple[str, str]]:
    """Return the pairs (label, image) of names of which a file follows the other's stem."""
    labels = [name for name, pattern in images.items() if isinstance(pattern, Label)]
    scalars = [name for name, pattern in images.items() if isinstance(pattern, Scalar)]
    return frozenset(
        (label, scalar)
        for label in labels
        for scalar in scalars
        if any(follows(a, b) for a in unit.hits.get(label, ()) for b in unit.hits.get(scalar, ()))
    )


@dataclass(frozen=True, slots=True)
class _Rules:
    """What two files must agree in to stand in one combination.

    Attributes:
        linked: Pairs (label, image) whose files go by their stems.
        apart: Pairs that need not agree in an entity.
    """

    linked: frozenset[tuple[str, str]]
    apart: Apart

    def fit(self, name: str, hit: Hit, chosen: Combination) -> bool:
        """Tell whether a file can stand beside those chosen, or one of several stacked."""
        return all(
            any(self._beside(name, hit, other, candidate) for candidate in hits)
            for other, hits in chosen.items()
            if hits
        )

    def _beside(self, name: str, hit: Hit, other: str, candidate: Hit) -> bool:
        """Tell whether two files can stand in one combination."""
        for entity, value_of in _AGREED.items():
            here, there = value_of(hit), value_of(candidate)
            if here and there and here != there and (name, other, entity) not in self.apart:
                return False
        if (name, other) in self.linked and not follows(hit, candidate):
            return False
        return (other, name) not in self.linked or follows(candidate, hit)


def _verdicts(combination: Combination) -> dict[tuple[str, str, str], bool]:
    """Say of each two images, and each entity that both name, whether they agree."""
    return {
        (one, other, entity): all(
            a.parsed.matches(entity, b.parsed.get(entity))
            for a, b in product(combination[one], combination[other])
        )
        for one, other in combinations(combination, 2)
        for entity in _named(combination[one]) & _named(combination[other])
    }


def _named(hits: Sequence[Hit]) -> set[str]:
    """Return the entities of the acquisition that all of these files name."""
    named = [set(hit.parsed.entities) for hit in hits]
    return set.intersection(*named) - _DERIVED if named else set()
