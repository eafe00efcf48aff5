"""Prepared volumes within the budget: keep one where there is room, lease one that is there.

Owns no state. A convenience: it only ever tries to reserve, evicts nothing that is used sooner
or that saves more time for its bytes, and never waits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tio_openneuro.content import ContentFile, ContentUnit
from tio_openneuro.disk.leases import Runtime
from tio_openneuro.disk.prepared_store import PreparedRepo
from tio_openneuro.errors import LedgerError
from tio_openneuro.ledger import ContentState, Want, is_worth_room
from tio_openneuro.sizes import format_size

_LOGGER = logging.getLogger(__name__)
_LATEST = 1 << 60
_TRIES = 4


@contextmanager
def lease(runtime: Runtime, unit: ContentUnit, file: ContentFile) -> Iterator[Path | None]:
    """Hold a unit's prepared volume while the block runs: see :meth:`Engine.lease_prepared`."""
    if file.repo.locate(file.key) is None:
        yield None
        return
    content = runtime.store.content_of(file)
    lease_id = runtime.ledger.try_lease(unit.name, content)
    if not lease_id:
        yield None
        return
    try:
        # Only now: a use that is not begun stays in the order, for the lease of the files.
        position = runtime.prefetcher.take(unit, runtime.store.files_of(unit))
        if position is not None:
            runtime.ledger.reach(position)
        runtime.counters.hit(1)
        yield file.repo.locate(file.key)
    finally:
        runtime.end_lease(lease_id)


def keep(
    runtime: Runtime, unit: ContentUnit, file: ContentFile, data: bytes, prepare_s: float
) -> bool:
    """Write a prepared volume if there is room for it: see :meth:`Engine.keep_prepared`."""
    repo = file.repo
    if not isinstance(repo, PreparedRepo):
        message = f"Cannot keep a prepared volume in {repo.path}: it is a clone."
        raise LedgerError(message)
    content = runtime.store.content_of(file)
    fetch_s = runtime.counters.seconds_per_byte() * unit.size_bytes
    worth = is_worth_room(unit.size_bytes, len(data), fetch_s=fetch_s, prepare_s=prepare_s)
    steps = (runtime.prefetcher.steps_to(unit.name) or _LATEST) if worth else None
    instead = frozenset(runtime.store.files_of(unit))
    with runtime.prefetcher.held():
        for _ in range(_TRIES):
            row = runtime.ledger.rows([content]).get(content)
            if row is not None:
                if row.state is not ContentState.RESERVED or row.owner_id:
                    return False
                # What a killed process left of writing it.
                given = runtime.ledger.give_up([content])
                runtime.store.drop([each.content for each in given], "left by a process that died")
                continue
            outcome = runtime.ledger.request_keep(
                Want(content, len(data), located=False),
                instead,
                steps=steps,
                spare=runtime.store.spare_bytes([file]),
            )
            if outcome.granted:
                kept = _write(runtime, repo, file, data)
                if kept:
                    runtime.prefetcher.prepared(unit, worth=worth)
                return kept
            if not outcome.victims:
                break
            runtime.prefetcher.lost(outcome.victims)
            runtime.store.drop(outcome.victims, f"for {unit.name}, prepared")
    _LOGGER.info(
        "Not kept: %s, prepared (%s): no room in the disk budget that is worth less.",
        unit.name,
        format_size(len(data)),
    )
    return False


def _write(runtime: Runtime, repo: PreparedRepo, file: ContentFile, data: bytes) -> bool:
    """Write what was reserved just now; on failure clear it away, then return its room."""
    content = runtime.store.content_of(file)
    try:
        # A file that no ledger knew, before it takes room beside the new one.
        repo.drop(file.key)
        repo.write(file.key, data)
    except OSError as error:
        _LOGGER.warning("Could not keep %s: %s", content.key, error)
        repo.drop(file.key)
        runtime.ledger.failed(content, empty=True)
        return False
    except BaseException:
        repo.drop(file.key)
        runtime.ledger.failed(content, empty=True)
        raise
    runtime.ledger.arrived(content)
    runtime.signal.notify()
    _LOGGER.info("Kept %s (%s).", content.key, format_size(len(data)))
    return True
