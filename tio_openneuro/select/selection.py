"""From patterns and a tree to the files of each unit. Pure.

A unit is a subject, a session or a run. Its images are combined by subject, session and run, where
both of two files name them, and a label whose name follows an image's stem belongs to that image.
A file that names no session or run belongs to every unit of its subject. Where no file names a
subject, as in layouts other than BIDS, units are what the globs' wildcards stand for. Every unit
of the tree ends up as selected or as skipped, with the reason in words; what could not be collated
into a batch raises here, at construction, and not in the training loop.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from tio_openneuro.content import TreeFile
from tio_openneuro.errors import SelectionError
from tio_openneuro.select.combinations import (
    Candidate,
    Combination,
    UnitCombinations,
    combine_files,
    hits_of,
    natural_key,
    never_together,
)
from tio_openneuro.select.patterns import Label, Scalar, check_option, find_hits, first_few
from tio_openneuro.select.units import LEVELS, Hits, Skipped, Unit, every_nifti, find_units

OnMissing = Literal["skip", "raise"]
OnMultiple = Literal["raise", "first", "all", "stack"]
OnIncomplete = Literal["raise", "allow"]

_LOG = logging.getLogger(__name__)
# Of the paths that a message shows.
_SHOWN_LENGTH = 200
_TAKEN = frozenset({"subject_id", "session_id", "dataset_id"})


@dataclass(frozen=True, slots=True)
class SelectedUnit:
    """The files of one unit.

    Attributes:
        unit: Name of the unit, ``"sub-01_ses-2"``; unique within a selection.
        subject_id: With its prefix, ``"sub-01"``; the unit's name where files name no subject.
        session_id: With its prefix, or ``""`` when there is none, or several.
        run_id: Likewise, ``"run-01"``.
        images: Files by image name: one, several to combine or stack, or none where the image is
            optional and missing.
    """

    unit: str
    subject_id: str
    session_id: str
    run_id: str
    images: Mapping[str, tuple[TreeFile, ...]]


@dataclass(frozen=True, slots=True)
class Selection:
    """What patterns select from a tree.

    Attributes:
        rows: The units, in natural order of their names (sub-2 before sub-10).
        skipped: What was left out, in the same order.
        images: The patterns; with ``images=None``, those found.
    """

    rows: tuple[SelectedUnit, ...]
    skipped: tuple[Skipped, ...]
    images: Mapping[str, Scalar | Label] = field(default_factory=dict)


def select(
    files: Sequence[TreeFile],
    images: Mapping[str, Scalar | Label] | None,
    *,
    unit: Unit = "subject",
    on_missing: OnMissing = "skip",
    on_multiple: OnMultiple = "raise",
    on_incomplete: OnIncomplete = "raise",
    says_label: Callable[[TreeFile], bool] = lambda _: False,
) -> Selection:
    """Find the files of each unit.

    Args:
        files: The dataset's tree.
        images: Patterns by image name; None takes every NIfTI, each under its stem less subject
            and session, none of them required.
        unit: What one unit is.
        on_missing: What to do with a unit that lacks a required image.
        on_multiple: What to do with a unit that has several files for one image: ``"first"`` in
            natural order, ``"all"`` makes a unit of each combination whose entities agree,
            ``"stack"`` keeps all, for channels.
        on_incomplete: Whether units may differ in their optional images.
        says_label: With ``images=None``, whether a file whose name tells nothing is a label map.

    Raises:
        SelectionError: A pattern matches nothing, a unit has several files for an image, no unit
            has all that is required, or the units could not be collated into a batch.
    """
    check_option("unit", unit, tuple(LEVELS))
    check_option("on_missing", on_missing, ("skip", "raise"))
    check_option("on_multiple", on_multiple, ("raise", "first", "all", "stack"))
    check_option("on_incomplete", on_incomplete, ("raise", "allow"))
    check_images(images)
    guessed = images is None
    if images is None:
        images, hits = every_nifti(files, unit, says_label)
    else:
        hits = {name: find_hits(name, pattern, files) for name, pattern in images.items()}
    apart = never_together(hits)
    # What is for all is named; a guess would give one subject's label to the others.
    units, skipped = find_units(hits, files, unit, share=not guessed)
    rows: list[SelectedUnit] = []
    lacking: list[Skipped] = []
    ambiguous: list[tuple[str, list[Combination]]] = []
    for name in sorted(units, key=natural_key):
        modes = {"stack": on_multiple == "stack", "strict": on_multiple in {"first", "all"}}
        found = combine_files(images, units[name], apart=apart, **modes)
        if found.reason:
            lacking.append(Skipped(name, found.reason))
        elif on_multiple == "raise" and _has_several(found.combinations):
            ambiguous.append((name, found.combinations))
        else:
            fullest = max(found.combinations, key=lambda each: sum(map(bool, each.values())))
            kept = found.combinations if on_multiple == "all" else [fullest]
            names = _combination_names(name, kept)
            rows += [_selected(n, units[name], c) for n, c in zip(names, kept, strict=True)]
            skipped += _left_out(name, units[name], found, kept)
    if ambiguous:
        raise SelectionError(_ambiguous_message(ambiguous, images, unit), unit=ambiguous[0][0])
    if lacking and on_missing == "raise":
        noun = "unit" if len(lacking) == 1 else "units"
        reasons = first_few([f"{entry.unit}: {entry.reason}" for entry in lacking], "; ")
        message = f"{len(lacking)} {noun} of {len(units)} cannot be used: {reasons}. Pass"
        raise SelectionError(
            f"{message} on_missing='skip' to leave them out.", unit=lacking[0].unit
        )
    used = {file.path for row in rows for several in row.images.values() for file in several}
    skipped = list({entry.unit: entry for entry in skipped if entry.unit not in used}.values())
    unreached = "" if guessed else _unreached(images, hits, rows, [*skipped, *lacking])
    if rows and unreached:
        raise SelectionError(unreached.strip())
    if not rows:
        counts = Counter(entry.reason for entry in lacking).most_common()
        reasons = first_few([f"{reason} ({count} units)" for reason, count in counts], "; ")
        message = f"None of {len(units)} units has all required images: {reasons}."
        advice = "Check the patterns, or pass required=False."
        raise SelectionError(f"{message}{unreached} {advice}")
    if on_incomplete == "raise":
        _check_uniform(rows, images)
    out = sorted(skipped + lacking, key=lambda entry: natural_key(entry.unit))
    selection = Selection(tuple(rows), tuple(out), dict(images))
    return _reached(selection) if guessed else selection


def _reached(guess: Selection) -> Selection:
    """Leave out of a guess the images that no unit has, and say what was guessed."""
    names = {name for row in guess.rows for name, found in row.images.items() if found}
    images = {name: pattern for name, pattern in guess.images.items() if name in names}
    labels = ", ".join(name for name, each in images.items() if isinstance(each, Label))
    _LOG.info("Of %d images, taken for label maps: %s.", len(images), labels or "none")
    rows = (replace(row, images={n: row.images[n] for n in images}) for row in guess.rows)
    return replace(guess, rows=tuple(rows), images=images)


def check_images(images: object) -> None:
    """Refuse what does not say by name which images a unit has.

    Args:
        images: As a user gave it; None asks for every NIfTI.

    Raises:
        SelectionError: It is no mapping, an empty one, or one of names that are taken or to what
            is neither Scalar nor Label.
    """
    example = "images={'t1': tno.Scalar('sub-*/anat/*_T1w.nii.gz')}"
    advice = f"Name each image and say which file it is, {example}, or pass None for every NIfTI."
    if images is None:
        return
    if not isinstance(images, Mapping) or not images:
        raise SelectionError(f"Cannot select images by {images!r}. {advice}")
    for name, pattern in images.items():
        if not isinstance(name, str) or not name or name in _TAKEN:
            raise SelectionError(f"Cannot call an image {name!r}: take another word. {advice}")
        if not isinstance(pattern, Scalar | Label):
            message = f"Image {name!r} must be a Scalar or a Label, not {pattern!r}. {advice}"
            raise SelectionError(message)


def _selected(name: str, unit: Candidate, combination: Combination) -> SelectedUnit:
    """Return one combination of a unit's files as what is selected."""
    hits = hits_of([combination])
    files = {image: tuple(hit.file for hit in several) for image, several in combination.items()}
    session_id = unit.session_id or _only(hit.parsed.session for hit in hits)
    run_id = unit.run_id or _only(hit.parsed.run for hit in hits)
    return SelectedUnit(name, unit.subject_id, session_id, run_id, files)


