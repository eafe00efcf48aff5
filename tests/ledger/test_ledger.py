"""The ledger: rooms, queues, owners and what is refused, on real SQLite and real locks."""

import contextlib
import errno
import os
import shutil
import signal
import sqlite3
import stat
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from fakes import decide
from hypothesis import given, settings
from hypothesis import strategies as st
from workers import Nursery

from tio_openneuro.content import ContentId
from tio_openneuro.errors import DiskBudgetError, LedgerError
from tio_openneuro.ledger import database
from tio_openneuro.ledger.database import make_database, why_lost
from tio_openneuro.ledger.ledger import Ledger
from tio_openneuro.ledger.owners import OwnerLock
from tio_openneuro.ledger.root import (
    FLOOR_BYTES,
    automatic_budget,
    free_bytes,
    prepare_ledger_folder,
)
from tio_openneuro.ledger.schema import SCHEMA_VERSION, TABLES, Answer, ContentState, Want
from tio_openneuro.ledger.transaction import OVERTAKES
from tio_openneuro.roots import network_type

Opening = Callable[..., Ledger]


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a ledger's folder; no content of these tests is on any disk, so nothing is checked."""
    return prepare_ledger_folder(tmp_path_factory.mktemp("unchecked"))


@pytest.fixture
def opening(folder: Path) -> Iterator[Opening]:
    """Return a function that opens owners of one ledger, which are ended at the end."""
    ledgers: list[Ledger] = []

    def open_ledger(budget_bytes: int | None = 100, free_bytes: int = 0) -> Ledger:
        ledgers.append(Ledger(folder, budget_bytes, free_bytes))
        return ledgers[-1]

    yield open_ledger
    for ledger in ledgers:
        ledger.close()


def want(name: str, size_bytes: int, *, located: bool = False) -> Want:
    """Return a want of content of that name."""
    return Want(ContentId("/clone", name), size_bytes, located)


def states(ledger: Ledger) -> dict[str, str]:
    """Return the state of all content by name."""
    return {content.key: row.state for content, row in ledger.rows().items()}


def arrive(ledger: Ledger, name: str, size_bytes: int) -> None:
    """Reserve, fetch and release content."""
    outcome = decide(ledger).request(name, [want(name, size_bytes)])
    assert outcome.granted
    ledger.arrived(ContentId("/clone", name))
    ledger.end_lease(outcome.lease_id)


def test_a_request_reserves_all_or_nothing(opening: Opening) -> None:
    """What does not fit whole reserves no part."""
    ledger = opening(100)
    assert decide(ledger).request("first", [want("a", 60)]).granted
    refused = decide(ledger).request("second", [want("b", 30), want("c", 30)])
    assert not refused.granted
    assert states(ledger) == {"a": ContentState.RESERVED}
    assert ledger.holdings().used_bytes == 60
    assert ledger.queue() == ["second"]


def test_bytes_count_until_the_drop_has_finished(opening: Opening) -> None:
    """Content that is being dropped is charged still; its room goes to the first in the queue."""
    ledger, other = opening(100), opening(100)
    arrive(ledger, "a", 100)
    waiting = decide(ledger).request("b", [want("b", 50)])
    assert waiting.victims == (ContentId("/clone", "a"),)
    assert ledger.holdings().used_bytes == 100
    assert decide(other).request("c", [want("c", 1)]).why == "earlier requests wait for room"
    assert ledger.dropped(waiting.victims[0]) == 100
    assert not decide(other).request("c", [want("c", 1)]).granted
    assert decide(ledger).request("b", [want("b", 50)], ticket=waiting.ticket).granted
    assert ledger.holdings().peak_bytes == 100


def test_hits_pass_the_queue_a_bounded_number_of_times(opening: Opening) -> None:
    """Requests that need no room go first for a while, so that the head of the queue is served."""
    ledger, other = opening(100), opening(100)
    held = decide(ledger).request("a", [want("a", 100)])
    ledger.arrived(ContentId("/clone", "a"))
    assert decide(other).request("b", [want("b", 50)]).ticket
    passed = 0
    while (hit := decide(ledger).request("a", [want("a", 100)])).granted:
        ledger.end_lease(hit.lease_id)
        passed += 1
    assert passed == OVERTAKES
    ledger.end_lease(held.lease_id)


