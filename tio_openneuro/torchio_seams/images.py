"""TorchIO images and subjects whose files come and go.

Owns the meeting of :class:`torchio.Image` with content that is fetched on demand. An image may
be made, copied, pickled and shown while its file is absent; asking for its voxels or its header
leases the content for that time. Never holds a lease beyond a call.

An image may also be lent an array that somebody else holds open, whose boxes are read when they are
wanted: a prepared volume, of whose format nothing is known here.

TorchIO's own images check at construction that the path exists, also when ``Crop`` rebuilds one
around a tensor (1.2.1), which is why patches need these subclasses too.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, Self, SupportsIndex

import numpy as np
import torch
import torchio as tio
from torchio.constants import AFFINE, DATA

from tio_openneuro.annex import read_blobs
from tio_openneuro.bounds import IMAGE_BYTES, parse_json
from tio_openneuro.content import AnnexKey, ContentFile, ContentRepo, ContentUnit, TreeFile
from tio_openneuro.disk import Engine
from tio_openneuro.errors import SelectionError, TioOpenNeuroError
from tio_openneuro.ram import available_bytes
from tio_openneuro.recording import doing
from tio_openneuro.select import Label, Scalar, decode_text
from tio_openneuro.sources import read_texts
from tio_openneuro.torchio_seams.in_place import read_file
from tio_openneuro.volumes import VolumeFile, read_grid, refuse_bomb

_NO_FIELDS = "Left out: %s of %s, which is no JSON object, and without a word each other such one."

Box = Sequence[tuple[int, int]]


class ReadSidecars(dict[tuple[TreeFile, ...], dict[str, Any]]):
    """What was read of a dataset's sidecars, once for all who share them; a pickle holds none.

    Attributes:
        told: Whether one was told to have no fields.
    """

    told = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Be pickled without what was read, but for what was told."""
        return type(self), (), {"told": self.told}

    def __deepcopy__(self, memo: object) -> Self:
        """Return the same object."""
        return self


SidecarFiles = tuple[Path, tuple[TreeFile, ...], ReadSidecars]


class Metadata(Mapping[str, Any]):
    """Hold an image's sidecars; read-only, read when asked for, and collated by TorchIO as a list.

    A ``dict`` would be collated key by key, which fails where two subjects' scanners wrote
    different fields (``torchio.data.loader._stack``, 1.2.1). A pickle holds no fields that were
    read, but the way to them; copies share them.
    """

    def __init__(self, fields: Mapping[str, Any], files: SidecarFiles | None = None) -> None:
        """Copy the fields that are known, and read none.

        Args:
            fields: They go before those of the sidecars.
            files: Folder of the dataset; the sidecars, of which later ones override; and what was
                read of the dataset's.
        """
        self._known, self._files = dict(fields), files or (Path(), (), ReadSidecars())

    @property
    def identity(self) -> tuple[Mapping[str, Any], list[str]]:
        """What decides the fields, without reading any: those known, and the sidecars' blobs."""
        return self._known, [file.blob for file in self._files[1]]

    @cached_property
    def _fields(self) -> dict[str, Any]:
        folder, files, read = self._files
        if files not in read:
            fields: dict[str, Any] = {}
            for path, text in read_texts(folder, files).items():
                try:
                    fields = {**fields, **parse_json(decode_text(text), f"{path} of {folder.name}")}
                except (ValueError, TypeError):
                    if not read.told:
                        logging.getLogger(__name__).warning(_NO_FIELDS, path, folder.name)
                    read.told = True
            read[files] = fields
        return read[files] | self._known

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - JSON holds anything
        """Return one field."""
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the fields' names."""
        return iter(self._fields)

    def __len__(self) -> int:
        """Return the number of fields."""
        return len(self._fields)

    def __repr__(self) -> str:
        """Show it as the dictionary it is."""
        return f"Metadata({self._fields!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Be pickled without the fields that were read."""
        return type(self), (self._known, self._files)

    def __deepcopy__(self, memo: object) -> Self:
        """Return the same object, which nothing changes."""
        return self

    def pin_memory(self) -> Self:
        """Return the same object, which holds no tensor: torch would read it to find some."""
        return self


