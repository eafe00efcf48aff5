"""Sizes of images from their files' headers, before anything is decoded.

A header is what a stranger wrote. Only its first bytes are read, here and not by a library:
those follow a header's extensions, of which a few compressed kilobytes may become gigabytes.

Source: https://nifti.nimh.nih.gov (nifti1.h, nifti2.h); FreeSurfer's MGH format.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from math import inf, isfinite, prod
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from nibabel import nifti1, nifti2

from tio_openneuro.errors import DamagedImageError, RamBudgetError, UnsafeDatasetError
from tio_openneuro.sizes import format_size

_NIFTI_SUFFIXES = (".nii", ".nii.gz")
_MGH_SUFFIXES = (".mgz", ".mgh")
VOLUME_SUFFIXES = _NIFTI_SUFFIXES + _MGH_SUFFIXES
HEADER_BYTES = 544
PLAIN_EXTENSION_BYTES = 1 << 20
_PACKED_BYTES = 1 << 16
GZIP = b"\x1f\x8b"
FLOAT_BYTES = 4
_NIFTI2_BYTES = 540
_MOST_DIMENSIONS = 7
_VECTOR_INTENT = 1007
_LABEL_INTENT = 1002
# Between this and nothing SimpleITK may take numbers for unscaled that are scaled.
_LEAST_SLOPE = 1e-12
LEAVE_OUT = "Likely it is damaged: leave the unit out."
# Whether the voxels follow in the same file.
_MAGICS = {b"n+1": True, b"n+2": True, b"ni1": False, b"ni2": False}
_CODES = range(6)
# What says where an image lies, by the code that says so.
_PLACE_FIELDS = {
    "sform_code": ("srow_x", "srow_y", "srow_z"),
    "qform_code": ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    "": ("pixdim",),
}
# Metres and micrometres, by their codes; all else is taken for millimetres.
_UNITS_MM = {1: 1e3, 3: 1e-3}
_MGH_VERSION = 1
_MGH_FRAMES = 4
# goodRASFlag, then the size of a voxel along each axis.
_MGH_SPACED_AT = 28


class ImageSize(NamedTuple):
    """What is known of an image before it is loaded.

    Attributes:
        channels: Its channels.
        voxels: Voxels of one channel.
        item_bytes: Bytes of a voxel once loaded, four at least.
        axes: Voxels and their size in mm along each spatial axis; none where that is not known.
    """

    channels: int
    voxels: int
    item_bytes: int
    axes: tuple[tuple[int, float], ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of all its voxels once loaded."""
        return self.channels * self.voxels * self.item_bytes


