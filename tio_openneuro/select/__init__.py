"""Which files make up which unit: BIDS names, patterns, combinations, tables.

Owns no state. Promises that a unit's images do not depend on the order of files. Never reads
content, and knows no annex.
"""

from tio_openneuro.select.bids import Sidecars, parse_path
from tio_openneuro.select.participants import Participants, decode_text, unique_headers
from tio_openneuro.select.patterns import IMAGE_EXTENSIONS, Label, Scalar
from tio_openneuro.select.selection import (
    OnIncomplete,
    OnMissing,
    OnMultiple,
    SelectedUnit,
    Selection,
    check_images,
    select,
)
from tio_openneuro.select.units import Skipped, Unit

__all__ = [
    "IMAGE_EXTENSIONS",
    "Label",
    "OnIncomplete",
    "OnMissing",
    "OnMultiple",
    "Participants",
    "Scalar",
    "SelectedUnit",
    "Selection",
    "Sidecars",
    "Skipped",
    "Unit",
    "check_images",
    "decode_text",
    "parse_path",
    "select",
    "unique_headers",
]
