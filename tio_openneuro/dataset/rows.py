"""From selected rows to TorchIO subjects: unloaded images, participants' columns, sidecars.

Touches git objects only, never image content.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import compress
from pathlib import Path
from typing import Any

import torchio as tio

from tio_openneuro.bounds import CELLS, refuse_above
from tio_openneuro.content import AnnexKey, ContentFile, ContentRepo, ContentUnit, TreeFile
from tio_openneuro.disk import Engine
from tio_openneuro.errors import SelectionError
from tio_openneuro.select import (
    Label,
    Participants,
    Scalar,
    SelectedUnit,
    Selection,
    Sidecars,
    Skipped,
    unique_headers,
)
from tio_openneuro.sources import Catalog
from tio_openneuro.torchio_seams import (
    FetchedLabelMap,
    FetchedScalarImage,
    FetchedSubject,
    ImageFiles,
    Metadata,
    ReadSidecars,
    reserved_names,
)

_SHOWN = 5


@dataclass(frozen=True)
class Origin:
    """What the rows of one dataset share.

    Attributes:
        dataset_id: Of the dataset.
        commit: Of what was selected from; empty in a plain folder.
        version: The tag or branch that led to it.
        folder: The clone, or the plain BIDS folder.
        repo: Gives the annexed content; None in a plain folder.
        engine: Leases it; None in a plain folder.
        images: The selector of each image, in order.
        columns: Attribute of each column of participants.tsv.
        templates: Paths of files that all its units have, which tie nobody, in no view.
        sidecars: What was read of the sidecars, and what was told.
    """

    dataset_id: str
    commit: str
    version: str
    folder: Path
    repo: ContentRepo | None
    engine: Engine | None
    images: Mapping[str, Scalar | Label]
    columns: tuple[str, ...]
    templates: frozenset[str]
    sidecars: ReadSidecars = field(default_factory=ReadSidecars)


@dataclass(frozen=True, slots=True)
class SubjectRow:
    """One unit, ready to be leased and loaded.

    Attributes:
        content: Its annexed files, each once.
        origin: What it shares with others.
        subject_id: With its prefix.
        session_id: Likewise; or empty.
        images: Files of each image of the origin, none where it lacks.
        sidecars: Of each image that has files: those of the image, and the path of its events.
        values: Of each column of the origin.
    """

    content: ContentUnit
    origin: Origin
    subject_id: str
    session_id: str
    images: tuple[tuple[TreeFile, ...], ...]
    sidecars: tuple[tuple[tuple[TreeFile, ...], str], ...]
    values: tuple[Any, ...]

    @property
    def subject(self) -> tio.Subject:
        """The unloaded subject, a new one each time."""
        sidecars = dict(zip(compress(self.origin.images, self.images), self.sidecars, strict=True))
        images: dict[str, Any] = {}
        for name, source in self.sources.items():
            files, events = sidecars.get(name, ((), ""))
            known = {"events": events} if events else {}
            kind = FetchedLabelMap if isinstance(source.selector, Label) else FetchedScalarImage
            metadata = Metadata(known, (source.folder, files, self.origin.sidecars))
            images[name] = kind.of(source, metadata)
        return FetchedSubject(**images, **self.attributes)

    @property
    def attributes(self) -> dict[str, Any]:
        """What the subject holds beside its images."""
        return {
            "subject_id": self.subject_id,
            "session_id": self.session_id,
            "dataset_id": self.origin.dataset_id,
            **dict(zip(self.origin.columns, self.values, strict=True)),
        }

    @property
    def sources(self) -> dict[str, ImageFiles]:
        """Where each image comes from, those included that are made of zeros."""
        origin, found = self.origin, {}
        for (name, selector), files in zip(origin.images.items(), self.images, strict=True):
            place = (origin.folder, origin.repo, origin.engine, self.content.name)
            found[name] = ImageFiles(files, *place, selector)
        # Not from a label where an image is there; a unit without any file is no row.
        full = [each for each in found.values() if each.files]
        grid = min(full, key=lambda each: isinstance(each.selector, Label), default=None)
        for name, each in found.items():
            if not each.files and getattr(each.selector, "when_missing", None) == "zeros":
                found[name] = replace(each, grid_of=grid)
        return {name: each for name, each in found.items() if each.files or each.grid_of}

    @property
    def files(self) -> tuple[TreeFile, ...]:
        """All its files."""
        return tuple(file for files in self.images for file in files)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Where its files lie in a plain folder."""
        return tuple(self.origin.folder / file.path for file in self.files)

    @property
    def keys(self) -> frozenset[AnnexKey]:
        """Annex keys of its intensity images, less those of templates."""
        pairs = zip(self.origin.images.values(), self.images, strict=True)
        scalars = (files for selector, files in pairs if isinstance(selector, Scalar))
        own = (file for files in scalars for file in files)
        templates = self.origin.templates
        return frozenset(f.key for f in own if f.key is not None and f.path not in templates)


