"""``plan``: a training's costs told beforehand, as tables of 80 columns and as a picture."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from tio_openneuro.annex import AnnexRepo
from tio_openneuro.content import TreeFile
from tio_openneuro.ledger import too_large
from tio_openneuro.plan import Epoch, Training, foresee, ram_budgets, total_bytes
from tio_openneuro.queue import choose_window
from tio_openneuro.ram import FLOAT_BYTES, TransformCost, available_bytes, bound_subject, read_budget
from tio_openneuro.sizes import format_size
from tio_openneuro.volumes import SubjectSize, VolumeFile, has_suffix

# A voxel of a head that is compressed takes about a byte, one that is not two.
_VOXELS_PER_BYTE, _PLAIN_VOXELS_PER_BYTE = 1.0, 0.5
# Loading, ZNormalization and a flip of 192**3 voxels and a label: 0.144 s (2026-11-25).
_SECONDS_PER_VOXEL = 2e-8
# ZNormalization, the hungriest of the usual transforms, in a Compose.
_TRANSFORM = TransformCost(copies=3, voxel_bytes=48)
_BUSY = 0.05
_BAR = 20
_HEADER_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked beside what a :class:`Training` states.

    Attributes:
        units: Bytes of each key of a unit, by its name.
        budget_bytes: Disk budget of each node.
        epochs: Passes over the units.
        ram_budget: Of each process, as the queue's.
        patch_size: Voxels of a patch along each axis.
        remote_rate: Bytes per second that the remote gives at most, to all nodes together.
        voxels_per_byte: Of compressed files.
        options: What a training has beside its units and times.
    """

    units: dict[str, dict[str, int]]
    budget_bytes: int
    epochs: int
    ram_budget: str
    patch_size: int
    remote_rate: float
    voxels_per_byte: float
    options: dict[str, Any]


def answer(question: Question) -> dict[str, Any]:
    """Return what a training will cost, by names for programs."""
    units = list(question.units.values())
    options = question.options
    sizes = {name: sum(files.values()) for name, files in question.units.items()}
    largest = max(sizes, key=sizes.__getitem__)
    if sizes[largest] > question.budget_bytes:
        raise too_large(largest, list(question.units[largest].values()), question.budget_bytes)
    voxels = [_voxels(files, question.voxels_per_byte) for files in units]
    images = max(map(len, units))
    size = SubjectSize(max(voxels), max(voxels) * images, max(voxels) * images * FLOAT_BYTES, images)
    work_bytes = bound_subject(size, _TRANSFORM, 0)
    patch_bytes = question.patch_size**3 * images * FLOAT_BYTES
    ram_bytes = read_budget(question.ram_budget, available_bytes())
    ...
