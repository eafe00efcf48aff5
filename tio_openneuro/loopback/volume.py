"""What can be published as a file: bytes, text, another file, or a volume written as NIfTI."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_WRITTEN_AS = {"b1": "u1", "i8": "i4", "u8": "u4", "f2": "f4"}


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """A volume to be written as NIfTI.

    Attributes:
        array: Shape ``(I, J, K)`` or ``(I, J, K, T)``. What NIfTI readers take badly is written
            as the nearest type that they take: bool as uint8, 64-bit integers as 32-bit ones,
            float16 as float32.
        affine: Shape ``(4, 4)``, voxel to RAS+ millimetres.
    """

    array: NDArray[np.generic]
    affine: NDArray[np.float64]


Content: TypeAlias = Volume | bytes | str | Path


def write_content(content: Content, path: Path) -> None:
    """Write a file; the same content gives the same bytes.

    Args:
        content: A volume (gzipped where the path says ``.gz``), bytes, text (as UTF-8), or the
            path of a file to copy.
        path: The file to write, in a folder that exists.
    """
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    elif isinstance(content, str):
        path.write_bytes(content.encode())
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        _write_volume(content, path)


def _write_volume(volume: Volume, path: Path) -> None:
    import nibabel

    kind = volume.array.dtype.str[1:]
    array = volume.array.astype(_WRITTEN_AS.get(kind, kind), copy=False)
    image: Any = nibabel.nifti1.Nifti1Image  # nibabel states no types
    nifti = image(array, volume.affine)
    nifti.header.set_xyzt_units("mm")
    nifti.to_filename(path)