_KINDS = {k.__name__: k for k in (SubjectRow, ContentUnit, ContentFile, TreeFile, AnnexKey)}


class Rows(list[SubjectRow]):
    """The rows of a dataset, which a pickle holds as compressed text."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Be pickled as text, beside the engines and clones, which are the dataset's too."""
        shared: dict[int, object] = {}

        def plain(value: Any) -> dict[str, list[Any]]:  # noqa: ANN401 - what rows hold
            name = type(value).__name__
            if name in _KINDS:
                return {name: [getattr(value, each.name) for each in fields(value)]}
            shared[id(value)] = value
            return {"": [id(value)]}

        return _unpack, (zlib.compress(json.dumps(list(self), default=plain).encode(), 1), shared)


def _unpack(packed: bytes, shared: dict[int, object]) -> Rows:
    # Rows have keys, files and names in common, with one another and with their content.
    kinds = {
        "": shared.__getitem__,
        **_KINDS,
        **{k.__name__: cache(k) for k in (AnnexKey, TreeFile)},
    }
    texts: dict[str, str] = {}

    def frozen(value: Any) -> Any:  # noqa: ANN401 - as above
        if isinstance(value, str):
            return texts.setdefault(value, value)
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    def made(found: dict[str, list[Any]]) -> Any:  # noqa: ANN401 - as above
        return next(kinds[name](*map(frozen, values)) for name, values in found.items())

    return Rows(json.loads(zlib.decompress(packed), object_hook=made))


class Subjects(Sequence[tio.Subject]):
    """Unloaded subjects, each built when it is asked for; what is changed in one is lost.

    Attributes:
        digests: What was found out of all of them, which does not change.
    """

    def __init__(self, rows: Rows) -> None:
        """Build none.

        Args:
            rows: Of which each is one subject.
        """
        self._rows = rows
        self.digests: dict[str, str] = {}

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - as a list's
        """Build one, or a list of several."""
        found = self._rows[index]
        return [row.subject for row in found] if isinstance(found, list) else found.subject


def build_rows(
    catalog: Catalog, selection: Selection, engine: Engine | None, *, on_missing: str
) -> tuple[Rows, list[Skipped]]:
    """Return a row for each unit that can be had, and what was skipped with its reason.

    Raises:
        SelectionError: A required image cannot be fetched, and ``on_missing`` is ``"raise"``; or
            no unit is left, with the reasons.
    """
    rows, unavailable = _available(catalog, selection)
    if unavailable and on_missing == "raise":
        first = unavailable[0]
        raise SelectionError(
            f"Cannot use {len(unavailable)} units of {catalog.dataset_id}, the first {first.unit}: "
            f"{first.reason}. Give on_missing='skip' to leave them out."
        )
    skipped = [*selection.skipped, *unavailable]
    if not rows:
        reasons = "; ".join(f"{skip.unit}: {skip.reason}" for skip in skipped[:_SHOWN])
        more = f" and {len(skipped) - _SHOWN} more" if len(skipped) > _SHOWN else ""
        raise SelectionError(
            f"Cannot use {catalog.dataset_id}: none of its {len(skipped)} units has every required "
            f"image ({reasons}{more}). Check the patterns, or give required=False where an image "
            f"may lack."
        )
    builder = _Builder(catalog, selection, engine)
    return Rows(map(builder.row, rows)), skipped