@dataclass(frozen=True, slots=True)
class SubjectSize:
    """What is known of a subject's images before they are loaded.

    Attributes:
        images: The size of each; one at least.
    """

    images: tuple[ImageSize, ...]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all its images once loaded, and as floats."""
        return sum(image.size_bytes for image in self.images)

    @property
    def largest_bytes(self) -> int:
        """Bytes of its largest image."""
        return max(image.size_bytes for image in self.images)

    @property
    def largest_grid(self) -> int:
        """Voxels of one channel of the image that has most."""
        return max(image.voxels for image in self.images)

    @property
    def channels(self) -> int:
        """Channels of all its images together."""
        return sum(image.channels for image in self.images)

    def of_images(self, count: int) -> SubjectSize:
        """Return the size of so many images, where this tells of each of their files.

        Several files of one image are joined, beside all of them; a missing label is made of zeros.

        Args:
            count: Images, at least one.
        """
        largest = max(self.images, key=lambda image: image.size_bytes)
        if len(self.images) > count:
            item_bytes = max(image.item_bytes for image in self.images)
            return SubjectSize((largest._replace(channels=self.channels, item_bytes=item_bytes),))
        made = largest._replace(channels=1)
        return SubjectSize(self.images + (count - len(self.images)) * (made,))

    def scaled(self, factor: float) -> SubjectSize:
        """Return the size of a subject that has this many times as many voxels.

        Args:
            factor: At least one.
        """
        return SubjectSize(
            tuple(each._replace(voxels=round(each.voxels * factor)) for each in self.images)
        )


_listener: ContextVar[Callable[[SubjectSize], None] | None] = ContextVar("size", default=None)


@contextmanager
def listening(check: Callable[[SubjectSize], None]) -> Iterator[None]:
    """Hear of sizes that are announced in this thread while the block runs.

    Args:
        check: Called with each size; what it raises stops the announcer.
    """
    token = _listener.set(check)
    try:
        yield
    finally:
        _listener.reset(token)


def announce_size(size: SubjectSize) -> None:
    """Say what a subject will need, once it is known and before it is decoded.

    Args:
        size: The subject's images.

    Raises:
        RamBudgetError: What was set aside for the subject does not suffice.
    """
    check = _listener.get()
    if check is not None:
        check(size)


@dataclass(eq=False)
class NiftiHeader:
    """What a NIfTI-1 or NIfTI-2 header says of its voxels, as it stands there.

    Attributes:
        fields: As nibabel has them, which corrected nothing.
        order: Order of bytes, ``"<"`` or ``">"``.
        header_bytes: Where the header ends.
        single: Whether its magic says that the voxels follow in the same file.
        tensor_shape: Channels and spatial shape, ``(C, I, J, K)``; in the file I is fastest.
        is_vector: Whether channels are components of a vector, the file's fifth dimension.
        stored: The voxels' type as in NumPy, ``"i2"``; ``"V0"`` where its code is unknown.
        size_bytes: Bytes of the voxels as they are stored.
        offset_bytes: Where they begin.
        scale: Slope and intercept, or None where the numbers stay as they are.
        intent: Its code of what the numbers mean.
        is_misread: Whether SimpleITK 2.5.7 makes other voxels of it than the standard says: it adds
            the intercept where there is no slope, takes tiny slopes for none, and knows a fifth
            dimension as that of a vector alone.
    """

    fields: Any
    order: str

    def __post_init__(self) -> None:
        """Take out what the reader asks for."""
        self.header_bytes: int = self.fields.template_dtype.itemsize
        self.single = _MAGICS.get(self._of("magic"), False)
        self.shape: list[int] = self._of("dim")[1 : self._of("dim")[0] + 1]
        rows, columns, slices = [*self.shape, 1, 1][:3]
        self.tensor_shape = prod(self.shape[3:]), rows, columns, slices
        self.is_vector = prod(self.shape[4:]) > 1
        code, types = self._of("datatype"), cast("Any", nifti1.data_type_codes)
        self.stored: str = np.dtype(types.dtype[code]).str[1:] if code in types else "V0"
        self.size_bytes = prod(self.shape) * np.dtype(self.stored).itemsize
        self.offset_bytes: float = self._of("vox_offset")
        scale = slope, intercept = self._of("scl_slope"), self._of("scl_inter")
        self.is_scaled = bool(slope) and isfinite(slope)
        self.scale = scale if self.is_scaled and scale != (1, 0) else None
        self.intent: int = self._of("intent_code")
        unknown = self.shape[5 if self.intent == _VECTOR_INTENT else 4 :]
        wrong = abs(slope) < _LEAST_SLOPE if self.is_scaled else abs(intercept) > 0
        self.is_misread = wrong or prod(unknown) > 1

    def _of(self, name: str) -> Any:  # noqa: ANN401 - a number, text, or a list of numbers
        return self.fields[name].tolist()

    def _place(self, name: str) -> np.ndarray[Any, Any] | None:
        """Return an affine of nibabel's, with sizes above zero, or None where it is no number."""
        sound = self.fields.copy()
        sound["pixdim"][:4] = -1 if sound["pixdim"][0] == -1 else 1, *abs(sound["pixdim"][1:4])
        with suppress(ValueError):
            affine = getattr(sound, f"get_{name}")()
            return affine if np.isfinite(affine).all() else None
        return None

    @property
    def spacing_mm(self) -> list[float]:
        """Size of a voxel along each axis, the larger one where its two places differ."""
        unit_mm, sizes = _UNITS_MM.get(self._of("xyzt_units") & 7, 1.0), self._of("pixdim")[1:4]
        place = self._place("best_affine")
        spans = [0.0] * 3 if place is None else np.linalg.norm(place[:3, :3], axis=0).tolist()
        found = (unit_mm * max(abs(size), span) for size, span in zip(sizes, spans, strict=True))
        return [size if 0 < size < inf else 1.0 for size in found]

    def agrees(self, shape: Sequence[int], affine: np.ndarray[Any, Any]) -> bool:
        """Tell whether a tensor's shape and its place, in mm, are among those that it states."""
        unit_mm = _UNITS_MM.get(self._of("xyzt_units") & 7, 1.0)
        # Of two dimensions SimpleITK knows no third axis.
        seen = np.ix_(range(3), range(4)) if self.shape[2:] else np.ix_((0, 1), (0, 1, 3))
        coded = [name for name in ("sform", "qform") if self._of(f"{name}_code") > 0]
        found = [place for name in coded if (place := self._place(name)) is not None]
        near = (np.allclose(affine[seen], unit_mm * each[seen], 1e-3, 1e-3) for each in found)
        return tuple(shape[1:]) == self.tensor_shape[1:] and (not coded or any(near))

    @cached_property
    def fault(self) -> str:
        """What it cannot mean, in words that name the field; empty where it is sound."""
        code = "sform_code" if self._of("sform_code") else "qform_code"
        wrong = {
            "sizeof_hdr": self._of("sizeof_hdr") != self.header_bytes,
            "magic": self._of("magic") not in _MAGICS,
            "dim": min(self.shape) < 1 or sum(size > 1 for size in self.shape[3:]) > 1,
            "datatype": not np.dtype(self.stored).itemsize,
            "vox_offset": self.single and not self.header_bytes + 4 <= self.offset_bytes < inf,
            "scl_inter": self.is_scaled and not isfinite(self._of("scl_inter")),
            code: self._of(code) not in _CODES,
        }
        named = [f"its {name} is {self._of(name)}" for name in wrong if wrong[name]]
        if self._place("best_affine") is None:
            place = _PLACE_FIELDS[code if self._of(code) else ""]
            named.append(", ".join(f"its {name} is {self._of(name)}" for name in place))
        return f"{named[0]}, which no image has" if named else ""


