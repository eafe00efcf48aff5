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
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, cast

import nibabel
import numpy as np
import SimpleITK
import torch
from isal import igzip_lib
from torchio.data.io import get_ras_affine_from_sitk

from tio_openneuro.errors import DamagedImageError
from tio_openneuro.sizes import format_size
from tio_openneuro.volumes.headers import (
    GZIP,
    LEAVE_OUT,
    PLAIN_EXTENSION_BYTES,
    VOLUME_SUFFIXES,
    NiftiHeader,
    VolumeFile,
    has_suffix,
)

# 64 kB to 1 MB make no difference (2026-11-21).
_CHUNK_BYTES = 1 << 18
_BEYOND_BYTES = 1 << 16
# Best of 0.3 to 9 MB for 192**3 and 256 x 256 x 180 voxels of 1, 2 and 4 bytes (2026-11-21).
_SLAB_BYTES = 2_400_000
_LEAST_SLICES = 32
_SPATIAL = 3
_LEAST_VOLUME = 1e-3
_DIMENSIONS = range(2, 5)
# Codes of NIfTI: SimpleITK reorders symmetric matrices, and turns displacements round.
_REORDERED_INTENTS = frozenset({1005, 1006})
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
# SimpleITK's factor and sum may be fused into one operation, which rounds once less, where the
# processor's baseline has it; that of x86-64 has not.
_UNFUSED = frozenset({"x86_64", "AMD64"})
# isal's stubs have its error for an instance.
_DAMAGES: tuple[type[Exception], ...] = (EOFError, cast("type[Exception]", igzip_lib.error))


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
    header, path = volume.nifti, volume.path
    if header is None:
        return None
    volume.refuse_fault(name)
    if not header.single:
        return None
    with path.open("rb", buffering=0) as file:
        compressed = file.read(len(GZIP)) == GZIP
        file.seek(0)
        if compressed != has_suffix(path, ".gz"):
            return None
        affine = _read_affine(path, header)
        source = _Inflated(file) if compressed else file
        try:
            _skip(source, int(header.offset_bytes))
            if affine is None:
                _skip(source, header.size_bytes)
            else:
                tensor = _read_voxels(source, header)
            if isinstance(source, _Inflated):
                source.check_end()
        except _DAMAGES as error:
            raise DamagedImageError(
                f"Cannot load {name}: {str(error).rstrip('.')}. Its header states "
                f"{format_size(header.size_bytes)} ({header.size_bytes} bytes) of voxels; the file "
                f"has {format_size(path.stat().st_size)}. {LEAVE_OUT}"
            ) from error
    return None if affine is None else (tensor, affine)


def read_grid(volume: VolumeFile) -> tuple[tuple[int, int, int, int], Any] | None:
    """Return shape and affine of what :func:`read_nifti` would return, by the header alone."""
    header = volume.nifti
    affine = None if header is None else _read_affine(volume.path, header)
    return None if header is None or affine is None else (header.tensor_shape, affine)


def read_volume(
    volume: VolumeFile, name: str, read: Callable[[Path], tuple[torch.Tensor, Any]]
) -> tuple[torch.Tensor, Any]:
    """Read an image as TorchIO does, sooner where that is certain.

    A NIfTI header that SimpleITK is known to misread, or finds another shape or place in than it
    states, is read by nibabel.

    Args:
        volume: A local file, whose header states no more than there is RAM for.
        name: What the file is called, for messages.
        read: TorchIO's own way to voxels and affine.

    Raises:
        DamagedImageError: It is a NIfTI or MGH file that is gone, cut off or otherwise damaged,
            or whose header cannot be believed.
    """
    if not has_suffix(volume.path, *VOLUME_SUFFIXES):
        return read(volume.path)
    found, header = read_nifti(volume, name), volume.nifti
    try:
        if found is None and (header is None or not header.is_misread):
            found = read(volume.path)
            if header is not None and not header.agrees(found[0].shape, found[1]):
                found = None
        if found is None:
            image: Any = nibabel.load(volume.path, mmap=False)
            voxels = image.get_fdata(dtype=np.float32)
            voxels = voxels.reshape(*[*voxels.shape, 1, 1][:_SPATIAL], -1)
            found = torch.from_numpy(np.moveaxis(voxels, -1, 0)), image.affine
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise DamagedImageError(f"Cannot load {name}: {reason}. {LEAVE_OUT}") from error
    return found