def test_prefetches_wait_for_the_queue(opening: Opening) -> None:
    """Nothing is prefetched while a lease waits for room."""
    ledger, other = opening(100), opening(100)
    assert decide(ledger).request("a", [want("a", 60)]).granted
    waiting = decide(ledger).request("b", [want("b", 60)])
    assert decide(other).request_ahead([want("c", 10)], 1) == Answer()
    ledger.withdraw(waiting.ticket)
    assert decide(other).request_ahead([want("c", 10)], 1).granted


def test_prefetches_take_only_the_room_of_later_use(opening: Opening) -> None:
    """Content of another process that is used sooner, or as soon, stays."""
    ledger, other = opening(100), opening(100)
    for name in ("soon", "late"):
        arrive(ledger, name, 50)
    entries = [(3, "soon", ContentId("/clone", "soon")), (8, "late", ContentId("/clone", "late"))]
    decide(ledger).set_order(entries, replace=True, reached=1)
    for steps, victims in ((7, []), (6, ["late"]), (1, ["late"])):
        outcome = decide(other).request_ahead([want("new", 40)], steps)
        assert [victim.key for victim in outcome.victims] == victims
        for victim in outcome.victims:
            other.kept(victim, refused=False, whole=True)
    assert decide(other).request_ahead([want("new", 60)], 2).victims == ()
    decide(ledger).reach(5)
    assert decide(other).request_ahead([want("new", 40)], 6).victims == ()


def test_what_is_used_out_of_order_stays_until_the_order_goes_on(opening: Opening) -> None:
    """Scoring between two steps and the prefetch for the next do not evict each other in turn."""
    ledger = opening(100)
    decide(ledger).set_order([(1, "next", ContentId("/clone", "next"))], replace=True, reached=0)
    arrive(ledger, "scored", 100)
    assert decide(ledger).request_ahead([want("next", 100)], 1) == Answer(refused=True)
    decide(ledger).reach(0)
    scored = ContentId("/clone", "scored")
    assert decide(ledger).request_ahead([want("next", 100)], 1).victims == (scored,)


def test_a_lease_cancels_prefetches_of_others(opening: Opening) -> None:
    """The room of a download ahead is asked for once, and comes when its process gives it."""
    ledger, other = opening(100), opening(100)
    ahead = ContentId("/clone", "ahead")
    assert decide(other).request_ahead([want("ahead", 100)], 1).fetch == {ahead}
    assert not other.cancelled(ahead)
    waiting = decide(ledger).request("now", [want("now", 10)])
    assert (waiting.granted, waiting.victims) == (False, ())
    assert other.cancelled(ahead)
    other.failed(ahead, empty=True)
    assert decide(ledger).request("now", [want("now", 10)], ticket=waiting.ticket).granted


def test_a_leased_download_is_not_cancelled(opening: Opening) -> None:
    """A prefetch that somebody leases is one no more, and outlives its failure in its room."""
    ledger, other = opening(100), opening(100)
    content = ContentId("/clone", "a")
    assert decide(other).request_ahead([want("a", 100)], 1).granted
    lease = decide(ledger).request("a", [want("a", 100)])
    assert lease.granted
    assert lease.fetch == frozenset()
    assert decide(other).request("b", [want("b", 10)]).ticket
    assert not other.cancelled(content)
    assert not decide(ledger).claim(content, absent=False)
    other.failed(content, empty=True)
    assert ledger.holdings().used_bytes == 100
    assert decide(ledger).claim(content, absent=False)
    ledger.failed(content, empty=True)
    ledger.end_lease(lease.lease_id)
    assert ledger.holdings().used_bytes == 0


def test_content_that_was_there_is_foreign(opening: Opening) -> None:
    """Content on disk that the ledger does not know is neither charged nor leased."""
    ledger = opening(100)
    outcome = decide(ledger).request("a", [want("a", 5000, located=True), want("b", 100)])
    assert outcome.granted
    assert {content.key for content in outcome.foreign} == {"a"}
    assert states(ledger) == {"b": ContentState.RESERVED}


def test_the_smallest_budget_of_the_living_holds(opening: Opening) -> None:
    """A budget holds for all from the moment that its owner is there, until it ends."""
    large = opening(100)
    arrive(large, "a", 80)
    small = opening(50)
    assert large.holdings().budget_bytes == 50
    answer = decide(small).make_room(0)
    assert (answer.short_bytes, answer.victims) == (30, (ContentId("/clone", "a"),))
    with pytest.raises(DiskBudgetError, match=r"b: its 1 files need 60 bytes.* 50 bytes"):
        decide(large).request("b", [want("b", 60)])
    small.close()
    assert large.holdings().budget_bytes == 100


