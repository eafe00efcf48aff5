"""Prepared volumes within the budget: keep one where there is room, lease one that is there.

Owns no state. A convenience: it only ever tries to reserve, evicts nothing that is used sooner
or that saves more time for its bytes, and never waits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tio_openneuro.content import ContentFile, ContentId, ContentUnit
from tio_openneuro.disk.leases import Leases
from tio_openneuro.disk.prepared_store import PreparedRepo
from tio_openneuro.errors import LedgerError
from tio_openneuro.ledger import Answer, Transaction, Want, is_worth_room
from tio_openneuro.sizes import format_size

_LOGGER = logging.getLogger(__name__)
_LATEST = 1 << 60


@contextmanager
def lease(leases: Leases, unit: ContentUnit, file: ContentFile) -> Iterator[Path | None]:
    """Hold a unit's prepared volume while the block runs: see :meth:`Engine.lease_prepared`."""
    if file.repo.locate(file.key) is None:
        yield None
        return
    content = leases.store.content_of(file)
    with leases.ledger.transaction() as decide:
        lease_id = decide.try_lease(unit.name, content)
    if not lease_id:
        yield None
        return
    try:
        # Only now: a use that is not begun stays in the order, for the lease of the files.
        position = leases.look_ahead.take(unit, leases.store.files_of(unit))
        if position is not None:
            leases.look_ahead.reach(position)
        leases.counters.hit(1)
        yield file.repo.locate(file.key)
    finally:
        leases.end_lease(lease_id)


def keep(
    leases: Leases, unit: ContentUnit, file: ContentFile, data: bytes, prepare_s: float
) -> bool:
    """Write a prepared volume if there is room for it: see :meth:`Engine.keep_prepared`."""
    repo = file.repo
    if not isinstance(repo, PreparedRepo):
        message = f"Cannot keep a prepared volume in {repo.path}: it is a clone."
        raise LedgerError(message)
    content = leases.store.content_of(file)
    fetch_s = leases.counters.seconds_per_byte() * unit.size_bytes
    worth = is_worth_room(unit.size_bytes, len(data), fetch_s=fetch_s, prepare_s=prepare_s)
    steps = (leases.look_ahead.steps_to(unit.name) or _LATEST) if worth else None
    instead = frozenset(leases.store.files_of(unit))
    want = Want(content, len(data), located=False)

    def ask(decide: Transaction, kept: frozenset[ContentId]) -> Answer:
        spare_bytes = leases.store.spare_bytes([file])
        return decide.request_prepared(
            want, instead, steps=steps, kept=kept, spare_bytes=spare_bytes
        )

    with leases.look_ahead.held():
        answer = leases.look_ahead.make_way(ask, f"for {unit.name}, prepared", set())
        if answer.granted:
            kept = _write(leases, repo, file, data)
            if kept:
                leases.look_ahead.prepared(unit, worth=worth)
            return kept
    _LOGGER.info(
        "Not kept: %s, prepared (%s): no room in the disk budget that is worth less.",
        unit.name,
        format_size(len(data)),
    )
    return False


def _write(leases: Leases, repo: PreparedRepo, file: ContentFile, data: bytes) -> bool:
    """Write what was reserved just now; on failure clear it away, then return its room."""
    content = leases.store.content_of(file)
    try:
        # A file that no ledger knew, before it takes room beside the new one.
        repo.drop(file.key)
        repo.write(file.key, data)
    except OSError as error:
        _LOGGER.warning("Could not keep %s: %s", content.key, error)
        repo.drop(file.key)
        leases.ledger.failed(content, empty=True)
        return False
    except BaseException:
        repo.drop(file.key)
        leases.ledger.failed(content, empty=True)
        raise
    leases.ledger.arrived(content)
    leases.changes.notify()
    _LOGGER.info("Kept %s (%s).", content.key, format_size(len(data)))
    return True
