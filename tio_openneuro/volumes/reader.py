"""The fast reader of NIfTI files: TorchIO's voxels and affine, bit for bit, in less time.

Owns the way from a ``.nii`` or ``.nii.gz`` file to a tensor. It reads only what it can promise to
read as TorchIO 1.2.1 does, which asks SimpleITK first: the place in space and the type come from
SimpleITK's own reading of the header, the voxels from here. For anything else it says so, and
TorchIO reads. Never inflates more than the header states, and never returns voxels of a file that
is cut off or fails its checksum, of which SimpleITK 2.5.7 makes zeros or noise without a word.

Source: https://nifti.nimh.nih.gov (nifti1.h); ``itk::NiftiImageIO`` 5.4; RFC 1952 (gzip).
"""

from __future__ import annotations

import io
import platform
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import SimpleITK
import torch
from isal import igzip_lib
from torchio.data.io import get_ras_affine_from_sitk

from tio_openneuro.errors import DamagedImageError
from tio_openneuro.sizes import format_size
from tio_openneuro.volumes.headers import GZIP, PLAIN_EXTENSION_BYTES, NiftiHeader, VolumeFile

# 64 kB to 1 MB make no difference (2026-11-21).
_CHUNK_BYTES = 1 << 18
_BEYOND_BYTES = 1 << 16
# Best of 0.3 to 9 MB for 192**3 and 256 x 256 x 180 voxels of 1, 2 and 4 bytes (2026-11-21).
_SLAB_BYTES = 2_400_000
_LEAST_SLICES = 32
_SPATIAL = 3
_VECTOR_AXIS = 4
_LEAST_VOLUME = 1e-3
_DIMENSIONS = range(2, 5)
# Between this and nothing SimpleITK may take numbers for unscaled that are scaled.
_LEAST_SLOPE = 1e-12
# Codes of NIfTI: SimpleITK reorders symmetric matrices, and turns displacements round.
_REORDERED_INTENTS = frozenset({1005, 1006})
_VECTOR_INTENT = 1007
# Not uint64, of which torch knows little, nor complex numbers, colours and float128.
_PIXELS = {
    "u1": "UInt8",
    "u2": "UInt16",
    "u4": "UInt32",
    "f4": "Float32",
    "f8": "Float64",
    "i1": "Int8",
    "i2": "Int16",
    "i4": "Int32",
    "i8": "Int64",
}
# isal's stubs have its error for an instance.
_DAMAGES: tuple[type[Exception], ...] = (EOFError, cast("type[Exception]", igzip_lib.error))


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a file's voxels are, and what becomes of them.

    Attributes:
        stored: Their type in the file, as in NumPy.
        order: Their order of bytes, ``"<"`` or ``">"``.
        shape: Channels and spatial shape, ``(C, I, J, K)``; in the file I is fastest, C slowest.
        vector: Whether the channels are components of a vector, the file's fifth dimension.
        offset_bytes: Where they begin.
        scale: Slope and intercept, or None where the numbers stay as they are.
    """

    stored: str
    order: str
    shape: tuple[int, int, int, int]
    vector: bool
    offset_bytes: int
    scale: tuple[float, float] | None

    @classmethod
    def of(cls, header: NiftiHeader) -> Self | None:
        """Return the layout that a header states, or None where SimpleITK may see another."""
        shape = [*header.shape, *[1] * (_VECTOR_AXIS + 1 - len(header.shape))]
        while len(shape) > _VECTOR_AXIS + 1 and shape[-1] == 1:
            shape.pop()
        vector = shape[_VECTOR_AXIS] > 1
        stored = header.stored.str[1:] if header.stored is not None else ""
        if (
            not header.single
            or stored not in _PIXELS
            or len(shape) > _VECTOR_AXIS + 1
            or min(shape) < 1
            or (vector and (shape[_SPATIAL] > 1 or header.intent != _VECTOR_INTENT))
            or header.intent in _REORDERED_INTENTS
        ):
            return None
        least = header.header_bytes + 4
        # Written so that a NaN is out of bounds as well.
        if not least <= header.offset_bytes <= least + PLAIN_EXTENSION_BYTES:
            return None
        scale: tuple[float, float] | None = (header.slope, header.intercept)
        if scale in {(0.0, 0.0), (1.0, 0.0)}:
            scale = None
        elif not _can_scale(header):
            return None
        return cls(
            stored=stored,
            order=header.order,
            shape=(shape[_VECTOR_AXIS if vector else _SPATIAL], shape[0], shape[1], shape[2]),
            vector=vector,
            offset_bytes=int(header.offset_bytes),
            scale=scale,
        )

    @property
    def pixel(self) -> int:
        """SimpleITK's name of the type that it makes of the voxels."""
        kind = "f4" if self.scale is not None and self.stored != "f8" else self.stored
        return int(getattr(SimpleITK, f"sitk{'Vector' if self.vector else ''}{_PIXELS[kind]}"))

    @property
    def size_bytes(self) -> int:
        """Bytes of the voxels as they are stored."""
        return prod(self.shape) * np.dtype(self.stored).itemsize


