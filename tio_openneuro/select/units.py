"""From files to units: the candidates of each subject, session or run. Pure.

Every subject and session of the tree that has an image becomes a unit, so that the ones without
the images asked for can be named. Where no path names a subject, units are what the globs'
wildcards stand for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tio_openneuro.content import TreeFile
from tio_openneuro.errors import SelectionError
from tio_openneuro.select.bids import OTHER_PREFIXES, BidsPath, entity_name, vocabulary
from tio_openneuro.select.combinations import Candidate
from tio_openneuro.select.patterns import NIFTI_EXTENSIONS, Hit, Label, Scalar, is_volume

Unit = Literal["subject", "session", "run"]
LEVELS = {"subject": 1, "session": 2, "run": 3}

# Words of label maps where nobody says which image is one (images=None).
_LABEL_WORDS = re.compile(
    r"(?i)(mask|seg|label|roi|lesion|tumou?r|segmentation|parc|parcellation|manual|ribbon|atlas)s?\d*(?![a-z])"
)
_FOLDERS = re.compile(r"(?:^|.*?/)(sub-[^/_]+)/(?:(?:.*?/)?(ses-[^/_]+)/)?")

Hits = dict[str, list[Hit]]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A unit, or a file without one, that is left out.

    Attributes:
        unit: Name of the unit, or path of the file.
        reason: Why, in words.

    Example:
        >>> import tio_openneuro as tno
        >>> images = {"flair": tno.Scalar(suffix="FLAIR"), "t1": tno.Scalar(suffix="T1w")}
        >>> with tno.DataladSubjectsDataset("ds004199", images, disk_budget="2 GB") as dataset:
        ...     dataset.skipped[-1].reason
        "no file for 't1'"
    """

    unit: str
    reason: str


def every_nifti(
    files: Sequence[TreeFile], unit: Unit, says_label: Callable[[TreeFile], bool]
) -> tuple[dict[str, Scalar | Label], Hits]:
    """Name every NIfTI of raw data and derivatives by its stem, less what names the unit.

    Args:
        files: The dataset's tree.
        unit: What one is.
        says_label: Asked of an image's first file where its name tells nothing.
    """
    found: list[tuple[str, Hit]] = []
    homes: dict[str, set[str]] = {}
    own = ("sub-", "ses-", "run-") if unit == "run" else ("sub-", "ses-")
    for file in files:
        if is_volume(file.path, NIFTI_EXTENSIONS) and not file.path.startswith(OTHER_PREFIXES):
            hit = Hit(file)
            name = "_".join(_words(hit.parsed, own)) or "image"
            found.append((name, hit))
            homes.setdefault(name, set()).add(f"{hit.parsed.scope}/{hit.parsed.pipeline}")
    if not any(hit.parsed.subject for _, hit in found):
        raise SelectionError(
            f"No NIfTI among {len(files)} files names a subject (sub-…) in its path."
            " Name the images by glob, such as Scalar('imagesTr/*.nii.gz')."
        )
    hits: Hits = {}
    for name, hit in found:
        pipeline = hit.parsed.pipeline.replace("/", "_")
        longer = f"{pipeline}_{name}" if pipeline and len(homes[name]) > 1 else name
        hits.setdefault(longer, []).append(hit)
    images = {name: _guess(name, several[0], says_label) for name, several in sorted(hits.items())}
    return images, {name: hits[name] for name in images}


def _words(parsed: BidsPath, own: tuple[str, ...]) -> Iterator[str]:
    """Yield the parts of a stem that do not name the unit, of ``sub-01.BA1`` the last word."""
    for part in parsed.stem.split("_"):
        unit, _, rest = part.partition(".")
        if not part.startswith(own):
            yield part
        elif rest and unit in {parsed.subject, parsed.session}:
            yield rest


def _guess(name: str, hit: Hit, says_label: Callable[[TreeFile], bool]) -> Scalar | Label:
    """Return a pattern of the kind that a file's name speaks for, else the file."""
    # What follows an intensity image's suffix tells: T1w_lesion is a lesion, lesion_T1w is none.
    tokens = re.split("[_.]", hit.parsed.stem)
    plain = {word for word in vocabulary().suffixes if not _LABEL_WORDS.search(word)}
    ends = [n for n, token in enumerate(tokens, 1) if token in plain]
    tail = tokens[max(ends, default=0) :]
    named = any(map(_tells_label, tail)) or (not ends and says_label(hit.file))
    kind = Label if named and "prob" not in "".join(tail).lower() else Scalar
    return kind(f"**/*{name}{hit.parsed.extension}", required=False)


