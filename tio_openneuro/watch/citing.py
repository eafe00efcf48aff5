"""Whose a dataset is, and how to cite it: what its description says, of which nothing is believed.

Owns no state; reads one file that git holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from tio_openneuro.bounds import parse_json
from tio_openneuro.dataset import Origin
from tio_openneuro.errors import TioOpenNeuroError
from tio_openneuro.sources import read_file

_LONGEST = 2000
_MOST = 100
_NOTHING = {"", "n/a", "none", "todo"}


def describe(part: Origin) -> Iterator[tuple[str, str]]:
    """Tell name, version, licence and citation of a dataset, and what its authors ask for.

    Source: BIDS 1.10, "dataset_description.json"; OpenNeuro's "How to cite".
    """
    fields: Any = None
    # It may have none, or none that can be read: its authors are to be asked.
    with suppress(TioOpenNeuroError, ValueError, OSError):
        text = read_file(part.folder, part.commit, "dataset_description.json")
        fields = parse_json(text.decode("utf-8-sig"), part.folder)
    said = {name: _texts(text) for name, text in fields.items()} if isinstance(fields, dict) else {}
    title, doi = "; ".join(said.get("Name", ())), "; ".join(said.get("DatasetDOI", ()))
    authors = "; ".join(said.get("Authors", ()))
    where = f"doi:{doi.removeprefix('doi:')}" if doi else f"commit {part.commit or 'unknown'}"
    cite = [authors, title, f"OpenNeuro, {part.dataset_id} {part.version} [dataset]", where]
    yield "dataset", f"{part.dataset_id}: {title or 'without a title'}"
    yield "version", f"{part.version or 'none'}, commit {part.commit or 'none'}"
    yield "licence", "; ".join(said.get("License", ())) or "not stated: ask its authors"
    yield "cite", ". ".join(text.rstrip(".") for text in cite if text)
    for wish in (*said.get("HowToAcknowledge", ()), *said.get("ReferencesAndLinks", ())):
        yield "authors ask", wish


def _texts(said: object) -> list[str]:
    """Return what a field says, as a few texts of bounded length."""
    texts = said[:_MOST] if isinstance(said, list) else [said]
    cut = (text if isinstance(text, str) else json.dumps(text) for text in texts if text)
    return [
        text
        for text in (" ".join(t[:_LONGEST].split()) for t in cut)
        if text.lower() not in _NOTHING
    ]
