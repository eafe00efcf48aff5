"""``DataladSubjectsDataset``: an OpenNeuro dataset as a :class:`torchio.SubjectsDataset`.

The only place where leases meet ``tio.Subject``: ``dataset[i]`` leases a unit's content for as
long as its bytes are decoded, and no longer. Constructing one clones and indexes; no image
content is fetched before an image is asked for.
"""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any, Self, SupportsIndex, cast, overload

import platformdirs
import torch
import torchio as tio

from tio_openneuro.content import AnnexKey, ContentUnit
from tio_openneuro.dataset.batches import batches
from tio_openneuro.dataset.rows import Origin, Rows, SubjectRow, Subjects, build_rows
from tio_openneuro.dataset.views import SplitViews, Transform, find_rows
from tio_openneuro.disk import DiskStatistics, Engine
from tio_openneuro.display import showing, transferring
from tio_openneuro.errors import LedgerError, SelectionError
from tio_openneuro.prepared import Preparation
from tio_openneuro.ram import available_bytes, read_budget
from tio_openneuro.recording import doing
from tio_openneuro.select import (
    Label,
    OnIncomplete,
    OnMissing,
    OnMultiple,
    Scalar,
    Unit,
    check_images,
    select,
)
from tio_openneuro.sizes import format_size
from tio_openneuro.sources import open_catalog, read_file
from tio_openneuro.torchio_seams import (
    FetchedImage,
    refuse_random,
    share_subjects,
    transform_in_place,
    transform_of,
)
from tio_openneuro.volumes import SubjectSize, VolumeFile, announce_files

_WHY = (
    "Of all datasets that are open under one root the smallest budget does. In a notebook it may "
    "be that of an older dataset, which a variable, a subject or an output keeps (Out[3].close() "
    "closes one that was shown), or which this cell replaces now."
)


