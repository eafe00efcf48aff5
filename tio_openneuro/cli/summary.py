"""What a dataset has, told from git metadata alone: for ``info`` and ``plan``.

Owns no state. Fetches no content.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tio_openneuro.bounds import TEXT_BYTES, parse_json
from tio_openneuro.content import AnnexKey
from tio_openneuro.errors import TioOpenNeuroError
from tio_openneuro.roots import refuse_root
from tio_openneuro.select import IMAGE_EXTENSIONS, Label, Scalar, Unit, parse_path, select
from tio_openneuro.sources import Catalog, open_catalog

_SHOWN_REASONS = 10
_DESCRIPTION = "dataset_description.json"
_LONGEST = 200


def is_used(root: Path) -> bool:
    """Tell whether anything was ever kept under a root; refuse what can be none."""
    refuse_root(root.expanduser().absolute())
    return any((root / name).exists() for name in ("ledger", "clones", ".ledger"))


def refuse_unused(root: Path) -> None:
    """Raise where nothing was ever kept under a root: only what fetches makes one."""
    if not is_used(root):
        raise TioOpenNeuroError(
            f"Cannot look into the root {root}: it holds no ledger. Nothing was fetched under it "
            f"yet; give the root of your training with --root or TIO_OPENNEURO_ROOT."
        )


@contextmanager
def opened(source: str, root: Path, version: str | None) -> Iterator[Catalog]:
    """Open a dataset to look at it: a root that is not in use stays so, for a temporary one."""
    if is_used(root):
        yield open_catalog(source, root, version=version)
        return
    with tempfile.TemporaryDirectory(prefix="tio-openneuro-") as folder:
        yield open_catalog(source, Path(folder), version=version)


@dataclass(frozen=True, slots=True)
class SelectionSummary:
    """What patterns select.

    Attributes:
        units: Units selected.
        units_bytes: Bytes of their content, each key once.
        skipped: Units left out.
        skipped_reasons: Why, with the number of units, the most frequent first.
    """

    units: int
    units_bytes: int
    skipped: int
    skipped_reasons: dict[str, int]


@dataclass(frozen=True, slots=True)
class Summary:
    """One dataset at one commit.

    Attributes:
        dataset: Accession, or the name of the repository or folder.
        version: Tag or branch; empty for a plain folder.
        commit: The commit; empty for a plain folder.
        licence: As its description states it; empty where it does not.
        subjects: Number of subjects that have a file.
        sessions: Number of sessions, over all subjects; zero where there are none.
        files: Number of files.
        images: Number of images by suffix, the most frequent first.
        total_bytes: Bytes of annexed content, each key once.
        present_bytes: Those of them that are on disk.
        remotes: Annex remotes that are used.
        unavailable_files: Annexed images that no remote can give.
        unavailable_reasons: Why, with the number of files.
    """

    dataset: str
    version: str
    commit: str
    licence: str
    subjects: int
    sessions: int
    files: int
    images: dict[str, int]
    total_bytes: int
    present_bytes: int
    remotes: tuple[str, ...]
    unavailable_files: int
    unavailable_reasons: dict[str, int]


def summarise(catalog: Catalog) -> Summary:
    """Count what the catalog has."""
    parsed = [parse_path(file.path) for file in catalog.files]
    images = [
        (file, path)
        for file, path in zip(catalog.files, parsed, strict=True)
        if path.extension in IMAGE_EXTENSIONS and (file.key or file.size_bytes is not None)
    ]
    keys = {file.key for file in catalog.files if file.key is not None}
    present = [k for k in keys if catalog.repo is not None and catalog.repo.locate(k) is not None]
    lost = _unavailable(catalog)
    reasons = Counter(lost[file.key] for file, _ in images if file.key in lost)
    return Summary(
        dataset=catalog.dataset_id,
        version=catalog.version,
        commit=catalog.commit,
        licence=_licence(catalog),
        subjects=len({path.subject for path in parsed if path.subject}),
        sessions=len({(p.subject, p.session) for p in parsed if p.subject and p.session}),
        files=len(catalog.files),
        images=dict(Counter(path.suffix or "no suffix" for _, path in images).most_common()),
        total_bytes=sum(key.size_bytes or 0 for key in keys),
        present_bytes=sum(key.size_bytes or 0 for key in present),
        remotes=catalog.repo.remotes if catalog.repo is not None else (),
        unavailable_files=sum(reasons.values()),
        unavailable_reasons=dict(reasons),
    )


def usable_units(
    catalog: Catalog,
    patterns: Mapping[str, Scalar | Label],
    unit: Unit,
    **how: Any,  # noqa: ANN401
) -> tuple[dict[str, dict[str, int]], SelectionSummary]:
    """Return the units that can be had, in the dataset's order, and what is left out.

    Args:
        catalog: The dataset's files.
        patterns: Patterns by image name.
        unit: What one unit is.
        **how: What to do where files are not clear, as :func:`select` has it.

    Returns:
        The bytes of each file by its key, by unit; and how many units there are, and are not.

    Raises:
        SelectionError: The patterns select nothing.
    """
    lost = _unavailable(catalog)
    selection = select(catalog.files, patterns, unit=unit, **how)
    why = Counter(skip.reason for skip in selection.skipped)
    units: dict[str, dict[str, int]] = {}
    for row in selection.rows:
        files = [file for found in row.images.values() for file in found]
        reasons = [lost[f.key] for f in files if f.key is not None and f.key in lost]
        if reasons:
            why[reasons[0]] += 1
        else:
            units[row.unit] = {str(f.key or f.path): f.size_bytes or 0 for f in files}
    sizes = {key: size for contents in units.values() for key, size in contents.items()}
    reasons_shown = dict(why.most_common(_SHOWN_REASONS))
    if rest := why.total() - sum(reasons_shown.values()):
        reasons_shown[f"{len(why) - _SHOWN_REASONS} other reasons"] = rest
    return units, SelectionSummary(len(units), sum(sizes.values()), why.total(), reasons_shown)


def _unavailable(catalog: Catalog) -> dict[AnnexKey, str]:
    """Return the keys that no remote can give, each with the reason."""
    keys = [file.key for file in catalog.files if file.key is not None]
    return catalog.repo.unavailable(keys) if catalog.repo is not None else {}


def _licence(catalog: Catalog) -> str:
    """Return the licence that a dataset's description states."""
    with suppress(KeyError, ValueError, TypeError):
        text = catalog.read([_DESCRIPTION], TEXT_BYTES, TEXT_BYTES)[_DESCRIPTION]
        return str(parse_json(text.decode(), catalog.dataset_id)["License"])[:_LONGEST]
    return ""