def _can_scale(header: NiftiHeader) -> bool:
    """Tell whether scaled numbers come out the same here.

    SimpleITK's factor and sum may be fused into one operation, which rounds once less, where the
    processor's baseline has it; that of x86-64 has not.
    """
    slope, intercept = header.slope, header.intercept
    return (
        platform.machine() in {"x86_64", "AMD64"}
        and _LEAST_SLOPE < abs(slope) < float("inf")
        and (slope != 1 or abs(intercept) > _LEAST_SLOPE)
        and abs(intercept) < float("inf")
    )


class _Inflated(io.RawIOBase):
    """The inflated bytes of a gzip file, member after member, each checked at its end."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._member = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_GZIP)
        self._input = b""

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - whatever has the buffer protocol
        """Fill the beginning of a buffer; return how much, 0 at the end of all members."""
        while not self._member.eof or self._next_member():
            if not self._input and self._member.needs_input:
                self._input = self._file.read(_CHUNK_BYTES)
                if not self._input:
                    raise EOFError("its compressed data are cut off")
            found = self._member.decompress(self._input, len(buffer))
            self._input = b""
            if found:
                buffer[: len(found)] = found
                return len(found)
        return 0

    def _next_member(self) -> bool:
        """Go on to a member that follows; whatever else follows is nobody's."""
        rest = self._member.unused_data + self._file.read(_CHUNK_BYTES)
        if not rest.startswith(GZIP):
            return False
        self._member = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_GZIP)
        self._input = rest
        return True

    def check_end(self) -> None:
        """Check the member that was read last, if it ends here or within 64 KiB."""
        beyond = memoryview(bytearray(_BEYOND_BYTES))
        while beyond and not self._member.eof:
            beyond = beyond[self.readinto(beyond) :]


def read_nifti(volume: VolumeFile, name: str) -> tuple[torch.Tensor, Any] | None:
    """Read a NIfTI file as TorchIO does, or return None where that is not certain.

    What follows the voxels that the header states is not read, as SimpleITK does; the checksum of
    a gzip member that goes on for more than 64 KiB behind them is therefore not checked.

    Args:
        volume: A local file, whose header states no more than there is RAM for.
        name: What the file is called, for messages.

    Returns:
        The voxels, shape ``(C, I, J, K)``, in C order, and the affine, 4 x 4, float64; or None:
        TorchIO's own reader is to read it.

    Raises:
        DamagedImageError: The file holds less than its header states, or its compressed data are
            damaged. Also said of a file that TorchIO is to read, as far as its type is known.
    """
    layout = _Layout.of(volume.nifti) if volume.nifti is not None else None
    if layout is None:
        return None
    path = volume.path
    with path.open("rb", buffering=0) as file:
        compressed = file.read(len(GZIP)) == GZIP
        file.seek(0)
        if compressed != path.name.lower().endswith(".gz"):
            return None
        affine = _read_affine(path, layout)
        source = _Inflated(file) if compressed else file
        try:
            _skip(source, layout.offset_bytes)
            if affine is None:
                _skip(source, layout.size_bytes)
            else:
                tensor = _read_voxels(source, layout)
            if isinstance(source, _Inflated):
                source.check_end()
        except _DAMAGES as error:
            raise DamagedImageError(
                f"Cannot load {name}: {str(error).rstrip('.')}. Its header states "
                f"{format_size(layout.size_bytes)} ({layout.size_bytes} bytes) of voxels; the file "
                f"has {format_size(path.stat().st_size)}. Likely it is damaged: leave the unit out."
            ) from error
    return None if affine is None else (tensor, affine)


