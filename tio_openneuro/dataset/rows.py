"""From selected rows to TorchIO subjects: unloaded images, participants' columns, sidecars.

Touches git objects only, never image content.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torchio as tio

from tio_openneuro.bounds import CELLS, refuse_above
from tio_openneuro.content import AnnexKey, ContentUnit, TreeFile
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
    reserved_names,
)

_SHOWN = 5


class Origin(NamedTuple):
    """What a unit was selected from: a dataset, its commit, and where both are."""

    dataset_id: str
    commit: str
    folder: Path
    version: str = ""


@dataclass(frozen=True)
class SubjectRow:
    """One unit, ready to be leased and loaded.

    Attributes:
        subject: The unloaded subject; copied before it is loaded.
        content: Its annexed files, each once.
        files: All its files.
        paths: Where they lie in a plain folder.
        keys: Annex keys of its intensity images, less those of a template: one file that all
            units of the dataset have ties nobody, in no view.
        origin: Where it is from.
    """

    subject: tio.Subject
    content: ContentUnit
    files: tuple[TreeFile, ...]
    paths: tuple[Path, ...]
    keys: frozenset[AnnexKey]
    origin: Origin


def build_rows(
    catalog: Catalog, selection: Selection, engine: Engine | None, *, on_missing: str
) -> tuple[list[SubjectRow], list[Skipped]]:
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
    return [builder.row(row) for row in rows], skipped


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
        self._engine = engine
        self._origin = Origin(catalog.dataset_id, catalog.commit, catalog.folder, catalog.version)
        uses = Counter(path for row in selection.rows for path in {f.path for f in _files_of(row)})
        self._templates = {path for path, count in uses.items() if count == len(selection.rows) > 1}
        paths = [file.path for file in catalog.files]
        self._participants = Participants.read(catalog.read, paths, catalog.dataset_id)
        columns, units = len(self._participants.columns), len(selection.rows)
        where = f"participants.tsv of {catalog.dataset_id}"
        refuse_above(CELLS, columns * units, where, f"values ({columns} for each of {units} units)")
        texts = [f for f in catalog.files if f.key is None and f.size_bytes is not None]
        self._texts = {file.path: file for file in texts if file.path.endswith(".json")}
        self._sidecars = Sidecars(self._texts)
        self._events = Sidecars(paths, "_events.tsv")
        self._told: list[str] = []
        self._names = self._column_names()

    def row(self, row: SelectedUnit) -> SubjectRow:
        sources = self._sources(row)
        attributes: dict[str, Any] = {name: self._image(source) for name, source in sources.items()}
        attributes["subject_id"] = row.subject_id
        attributes["session_id"] = row.session_id
        attributes["dataset_id"] = self._catalog.dataset_id
        for column, value in self._participants.row(row.subject_id, row.session_id).items():
            if column in self._names:
                attributes[self._names[column]] = value
        content = tuple(file for source in sources.values() for file in source.content)
        files = _files_of(row)
        return SubjectRow(
            FetchedSubject(**attributes),
            ContentUnit(row.unit, tuple({file.key: file for file in content}.values())),
            files,
            tuple(self._catalog.folder / file.path for file in files),
            frozenset(
                file.key
                for source in sources.values()
                if isinstance(source.selector, Scalar)
                for file in source.files
                if file.key is not None and file.path not in self._templates
            ),
            self._origin,
        )

    def _sources(self, row: SelectedUnit) -> dict[str, ImageFiles]:
        catalog, engine = self._catalog, self._engine

        def source(selector: Scalar | Label, files: tuple[TreeFile, ...]) -> ImageFiles:
            return ImageFiles(files, catalog.folder, catalog.repo, engine, row.unit, selector)

        sources = {
            name: source(selector, row.images[name])
            for name, selector in self._images.items()
            if row.images.get(name)
        }
        # Not from a label where an image is there; a unit without any file is no row.
        by_kind = sorted(sources.values(), key=lambda source: isinstance(source.selector, Label))
        for name, selector in self._images.items():
            zeros = isinstance(selector, Label) and selector.when_missing == "zeros"
            if name not in sources and zeros:
                sources[name] = replace(source(selector, ()), grid_of=by_kind[0])
        return {name: sources[name] for name in self._images if name in sources}

    def _image(self, source: ImageFiles) -> tio.Image:
        fields: dict[str, Any] = {}
        sidecars: list[TreeFile] = []
        for file in source.files[:1]:
            sidecars = [self._texts[path] for path in self._sidecars.find(file.path)]
            events = self._events.find(file.path, "events")
            if events:
                fields["events"] = events[-1]
        kind = FetchedLabelMap if isinstance(source.selector, Label) else FetchedScalarImage
        return kind.of(source, Metadata(fields, (source.folder, sidecars, self._told)))

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