@dataclass(frozen=True)
class ImageFiles:
    """The files of one image, wherever they are: annexed, in git itself, or in a plain folder.

    Attributes:
        files: The image's files, in channel order; empty for a label that is missing.
        folder: The clone, or the plain BIDS folder.
        repo: Gives the annexed content; None in a plain folder.
        engine: Leases it; None in a plain folder.
        unit_name: For messages, ``"sub-07"``.
        selector: How the files become one tensor.
        grid_of: Another image's files, whose grid a missing label takes.
    """

    files: tuple[TreeFile, ...]
    folder: Path
    repo: ContentRepo | None
    engine: Engine | None
    unit_name: str
    selector: Scalar | Label
    grid_of: ImageFiles | None = None

    def __deepcopy__(self, memo: object) -> Self:
        """Return the same object: it is frozen, and copies of an image share the engine."""
        return self

    @property
    def content(self) -> tuple[ContentFile, ...]:
        """The annexed ones among the files, and those whose grid is needed."""
        own = tuple(
            ContentFile(self.repo, file.key, file.path)
            for file in self.files
            if self.repo is not None and file.key is not None
        )
        return own + (self.grid_of.content if self.grid_of is not None else ())

    @contextmanager
    def lease(self) -> Iterator[dict[AnnexKey, VolumeFile]]:
        """Fetch what is absent and hold it while the block runs."""
        if self.engine is None or not self.content:
            yield {}
            return
        with self.engine.lease(ContentUnit(self.unit_name, self.content)) as leased:
            yield {key: VolumeFile(path) for key, path in leased.items()}

    @contextmanager
    def opened(self, leased: Mapping[AnnexKey, VolumeFile]) -> Iterator[list[VolumeFile]]:
        """Yield a readable one for each file, given the leased content's.

        Files whose decoding must be refused are, by their headers; see :func:`refuse_bomb`.

        Files that git itself holds are written to the system's temporary folder for that time.
        """
        with ExitStack() as stack:
            found = []
            for file in self.files:
                if file.key is not None and self.repo is not None:
                    found.append(leased[file.key])
                elif file.blob:
                    suffix = "".join(Path(file.path).suffixes[-2:])
                    copy = stack.enter_context(tempfile.TemporaryDirectory(prefix="tio-openneuro-"))
                    path = Path(copy) / f"image{suffix}"
                    held = read_blobs(self.folder, [file.blob], IMAGE_BYTES, IMAGE_BYTES)
                    path.write_bytes(b"".join(filter(None, held)))
                    found.append(VolumeFile(path))
                else:
                    found.append(VolumeFile(self.folder / file.path))
                refuse_bomb(found[-1], file.path, self.unit_name, available_bytes())
            yield found

    @property
    def path(self) -> Path | list[Path]:
        """Where the dataset has the files, whether or not they are checked out."""
        paths = [self.folder / file.path for file in self.files]
        if not paths:
            return self.folder / "missing-label.nii.gz"
        return paths if len(paths) > 1 else paths[0]