def _read_affine(path: Path, layout: _Layout) -> Any:  # noqa: ANN401 - TorchIO's own
    """Return the affine as SimpleITK reads it, or None where it sees another image than we."""
    reader: Any = SimpleITK.ImageFileReader()  # type: ignore[no-untyped-call]
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    channels, *spatial = layout.shape
    seen = [*spatial, 1 if layout.vector else channels]
    size = list(reader.GetSize())
    if (
        reader.GetPixelID() != layout.pixel
        or reader.GetNumberOfComponents() != (channels if layout.vector else 1)
        or len(size) not in _DIMENSIONS
        or size + [1] * (len(seen) - len(size)) != seen
        or not all(0 < spacing < float("inf") for spacing in reader.GetSpacing())
    ):
        return None
    affine = get_ras_affine_from_sitk(reader)
    # It refuses to read the voxels of an image without extent.
    flat = abs(np.linalg.det(affine)) < _LEAST_VOLUME * prod(reader.GetSpacing()[:_SPATIAL])
    return None if flat or not np.isfinite(affine).all() else affine


def _read_voxels(source: io.RawIOBase, layout: _Layout) -> torch.Tensor:
    """Read slabs of slices, and turn each into C order while it is in the processor's cache.

    C order is what TorchIO's reader ends with and what its transforms are fast on; they may round
    otherwise on another. Turning 192**3 int16 took torch's ``contiguous`` and NumPy 28 ms, slabs
    in this way 8 ms (one thread, 2026-11-21): torch turns matrices by blocks, and nothing else.
    """
    channels, rows, columns, slices = layout.shape
    stored = np.dtype(layout.stored)
    depth = max(_SLAB_BYTES // (rows * columns * stored.itemsize), _LEAST_SLICES)
    slab = np.empty((min(depth, slices), columns * rows), stored)
    voxels: torch.Tensor | None = None
    for channel in range(channels):
        for begin in range(0, slices, depth):
            part = slab[: slices - begin]
            _fill(source, part.reshape(-1).view(np.uint8).data)
            if (layout.order == "<") != (sys.byteorder == "little"):
                part.byteswap(inplace=True)
            # Of unsigned numbers torch turns few; their bits are those of signed ones.
            signed = torch.from_numpy(part.view(layout.stored.replace("u", "i")))
            turned = _convert(signed.t().contiguous(), layout)
            if voxels is None:
                voxels = torch.empty(layout.shape, dtype=turned.dtype)
            target = voxels[channel, :, :, begin : begin + len(part)]
            target.copy_(turned.view(columns, rows, len(part)).permute(1, 0, 2))
    assert voxels is not None  # noqa: S101 - there is no dimension below one
    return voxels


def _convert(numbers: torch.Tensor, layout: _Layout) -> torch.Tensor:
    """Return stored numbers as SimpleITK and TorchIO make them."""
    if layout.stored == "u1":
        numbers = numbers.view(torch.uint8)
    elif layout.stored == "u2":
        numbers = numbers.to(torch.int32).bitwise_and_(0xFFFF)
    elif layout.stored == "u4":
        numbers = numbers.to(torch.int64).bitwise_and_(0xFFFFFFFF)
    elif numbers.is_floating_point():
        # The NIfTI library's: what is not finite becomes zero, before it is scaled.
        numbers.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    if layout.scale is None:
        return numbers
    slope, intercept = layout.scale
    # Integers become float32 first and are scaled in float64, as in itk::NiftiImageIO.
    floats = numbers if numbers.is_floating_point() else numbers.to(torch.float32)
    return floats.to(torch.float64).mul_(slope).add_(intercept).to(floats.dtype)


def _fill(source: io.RawIOBase, buffer: memoryview) -> None:
    wanted = len(buffer)
    while buffer:
        count = source.readinto(buffer)
        if not count:
            raise EOFError(f"its voxels end early: {len(buffer)} of {wanted} bytes are missing")
        buffer = buffer[count:]


def _skip(source: io.RawIOBase, size_bytes: int) -> None:
    buffer = memoryview(bytearray(min(size_bytes, _CHUNK_BYTES)))
    for begin in range(0, size_bytes, _CHUNK_BYTES):
        _fill(source, buffer[: size_bytes - begin])
