"""Compare ledger and disk, both ways, and mend what a killed process left.

Owns no state. Reports only what stays so on a second look: processes at work change both. What a
repair cannot tell to be ours stays on disk.
"""

from __future__ import annotations

from contextlib import suppress

from tio_openneuro.content import ContentId
from tio_openneuro.disk.prepared_volumes import PreparedRepo
from tio_openneuro.disk.store import FOLDER, UNSEEN, Store, key_of
from tio_openneuro.ledger import ContentRow, ContentState, Ledger, Want

_LOOKS = 2


def audit(ledger: Ledger, store: Store, *, repair: bool) -> list[str]:
    """Return what is wrong between ledger and disk; with ``repair`` mend it first.

    Args:
        ledger: The root's ledger; dead owners are reaped.
        store: The clones.
        repair: Whether to mend what can be mended.
    """
    ledger.reap()
    if repair:
        for row, _ in _suspects(ledger, store):
            _mend(ledger, store, row)
        for content, _ in _unknown_partials(ledger, store):
            _charge(ledger, store, content)
        ledger.stray_locks(remove=True)
    found = [
        f"process {owner.pid} ended and left its reservations and leases" for owner in ledger.dead()
    ]
    found += ledger.miscounted(repair=repair)
    suspects = _suspects(ledger, store)
    found += [why for _, why in suspects]
    told = {row.content for row, _ in suspects}
    found += [
        f"{content.clone}: {size_bytes} bytes of {content.key}, unfinished, spoilt or prepared, "
        f"are not charged"
        for content, size_bytes in _unknown_partials(ledger, store)
        if content not in told
    ]
    return found + [f"{name} is the lock of no owner" for name in ledger.stray_locks(remove=False)]


def _suspects(ledger: Ledger, store: Store) -> list[tuple[ContentRow, str]]:
    """Return the rows that the disk contradicts and why, twice, with the ledger as it was before.

    Others act between any two looks: a row that is the same before and after one was so meanwhile.
    """
    rows, why = ledger.rows(), {}
    for _ in range(_LOOKS):
        partials = _partials(store, {content.clone for content in rows})
        told = {content: _complaint(row, store, partials) for content, row in rows.items()}
        why = {content: said for content, said in told.items() if said}
        again = ledger.rows(why)
        rows = {content: rows[content] for content in why if again.get(content) == rows[content]}
    return [(row, why[content]) for content, row in rows.items()]


def _partials(store: Store, clones: set[str]) -> dict[ContentId, int]:
    """Return the unfinished downloads that lie in these clones, with their bytes."""
    found: dict[ContentId, int] = {}
    for clone in clones:
        repo = store.repo_of(clone)
        for stored in repo.stored() if repo is not None else ():
            if stored.partial:
                content = ContentId(clone, stored.key_name)
                found[content] = found.get(content, 0) + stored.size_bytes
    return found


def _complaint(row: ContentRow, store: Store, partials: dict[ContentId, int]) -> str:
    """Return how the disk contradicts a row; empty where it has what the row says."""
    where = f"{row.content.clone}: {row.content.key} ({row.size_bytes} bytes charged)"
    repo = store.repo_of(row.content.clone)
    if repo is None:
        return f"{where}: {UNSEEN.format(row.content.clone)}"
    path = repo.locate(key_of(row.content))
    size_bytes, ours = None, True
    with suppress(FileNotFoundError):  # Dropped in between: absent.
        if path is not None:
            ours, size_bytes = store.is_ours(row, path), path.stat().st_size
    if row.state is ContentState.PRESENT:
        sound = ours and size_bytes == row.size_bytes
    else:
        # What nobody works on, a download kept for later, is sound while it is charged whole.
        kept = row.state is ContentState.RESERVED and size_bytes is None
        sound = bool(row.owner_id) or (kept and partials.get(row.content, 0) <= row.size_bytes)
    if sound:
        return ""
    if not ours:
        return f"{where} was replaced by a file that is not this library's"
    there = "absent" if size_bytes is None else f"whole, {size_bytes} bytes"
    return f"{where} is recorded as {row.state} and is {there}"


def _mend(ledger: Ledger, store: Store, row: ContentRow) -> None:
    """Make ledger and disk agree about one row."""
    repo = store.repo_of(row.content.clone)
    if repo is None:
        return
    path = repo.locate(key_of(row.content))
    if row.state is ContentState.RESERVED and path is not None:
        if path.stat().st_size == row.size_bytes:
            store.take_in(row.content, path)
            return
    elif row.state is not ContentState.DROPPING and path is None:
        # An object of another size is not located, and takes room all the same.
        if store.is_own(row.content.clone):
            repo.discard_spoilt(key_of(row.content), everywhere=True)
            repo.discard_partial(key_of(row.content))
        if not row.leased:
            ledger.disowned(row.content)
        return
    with ledger.transaction() as decide:
        marked = decide.give_up([row.content])
    store.drop([given.content for given in marked], "to mend the ledger")


def _unknown_partials(ledger: Ledger, store: Store) -> list[tuple[ContentId, int]]:
    """Return downloads in our own clones, and prepared volumes, that the ledger does not charge."""
    ours = {clone for clone in ledger.clones() if store.is_own(clone)}
    found: dict[ContentId, tuple[int, ContentRow | None]] = {}
    for look in range(_LOOKS):
        sizes = _partials(store, ours)
        repo = store.repo_of(FOLDER) if FOLDER in ours else None
        if isinstance(repo, PreparedRepo):
            sizes |= {ContentId(FOLDER, each.key_name): each.size_bytes for each in repo.stored()}
        known = ledger.rows(sizes)
        now = {content: (size_bytes, known.get(content)) for content, size_bytes in sizes.items()}
        found = {
            content: (size_bytes, row)
            for content, (size_bytes, row) in now.items()
            # What lies beside whole content is not charged either.
            if (row is None or (row.state is ContentState.PRESENT and content.clone != FOLDER))
            and (not look or found.get(content) == (size_bytes, row))
        }
    return [(content, size_bytes) for content, (size_bytes, _) in found.items()]


def _charge(ledger: Ledger, store: Store, content: ContentId) -> None:
    """Charge a download that nobody charges, or clear it away where it does not fit."""
    key = key_of(content)
    repo = store.repo_of(content.clone)
    if isinstance(repo, PreparedRepo):
        repo.drop(key)
        return
    if repo is not None:
        repo.discard_spoilt(key, everywhere=True)
    held_bytes = _partials(store, {content.clone}).get(content, 0)
    if not held_bytes:
        return
    if content in ledger.rows([content]) and repo is not None:
        repo.discard_partial(key)
        return
    want = Want(content, max(key.size_bytes or 0, held_bytes), located=False)
    with ledger.transaction() as decide:
        adopted = decide.adopt(want)
    if not adopted and repo is not None:
        repo.discard_partial(key)