class OpenArray(Protocol):
    """An array of shape ``(C, I, J, K)`` that gives copies of its boxes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    def read(self, box: Box | None = None) -> np.ndarray[Any, Any]:
        """Return a copy of a box, or of all."""


class FetchedImage(tio.Image):
    """Behaviour that scalar images and label maps share; see the module's docstring.

    Attributes:
        source: Where the voxels come from; None once the image was rebuilt around a tensor.
    """

    source: ImageFiles | None = None
    _array: OpenArray | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - TorchIO's own
        """Make the image as TorchIO does, without asking whether its path exists."""
        kwargs["verify_path"] = False
        super().__init__(*args, **kwargs)

    @classmethod
    def of(cls, source: ImageFiles, metadata: Metadata) -> Self:
        """Return an unloaded image of these files. Touches no content."""
        image = cls(source.path, metadata=metadata)
        image.source = source
        return image

    def lend(self, array: OpenArray, source: ImageFiles | None) -> None:
        """Let the voxels be those of an array, which are read when they are asked for.

        Args:
            array: Held open by the caller until :meth:`take_back`.
            source: The image's files, where it still knows them.
        """
        self.pop(DATA, None)
        self._loaded, self._array, self.source = False, array, source

    def take_back(self) -> None:
        """Let go of the array that was lent; what was not read is gone."""
        self._array = None

    def read_box(self, box: Box) -> torch.Tensor:
        """Return a copy of a box of the voxels, of an array that was lent no more than it needs."""
        if self._loaded or self._array is None:
            return self.data[tuple(slice(*edge) for edge in box)].clone()
        return torch.from_numpy(self._array.read(box))

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        """Be copied deeply, or pickled, with voxels of its own where an array was lent."""
        if self._array is not None:
            self.load()
            self.take_back()
        return super().__reduce_ex__(protocol)

    def __copy__(self) -> Self:
        """Copy as TorchIO does, and keep where the voxels come from."""
        if self._array is not None:
            self.load()
        image: Self = super().__copy__()  # type: ignore[no-untyped-call]
        image.source = self.source
        return image

    def __repr__(self) -> str:
        """Show the image; an unloaded one by its path alone, since its header may be absent."""
        if self._loaded or self.source is None:
            return str(super().__repr__())  # type: ignore[no-untyped-call]
        return f'{type(self).__name__}(path: "{self.path}"; not loaded)'

    def load(self) -> None:
        """Fetch what is absent, and load the voxels, shape ``(C, I, J, K)``.

        Raises:
            DiskBudgetError: The disk budget cannot hold the image's files.
            FetchError: The remote does not give them.
        """
        if self._loaded:
            return
        if self._array is not None:
            self.set_data(torch.from_numpy(self._array.read()))
        elif self.source is None:
            super().load()
        else:
            with doing("content"), self.source.lease() as leased, doing("decode"):
                self.load_leased(leased)

    def load_leased(self, leased: Mapping[AnnexKey, VolumeFile]) -> None:
        """Load the voxels from content that the caller has leased.

        Args:
            leased: File of each annex key.

        Raises:
            RamBudgetError: A header states more than the RAM that is available.
            UnsafeDatasetError: A file is no image of the format that its name tells.
            DamagedImageError: A file is gone or cut off, fails its own checksum, or has a header
                that lies.
        """
        source = self.source
        if self._loaded or source is None:
            return
        if source.grid_of is not None:
            path, unit = source.grid_of.files[0].path, source.unit_name
            try:
                with source.grid_of.opened(leased) as files:
                    whole = partial(read_file, self, files[0], f"{path} of {unit}")
                    grid, self.affine = read_grid(files[0]) or whole()
            except TioOpenNeuroError as error:
                taken = f"{unit} lacks {source.selector!r}, whose zeros take the grid of {path}."
                raise type(error)(f"{error} {taken}", key=error.key, unit=error.unit) from error
            shape = grid.shape if isinstance(grid, torch.Tensor) else grid
            self.set_data(torch.zeros(1, *shape[1:], dtype=torch.uint8))
            return
        with source.opened(leased) as files:
            self._read(source, files)

    def _read(self, source: ImageFiles, volumes: list[VolumeFile]) -> None:
        """Read each file, take what is wanted of it, and join them along the channels."""
        tensors: list[torch.Tensor] = []
        affines: list[Any] = []
        for file, volume in zip(source.files, volumes, strict=True):
            tensor, affine = read_file(self, volume, f"{file.path} of {source.unit_name}")
            if tensors and tensor.shape[1:] != tensors[0].shape[1:]:
                raise SelectionError(
                    f"Cannot join the files of {source.unit_name} into one image: "
                    f"{source.files[0].path} has shape {tuple(tensors[0].shape[1:])}, {file.path} "
                    f"{tuple(tensor.shape[1:])}. Narrow the pattern, or pass a finer unit.",
                    unit=source.unit_name,
                )
            tensors.append(_wanted_volumes(tensor, source.selector, file.path, source.unit_name))
            affines.append(affine)
        if not all(np.allclose(affines[0], other, rtol=1e-6, atol=1e-6) for other in affines):
            warnings.warn(
                f"The files of {source.unit_name} that make up one image lie differently in "
                f"space; the place of {source.files[0].path} holds for all.",
                RuntimeWarning,
                stacklevel=2,
            )
        # Of one tensor too where it is in Fortran order, as TorchIO's own reader leaves it: its
        # transforms are many times slower on that.
        joined = tensors[0].contiguous() if len(tensors) == 1 else torch.cat(tensors)
        if isinstance(source.selector, Label) and source.selector.combine == "union":
            joined = joined.amax(dim=0, keepdim=True)
        self.set_data(joined)
        self.affine = affines[0]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Tensor shape ``(C, I, J, K)``; of an unloaded image from its header, fetched first."""
        if not self._loaded and self._array is not None:
            channels, i, j, k = self._array.shape
            return channels, i, j, k
        grid = self._grid()
        return super().shape if grid is None else grid[0]

    @property
    def affine(self) -> Any:  # noqa: ANN401 - TorchIO's own
        """Affine, 4 x 4, float64; of an unloaded image from its header, fetched first."""
        if not self._loaded and self._array is not None:
            return self[AFFINE]
        grid = self._grid()
        return super().affine if grid is None else grid[1]

    @affine.setter
    def affine(self, matrix: Any) -> None:  # noqa: ANN401 - TorchIO's own
        self[AFFINE] = self._parse_affine(matrix)

    def _grid(self) -> tuple[tuple[int, int, int, int], Any] | None:
        """Return shape and affine by the header; load the image and return None where it lies."""
        source = self.source
        if self._loaded or source is None:
            return None
        if len(source.files) == 1 and _is_plain(source.selector):
            with source.lease() as leased, source.opened(leased) as files:
                grid = read_grid(files[0])
            if grid is not None:
                return grid
        self.load()
        return None