def has_suffix(path: Path | str, *suffixes: str) -> bool:
    """Tell whether a file's name ends so, in capital letters or small ones.

    Example:
        >>> has_suffix("sub-01_T1w.NII.GZ", ".nii", ".nii.gz")
        True
    """
    return str(path).lower().endswith(suffixes)


@dataclass(eq=False)
class VolumeFile:
    """A local file of an image, of whose header each part is read once.

    Attributes:
        path: The file; its suffix tells the format.
    """

    path: Path

    @cached_property
    def first(self) -> bytes:
        """Its first ``HEADER_BYTES``, inflated where they are compressed; none where unreadable."""
        try:
            # Not by Python's gzip, which reads the name in a gzip header however long it is.
            with self.path.open("rb") as file:
                packed = file.read(_PACKED_BYTES)
            first = b"" if packed.startswith(GZIP) else packed[:HEADER_BYTES]
            while packed.startswith(GZIP) and len(first) < HEADER_BYTES:
                member = zlib.decompressobj(31)
                first += member.decompress(packed, HEADER_BYTES - len(first))
                packed = member.unused_data
        except (OSError, zlib.error):
            return b""
        return first

    @cached_property
    def nifti(self) -> NiftiHeader | None:
        """What its header says, or None where it is none."""
        return _parse_nifti(self.first) if has_suffix(self.path, *_NIFTI_SUFFIXES) else None

    @cached_property
    def size(self) -> ImageSize | None:
        """Channels, voxels of one channel and bytes per voxel once loaded, or None.

        None where the file is absent, no sound NIfTI or MGH, or cannot be read. A voxel counts four
        bytes at least, since scaling factors turn integers into floats. Extensions of the header
        that pass 1 MiB count as voxels, since they are loaded too.
        """
        try:
            if has_suffix(self.path, *_MGH_SUFFIXES):
                return _measure_mgh(self.first)
            return _measure_nifti(self.nifti) if self.nifti and not self.nifti.fault else None
        except (struct.error, ValueError, OverflowError):
            return None

    @property
    def says_label(self) -> bool:
        """Whether its header is a label map's: by its intent, or by bytes that nothing scales."""
        header = None if self.nifti and self.nifti.fault else self.nifti
        kinds = ("u1", "i1") if header and header.scale is None else ()
        return header is not None and (header.intent == _LABEL_INTENT or header.stored in kinds)

    def refuse_fault(self, name: str) -> None:
        """Raise where the file is gone, or its header cannot be believed.

        Raises:
            DamagedImageError: The message names the file and the field.
        """
        fault = self.nifti.fault if self.nifti is not None else ""
        if not self.path.exists():
            fault = "the file is not there any more"
        if fault:
            raise DamagedImageError(f"Cannot load {name}: {fault}. {LEAVE_OUT}")


