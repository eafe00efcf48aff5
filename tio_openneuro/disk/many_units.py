"""Fetch, evict and adopt many units at once, for people at a prompt rather than for training.

Owns no state. Only tries to reserve, never waits for room, and never evicts for it what anybody
is known to use.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence

from tio_openneuro.content import UNCLAIMED, ContentFile, ContentId, ContentUnit, mark_of
from tio_openneuro.disk.leases import Leases
from tio_openneuro.disk.store import Fetch, key_of
from tio_openneuro.ledger import Answer, Transaction, refuse_beside
from tio_openneuro.sizes import format_size

_LOGGER = logging.getLogger(__name__)
_LATEST = 1 << 60
_AT_ONCE = 500
_QUEUE_TIMEOUT_S = 600.0
_WAIT_S = 60.0


def fetch(
    leases: Leases,
    units: Sequence[ContentUnit],
    jobs: int,
    on_progress: Callable[[int, int], None] | None,
) -> int:
    """Fetch units in order, as far as there is room: see :meth:`Engine.fetch`."""
    all_files = [leases.store.files_of(unit) for unit in units]
    since = _keep(leases, [content for files in all_files for content in files])
    total_bytes = sum(unit.size_bytes for unit in units)
    done_bytes = 0
    under_way = _UnderWay(leases)
    for unit, files in zip(units, all_files, strict=True):
        started = _begin(leases, unit, files, since)
        if started is None:
            held_bytes, budget_bytes = leases.ledger.unclaimed_bytes(), leases.ledger.binding()[0]
            refuse_beside(held_bytes, unit.name, unit.size_bytes, budget_bytes)
            _LOGGER.info("Stopped fetching at %s: the disk budget is full.", unit.name)
            break
        under_way.fetches += started
        under_way.collect(2 * jobs - 1)
        done_bytes += unit.size_bytes
        if on_progress is not None:
            on_progress(done_bytes, total_bytes)
    under_way.collect(0)
    if under_way.error is not None:
        raise under_way.error
    return under_way.fetched_bytes


class _UnderWay:
    """Fetches that were begun and have not been looked at since they ended."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self.fetches: list[Fetch] = []
        self.fetched_bytes = 0
        self.error: BaseException | None = None

    def collect(self, most: int) -> None:
        """Wait until no more than that many are under way; each ends within its own deadline."""
        while len(self.fetches) > most:
            seen = self._leases.changes.value
            ended = [fetch for fetch in self.fetches if fetch.done.is_set()]
            for fetch in ended:
                self.fetches.remove(fetch)
                if fetch.error is None:
                    self.fetched_bytes += fetch.file.key.size_bytes or 0
                elif fetch.failed:
                    self.error = self.error or fetch.error
            if not ended:
                self._leases.changes.wait_here(seen, _WAIT_S)


def _begin(
    leases: Leases,
    unit: ContentUnit,
    files: dict[ContentId, ContentFile],
    since: int,
) -> list[Fetch] | None:
    """Begin to fetch a unit; return its fetches, or None where there is no room for it."""

    def ask(decide: Transaction, avoid: frozenset[ContentId]) -> Answer:
        wants, spare_bytes = leases.store.wants(files), leases.store.spare_bytes(files.values())
        return decide.request_ahead(
            wants, _LATEST, keep=avoid, spare_bytes=spare_bytes, since=since
        )

    def stalled(_: Answer) -> str:
        return (
            f"Cannot fetch {unit.name} ({unit.size_bytes} bytes): others waited for room for "
            f"{_QUEUE_TIMEOUT_S:.0f} s; {leases.who_leases()}. Raise disk_budget."
        )

    answer = leases.make_room(ask, f"for {unit.name}", set(), _QUEUE_TIMEOUT_S, stalled, unit.name)
    return leases.look_ahead.begin(unit, files, answer) if answer.granted else None


def _keep(leases: Leases, contents: Sequence[ContentId]) -> int:
    """Count content as used just now; return the turn before that, since when all stays."""
    since = 0
    for start in range(0, max(len(contents), 1), _AT_ONCE):
        with leases.ledger.transaction() as decide:
            lease_id = decide.lease("kept", contents[start : start + _AT_ONCE])
        leases.ledger.end_lease(lease_id)
        since = since or lease_id - 1
    return since


def adopt(leases: Leases, units: Iterable[ContentUnit]) -> int:
    """Charge content that was there before: see :meth:`Engine.adopt`."""
    files = {c: file for unit in units for c, file in leases.store.files_of(unit).items()}
    known = leases.ledger.rows(files)
    wants = [
        want
        for want in leases.store.wants(files)
        if want.located and not leases.store.has_owner(known.get(want.content))
    ]
    lost = _unavailable([files[want.content] for want in wants])
    adopted_bytes = 0
    since = _keep(leases, ())
    kept: set[ContentId] = set()
    for want in wants:
        if want.content.key in lost:
            continue
        ask = functools.partial(Transaction.request_adoption, want=want, since=since)
        answer = leases.look_ahead.make_way(ask, "for adopted content", kept)
        if not answer.granted:
            _LOGGER.warning(
                "Adopted %s; the rest does not fit into the disk budget and stays yours.",
                format_size(adopted_bytes),
            )
            break
        file = files[want.content]
        path = file.repo.locate(file.key)
        if path is not None:
            leases.ledger.arrived(want.content, mark_of(path, file.repo.path))
        adopted_bytes += want.size_bytes
    return adopted_bytes


def claim(leases: Leases) -> int:
    """Hand all content of which nobody knows whose it is to the budget: return the bytes."""
    files = {}
    for row in leases.ledger.rows().values():
        repo, path = leases.store.repo_of(row.content.clone), leases.store.whole(row)
        if row.mark == UNCLAIMED and repo is not None and path is not None:
            files[row.content] = ContentFile(repo, key_of(row.content), row.content.key)
    lost = _unavailable(files.values())
    claimed_bytes = 0
    for content, file in files.items():
        path = file.repo.locate(file.key)
        if path is not None and content.key not in lost:
            leases.ledger.arrived(content, mark_of(path, file.repo.path))
            claimed_bytes += path.stat().st_size
    return claimed_bytes


def _unavailable(files: Iterable[ContentFile]) -> set[str]:
    """Return the keys that no remote can give back; each is asked for once."""
    found = set()
    by_repo: dict[int, list[ContentFile]] = {}
    for file in files:
        by_repo.setdefault(id(file.repo), []).append(file)
    for group in by_repo.values():
        for key, reason in group[0].repo.gone([file.key for file in group]).items():
            _LOGGER.warning("Not adopted, since it could not be fetched again: %s: %s", key, reason)
            found.add(key.name)
    return found
