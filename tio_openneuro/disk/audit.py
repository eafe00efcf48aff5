"""Compare ledger and disk, both ways, and mend what a killed process left.

Owns no state. Reports only what stays so on a second look: processes at work change both. What a
repair cannot tell to be ours stays on disk.
"""

from __future__ import annotations

from tio_openneuro.content import ContentId
from tio_openneuro.disk.prepared_volumes import PreparedRepo
from tio_openneuro.disk.store import FOLDER, UNSEEN, Store, key_of
from tio_openneuro.ledger import ContentRow, ContentState, Ledger, Want


def audit(ledger: Ledger, store: Store, *, repair: bool) -> list[str]:
    """Return what is wrong between ledger and disk; with ``repair`` mend it first.

    Args:
        ledger: The root's ledger; dead owners are reaped.
        store: The clones.
        repair: Whether to mend what can be mended.
    """
    ledger.reap()
    if repair:
        for row in _suspects(ledger, store):
            _mend(ledger, store, row)
        for content, _ in _unknown_partials(ledger, store):
            _charge(ledger, store, content)
        ledger.stray_locks(remove=True)
    found = [
        f"process {owner.pid} ended and left its reservations and leases" for owner in ledger.dead()
    ]
    found += ledger.miscounted(repair=repair)
    suspects = _suspects(ledger, store)
    found += [_describe(row, store) for row in suspects]
    told = {row.content for row in suspects}
    found += [
        f"{content.clone}: {size_bytes} bytes of {content.key}, unfinished, spoilt or prepared, "
        f"are not charged"
        for content, size_bytes in _unknown_partials(ledger, store)
        if content not in told
    ]
    return found + [f"{name} is the lock of no owner" for name in ledger.stray_locks(remove=False)]


def _suspects(ledger: Ledger, store: Store) -> list[ContentRow]:
    """Return the rows that the disk contradicts, twice, without having changed between."""
    rows = ledger.rows()
    partials = _partials(store, {content.clone for content in rows})
    suspects = [row for row in rows.values() if not _is_sound(row, store, partials)]
    again = ledger.rows(row.content for row in suspects)
    partials = _partials(store, {row.content.clone for row in suspects})
    return [
        row
        for row in suspects
        if again.get(row.content) == row and not _is_sound(row, store, partials)
    ]


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


def _is_sound(row: ContentRow, store: Store, partials: dict[ContentId, int]) -> bool:
    """Return whether the disk has what the row says."""
    repo = store.repo_of(row.content.clone)
    if repo is None:
        return False
    path = repo.locate(key_of(row.content))
    if row.state is ContentState.PRESENT:
        ours = path is not None and store.is_ours(row, path)
        return ours and path is not None and path.stat().st_size == row.size_bytes
    if row.owner_id:
        return True
    # Nobody works on it: a download kept for later is sound, as long as it is charged whole.
    held_bytes = partials.get(row.content, 0)
    return row.state is ContentState.RESERVED and path is None and held_bytes <= row.size_bytes


def _describe(row: ContentRow, store: Store) -> str:
    repo = store.repo_of(row.content.clone)
    where = f"{row.content.clone}: {row.content.key} ({row.size_bytes} bytes charged)"
    if repo is None:
        return f"{where}: {UNSEEN.format(row.content.clone)}"
    path = repo.locate(key_of(row.content))
    if path is not None and not store.is_ours(row, path):
        return f"{where} was replaced by a file that is not this library's"
    there = "absent" if path is None else f"whole, {path.stat().st_size} bytes"
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
    found = _partials(store, ours)
    for clone in ours:
        repo = store.repo_of(clone)
        if isinstance(repo, PreparedRepo):
            found |= {ContentId(clone, each.key_name): each.size_bytes for each in repo.stored()}
    known = ledger.rows(found)
    suspects = {
        content: size_bytes
        for content, size_bytes in found.items()
        # What lies beside whole content is not charged either.
        if content not in known
        or (known[content].state is ContentState.PRESENT and content.clone != FOLDER)
    }
    again = _partials(store, {content.clone for content in suspects})
    whole = [each for each in suspects if each.clone == FOLDER]
    return [(c, size) for c, size in suspects.items() if c in whole or again.get(c) == size]


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