class DataladSubjectsDataset(SplitViews, tio.SubjectsDataset):
    """Yield subjects whose images are fetched on demand, within a disk budget.

    Nothing is fetched by the constructor, ``len``, ``repr`` or ``dry_iter``. If the process is
    killed, what was fetched stays counted in the root's ledger and is used by the next one.

    ``subject.t1.path`` has the file's own name under the dataset's folder, and nothing needs to
    lie there: a clone has no files, and content comes and goes. ``subject.t1.data`` fetches what
    is absent; for a program that wants a file, ``subject.t1.save(...)``.

    Example:
        >>> import tio_openneuro as tno
        >>> dataset = tno.DataladSubjectsDataset(
        ...     "ds004199",
        ...     {
        ...         "flair": tno.Scalar("sub-*/anat/*_FLAIR.nii.gz"),
        ...         "lesion": tno.Label("sub-*/anat/*_FLAIR_roi.nii.gz"),
        ...     },
        ...     disk_budget="2 GB",
        ... )
        >>> dataset[0]["flair"].data.shape == dataset[0]["lesion"].data.shape  # fetched now
        True
        >>> dataset.split({"train": 0.8, "val": 0.2}, stratify="sex").keys()
        dict_keys(['train', 'val'])
        >>> dataset.close()
    """

    def __init__(
        self,
        source: str | Path,
        images: Mapping[str, Scalar | Label] | None = None,
        *,
        version: str | None = None,
        root: str | Path | None = None,
        unit: Unit = "subject",
        on_missing: OnMissing = "skip",
        on_multiple: OnMultiple = "raise",
        on_incomplete: OnIncomplete = "raise",
        disk_budget: int | str = "auto",
        preprocess: Transform | None = None,
        transform: Transform | None = None,
        jobs: int = 8,
        remotes: Sequence[str] | None = None,
        load_getitem: bool = True,
        preprocess_id: str | None = None,
    ) -> None:
        """Clone and index the source, and select each unit's images.

        Args:
            source: Accession (``"ds004199"``), git URL, or path of a clone or BIDS folder, which
                is used where it is.
            images: Name and pattern of each image; None for every NIfTI, each under its stem
                less subject and session. Label maps are then told by their names; where one tells
                nothing, in a plain folder by its first file's header. Annexed content, which comes
                and goes, is not asked: what an image is would change with what is on the disk.
            version: Tag or commit; None for the newest snapshot's tag, else the default branch.
            root: Local folder of clones and ledger; None for ``$TIO_OPENNEURO_ROOT``, else the
                user's cache folder.
            unit: What one ``tio.Subject`` is: ``"subject"``, ``"session"`` or ``"run"``.
            on_missing: ``"skip"`` or ``"raise"``: a unit that lacks a required image.
            on_multiple: ``"raise"``, ``"first"``, ``"all"`` (one unit for each combination) or
                ``"stack"`` (hits as channels): a pattern with several hits in a unit.
            on_incomplete: ``"raise"`` or ``"allow"``: units that differ in their images.
            disk_budget: Bytes, ``"10 GB"``, or ``"auto"``. The smallest one that is open under
                the root holds for all, in every process; one stated larger warns and names it.
            preprocess: Deterministic transform, applied before ``transform``; another one may be
                assigned later to ``dataset.preprocess``, without an id.
            transform: Random transform, applied each time.
            jobs: Fetches in flight.
            remotes: Names of further annex remotes to trust; None for OpenNeuro's public ones.
            load_getitem: Load the images in ``dataset[i]``; else when they are asked for.
            preprocess_id: Your name for what ``preprocess`` does, changed whenever its code is;
                without it no result of a function or of a class of yours is kept.

        Raises:
            NotAnAnnexError: The source is neither an annex dataset nor a BIDS folder.
            RemoteUnavailableError: The source cannot be reached.
            SelectionError: ``images`` is no mapping of names to patterns, or selects nothing, or
                what cannot be batched.
            DiskBudgetError: The disk budget cannot hold the largest unit.
            SelectionError: ``preprocess`` is random.
        """
        check_images(images)
        if preprocess is not None:
            refuse_random(preprocess)
        self._root = Path(root or _default_root()).expanduser().absolute()
        with showing(f"Opening {source}", steps=3) as on_step:
            catalog = open_catalog(
                source,
                self._root,
                version=version,
                remotes=tuple(remotes) if remotes else None,
                on_step=on_step,
            )
            on_step("selecting")
            selection = select(
                catalog.files,
                images,
                unit=unit,
                on_missing=on_missing,
                on_multiple=on_multiple,
                on_incomplete=on_incomplete,
                # What is annexed comes and goes, and an image must not change its kind with that.
                says_label=lambda file: (
                    catalog.repo is None and VolumeFile(catalog.folder / file.path).says_label
                ),
            )
        self._engine = (
            Engine(self._root, disk_budget=disk_budget, jobs=jobs) if catalog.repo else None
        )
        self.dataset_id = catalog.dataset_id
        self.version = catalog.commit
        self._preparation: Preparation | None = None
        try:
            self._rows, self.skipped = build_rows(
                catalog, selection, self._engine, on_missing=on_missing
            )
            # As many as were concatenated, each with small files of its own.
            self.parts: tuple[Origin, ...] = (self._rows[0].origin,)
            self._prepare(preprocess, preprocess_id)
            super().__init__([self._rows[0].subject], transform, load_getitem=load_getitem)
            share_subjects(self, Subjects(self._rows))
            if self._engine is not None:
                self._engine.require(max(self._contents(), key=lambda unit: unit.size_bytes))
                budget_bytes, stated = self._engine.binding()
                if stated and disk_budget != "auto":
                    smaller = f"{format_size(budget_bytes)}{stated}"
                    warnings.warn(f"A smaller disk budget holds: {smaller}. {_WHY}", stacklevel=2)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        """Show what is selected, and the disk budget that binds, without touching content."""
        budget = ""
        if self._engine is not None:
            budget_bytes, stated = self._engine.binding()
            budget = f"; disk budget {format_size(budget_bytes)}{stated}"
        taken = {n: source.selector for row in self._rows for n, source in row.sources.items()}
        commits = "+".join(origin.commit[:8] or "no commit" for origin in self.parts)
        names = ", ".join(n + " (label)" * isinstance(s, Label) for n, s in taken.items())
        return (
            f"{type(self).__name__}({self.dataset_id!r} at {commits}: "
            f"{len(self)} subjects; images: {names}; {format_size(self.nbytes)}{budget})"
        )

    # -- subjects ----------------------------------------------------------------------------

    @overload
    def __getitem__(self, index: SupportsIndex) -> tio.Subject: ...

    @overload
    def __getitem__(self, index: str) -> tio.Subject | Self: ...

    @overload
    def __getitem__(self, index: slice | Sequence[int] | list[str]) -> Self: ...

    def __getitem__(self, index: Any) -> Any:  # type: ignore[override,unused-ignore]
        """Fetch, load, preprocess and transform one subject; or return a view of several.

        Args:
            index: An integer of any kind, or a name (``"sub-01"``, ``"sub-01 ses-2"``); or, for a
                view that shares this dataset's engine and budget, a slice, a boolean mask, a name
                that several bear, or a list, array or tensor of integers or names.

        Raises:
            IndexError: There is no such subject.
            KeyError: None bears that name; the message tells the nearest ones.
            ValueError: It is no index, such as 1.0 or True.
            DiskBudgetError: The disk budget cannot hold the unit.
            FetchError: The remote does not give its files.
        """
        found = find_rows(index, self._rows)
        if isinstance(found, list):
            return self._view(found)
        row = self._named(found)[0]
        subject = None
        if self._preparation is not None:
            subject = self._preparation.load(row.subject, row.content)
        if subject is None:
            subject = self._make(row)
        return transform_in_place(transform_of(self), subject)

    def _make(self, row: SubjectRow) -> tio.Subject:
        """Return a subject from its files, preprocessed."""
        subject = row.subject
        began_s = time.monotonic()
        if self.load_getitem or self._preparation is not None:
            self._load(subject, row)
        if self._preparation is None:
            return subject
        load_s = time.monotonic() - began_s
        prepared = self._preparation.prepare(row.subject, subject, row.content, load_s=load_s)
        del subject
        return self._make(row) if prepared is None else prepared

    @contextmanager
    def opened(self, index: int) -> Iterator[tio.Subject | None]:
        """Hold a prepared volume open for patches; None where it, or a transform, says no.

        Args:
            index: Number of the subject, whose images are read box by box, as they are asked for.
        """
        preparation = self._own_preparation()
        if preparation is None or transform_of(self) is not None:
            yield None
            return
        row = self._named(index)[0]
        with preparation.opened(row.subject, row.content) as subject:
            yield subject

    def prepared_size(self, index: int) -> SubjectSize | None:
        """Return the size of a subject whose prepared volume is there; else None."""
        preparation = self._own_preparation()
        return None if preparation is None else preparation.size(self._rows[index].content)

    def _own_preparation(self) -> Preparation | None:
        """Return what may stand for ``dataset[i]``, which a subclass may have changed."""
        ours = type(self).__getitem__ is DataladSubjectsDataset.__getitem__
        return self._preparation if ours else None

    def __iter__(self) -> Iterator[tio.Subject]:
        """Yield every subject in order, fetching ahead; end where this is closed meanwhile."""
        with self.fetching_ahead(range(len(self))):
            for index in range(len(self)):
                yield self[index]

    def _load(self, subject: tio.Subject, row: SubjectRow) -> None:
        """Load a subject's images while its content is leased."""
        lease: AbstractContextManager[Mapping[AnnexKey, Path]] = nullcontext({})
        if self._engine is not None and row.content.files:
            lease = self._engine.lease(row.content)
        with doing("content"), lease as leased, doing("decode"):
            files = {key: VolumeFile(path) for key, path in leased.items()}
            announce_files(files.values() or map(VolumeFile, filter(Path.exists, row.paths)))
            for image in cast("list[FetchedImage]", subject.get_images(intensity_only=False)):
                image.load_leased(files)

    @property
    def preprocess(self) -> Transform | None:
        """The deterministic transform; one that is assigned holds from then on, for this view."""
        return None if self._preparation is None else self._preparation.transform

    @preprocess.setter
    def preprocess(self, preprocess: Transform | None) -> None:
        self._prepare(preprocess, None)

    def _prepare(self, preprocess: Transform | None, preprocess_id: str | None) -> None:
        """Let a transform be the preprocess, and give each unit the name of its prepared volume."""
        self._preparation = None
        if preprocess is not None:
            self._preparation = Preparation(preprocess, self._engine, preprocess_id)
        self._named(*range(len(self._rows)))

    def _named(self, *indices: int) -> list[SubjectRow]:
        """Return rows under the names that their prepared volumes have now.

        The transform, or a subject, may have been changed since it was named.
        """
        rows, made = [self._rows[index] for index in indices], self._preparation
        units = ((row.subject, row.content) for row in rows)
        names = repeat(None) if made is None else made.names(units)
        for index, row, prepared in zip(indices, rows, names, strict=False):
            if prepared != row.content.prepared:
                content = replace(row.content, prepared=prepared)
                self._rows[index] = replace(row, content=content)
        return [self._rows[index] for index in indices]

    def _view(self, indices: Sequence[int]) -> Self:
        return self._with_rows([self._rows[index] for index in indices])

    def _with_rows(self, rows: list[SubjectRow]) -> Self:
        """Return a copy that has other rows, and shares the engine."""
        view = copy.copy(self)
        view._rows = Rows(rows)  # noqa: SLF001 - itself
        share_subjects(view, Subjects(view._rows))  # noqa: SLF001 - itself
        return view

    def _contents(self) -> list[ContentUnit]:
        return [row.content for row in self._rows]

    def sample(self, seed: int) -> tio.Subject:
        """Return one subject, drawn uniformly by that seed.

        Raises:
            SelectionError: There is none.
        """
        if not self._rows:
            raise SelectionError(f"Cannot draw a subject of {self.dataset_id}: this view has none.")
        generator = torch.Generator().manual_seed(seed)
        return self[int(torch.randint(len(self), (1,), generator=generator))]

    def batches(
        self,
        count: int | None = None,
        ram_budget: int | str = "auto",
        shuffle: bool = False,  # noqa: FBT001, FBT002 - the contract's signature
        seed: int = 0,
    ) -> Iterator[list[tio.Subject]]:
        """Yield lists of loaded whole subjects, the next list being fetched while one is used.

        Args:
            count: Subjects in each list, the last one shorter; None for as many as fit.
            ram_budget: Bytes, text like ``"4 GB"``, or ``"auto"``: half of what is available.
                Holds two lists, since the caller still has one while the next is loaded.
            shuffle: Whether to permute the subjects.
            seed: Decides the permutation.

        Raises:
            RamBudgetError: A subject alone exceeds half of the budget.
        """
        budget_bytes = read_budget(ram_budget, available_bytes())
        return batches(self, count, budget_bytes, shuffle=shuffle, seed=seed)

    def read(self, path: str) -> bytes:
        """Return a small file that git itself holds, such as ``image["metadata"]["events"]``.

        Args:
            path: Posix, from the dataset's root.

        Raises:
            SelectionError: There is no such file at this version, or it is annexed; or several
                parts of a :func:`concat` have one.
        """
        found = []
        for part in self.parts:
            with suppress(SelectionError) if self.parts[1:] else nullcontext():
                found.append(read_file(part.folder, part.commit, path))
        if len(found) != 1:
            raise SelectionError(
                f"Cannot read {path!r} of {self.dataset_id}: these are {len(self.parts)} "
                f"datasets, of which {len(found) or 'none'} have such a file. Call read() of the "
                f"one that you mean, as it was given to tno.concat."
            )
        return found[0]

    # -- content -----------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of content selected, each annex key counted once."""
        files = [pair for row in self._rows for pair in zip(row.files, row.paths, strict=True)]
        return sum({file.key or path: file.size_bytes or 0 for file, path in files}.values())

    def fetch(self, *, progress: bool | Callable[[int, int], None] = False) -> int:
        """Fetch what of this view the budget holds; return the bytes that came.

        Args:
            progress: Whether to show bytes, rate and time left, and at the end why it stopped: all
                is there, or the disk budget is full. Or what is called instead, with the bytes
                that are there and those of all.

        Raises:
            FetchError: Content did not arrive; the first error, after the other fetches ended.
        """
        if self._engine is None:
            return 0
        told = nullcontext(progress if callable(progress) else None)
        with transferring(self.dataset_id) if progress is True else told as tell:
            return self._engine.fetch(self._contents(), on_progress=tell)

    def evict(self) -> int:
        """Drop what this library fetched for this view and nobody leases; return the bytes."""
        return self._engine.evict(self._contents()) if self._engine else 0

    def adopt(self) -> int:
        """Hand content that was there before to the budget; return the bytes.

        Only content that a remote can give back is adopted.
        """
        return self._engine.adopt(self._contents()) if self._engine else 0

    def prefetch_indices(self, indices: Sequence[int], *, likely_later: Sequence[int] = ()) -> None:
        """Fetch these units ahead, in that order, in the background; return at once.

        Args:
            indices: The next uses, in order.
            likely_later: Units that come after them in an order that is not known yet, the
                likeliest first: they stay before all that nobody needs.
        """
        if self._engine is not None:
            units = [self._rows[index].content for index in indices]
            later = [self._rows[index].content for index in likely_later]
            self._engine.prefetch(units, again=later)

    @contextmanager
    def fetching_ahead(self, indices: Sequence[int]) -> Iterator[None]:
        """Fetch these units ahead while the block runs, which ends where this is closed."""
        self.prefetch_indices(indices)
        try:
            yield
        except LedgerError:
            if self._engine is None or not self._engine.closed:
                raise
        finally:
            self.prefetch_indices(())

    def release_index(self, index: int, *, drop: bool) -> None:
        """Let a unit's content go: at once, or when its room is needed."""
        if self._engine is not None:
            self._engine.release(self._rows[index].content, drop=drop)

    def statistics(self) -> DiskStatistics:
        """Return what was fetched and evicted by this process, and what the root holds."""
        return self._engine.statistics() if self._engine else DiskStatistics.empty()

    def check(self) -> list[str]:
        """Compare ledger and disk; return the inconsistencies, none when sound."""
        return self._engine.check() if self._engine is not None else []

    def close(self) -> None:
        """End background fetches, child processes and leases of this dataset and its views."""
        if self._engine is not None:
            self._engine.close()

    def __enter__(self) -> Self:
        """Return the dataset, which the block's end closes."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the dataset."""
        self.close()


def _default_root() -> str:
    return os.environ.get("TIO_OPENNEURO_ROOT") or platformdirs.user_cache_dir("tio_openneuro")