def test_an_owner_that_ends_leaves_its_bytes_charged(opening: Opening) -> None:
    """Leases and tickets end with their owner; reservations stay, for others to resume."""
    ledger, other = opening(100), opening(100)
    decide(other).request("a", [want("a", 40)])
    decide(other).request_ahead([want("b", 20)], 1)
    decide(other).request("c", [want("c", 90)])
    other.close()
    assert ledger.holdings().used_bytes == 60
    assert ledger.holdings().lease_pids == ()
    assert ledger.queue() == []
    resumed = decide(ledger).request_ahead([want("a", 40)], 1)
    assert resumed.fetch == resumed.resumed == {ContentId("/clone", "a")}


def test_a_drop_that_its_process_left_is_finished_by_the_next(opening: Opening) -> None:
    """Whoever needs content or room finds interrupted drops, and does them."""
    ledger, other = opening(100), opening(100)
    arrive(other, "a", 100)
    assert len(decide(other).give_up([ContentId("/clone", "a")])) == 1
    other.close()
    waiting = decide(ledger).request("a", [want("a", 100)])
    assert waiting.victims == (ContentId("/clone", "a"),)
    ledger.dropped(waiting.victims[0])
    assert decide(ledger).request("a", [want("a", 100)], ticket=waiting.ticket).granted


def test_refused_content_is_not_chosen_again(opening: Opening) -> None:
    """What no remote can give back stays, and is no victim any more."""
    ledger = opening(100)
    arrive(ledger, "a", 60)
    waiting = decide(ledger).request("b", [want("b", 50)])
    ledger.kept(waiting.victims[0], refused=True, whole=True)
    assert decide(ledger).request("b", [want("b", 50)], ticket=waiting.ticket).victims == ()


def test_the_floor_of_free_space_bounds_the_room(opening: Opening) -> None:
    """A reservation leaves the floor free, counting what is reserved and not yet written."""
    ledger = opening(100)
    assert decide(ledger).request("a", [want("a", 30)], spare_bytes=50).granted
    assert not decide(ledger).request_ahead([want("b", 21)], 1, spare_bytes=50).granted
    assert decide(ledger).request_ahead([want("b", 20)], 1, spare_bytes=50).granted


def test_an_automatic_budget_is_shared(opening: Opening) -> None:
    """Owners without a budget of their own take that of the first, while it lives."""
    first = opening(None, 40 * FLOOR_BYTES)
    second = opening(None, 10 * FLOOR_BYTES)
    assert first.budget_bytes == second.budget_bytes == 20 * FLOOR_BYTES
    with pytest.raises(DiskBudgetError, match="are free"):
        automatic_budget(FLOOR_BYTES, 0)
    assert automatic_budget(FLOOR_BYTES + 10, 0) == 10


def test_the_planned_budget_is_the_one_that_is_taken(opening: Opening, folder: Path) -> None:
    """What is held already counts as free, live owners are followed, and none is left behind."""
    root = folder.parent
    holder = opening(10**15)
    arrive(holder, "a", 10**14)
    planned_bytes = Ledger.planned_budget(root)
    taken = opening(None, free_bytes(root))
    # The same formula a moment later: others may write to this disk meanwhile.
    assert abs(planned_bytes - taken.budget_bytes) < 10**9
    assert planned_bytes > 10**14 // 2
    assert Ledger.planned_budget(root) == taken.budget_bytes
    assert len(holder.other_owners()) == 1
    assert Ledger.planned_budget(root / "elsewhere") < planned_bytes
    assert not (root / "elsewhere").exists()