def _parse_nifti(first: bytes) -> NiftiHeader | None:
    second = _NIFTI2_BYTES in {int.from_bytes(first[:4], order) for order in ("little", "big")}
    kind: Any = nifti2.Nifti2Header if second else nifti1.Nifti1Header
    block = first[: kind.template_dtype.itemsize]
    if len(block) < kind.template_dtype.itemsize:
        return None
    # As the NIfTI library does: the order of bytes is that in which there are 1 to 7 dimensions.
    for order in "<>":
        fields = kind(block, order, check=False)
        if 1 <= fields["dim"][0] <= _MOST_DIMENSIONS:
            return NiftiHeader(fields, order)
    return None


def _measure_nifti(header: NiftiHeader) -> ImageSize:
    # SimpleITK's 32 bits without a sign are 64 with one to torch.
    item_bytes = 8 if header.stored == "u4" else max(np.dtype(header.stored).itemsize, FLOAT_BYTES)
    extension_bytes = int(header.offset_bytes) - header.header_bytes
    channels, voxels = prod(header.shape[3:]), prod(header.shape[:3])
    if extension_bytes > PLAIN_EXTENSION_BYTES:
        voxels += extension_bytes // (item_bytes * channels) + 1
    axes = zip(header.tensor_shape[1:], header.spacing_mm, strict=True)
    return ImageSize(channels, voxels, item_bytes, tuple(axes))


def _measure_mgh(header: bytes) -> ImageSize | None:
    version, *shape = struct.unpack_from(">5i", header)
    if version != _MGH_VERSION:
        return None
    frames = max(abs(shape.pop()), 1)
    spaced = struct.unpack_from(">h3f", header, _MGH_SPACED_AT)
    spacing_mm = spaced[1:] if spaced[0] > 0 else (1.0,) * 3
    axes = tuple(zip(map(abs, shape), spacing_mm, strict=True))
    return ImageSize(frames, prod(map(abs, shape)), FLOAT_BYTES, axes)


def sum_sizes(images: Iterable[Iterable[Any]]) -> SubjectSize:
    """Return the size of a subject that has these images.

    Args:
        images: Channels, voxels of one channel, bytes per voxel and, if known, axes of each; one at
            least.
    """
    found = (ImageSize(*image) for image in images)
    return SubjectSize(
        tuple(each._replace(item_bytes=max(each.item_bytes, FLOAT_BYTES)) for each in found)
    )


def announce_files(files: Iterable[VolumeFile]) -> None:
    """Tell whoever admits RAM what a subject's files will need, before they are decoded.

    Does nothing where nobody listens, or where a header cannot be read.

    Args:
        files: All files of one subject.

    Raises:
        RamBudgetError: The RAM that was set aside for the subject does not suffice; its files
            must not be decoded now.
    """
    if _listener.get() is None:
        return
    # One whose header cannot be believed is refused before it takes any room.
    sizes = [file.size for file in files if not (file.nifti and file.nifti.fault)]
    known = [size for size in sizes if size is not None]
    if known and len(known) == len(sizes):
        announce_size(sum_sizes(known))


def refuse_bomb(file: VolumeFile, title: str, unit_name: str, free_bytes: int) -> None:
    """Raise where a file must not be decoded, by what its header states.

    A file that bears the name of a NIfTI or MGH image and is none is refused too: readers try
    other formats then, of which nothing is known before they are decoded.

    Args:
        file: The file.
        title: Where the dataset has it; its suffix tells the format.
        unit_name: The unit that it belongs to, for messages.
        free_bytes: RAM that is available.

    Raises:
        RamBudgetError: The header states more than the RAM that is available.
        DamagedImageError: The file is gone, or its header cannot be believed.
        UnsafeDatasetError: It is no image of the format that its name tells.
    """
    file.refuse_fault(f"{title} of {unit_name}")
    if not has_suffix(title, *VOLUME_SUFFIXES):
        return
    size = file.size
    if size is None:
        raise UnsafeDatasetError(
            f"Refused to load {title} of {unit_name}: it has no header of a NIfTI or MGH image, "
            f"though its name says so ({format_size(file.path.stat().st_size)}). Likely it is "
            f"damaged: leave the unit out.",
            unit=unit_name,
        )
    need_bytes = size.size_bytes
    if need_bytes > free_bytes:
        channels, voxels, item_bytes, _ = size
        raise RamBudgetError(
            f"Cannot load {title} of {unit_name}: its header states {channels} x {voxels} voxels "
            f"of {item_bytes} bytes, {format_size(need_bytes)} ({need_bytes} bytes), and "
            f"{format_size(free_bytes)} of RAM are available. Likely the file, of "
            f"{format_size(file.path.stat().st_size)}, is damaged: leave the unit out.",
            unit=unit_name,
        )