def _has_several(combinations: Sequence[Combination]) -> bool:
    """Tell whether combinations differ in which file is an image, and not just in its lack."""
    return any(
        len({each[name] for each in combinations if each[name]}) > 1 for name in combinations[0]
    )


def _left_out(
    name: str, unit: Candidate, found: UnitCombinations, kept: Sequence[Combination]
) -> list[Skipped]:
    """Say of each file of a unit that stands in no combination that is kept why it does not."""
    inside = {hit.file.path for hit in hits_of(kept)}
    left = [
        Skipped(hit.file.path, hit.unusable)
        for hit in [hit for several in unit.notes.values() for hit in several]
    ]
    for hit in [hit for several in unit.hits.values() for hit in several]:
        path = hit.file.path
        if path not in inside:
            strangers = ", ".join(map(repr, found.strangers[path]))
            reason = f"agrees with no file for {strangers} of {name}"
            others = f"other files of {name}, which agree with one another, are taken"
            left.append(Skipped(path, reason if strangers else others))
    return left


def _unreached(
    images: Mapping[str, Scalar | Label], hits: Hits, rows: list[SelectedUnit], out: list[Skipped]
) -> str:
    """Say which label's files reach no unit, and why; empty where there is none such."""
    reasons = {entry.unit: entry.reason for entry in out}
    for name, pattern in images.items():
        if isinstance(pattern, Label) and not any(row.images[name] for row in rows):
            paths = [hit.file.path for hit in hits[name]]
            whose = [hit.parsed.subject or "/".join(hit.captures) for hit in hits[name]]
            found = [reasons.get(p, reasons.get(s)) for p, s in zip(paths, whose, strict=True)]
            why = dict.fromkeys(reason or "the unit is skipped" for reason in found)
            message = f"{len(paths)} files match {name!r} = {pattern!r}, and none reaches a unit"
            return f" {message} ({paths[0]}, for one): {first_few(list(why), '; ')}."
    return ""