def _tells_label(token: str) -> bool:
    """Tell whether a part of a name says that a file holds labels."""
    key, value = entity_name(token.partition("-")[0]), token.partition("-")[2]
    if value and key != "description":
        return key in {"label", "labels", "segmentation", "atlas"}
    return _LABEL_WORDS.search(token) is not None


def find_units(
    hits: Hits, files: Iterable[TreeFile], unit: Unit, *, share: bool = True
) -> tuple[dict[str, Candidate], list[Skipped]]:
    """Gather the hits of each unit; files without a unit come back as skipped.

    Args:
        hits: By the images' names.
        files: The dataset's.
        unit: What one is.
        share: Whether an image's only hit, which names no subject, is every unit's: a template.
    """
    if not any(hit.parsed.subject for several in hits.values() for hit in several):
        return _units_by_captures(hits)
    loose: list[Skipped] = []
    shared: list[tuple[str, Hit]] = []
    by_subject: dict[str, list[tuple[str, Hit]]] = {}
    for name, several in hits.items():
        for hit in several:
            for subject in _subjects_of(hit):
                by_subject.setdefault(subject, []).append((name, hit))
            if hit.parsed.subject:
                continue
            if share and len(several) == 1:
                shared.append((name, hit))
            else:
                folder = hit.file.path.rpartition("/")[0].rpartition("/")[2] or "the dataset's own"
                reason = f"its path names no subject (sub-…), its folder is {folder}"
                loose.append(Skipped(hit.file.path, reason))
    level = LEVELS[unit]
    units: dict[str, Candidate] = {}
    for subject, folders in _folders(files, by_subject, level).items():
        members = by_subject.get(subject, [])
        keys = folders | {_key(hit, level) for _, hit in members}
        for session, run in keys:
            if any(_contains((session, run), other) for other in keys - {(session, run)}):
                continue
            here = [m for m in members if _contains(_key(m[1], level), (session, run))]
            runs = [hit.parsed.run for _, hit in here if hit.parsed.run and run]
            run_id = min(runs, default="")
            candidate = Candidate(subject, session, run_id)
            _add(candidate, [*here, *shared])
            units["_".join(part for part in (subject, session, run_id) if part)] = candidate
    return units, loose


def _folders(
    files: Iterable[TreeFile], subjects: Iterable[str], level: int
) -> dict[str, set[tuple[str, str]]]:
    """Return the keys of all subjects and sessions that have a folder with an image in it."""
    keys: dict[str, set[tuple[str, str]]] = {subject: set() for subject in subjects}
    for file in files:
        path = file.path
        if is_volume(path) and not path.startswith(OTHER_PREFIXES):
            found = _FOLDERS.match(path)
            if found is not None:
                session = (found[2] or "") if level > 1 else ""
                keys.setdefault(found[1], set()).add((session, ""))
    return keys


def _subjects_of(hit: Hit) -> tuple[str, ...]:
    """Return the subjects that a file's name and folder speak of; usually one."""
    folders = _FOLDERS.match(hit.file.path) if hit.parsed.conflict else None
    named = [hit.parsed.subject, folders[1] if folders else ""]
    return tuple(dict.fromkeys(subject for subject in named if subject))


def _key(hit: Hit, level: int) -> tuple[str, str]:
    """Return session and run as far as the unit tells them apart, the run without zeros."""
    run = hit.run if level == LEVELS["run"] else ""
    return hit.parsed.session if level > 1 else "", run


def _contains(key: tuple[str, str], finer: tuple[str, str]) -> bool:
    """Tell whether a file with this key belongs to the unit with that one."""
    return all(part in {"", whole} for part, whole in zip(key, finer, strict=True))


def _add(candidate: Candidate, members: Iterable[tuple[str, Hit]]) -> None:
    """Give a unit its files; what cannot be used becomes a note."""
    for name, hit in members:
        if hit.unusable:
            candidate.notes.setdefault(name, []).append(hit)
        else:
            candidate.hits.setdefault(name, []).append(hit)


def _units_by_captures(hits: Hits) -> tuple[dict[str, Candidate], list[Skipped]]:
    """Gather hits by what the wildcards stand for, where no path names a subject."""
    units: dict[str, Candidate] = {}
    shared: list[tuple[str, Hit]] = []
    for name, several in hits.items():
        for hit in several:
            unit = "/".join(hit.captures)
            if unit:
                _add(units.setdefault(unit, Candidate(unit)), [(name, hit)])
            elif len(several) == 1:
                shared.append((name, hit))
            else:
                raise SelectionError(
                    f"{len(several)} files match {name!r}, and none names a subject (sub-…):"
                    " their units cannot be told apart. Select by a glob with a wildcard."
                )
    if not units:
        stem = shared[0][1].parsed.stem
        units[stem] = Candidate(stem)
    for candidate in units.values():
        _add(candidate, shared)
    return units, []
