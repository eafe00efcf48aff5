"""Headers and voxels of NIfTI and MGH files.

Owns the fast reader, the sizes that headers state, and the gate that keeps forks apart from ITK's
reading of files. Promises to refuse what is damaged instead
of inventing voxels. Never reads more than it must to know a size.
"""

from tio_openneuro.volumes.headers import (
    FLOAT_BYTES,
    ImageSize,
    SubjectSize,
    VolumeFile,
    announce_files,
    listening,
    refuse_bomb,
    sum_sizes,
)
from tio_openneuro.volumes.reader import read_grid, read_volume
from tio_openneuro.volumes.reading_gate import install_reading_gate

__all__ = [
    "FLOAT_BYTES",
    "ImageSize",
    "SubjectSize",
    "VolumeFile",
    "announce_files",
    "install_reading_gate",
    "listening",
    "read_grid",
    "read_volume",
    "refuse_bomb",
    "sum_sizes",
]
