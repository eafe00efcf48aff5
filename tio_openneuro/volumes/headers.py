"""Sizes of images from their files' headers, before anything is decoded.

A header is what a stranger wrote. Only its first bytes are read, here and not by a library:
those follow a header's extensions, of which a few compressed kilobytes may become gigabytes.

Source: https://nifti.nimh.nih.gov (nifti1.h, nifti2.h); FreeSurfer's MGH format.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
from nibabel import nifti1, nifti2

from tio_openneuro.errors import RamBudgetError, UnsafeDatasetError
from tio_openneuro.sizes import format_size

ImageSize = tuple[int, int, int]
_NIFTI_SUFFIXES = (".nii", ".nii.gz")
_MGH_SUFFIXES = (".mgz", ".mgh")
HEADER_BYTES = 544
PLAIN_EXTENSION_BYTES = 1 << 20
_PACKED_BYTES = 1 << 16
GZIP = b"\x1f\x8b"
_LEAST_ITEM_BYTES = 4
_NIFTI2_BYTES = 540
_MOST_DIMENSIONS = 7
_MGH_VERSION = 1
_MGH_FRAMES = 4


@dataclass(frozen=True, slots=True)
class SubjectSize:
    """What is known of a subject's images before they are loaded.

    Attributes:
        largest_voxels: Voxels of its largest image, channels included.
        total_voxels: Voxels of all its images, channels included.
        stored_bytes: Bytes of all its images in the type that they are loaded in.
        channels: Channels of all its images together.
    """

    largest_voxels: int
    total_voxels: int
    stored_bytes: int
    channels: int

    def scaled(self, factor: float) -> SubjectSize:
        """Return the size of a subject that has this many times as many voxels.

        Args:
            factor: At least one.
        """
        return SubjectSize(
            largest_voxels=round(self.largest_voxels * factor),
            total_voxels=round(self.total_voxels * factor),
            stored_bytes=round(self.stored_bytes * factor),
            channels=self.channels,
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


@dataclass(frozen=True, slots=True)
class NiftiHeader:
    """What a NIfTI-1 or NIfTI-2 header says of its voxels, as it stands there.

    Attributes:
        single: Whether its magic says that the voxels follow in the same file.
        order: Order of bytes, ``"<"`` or ``">"``.
        shape: Its dimensions, first one fastest; may be zero or negative.
        stored: The voxels' type in native order, or None where its code is unknown.
        bits: What it says that a voxel has.
        header_bytes: Where the header ends.
        offset_bytes: Where the voxels begin.
        extended: Whether extensions follow the header.
        slope: Factor of the stored numbers.
        intercept: Added after that.
        intent: Its code of what the numbers mean.
    """

    single: bool
    order: str
    shape: tuple[int, ...]
    stored: np.dtype[Any] | None
    bits: int
    header_bytes: int
    offset_bytes: float
    extended: bool
    slope: float
    intercept: float
    intent: int


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
        """What its header says, or None where it is none, or its place in space no number."""
        return _parse_nifti(self.first) if self.path.name.endswith(_NIFTI_SUFFIXES) else None

    @cached_property
    def size(self) -> ImageSize | None:
        """Channels, voxels of one channel and bytes per voxel once loaded, or None.

        None where the file is absent, no NIfTI or MGH, or cannot be read. A voxel counts four
        bytes at least, since scaling factors turn integers into floats. Extensions of the header
        that pass 1 MiB count as voxels, since they are loaded too.
        """
        try:
            if self.path.name.endswith(_MGH_SUFFIXES):
                return _measure_mgh(self.first)
            return None if self.nifti is None else _measure_nifti(self.nifti)
        except (struct.error, ValueError, OverflowError):
            return None


def _parse_nifti(first: bytes) -> NiftiHeader | None:
    second = _NIFTI2_BYTES in {int.from_bytes(first[:4], order) for order in ("little", "big")}
    layout = nifti2.header_dtype if second else nifti1.header_dtype
    if len(first) < layout.itemsize:
        return None
    # As the NIfTI library does: the order of bytes is that in which there are 1 to 7 dimensions.
    for order in "<>":
        fields = np.frombuffer(first, layout.newbyteorder(cast("Any", order)), count=1)[0]
        count, *dims = fields["dim"].tolist()
        if 1 <= count <= _MOST_DIMENSIONS:
            break
    else:
        return None
    # SimpleITK 2.5.7 may compute for ever on a place in space that is no number.
    rows = [fields["srow_x"], fields["srow_y"], fields["srow_z"]]
    if not second and fields["sform_code"] > 0 and not np.isfinite(rows).all():
        return None
    code = fields["datatype"].item()
    types: Any = nifti1.data_type_codes
    return NiftiHeader(
        single=fields["magic"] == (b"n+2" if second else b"n+1"),
        order=order,
        shape=tuple(dims[:count]),
        stored=np.dtype(types.dtype[code]) if code in types else None,
        bits=fields["bitpix"].item(),
        header_bytes=layout.itemsize,
        offset_bytes=fields["vox_offset"].item(),
        extended=any(first[layout.itemsize : layout.itemsize + 1]),
        slope=fields["scl_slope"].item(),
        intercept=fields["scl_inter"].item(),
        intent=fields["intent_code"].item(),
    )


def _measure_nifti(header: NiftiHeader) -> ImageSize:
    shape = [abs(size) for size in header.shape]
    stored_bytes = header.stored.itemsize if header.stored is not None else 0
    item_bytes = max(stored_bytes, abs(header.bits) // 8, _LEAST_ITEM_BYTES)
    extension_bytes = int(header.offset_bytes) - header.header_bytes if header.extended else 0
    channels, voxels = prod(shape[3:]), prod(shape[:3])
    if extension_bytes > PLAIN_EXTENSION_BYTES:
        voxels += extension_bytes // (item_bytes * max(channels, 1)) + 1
    return max(channels, 1), voxels, item_bytes


def _measure_mgh(header: bytes) -> ImageSize | None:
    version, *shape = struct.unpack_from(">5i", header)
    if version != _MGH_VERSION:
        return None
    frames = max(abs(shape.pop()), 1)
    return frames, prod(map(abs, shape)), _LEAST_ITEM_BYTES


def sum_sizes(images: Sequence[ImageSize]) -> SubjectSize:
    """Return the size of a subject that has these images.

    Args:
        images: Channels, voxels of one channel and bytes per voxel of each; one at least.
    """
    return SubjectSize(
        largest_voxels=max(channels * voxels for channels, voxels, _ in images),
        total_voxels=sum(channels * voxels for channels, voxels, _ in images),
        stored_bytes=sum(prod(image) for image in images),
        channels=sum(channels for channels, _, _ in images),
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
    sizes = [file.size for file in files]
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
        UnsafeDatasetError: It is no image of the format that its name tells.
    """
    if not title.endswith(_NIFTI_SUFFIXES + _MGH_SUFFIXES) or not file.path.exists():
        return
    size = file.size
    if size is None:
        raise UnsafeDatasetError(
            f"Refused to load {title} of {unit_name}: it has no header of a NIfTI or MGH image, "
            f"though its name says so ({format_size(file.path.stat().st_size)}). Likely it is "
            f"damaged: leave the unit out.",
            unit=unit_name,
        )
    need_bytes = prod(size)
    if need_bytes > free_bytes:
        channels, voxels, item_bytes = size
        raise RamBudgetError(
            f"Cannot load {title} of {unit_name}: its header states {channels} x {voxels} voxels "
            f"of {item_bytes} bytes, {format_size(need_bytes)} ({need_bytes} bytes), and "
            f"{format_size(free_bytes)} of RAM are available. Likely the file, of "
            f"{format_size(file.path.stat().st_size)}, is damaged: leave the unit out.",
            unit=unit_name,
        )
