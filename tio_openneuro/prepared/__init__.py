"""Deterministic preprocessing done once, and its results read box by box.

Owns the format of a prepared volume, and its name, which holds all that the result may depend on.
Promises the very subject that ``preprocess`` returned, and mends any damage. Never waits for room.
"""

from tio_openneuro.prepared.file import DamagedVolumeError
from tio_openneuro.prepared.preparation import Preparation

__all__ = ["DamagedVolumeError", "Preparation"]