def _available(catalog: Catalog, selection: Selection) -> tuple[list[SelectedUnit], list[Skipped]]:
    """Part the rows that can be fetched, or are present, from those that never can."""
    if catalog.repo is None:
        return list(selection.rows), []
    files = [file for row in selection.rows for file in _files_of(row)]
    keys = sorted({file.key for file in files if file.key is not None}, key=str)
    reasons: dict[AnnexKey | None, str] = {
        key: reason
        for key, reason in catalog.repo.unavailable(keys).items()
        if catalog.repo.locate(key) is None
    }
    kept, skipped = [], []
    for row in selection.rows:
        lost = next((file for file in _files_of(row) if file.key in reasons), None)
        if lost is None:
            kept.append(row)
        else:
            reason = f"{lost.path} cannot be fetched: {reasons[lost.key]}"
            skipped.append(Skipped(row.unit, reason))
    return kept, skipped


def _files_of(row: SelectedUnit) -> tuple[TreeFile, ...]:
    return tuple(file for files in row.images.values() for file in files)


class _Builder:
    """Turn rows into subjects; reads the tables, and leaves sidecars until they are asked for."""

    def __init__(self, catalog: Catalog, selection: Selection, engine: Engine | None) -> None:
        self._catalog = catalog
        self._images = selection.images
        uses = Counter(path for row in selection.rows for path in {f.path for f in _files_of(row)})
        paths = [file.path for file in catalog.files]
        self._participants = Participants.read(catalog.read, paths, catalog.dataset_id)
        columns, units = len(self._participants.columns), len(selection.rows)
        where = f"participants.tsv of {catalog.dataset_id}"
        refuse_above(CELLS, columns * units, where, f"values ({columns} for each of {units} units)")
        texts = [f for f in catalog.files if f.key is None and f.size_bytes is not None]
        self._texts = {file.path: file for file in texts if file.path.endswith(".json")}
        self._sidecars = Sidecars(self._texts)
        self._events = Sidecars(paths, "_events.tsv")
        names = self._column_names()
        self._columns = tuple(names)
        self._origin = Origin(
            catalog.dataset_id,
            catalog.commit,
            catalog.version,
            catalog.folder,
            catalog.repo,
            engine,
            dict(selection.images),
            tuple(names.values()),
            frozenset(path for path, count in uses.items() if count == len(selection.rows) > 1),
        )

    def row(self, row: SelectedUnit) -> SubjectRow:
        images = tuple(row.images.get(name, ()) for name in self._origin.images)
        values = self._participants.row(row.subject_id, row.session_id)
        made = SubjectRow(
            ContentUnit(row.unit, ()),
            self._origin,
            row.subject_id,
            row.session_id,
            images,
            tuple(self._sidecars_of(files[0].path) for files in images if files),
            tuple(values[column] for column in self._columns),
        )
        files = {file.key: file for source in made.sources.values() for file in source.content}
        return replace(made, content=ContentUnit(row.unit, tuple(files.values())))

    def _sidecars_of(self, path: str) -> tuple[tuple[TreeFile, ...], str]:
        events = self._events.find(path, "events")
        texts = tuple(self._texts[found] for found in self._sidecars.find(path))
        return texts, events[-1] if events else ""

    def _column_names(self) -> dict[str, str]:
        """Return the attribute of each column: its own name, unless a subject has that already."""
        table = self._participants
        taken = {*self._images, "subject_id", "session_id", "dataset_id", *reserved_names()}
        names = {column: column for column in table.columns if column not in taken}
        others = [column for column in table.columns if column in taken]
        found = unique_headers([f"participant_{column}" for column in others], {*taken, *names})
        renamed = dict(zip(others, found, strict=True))
        if renamed:
            each = "; ".join(f"{c!r} of {table.files[c]} becomes {n!r}" for c, n in renamed.items())
            warnings.warn(
                f"{self._catalog.dataset_id} has columns that a subject's images or attributes, "
                f"TorchIO or the queue already use: {each}.",
                stacklevel=6,
            )
        return names | renamed
