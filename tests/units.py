"""Content of a clone of ours, for what the engine holds of it."""

from tio_openneuro.annex.repo import AnnexRepo
from tio_openneuro.annex.tree import index_tree
from tio_openneuro.content import AnnexKey, ContentFile, ContentUnit


def units_of(repo: AnnexRepo) -> list[ContentUnit]:
    """Return a unit for each file."""
    files = index_tree(repo.path, "refs/tags/1.0.0")
    return [
        ContentUnit(f.path, (ContentFile(repo, f.key, f.path),)) for f in files if f.key is not None
    ]


def key_of(unit: ContentUnit) -> AnnexKey:
    """Return the key of a unit's first file."""
    return unit.files[0].key
