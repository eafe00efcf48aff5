"""Prepared volumes: a subject's deterministic preprocessing, done once and read back.

Owns what meets TorchIO: which subject a prepared volume stands for, and how one is taken apart
and put together again, bit for bit. Room for it is the engine's, its file is
:mod:`~tio_openneuro.prepared.file`'s. Never holds a lease beyond a call or a block.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torchio as tio

from tio_openneuro.content import ContentFile, ContentUnit
from tio_openneuro.disk import Engine, PreparedRepo
from tio_openneuro.errors import SelectionError
from tio_openneuro.prepared.file import (
    FORMAT,
    DamagedVolumeError,
    PreparedFile,
    SoundChunks,
    encode,
    opened,
)
from tio_openneuro.prepared.notes import describe, read_note, rebuild, write_note
from tio_openneuro.torchio_seams import (
    FetchedImage,
    ImageFiles,
    UnpinnedError,
    drawing_from,
    identify_items,
    pin,
    refuse_random,
    transform_in_place,
    walk_parts,
)
from tio_openneuro.volumes import SubjectSize, sum_sizes

_LOGGER = logging.getLogger(__name__)
_LAYOUT = 2
_LIBRARIES = ("torchio", "torch", "numpy", "scipy", "nibabel", "SimpleITK")


class Preparation:
    """Does one ``preprocess``, and keeps its results where that is possible."""

    def __init__(
        self,
        preprocess: Callable[[tio.Subject], tio.Subject],
        engine: Engine | None,
        preprocess_id: str | None,
    ) -> None:
        """Refuse what is random; find out whether results can be kept.

        Args:
            preprocess: Deterministic transform.
            engine: Has the room; None for a plain folder, where nothing is kept.
            preprocess_id: The user's word for what ``preprocess`` does.

        Raises:
            SelectionError: ``preprocess`` is random.
        """
        refuse_random(preprocess)
        self._preprocess = preprocess
        self._engine = engine
        self._repo: PreparedRepo | None = None
        self._name = ""
        self._sound: dict[str, tuple[tuple[int, ...], SoundChunks]] = {}
        self._damaged: set[ContentFile | None] = set()
        # What the first result consists of, until it was made again.
        self._told: dict[str, dict[str, list[str]]] = {}
        self._repeats = False
        if engine is None:
            return
        try:
            versions = [version(library) for library in _LIBRARIES]
            self._name = repr((_LAYOUT, FORMAT, versions, pin(preprocess, preprocess_id)))
        except UnpinnedError as error:
            _LOGGER.info(
                "Results of preprocess are not kept: %s cannot be told from another of its name. "
                "Give preprocess_id, and change it whenever the code changes.",
                error,
            )
            return
        self._repo = PreparedRepo(engine.root)

    def unit(self, subject: tio.Subject, content: ContentUnit) -> ContentUnit:
        """Return a unit's content with the name of its prepared volume, where it has one.

        Args:
            subject: Unloaded.
            content: Its files.
        """
        if self._repo is None or not content.files:
            return content
        images = [
            (name, type(image).__name__, _origin(getattr(image, "source", None)))
            for name, image in subject.get_images_dict(intensity_only=False).items()
        ]
        text = repr((self._name, images))
        digest = hashlib.blake2b(text.encode(), digest_size=20).hexdigest()
        return replace(content, prepared=self._repo.file(digest))

    # -- reading -----------------------------------------------------------------------------

    def load(self, template: tio.Subject, content: ContentUnit) -> tio.Subject | None:
        """Return the prepared subject, loaded, or None where it was not kept."""
        try:
            with self.opened(template, content) as subject:
                if subject is None:
                    return None
                for image in subject.get_images(intensity_only=False):
                    image.load()
                return subject
        except DamagedVolumeError:
            return None

    @contextmanager
    def opened(self, template: tio.Subject, content: ContentUnit) -> Iterator[tio.Subject | None]:
        """Hold the prepared subject open while the block runs; None where it was not kept.

        Its images are not loaded: each reads the boxes that it is asked for, or itself whole.

        Args:
            template: The unprepared subject, unloaded.
            content: As :meth:`unit` returned it.

        Raises:
            DamagedVolumeError: The file is damaged. It was dropped, and is not opened again.
        """
        if self._engine is None or content.prepared in {None, *self._damaged}:
            yield None
            return
        try:
            with self._engine.lease_prepared(content) as path:
                if path is None:
                    yield None
                    return
                with opened(path, self._sound_of(path)) as file:
                    subject = self._assemble(template, file)
                    del file
                    try:
                        yield subject
                    finally:
                        _take_back(subject)
                        del subject
        except DamagedVolumeError:
            _LOGGER.warning("The prepared volume of %s is damaged: made again.", content.name)
            self._damaged.add(content.prepared)
            self._engine.drop_prepared(content, f"of {content.name}, damaged")
            raise

    def _sound_of(self, path: Path) -> SoundChunks:
        """Return which chunks of a file this process has found sound since it was written.

        Checked once, as git-annex checks what it fetches: to check at each use took 0.7 of the
        2.4 ms of a 64³ patch of image and label (2026-11-21).
        """
        found = path.stat()
        written = (found.st_ino, found.st_size, found.st_mtime_ns)
        known = self._sound.get(path.name)
        if known is None or known[0] != written:
            known = self._sound[path.name] = (written, {})
        return known[1]

    def _assemble(self, template: tio.Subject, file: PreparedFile) -> tio.Subject:
        note = read_note(file.note, walk_parts(self._preprocess))
        subject = copy.deepcopy(template)
        bases = dict(subject.get_images_dict(intensity_only=False))
        for name in note.items.removed:
            delattr(subject, name)
        note.items.apply(subject)
        for name, image_note in note.images.items():
            subject[name] = rebuild(image_note, bases.get(image_note.base), file.array(name))
        subject.applied_transforms = note.applied_transforms
        subject.update_attributes()
        return subject

    def size(self, content: ContentUnit) -> SubjectSize | None:
        """Return the size of a prepared subject from its file's header; None if it is not there."""
        if content.prepared is None:
            return None
        path = content.prepared.repo.locate(content.prepared.key)
        if path is None:
            return None
        try:
            with opened(path) as file:
                shapes = list(file.shapes().values())
        except (DamagedVolumeError, FileNotFoundError):
            return None
        return sum_sizes([(shape[0], int(np.prod(shape[1:])), size) for shape, size in shapes])

    # -- making ------------------------------------------------------------------------------

    def prepare(
        self, template: tio.Subject, subject: tio.Subject, content: ContentUnit, *, load_s: float
    ) -> tio.Subject | None:
        """Preprocess a loaded subject, and keep the result where there is room.

        The first one is made twice from two seeds, to find what is random in disguise; its first
        result is gone before it is loaded again.

        Draws of the caller's thread are left alone, so that what follows is the same whether or
        not the result was there; so are torch's threads, on whose number results depend.

        Args:
            template: The unprepared subject, unloaded.
            subject: It, loaded; may be changed.
            content: As :meth:`unit` returned it; not leased by this thread.
            load_s: Seconds that loading took.

        Returns:
            None where it has to be made again, from a subject that is loaded anew.

        Raises:
            SelectionError: It came out otherwise the second time.
        """
        began_s = time.monotonic()
        told = self._told.pop(content.name, None)
        again = not self._repeats and told is None
        with drawing_from(int(again)), _one_thread():
            prepared = transform_in_place(self._preprocess, subject)
        if told is not None or again:
            found = identify_items([prepared])
            if again:
                self._told[content.name] = found
                return None
            self._require_same(content.name, told or {}, found)
        for image in prepared.get_images(intensity_only=False):
            # As it will be read back: results of what follows depend on the layout, too.
            image.set_data(image.data.contiguous())
        if self._engine is not None and content.prepared is not None:
            seconds = load_s + time.monotonic() - began_s
            data = self._pack(template, prepared, content.name)
            if data is not None:
                self._engine.keep_prepared(content, data, seconds)
                self._damaged.discard(content.prepared)
        return prepared

    def _require_same(
        self, name: str, told: dict[str, list[str]], found: dict[str, list[str]]
    ) -> None:
        differing = [item for item in told | found if told.get(item) != found.get(item)]
        if differing:
            raise SelectionError(
                f"Cannot use {type(self._preprocess).__name__} as preprocess: {name} came out "
                f"otherwise the second time, in {', '.join(differing)}, and preprocess is done "
                f"once for all epochs. It draws at random, reads the clock, or keeps something "
                f"from one call to the next. Give what is random as transform, which is done each "
                f"time."
            )
        self._repeats = True

    def _pack(self, before: tio.Subject, after: tio.Subject, name: str) -> bytes | None:
        """Return the file of a prepared subject; None where it cannot be told in one."""
        try:
            images = after.get_images_dict(intensity_only=False)
            note = describe(before, after, images)
            arrays = {key: image.data.numpy() for key, image in images.items()}
            return encode(arrays, write_note(note, walk_parts(self._preprocess)))
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            _LOGGER.info("The prepared volume of %s is not kept: %s.", name, error)
            return None


def _take_back(subject: tio.Subject) -> None:
    """Let go of the file, whose bytes are free once nobody maps it."""
    for image in subject.get_images(intensity_only=False):
        if isinstance(image, FetchedImage):
            image.take_back()


def _origin(source: ImageFiles | None) -> object:
    """Return what an image is read from, and how, in words that last."""
    if source is None:
        return None
    selector = source.selector
    how = [getattr(selector, name, None) for name in ("volumes", "combine", "when_missing")]
    files = [file.key.name if file.key is not None else file.blob for file in source.files]
    return type(selector).__name__, repr(how), files, _origin(source.grid_of)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute on this thread alone: sums depend on the number of threads."""
    before = torch.get_num_threads()
    if before != 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before != 1:
            torch.set_num_threads(before)
