"""Headers and voxels of NIfTI and MGH files.

Owns the fast reader and the sizes that headers state. Promises to refuse what is damaged instead
of inventing voxels. Never reads more than it must to know a size.
"""

from tio_openneuro.volumes.headers import (
    ImageSize,
    SubjectSize,
    VolumeFile,
    announce_files,
    listening,
    refuse_bomb,
    sum_sizes,
)
from tio_openneuro.volumes.reader import read_nifti

__all__ = [
    "ImageSize",
    "SubjectSize",
    "VolumeFile",
    "announce_files",
    "listening",
    "read_nifti",
    "refuse_bomb",
    "sum_sizes",
]
