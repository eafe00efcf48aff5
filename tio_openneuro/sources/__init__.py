"""From an accession, URL, clone or folder to a catalog of files.

Owns clones and which remotes are trusted. Promises that what a stranger's repository says starts
nothing. Never fetches image content.
"""

from tio_openneuro.sources.catalog import Catalog, open_catalog, read_file, read_texts
from tio_openneuro.sources.install import forget

__all__ = [
    "Catalog",
    "forget",
    "open_catalog",
    "read_file",
    "read_texts",
]