def test_the_ledger_is_for_its_user_alone(folder: Path) -> None:
    """Nobody else can read the ledger's folder."""
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("how", ["newer", "older", "garbage", "empty", "cut", "deleted", "gone"])
def test_a_ledger_that_was_lost_is_begun_anew_by_one_alone(
    folder: Path, opening: Opening, how: str
) -> None:
    """Refused with the pids while an owner lives, who cannot go on; anew once it has ended."""
    path = folder / "ledger.sqlite"
    owner = opening()
    arrive(owner, "a", 60)
    assert not owner.is_lost()
    if how in {"newer", "older"}:
        owner.close()
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute(f"PRAGMA user_version = {99 if how == 'newer' else 1}")
    elif how == "gone":
        shutil.rmtree(folder)
        prepare_ledger_folder(folder.parent)
    elif how == "deleted":
        for file in folder.glob("ledger.sqlite*"):
            file.unlink()
    else:
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        size_bytes = {"garbage": 0, "empty": 0, "cut": path.stat().st_size // 2}[how]
        os.truncate(path, size_bytes)
        if how == "garbage":
            path.write_bytes(b"no database at all, but text" * 400)
    if how not in {"newer", "older"}:
        with pytest.raises(LedgerError, match=rf"doctor --repair|{os.getpid()}"):
            Ledger(folder, 100)
        with contextlib.suppress(LedgerError):
            owner.close()
        owner.abandon()
    again = opening()
    assert again.is_lost()
    assert states(again) == {}
    again.remember_clone("/clone", ())
    again.count_again([(want("a", 60, located=True), "?")])
    assert not again.is_lost()
    assert again.unclaimed_bytes() == 60
    with pytest.raises(DiskBudgetError, match="doctor --repair --adopt"):
        decide(again).request("b", [want("b", 50)])
    assert decide(again).request("a", [want("a", 60, located=True)]).granted


def test_network_file_systems_are_refused_by_name(tmp_path: Path) -> None:
    """The longest mount point decides, the last of several on one point."""
    here = str(tmp_path)
    local = [("/", "ext4"), (here, "tmpfs")]
    assert network_type(tmp_path / "root", local) is None
    assert network_type(tmp_path / "root", [("/", "nfs4")]) == ("/", "nfs4")
    assert network_type(tmp_path / "root", [*local, (f"{here}/root", "fuse.sshfs")]) == (
        f"{here}/root",
        "fuse.sshfs",
    )
    assert network_type(tmp_path / "root", [(here, "cifs"), (here, "ext4")]) is None
    assert network_type(tmp_path / "root", [*local, (f"{here}/roo", "nfs")]) is None


@pytest.mark.parametrize(
    "kind",
    ["9p", "virtiofs", "drvfs", "wekafs", "panfs", "fuse.gcsfuse", "gcsfuse", "lustre"],
)
def test_a_network_file_system_is_told_by_any_of_its_names(tmp_path: Path, kind: str) -> None:
    """Those of clusters, clouds and virtual machines, mounted by the kernel or by a program."""
    assert network_type(tmp_path, [(str(tmp_path), kind)]) == (str(tmp_path), kind)


def test_a_refused_network_file_system_says_what_a_cluster_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scratch of a job, and memory; nothing is made."""
    mounts = [types.SimpleNamespace(mountpoint=str(tmp_path), fstype="wekafs")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: mounts)
    with pytest.raises(LedgerError, match=r"wekafs.*\$SLURM_TMPDIR.*/dev/shm"):
        prepare_ledger_folder(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("below", "why"),
    [
        ("x" * 600, "bytes"),
        ("/".join(["y" * 100] * 6), "bytes"),
        ("bad\udcff", "UTF-8"),
        ("two\nlines", "control"),
        ("dangling", "a link to no folder"),
        ("loop/root", "a link to no folder"),
        ("file", "no folder but a file"),
        ("file/root", "no folder but a file"),
        ("locked/root", "may not write"),
    ],
    ids=[
        *("name", "path", "bytes", "newline", "dangling", "loop", "file", "below-a-file"),
        "permission",
    ],
)
def test_a_root_that_cannot_be_used_is_one_clear_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str, why: str
) -> None:
    """The folder, why, and what to give instead, in one line; nothing is made."""
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "locked").mkdir()
    if below.startswith("locked"):  # Who runs the tests may be allowed anything.
        monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "locked")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LedgerError, match=why) as refused:
        prepare_ledger_folder(tmp_path / below)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 700
    assert "--root" in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("below", ["a" * 255, "Größe/ü ber", "new/er/root"])
def test_what_can_be_a_root_is_none_to_refuse(tmp_path: Path, below: str) -> None:
    """Also where it is not there yet, and with letters of any language."""
    assert prepare_ledger_folder(tmp_path / below).is_dir()


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    """A lock that is held cannot be taken, even within the process, until it is let go."""
    lock = OwnerLock.create(tmp_path / "lock")
    assert OwnerLock.try_take(lock.path) is None
    lock.let_go()
    again = OwnerLock.try_take(lock.path)
    assert again is not None
    again.remove()
    assert not lock.path.exists()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_commit_exceeds_the_budget(  # noqa: C901 - a table of acts
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever three owners do in whatever order, used bytes stay within the budget."""
    folder = prepare_ledger_folder(tmp_path_factory.mktemp("ledger"))
    owners = [Ledger(folder, 100) for _ in range(3)]
    sizes = {name: 4 * place + 9 for place, name in enumerate("abcdefg")}
    leases: list[tuple[Ledger, int]] = []
    tickets: dict[Ledger, int] = {}
    try:
        for _ in range(data.draw(st.integers(5, 25))):
            owner = data.draw(st.sampled_from(owners))
            names = data.draw(st.lists(st.sampled_from("abcdefg"), max_size=3, unique=True))
            wants = [want(name, sizes[name]) for name in names]
            act = data.draw(
                st.sampled_from(["lease", "end", "prefetch", "arrive", "fail", "evict"])
            )
            mine = [c for c, row in owner.rows().items() if row.owner_id == owner.owner_id]
            reserved = [c for c in mine if owner.rows()[c].state is ContentState.RESERVED]
            victims: tuple[ContentId, ...] = ()
            if act == "lease":
                outcome = decide(owner).request("u", wants, ticket=tickets.pop(owner, 0))
                tickets[owner] = outcome.ticket
                victims = outcome.victims
                if outcome.granted:
                    leases.append((owner, outcome.lease_id))
            elif act == "end" and leases:
                holder, lease_id = leases.pop()
                holder.end_lease(lease_id)
            elif act == "prefetch":
                victims = decide(owner).request_ahead(wants, 1).victims
            elif act == "arrive" and reserved:
                owner.arrived(reserved[0])
            elif act == "fail" and reserved:
                owner.failed(reserved[0], empty=data.draw(st.booleans()))
            elif act == "evict":
                victims = tuple(
                    row.content for row in decide(owner).give_up([w.content for w in wants])
                )
            leased = {c for c, row in owner.rows().items() if row.leased}
            assert leased.isdisjoint(victims)
            for victim in victims:
                owner.dropped(victim)
            now = owner.holdings()
            assert now.used_bytes == sum(row.size_bytes for row in owner.rows().values()) <= 100
            assert now.used_bytes <= now.peak_bytes <= 100
    finally:
        for owner in owners:
            owner.close()


def test_a_reservation_is_on_disk_before_its_fetch_may_begin(
    opening: Opening, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is reserved outlives a power failure, or is taken back where it cannot be written."""
    ledger = opening()
    synced: list[Path] = []
    disk_is_full = False

    def fsync(descriptor: int) -> None:
        if disk_is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())

    monkeypatch.setattr(os, "fsync", fsync)
    arrive(ledger, "a", 10)
    log = (folder / "ledger.sqlite-wal").resolve()
    assert synced == [log]
    ledger.end_lease(decide(ledger).request("a", [want("a", 10, located=True)]).lease_id)
    assert synced == [log]  # nothing new was reserved
    disk_is_full = True
    with pytest.raises(LedgerError, match="Is it full"):
        decide(ledger).request("b", [want("b", 10)])
    assert states(ledger) == {"a": "present"}


def uses(ledger: Ledger) -> dict[str, tuple[int | None, int | None]]:
    """Return whose use of each content is the nearest, and its position."""
    found = ledger._db.read("SELECT key, next_owner, next_position FROM content")
    return {key: (owner, position) for key, owner, position in found}


def test_the_nearest_of_all_owners_uses_decides(opening: Opening) -> None:
    """Each owner's next use of what is held is known to all, and gone with the owner."""
    ledger, other = opening(), opening()
    for name in ("a", "b"):
        arrive(ledger, name, 50)
    a, b, absent = (ContentId("/clone", name) for name in ("a", "b", "absent"))
    mine = [(9, "u", a), (2, "u", a), (4, "u", b), (1, "u", absent)]
    decide(ledger).set_order(mine, replace=True, reached=0)
    decide(other).set_order([(103, "u", b), (107, "v", a)], replace=True, reached=100)
    assert uses(ledger) == {"a": (ledger._number, 2), "b": (other._number, 103)}
    assert decide(ledger).request_ahead([want("new", 40)], 1).victims == (b,)
    ledger.kept(b, refused=False, whole=True)
    decide(ledger).reach(2, [(None, "u", a)])
    assert uses(ledger) == {"a": (other._number, 107), "b": (other._number, 103)}
    assert ledger.needed_by_others(a, "u")
    assert not ledger.needed_by_others(a, "v")
    other.close()
    assert uses(ledger) == {"a": (None, None), "b": (ledger._number, 4)}
    assert ledger.held_after(0, 5) == [(1, a, None), (2, b, 4)]
    assert ledger.held_after(1, 5) == [(2, b, 4)]
    decide(ledger).set_order([], replace=True, reached=2, ordered=False)
    assert uses(ledger) == {"a": (None, None), "b": (None, None)}


def test_sums_are_those_of_the_rows_whatever_happens(opening: Opening) -> None:
    """Also when an owner ends in the middle of it; a sum that is wrong is reported and mended."""
    ledger, other = opening(1000), opening(1000)
    arrive(ledger, "a", 100)
    assert decide(other).request("b", [want("a", 100), want("b", 200)]).granted
    assert decide(other).request_ahead([want("c", 300)], 1).granted
    decide(ledger).request("d", [want("d", 500)])
    sums = ledger._db.read("SELECT * FROM sums")
    assert sums == [(600, 500, 300, 300, 600)]  # the prefetch was told to end
    other.close()
    assert ledger._db.read("SELECT * FROM sums") == [(600, 500, 0, 0, 600)]
    assert ledger.miscounted(repair=False) == []
    with ledger._db.writing() as db:
        db.execute("UPDATE sums SET used_bytes = 7, leased_bytes = 1")
        db.execute("UPDATE content SET leases = 2 WHERE key = 'a'")
    (found,) = ledger.miscounted(repair=False)
    assert "are [7, 500, 0, 101], those of its rows [600, 500, 0, 100]" in found
    assert ledger.miscounted(repair=True) == []
    assert ledger.holdings().used_bytes == 600
    assert not ledger.rows()[ContentId("/clone", "a")].leased


def test_what_is_deleted_is_given_back_to_the_disk(opening: Opening) -> None:
    """The ledger's file shrinks again once what it had rows for is gone."""
    ledger = opening(10**6)
    contents = [ContentId("/clone", f"{'key' * 30}{number}") for number in range(5000)]
    with ledger.transaction() as transaction:
        for content in contents:
            transaction.adopt(Want(content, 1, located=True))
    assert ledger.size_bytes() > 1_000_000
    for content in decide(ledger).give_up(contents):
        assert ledger.dropped(content.content) == 1
    ledger.close()
    assert ledger.size_bytes() < 200_000


def statements_of(ledger: Ledger, act: Callable[[], object]) -> list[tuple[str, str]]:
    """Return each statement that an act runs, with the plan that SQLite has for it."""
    db = ledger._db._connected()
    said: list[str] = []
    db.set_trace_callback(said.append)
    act()
    db.set_trace_callback(None)
    statements = [text for text in said if text.split()[0] in {"SELECT", "UPDATE", "DELETE"}]
    return [
        (text, row[3]) for text in statements for row in db.execute(f"EXPLAIN QUERY PLAN {text}")
    ]


def test_no_step_reads_all_rows(opening: Opening) -> None:
    """Every statement finds content, leases and uses by an index, and no query sorts them."""
    ledger = opening(100)
    arrive(ledger, "a", 60)
    held = ContentId("/clone", "a")
    decide(ledger).set_order([(5, "u", held)], replace=True, reached=0)

    def steps() -> None:
        hit = decide(ledger).request("u", [want("a", 60)], position=1, following=[(6, "u", held)])
        assert not decide(ledger).request_ahead([want("c", 60)], 1).granted
        ledger.end_lease(hit.lease_id)
        waiting = decide(ledger).request("u", [want("b", 50)])
        for victim in waiting.victims:
            ledger.dropped(victim)
        lease = decide(ledger).request("u", [want("b", 50)], ticket=waiting.ticket)
        ledger.failed(ContentId("/clone", "b"), empty=True)
        ledger.end_lease(lease.lease_id)
        decide(ledger).make_room(100)
        ledger.held_after(0, 10)
        ledger.cancelled(held)
        ledger.unfinished()
        ledger.holdings()

    plans = statements_of(ledger, steps)
    few = ("content_unfinished", "content_empty")
    large = ("SCAN content", "SCAN leased", "SCAN upcoming")
    scans = [(text, plan) for text, plan in plans if plan.startswith(large)]
    assert [(text, plan) for text, plan in scans if not plan.endswith(few)] == []
    assert len(scans) > 0
    sorts = [text for text, plan in plans if "TEMP B-TREE" in plan and "FROM content" in text]
    assert [text for text in sorts if not text.startswith("SELECT DISTINCT pid")] == []
    assert any("content_victim" in plan for _, plan in plans)


def test_a_ledger_that_cannot_be_made_leaves_what_was_there(tmp_path: Path) -> None:
    """It takes its place wholly or not at all, and what a killed maker left is made anew."""
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"lost")
    with pytest.raises(sqlite3.Error):
        make_database(path, [*TABLES, "no SQL"], SCHEMA_VERSION)
    assert path.read_bytes() == b"lost"
    make_database(path, TABLES, SCHEMA_VERSION)
    assert why_lost(path, SCHEMA_VERSION) == ""
    assert (tmp_path / "lost-ledger.sqlite").read_bytes() == b"lost"
    assert not list(tmp_path.glob("new-*"))


def stop_inside(folder: Path, how: str) -> dict[str, str]:
    """Stop this process in the middle of a transaction, or of the last owner's leaving."""
    ledger = Ledger(folder, 100)
    if how == "writing":
        with ledger.transaction() as transaction:
            transaction.request("late", [want("late", 10)])
            os.kill(os.getpid(), signal.SIGSTOP)
    else:
        with contextlib.closing(sqlite3.connect(folder / "ledger.sqlite")) as db:
            ledger._db._disconnect()
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            db.execute("BEGIN EXCLUSIVE")
            os.kill(os.getpid(), signal.SIGSTOP)
            db.rollback()
    found = states(ledger)
    ledger.close()
    return found


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
@pytest.mark.timeout(60)
def test_a_process_that_is_stopped_in_a_transaction_is_named(
    opening: Opening, folder: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others wait once, all calls together, are told who it is, and work once it goes on."""
    monkeypatch.setattr(database, "_LOCKED_TIMEOUT_S", 5.0)
    ledger = opening()
    with nursery.start(stop_inside, folder, "writing") as worker:
        while worker.process.status() != psutil.STATUS_STOPPED:
            threading.Event().wait(0.01)
        told = rf"process {worker.pid}\).*kill -CONT"
        errors: list[LedgerError] = []

        def call() -> None:
            for _ in range(3):
                with pytest.raises(LedgerError, match=told) as caught:
                    ledger.end_lease(1)
                errors.append(caught.value)

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(errors) == 12
        assert states(ledger) == {}
        with pytest.raises(LedgerError, match=told):
            opening()
        worker.process.resume()
        assert worker.result() == {"late": "reserved"}
    arrive(ledger, "a", 60)
    assert states(opening())["a"] == "present"


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
@pytest.mark.timeout(60)
def test_a_process_that_keeps_the_whole_ledger_is_named(
    opening: Opening, folder: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is stopped where nobody else may read either is no lost ledger."""
    monkeypatch.setattr(database, "_LOCKED_TIMEOUT_S", 2.0)
    with nursery.start(stop_inside, folder, "leaving") as worker:
        while worker.process.status() != psutil.STATUS_STOPPED:
            threading.Event().wait(0.01)
        with pytest.raises(LedgerError, match=rf"process {worker.pid}\).*kill -CONT"):
            opening()
        worker.process.resume()
        assert worker.result() == {}
    arrive(opening(), "a", 60)


def see_after_fork(folder: Path) -> list[bool]:
    """Look whether a change is seen that happens around a fork: in the child, in the parent."""
    ledger, other = Ledger(folder, 100), Ledger(folder, 100)
    ledger.changes()
    os.waitpid(os.fork() or os._exit(0), 0)  # Both have connections that have seen nothing.
    seen = ledger.changes()
    other.end_lease(1)
    pid = os.fork()
    if pid == 0:
        os._exit(ledger.changes() != seen)
    child = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    found = [bool(child), ledger.changes() != seen]
    ledger.close()
    other.close()
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_change_is_seen_over_a_fork(folder: Path, nursery: Nursery) -> None:
    """Who saw the ledger before a fork sees after it that another process has written."""
    with nursery.start(see_after_fork, folder) as worker:
        assert worker.result() == [True, True]