def _read_affine(path: Path, header: NiftiHeader) -> Any:  # noqa: ANN401 - TorchIO's own
    """Return the affine as SimpleITK reads it, or None where it may see another image than we."""
    if (
        header.fault
        or header.is_misread
        or header.stored not in _PIXELS
        or not header.single
        or header.intent in _REORDERED_INTENTS
        or header.offset_bytes > header.header_bytes + 4 + PLAIN_EXTENSION_BYTES
        or (header.scale is not None and platform.machine() not in _UNFUSED)
    ):
        return None
    reader: Any = SimpleITK.ImageFileReader()  # type: ignore[no-untyped-call]
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    channels, *spatial = header.tensor_shape
    seen = [*spatial, 1 if header.is_vector else channels]
    stored = "f4" if header.scale is not None and header.stored != "f8" else header.stored
    pixel = f"sitk{'Vector' if header.is_vector else ''}{_PIXELS[stored]}"
    size = list(reader.GetSize())
    if (
        reader.GetPixelID() != getattr(SimpleITK, pixel)
        or reader.GetNumberOfComponents() != (channels if header.is_vector else 1)
        or len(size) not in _DIMENSIONS
        or size + [1] * (len(seen) - len(size)) != seen
        or not all(0 < spacing < float("inf") for spacing in reader.GetSpacing())
    ):
        return None
    affine = get_ras_affine_from_sitk(reader)
    # It refuses to read the voxels of an image without extent.
    flat = abs(np.linalg.det(affine)) < _LEAST_VOLUME * prod(reader.GetSpacing()[:_SPATIAL])
    return affine if header.agrees(header.tensor_shape, affine) and not flat else None


def _read_voxels(source: io.RawIOBase, header: NiftiHeader) -> torch.Tensor:
    """Read slabs of slices, and turn each into C order while it is in the processor's cache.

    C order is what TorchIO's reader ends with and what its transforms are fast on; they may round
    otherwise on another. Turning 192**3 int16 took torch's ``contiguous`` and NumPy 28 ms, slabs
    in this way 8 ms (one thread, 2026-11-21): torch turns matrices by blocks, and nothing else.
    """
    channels, rows, columns, slices = header.tensor_shape
    stored = np.dtype(header.stored)
    depth = max(_SLAB_BYTES // (rows * columns * stored.itemsize), _LEAST_SLICES)
    slab = np.empty((min(depth, slices), columns * rows), stored)
    voxels: torch.Tensor | None = None
    for channel in range(channels):
        for begin in range(0, slices, depth):
            part = slab[: slices - begin]
            _fill(source, part.reshape(-1).view(np.uint8).data)
            if (header.order == "<") != (sys.byteorder == "little"):
                part.byteswap(inplace=True)
            # Of unsigned numbers torch turns few; their bits are those of signed ones.
            signed = torch.from_numpy(part.view(header.stored.replace("u", "i")))
            turned = _convert(signed.t().contiguous(), header)
            if voxels is None:
                voxels = torch.empty(header.tensor_shape, dtype=turned.dtype)
            target = voxels[channel, :, :, begin : begin + len(part)]
            target.copy_(turned.view(columns, rows, len(part)).permute(1, 0, 2))
    assert voxels is not None  # noqa: S101 - there is no dimension below one
    return voxels


def _convert(numbers: torch.Tensor, header: NiftiHeader) -> torch.Tensor:
    """Return stored numbers as SimpleITK and TorchIO make them."""
    if header.stored == "u1":
        numbers = numbers.view(torch.uint8)
    elif header.stored == "u2":
        numbers = numbers.to(torch.int32).bitwise_and_(0xFFFF)
    elif header.stored == "u4":
        numbers = numbers.to(torch.int64).bitwise_and_(0xFFFFFFFF)
    elif numbers.is_floating_point():
        # The NIfTI library's: what is not finite becomes zero, before it is scaled.
        numbers.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    if header.scale is None:
        return numbers
    slope, intercept = header.scale
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
