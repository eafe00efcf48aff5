"""The only place that touches TorchIO's private names.

Owns images that are fetched on demand, seeded draws, box crops, sampler maps, transforms in place,
and the identity of a transform. Promises TorchIO's own bits. Never schedules.
"""

from tio_openneuro.torchio_seams.box_crop import reads_boxes
from tio_openneuro.torchio_seams.costs import knows_cost, measure_subject, trace_transform
from tio_openneuro.torchio_seams.fingerprint import (
    UnpinnedError,
    identify,
    identify_items,
    identify_parts,
    pin,
)
from tio_openneuro.torchio_seams.images import (
    FetchedImage,
    FetchedLabelMap,
    FetchedScalarImage,
    FetchedSubject,
    ImageFiles,
    Metadata,
    ReadSidecars,
)
from tio_openneuro.torchio_seams.in_place import get_subject, transform_in_place
from tio_openneuro.torchio_seams.parts import walk_parts
from tio_openneuro.torchio_seams.private_names import (
    is_loaded,
    leave_unfilled,
    reserved_names,
    share_subjects,
    transform_of,
)
from tio_openneuro.torchio_seams.randomness import (
    CancelledWorkError,
    drawing_from,
    find_other_generator,
    install_seed_guard,
    refuse_random,
)
from tio_openneuro.torchio_seams.sampler_maps import (
    KeptMaps,
    SamplerMap,
    draw_patches,
    has_map,
    map_bytes,
)

__all__ = [
    "CancelledWorkError",
    "FetchedImage",
    "FetchedLabelMap",
    "FetchedScalarImage",
    "FetchedSubject",
    "ImageFiles",
    "KeptMaps",
    "Metadata",
    "ReadSidecars",
    "SamplerMap",
    "UnpinnedError",
    "draw_patches",
    "drawing_from",
    "find_other_generator",
    "get_subject",
    "has_map",
    "identify",
    "identify_items",
    "identify_parts",
    "install_seed_guard",
    "is_loaded",
    "knows_cost",
    "leave_unfilled",
    "map_bytes",
    "measure_subject",
    "pin",
    "reads_boxes",
    "refuse_random",
    "reserved_names",
    "share_subjects",
    "trace_transform",
    "transform_in_place",
    "transform_of",
    "walk_parts",
]