def _only(values: Iterable[str]) -> str:
    """Return the one value that is named; empty where there is none, or several."""
    named = set(values) - {""}
    return named.pop() if len(named) == 1 else ""


def _combination_names(unit: str, combinations: Sequence[Combination]) -> list[str]:
    """Name each combination by the unit and what tells it from the others.

    That is the entities, else the words of the files' names, else names and folders.
    """
    if len(combinations) == 1:
        return [unit]
    files = [
        sorted((hit.parsed for hit in hits_of([each])), key=lambda file: natural_key(file.path))
        for each in combinations
    ]
    for part, sign, mark in (("stem", "_", "-"), ("stem", "_", ""), ("path", "/", "")):
        words = [[w for f in fs for w in getattr(f, part).split(sign) if mark in w] for fs in files]
        common = set(words[0]).intersection(*words[1:])
        names = [
            "_".join([unit, *dict.fromkeys(word for word in own if word not in common)])
            for own in words
        ]
        if len(set(names)) == len(names):
            return names
    return [f"{name}_{number}" for number, name in enumerate(names, start=1)]


def _check_uniform(rows: Sequence[SelectedUnit], images: Mapping[str, Scalar | Label]) -> None:
    """Refuse units that differ in what they have of an image, which no batch could hold."""
    for name, pattern in images.items():
        filled = isinstance(pattern, Label) and pattern.when_missing is not None
        merged = isinstance(pattern, Label) and pattern.combine is not None
        by_count: dict[int, list[str]] = {}
        for row in rows:
            count = len(row.images[name])
            by_count.setdefault(min(count, 1) if merged else count, []).append(row.unit)
        if filled:
            by_count.pop(0, None)
        if len(by_count) <= 1:
            continue
        cases = ", ".join(
            f"{len(units)} units have {count} ({units[0]})"
            for count, units in sorted(by_count.items())
        )
        advice = "or on_incomplete='allow' and a collate function of your own"
        if isinstance(pattern, Label) and 0 in by_count:
            advice = "when_missing='zeros', " + advice
        raise SelectionError(
            f"Units differ in their number of files for {name!r}: {cases}; a batch could not be"
            f" collated. Select it with required=True to skip those that lack it, {advice}."
        )


def _ambiguous_message(
    ambiguous: Sequence[tuple[str, Sequence[Combination]]],
    images: Mapping[str, Scalar | Label],
    unit: Unit,
) -> str:
    """Say which unit has too many files for which image, and the ways out."""
    name, found = ambiguous[0]
    hits = {image: {hit.file.path: hit for c in found for hit in c[image]} for image in images}
    image = max(hits, key=lambda candidate: len(hits[candidate]))
    several = list(hits[image].values())
    # A message is read in a terminal, however long the paths are.
    longest = max(map(len, hits[image]))
    shown = first_few(list(hits[image]), shown=min(5, max(1, _SHOWN_LENGTH // longest)))
    ways = ["narrow the pattern"]
    for finer, level in (("session", 2), ("run", 3)):
        values = {hit.parsed.get(finer) for hit in several}
        if level > LEVELS[unit] and len(values) > 1:
            ways.append(f"pass unit={finer!r}")
            break
    if isinstance(images[image], Label):
        ways.append("pass combine='union' to merge them")
    ways.append("pass on_multiple='first', 'all' (one unit each) or 'stack' (channels)")
    others = f" ({len(ambiguous) - 1} more units have several)" if len(ambiguous) > 1 else ""
    return (
        f"{name} has {len(several)} files for {image!r} = {images[image]!r}, where one is wanted:"
        f" {shown}{others}. To choose, {'; or '.join(ways)}."
    )
