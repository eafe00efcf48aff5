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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torchio as tio
from torchio.constants import AFFINE, DATA, PATH, STEM

from tio_openneuro.content import ContentFile, ContentUnit
from tio_openneuro.disk import Engine, PreparedRepo
from tio_openneuro.errors import SelectionError
from tio_openneuro.prepared.file import (
    DAMAGED,
    FORMAT,
    DamagedVolumeError,
    PreparedFile,
    SoundChunks,
    encode,
    opened,
)
from tio_openneuro.prepared.notes import PLAIN, describe, read_note, rebuild, write_note
from tio_openneuro.torchio_seams import (
    FetchedImage,
    ImageFiles,
    Metadata,
    UnpinnedError,
    drawing_from,
    identify_items,
    is_loaded,
    pin,
    refuse_random,
    transform_in_place,
    walk_parts,
)
from tio_openneuro.volumes import SubjectSize, sum_sizes

_LOGGER = logging.getLogger(__name__)
_LAYOUT = 3
_OURS = ("tio-openneuro", "isal", "torchio", "torch", "numpy")
_LIBRARIES = (*_OURS, "scipy", "scikit-learn", "nibabel", "SimpleITK")


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
        self.transform = preprocess
        self._engine = engine
        self._id = preprocess_id
        self._versions = [version(library) for library in _LIBRARIES]
        self._repo: PreparedRepo | None = None
        self._sound: dict[str, tuple[tuple[int, ...], SoundChunks | None]] = {}
        # What the first result consists of, until it was made again.
        self._told: dict[str, dict[str, list[str]]] = {}
        self._repeats = False
        if engine is None:
            return
        try:
            self._pin()
        except UnpinnedError as error:
            _LOGGER.info(
                "Results of preprocess are not kept: %s cannot be told from another of its name. "
                "Give preprocess_id, and change it whenever the code changes.",
                error,
            )
            return
        self._repo = PreparedRepo(engine.root)

    def _pin(self) -> str:
        """Return a digest of the transform as it is now, and of what computes with it."""
        return repr((_LAYOUT, FORMAT, self._versions, pin(self.transform, self._id)))

    def names(
        self, units: Iterable[tuple[tio.Subject, ContentUnit]]
    ) -> Iterator[ContentFile | None]:
        """Yield the name of each unit's prepared volume, or None where it cannot have one.

        It holds all that the result may depend on: the transform as it is now, and what it may
        read of the subject. TorchIO's own transforms read images alone, so that of the rest its
        keys count, in whose order it comes back.

        Args:
            units: Subjects, unloaded, and their files.
        """
        pinned = None
        for subject, content in units:
            name = None
            if self._repo is not None and content.files:
                with suppress(UnpinnedError):
                    pinned = pinned or self._pin()
                    name = self._name(subject, pinned, self._repo)
            yield name

    def _name(self, subject: tio.Subject, pinned: str, repo: PreparedRepo) -> ContentFile | None:
        images = subject.get_images_dict(intensity_only=False)
        if any(is_loaded(each) or not vars(each).get("source") for each in images.values()):
            # Its voxels may be others than its files'.
            return None
        seen: list[object] = [pinned, [*subject], [*vars(subject)]]
        for name, image in images.items():
            # Where the root lies does not matter.
            words = {**image, PATH: str(image.path).replace(str(repo.path.parent), "")}
            seen += [name, type(image).__name__, _origin(vars(image)["source"])]
            unseen = () if self._id is not None else (PATH, STEM, "metadata")
            seen += [(key, _told(words[key])) for key in image if key not in unseen]
        held = [*subject.items(), *vars(subject).items()]
        # Code of the user's may read all that the subject has.
        told = {key for key, _ in held if self._id is not None or key not in subject} - {*images}
        seen += [(key, _told(value)) for key, value in held if key in told]
        return repo.file(hashlib.blake2b(repr(seen).encode(), digest_size=20).hexdigest())

    # -- reading -----------------------------------------------------------------------------

    def load(self, template: tio.Subject, content: ContentUnit) -> tio.Subject | None:
        """Return the prepared subject, loaded, or None where it was not kept."""
        with suppress(DamagedVolumeError), self.opened(template, content) as subject:
            for image in subject.get_images(intensity_only=False) if subject else ():
                image.load()
            return subject
        return None

    @contextmanager
    def opened(self, template: tio.Subject, content: ContentUnit) -> Iterator[tio.Subject | None]:
        """Hold the prepared subject open while the block runs; None where it was not kept.

        Its images are not loaded: each reads the boxes that it is asked for, or itself whole.

        Args:
            template: The unprepared subject, unloaded.
            content: Under its name now.

        Raises:
            DamagedVolumeError: The file is damaged. It was dropped, and is not opened again.
        """
        if self._engine is None or content.prepared is None:
            yield None
            return
        try:
            with self._engine.lease_prepared(content) as path:
                if path is None or (sound := self._sound_of(path)) is None:
                    yield None
                    return
                with opened(path, sound) as file:
                    subject = self._assemble(template, content.prepared, file)
                    del file
                    try:
                        yield subject
                    finally:
                        # Of the file, whose bytes are free once nobody maps it.
                        for image in subject.get_images(intensity_only=False):
                            if isinstance(image, FetchedImage):
                                image.take_back()
                        del subject
        except DamagedVolumeError:
            _LOGGER.warning("The prepared volume of %s is damaged: made again.", content.name)
            written, _ = self._sound.get(content.prepared.key.name, ((), None))
            self._sound[content.prepared.key.name] = (written, None)
            self._engine.drop_prepared(content, f"of {content.name}, damaged")
            raise

    def _sound_of(self, path: Path) -> SoundChunks | None:
        """Return which chunks of a file this process has found sound since it was written.

        None where it has found it damaged: whoever leases it keeps it from being dropped.

        Checked once, as git-annex checks what it fetches: to check at each use took 0.7 of the
        2.4 ms of a 64³ patch of image and label (2026-11-21).
        """
        try:
            found = path.stat()
        except OSError as error:
            raise DamagedVolumeError(DAMAGED) from error
        written = (found.st_ino, found.st_size, found.st_mtime_ns)
        known = self._sound.get(path.name)
        if known is None or known[0] != written:
            known = self._sound[path.name] = (written, {})
        return known[1]

    def _assemble(
        self, template: tio.Subject, prepared: ContentFile, file: PreparedFile
    ) -> tio.Subject:
        try:
            note = read_note(file.note, walk_parts(self.transform))
            if note.volume == prepared.key.name:
                return rebuild(note, copy.deepcopy(template), file.array)
        except Exception as error:
            raise DamagedVolumeError(DAMAGED) from error
        raise DamagedVolumeError(DAMAGED)

    def size(self, content: ContentUnit) -> SubjectSize | None:
        """Return the size of a prepared subject from its file's header; None if it is not there."""
        volume = content.prepared
        path = volume.repo.locate(volume.key) if volume else None
        # Whoever opens it finds out what is wrong with it, and mends that.
        with suppress(Exception), opened(path or Path()) as file:
            shapes = file.shapes().values()
            return sum_sizes([(shape[0], int(np.prod(shape[1:])), size) for shape, size in shapes])
        return None

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
            content: Under its name now; not leased by this thread.
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
            prepared = transform_in_place(self.transform, subject)
        if told is not None or again:
            found = identify_items([prepared])
            if again:
                self._told[content.name] = found
                return None
            self._require_same(content.name, told or {}, found)
        for image in prepared.get_images(intensity_only=False):
            # As it will be read back: results of what follows depend on the layout, too.
            voxels, affine = image.data.contiguous(), np.ascontiguousarray(image.affine)
            for key in (DATA, AFFINE):
                del image[key]
            image.affine = affine
            image.set_data(voxels)
        if self._engine is not None and content.prepared is not None:
            seconds = load_s + time.monotonic() - began_s
            data = self._pack(template, prepared, content, content.prepared)
            if data is not None:
                self._engine.keep_prepared(content, data, seconds)
        return prepared

    def _require_same(
        self, name: str, told: dict[str, list[str]], found: dict[str, list[str]]
    ) -> None:
        differing = [item for item in told | found if told.get(item) != found.get(item)]
        if differing:
            raise SelectionError(
                f"Cannot use {type(self.transform).__name__} as preprocess: {name} came out "
                f"otherwise the second time, in {', '.join(differing)}, and preprocess is done "
                f"once for all epochs. It draws at random, reads the clock, or keeps something "
                f"from one call to the next. Give what is random as transform, which is done each "
                f"time."
            )
        self._repeats = True

    def _pack(
        self, before: tio.Subject, after: tio.Subject, content: ContentUnit, volume: ContentFile
    ) -> bytes | None:
        """Return the file of a prepared subject; None where it cannot be told in one."""
        try:
            reason: object = "preprocess, or what it was given, changed while it ran"
            if [volume] == list(self.names([(before, content)])):
                note = describe(before, after, volume.key.name)
                images = after.get_images_dict(intensity_only=False)
                arrays = {key: image.data.numpy() for key, image in images.items()}
                return encode(arrays, write_note(note, walk_parts(self.transform)))
        except Exception as error:  # noqa: BLE001 - whatever the user's classes raise
            reason = error
        _LOGGER.info(
            "The prepared volume of %s is not kept, as it could not be told: %r.",
            content.name,
            reason,
        )
        return None


def _origin(source: ImageFiles | None) -> object:
    """Return what an image is read from, and how, in words that last."""
    if source is None:
        return None
    selector = source.selector
    how = [getattr(selector, name, None) for name in ("volumes", "combine", "when_missing")]
    files = [
        file.key.name if file.key is not None else (file.blob, Path(file.path).suffixes[-2:])
        for file in source.files
    ]
    return type(selector).__name__, repr(how), files, _origin(source.grid_of)


def _told(value: object) -> object:
    """Return a value in words that last; sidecars by which they are, without reading them."""
    value = value.identity if isinstance(value, Metadata) else value
    return value if isinstance(value, PLAIN) else pin(value)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute on this thread alone: sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