class FetchedScalarImage(FetchedImage, tio.ScalarImage):
    """A :class:`torchio.ScalarImage` whose file is fetched when it is needed."""


class FetchedLabelMap(FetchedImage, tio.LabelMap):
    """A :class:`torchio.LabelMap` whose file is fetched when it is needed."""


class FetchedSubject(tio.Subject):
    """A :class:`torchio.Subject` that says which grids differ."""

    def check_consistent_space(self) -> None:
        """Raise where the images' grids differ, naming both, and the way out.

        Raises:
            RuntimeError: Two images differ in shape, spacing, direction or origin.
        """
        try:
            super().check_consistent_space()
        except RuntimeError as error:
            images = self.get_images_dict(intensity_only=False)
            reference, first = next(iter(images.items()))
            other, second = next(
                ((name, image) for name, image in images.items() if not _same_grid(first, image)),
                (reference, first),
            )
            raise RuntimeError(
                f"Cannot cut patches from {self.get('subject_id', 'a subject')}: {reference!r} "
                f"({_grid(first)}) and {other!r} ({_grid(second)}) lie on different grids, as "
                f"stored in the dataset. Bring them onto one, for example with "
                f"preprocess=tio.Resample({reference!r})."
            ) from error


def _is_plain(selector: Scalar | Label) -> bool:
    return getattr(selector, "volumes", None) is None and getattr(selector, "combine", None) is None


def _wanted_volumes(
    tensor: torch.Tensor, selector: Scalar | Label, path: str, unit: str
) -> torch.Tensor:
    """Return the volumes of one file that the selector asks for."""
    if isinstance(selector, Label) or selector.volumes is None:
        return tensor
    if selector.volumes == "mean":
        return tensor.to(torch.float32).mean(dim=0, keepdim=True)
    volumes = list(range(len(tensor)))
    if isinstance(selector.volumes, slice):
        volumes = volumes[selector.volumes]
    else:
        volumes = [n for n in volumes if selector.volumes in {n, n - len(tensor)}]
    if not volumes:
        raise SelectionError(
            f"Cannot take volumes={selector.volumes} of {unit}: {path} has {len(tensor)} volumes. "
            f"Ask for others, or for 'mean'.",
            unit=unit,
        )
    return tensor[volumes]


def _same_grid(first: tio.Image, second: tio.Image) -> bool:
    return first.spatial_shape == second.spatial_shape and np.allclose(
        first.affine, second.affine, rtol=1e-6, atol=1e-6
    )


def _grid(image: tio.Image) -> str:
    spacing = ", ".join(f"{size:.3g}" for size in image.spacing)
    return f"shape {image.spatial_shape}, spacing ({spacing}) mm"
