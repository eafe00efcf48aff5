"""``DataladSubjectsDataset``: subjects whose images are fetched on demand.

Owns rows, views, splits and batches. Promises that no lease outlives a call. Never fetches before
an image is asked for.
"""

from tio_openneuro.dataset.batches import subject_bytes
from tio_openneuro.dataset.concatenation import concat
from tio_openneuro.dataset.dataset import DataladSubjectsDataset
from tio_openneuro.dataset.rows import Origin

__all__ = ["DataladSubjectsDataset", "Origin", "concat", "subject_bytes"]
