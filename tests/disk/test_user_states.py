"""A state machine whose rules include the user, against a model of whose each file is."""

import contextlib
import os
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from fakes import FakeRepo, content_of, make_key
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tio_openneuro.content import UNCLAIMED, AnnexKey, ContentFile, ContentUnit
from tio_openneuro.disk.engine import Engine
from tio_openneuro.errors import DiskBudgetError, LedgerError

BUDGET_BYTES = 1000
KEYS = [make_key(f"user-{place}", size) for place, size in enumerate((100, 200, 300, 400, 600))]
UNITS = {"a": (0, 1), "b": (1, 2), "c": (3,), "d": (4, 0), "e": (2, 3)}

unit_names = st.sampled_from(sorted(UNITS))
keys = st.sampled_from(KEYS)
engine_numbers = st.integers(0, 1)


class OfTheUser(RuleBasedStateMachine):
    """Two engines, one of them by another path, and a user who works in the same clone.

    The model: which keys' files are the user's, by inode and time, and which are nobody's known
    since a ledger was lost. All other content is ours: within the budget, and charged.
    """

    @initialize()
    def begin(self) -> None:
        """Open two engines on an empty root, one through a link."""
        self.folder = Path(tempfile.mkdtemp())
        self.root = self.folder / "root"
        FakeRepo(self.root / "clones" / "ds1")
        self.moves = 0
        self.time_s = 1_000_000_000
        self.theirs: dict[AnnexKey, tuple[int, int]] = {}
        self.unknown: set[AnnexKey] = set()
        self.leases: list[tuple[str, contextlib.ExitStack]] = []
        self.leased: Counter[AnnexKey] = Counter()
        self.open()

    def open(self) -> None:
        """Open both engines where the root is now."""
        link = self.folder / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(self.root)
        self.engines = [self.engine(self.root), self.engine(link)]
        self.repos = [FakeRepo(path / "clones" / "ds1") for path in (self.root, link)]
        self.repo = self.repos[0]

    def engine(self, root: Path) -> Engine:
        """Open an engine; a clone that only the ledger knows is a fake too."""
        return Engine(
            root, disk_budget=BUDGET_BYTES, jobs=2, open_repo=lambda path, _: FakeRepo(path)
        )

    def close(self) -> None:
        """End leases and engines."""
        while self.leases:
            self.end(0)
        self.settle()
        for engine in self.engines:
            engine.close()

    def unit(self, number: int, name: str) -> ContentUnit:
        """Return a unit as one of the engines sees it."""
        found = [KEYS[place] for place in UNITS[name]]
        return ContentUnit(
            name, tuple(ContentFile(self.repos[number], key, str(key)) for key in found)
        )

    def mark(self, key: AnnexKey) -> tuple[int, int] | None:
        """Return which file lies there, if any."""
        with contextlib.suppress(FileNotFoundError):
            found = self.repo.object_path(key).stat()
            return found.st_ino, found.st_mtime_ns
        return None

    def is_theirs(self, key: AnnexKey) -> bool:
        """Return whether the user's file lies there, and everybody knows that it is theirs."""
        return key in self.theirs and key not in self.unknown

    def fits(self, name: str) -> bool | None:
        """Return whether a lease must be granted, ``None`` where it may.

        What is there may always be used. A file of nobody's that the user deleted is charged until
        somebody looks.
        """
        wanted = {KEYS[place] for place in UNITS[name]}
        if all(self.mark(key) and key in {*self.leased, *self.unknown} for key in wanted):
            return True
        there = {key for key in self.unknown if self.mark(key)}
        least, most = (
            sum(key.size_bytes or 0 for key in charged if not self.is_theirs(key))
            for charged in (wanted | {*self.leased} | there, wanted | {*self.leased} | self.unknown)
        )
        return None if least <= BUDGET_BYTES < most else most <= BUDGET_BYTES

    def rows(self) -> dict[str, str]:
        """Return the keys that are charged, with the marks of their files."""
        rows = self.engines[0]._here().ledger.rows()
        return {content.key: row.mark for content, row in rows.items()}

    # What we do

    @rule(number=engine_numbers, name=unit_names)
    def lease(self, number: int, name: str) -> None:
        """It is granted when the model says so; what is held has the right content."""
        stack = contextlib.ExitStack()
        fits = self.fits(name)
        lease = self.engines[number].lease(self.unit(number, name), timeout_s=20 if fits else 0.02)
        if fits is False:
            with pytest.raises(DiskBudgetError, match=name):
                stack.enter_context(lease)
            return
        try:
            files = stack.enter_context(lease)
        except DiskBudgetError:
            assert fits is None
            return
        for key, path in files.items():
            assert path.read_bytes() == content_of(key)
            self.leased[key] += 1
            # What somebody deleted, and we fetched again, is ours.
            if key in self.unknown and self.rows().get(key.name) != UNCLAIMED:
                self.unknown.remove(key)
        self.leases.append((name, stack))

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 99))
    def end(self, which: int) -> None:
        """A lease ends."""
        name, stack = self.leases.pop(which % len(self.leases))
        stack.close()
        self.leased.subtract({KEYS[place] for place in UNITS[name]})
        self.leased = +self.leased

    @rule(number=engine_numbers, names=st.lists(unit_names, max_size=4))
    def prefetch(self, number: int, names: list[str]) -> None:
        """An order becomes known."""
        self.engines[number].prefetch([self.unit(number, name) for name in names])

    @rule(number=engine_numbers, name=unit_names, drop=st.booleans())
    def release(self, number: int, name: str, drop: bool) -> None:
        """A unit is done with."""
        self.engines[number].release(self.unit(number, name), drop=drop)

    @rule(number=engine_numbers, name=unit_names)
    def evict(self, number: int, name: str) -> None:
        """A unit is evicted by hand."""
        self.engines[number].evict([self.unit(number, name)])

    @rule(number=engine_numbers)
    def evict_all(self, number: int) -> None:
        """All that is ours and not leased is gone, and as much came free as was on the disk."""
        self.settle()
        before = self.repo.held_bytes()
        freed = self.engines[number].evict_all()
        assert freed == before - self.repo.held_bytes()
        for key in KEYS:
            kept = key in self.leased or key in self.theirs or key in self.unknown
            assert kept or self.mark(key) is None

    @rule(number=engine_numbers, name=unit_names)
    def adopt(self, number: int, name: str) -> None:
        """What is there becomes ours, as far as it fits."""
        if not self.leased:
            self.engines[number].adopt([self.unit(number, name)])
            self.take_over()

    @rule(number=engine_numbers, adopt=st.booleans())
    def doctor(self, number: int, adopt: bool) -> None:
        """It leaves nothing wrong."""
        self.settle()
        assert self.engines[number].check(repair=True, adopt=adopt) == []
        if adopt:
            self.take_over()
        gone = {key for key in self.unknown if self.mark(key) is None and key not in self.leased}
        self.unknown -= gone
        assert self.engines[number].check() == []

    def take_over(self) -> None:
        """Note what was handed to the budget: the ledger knows its file."""
        self.settle()
        for key in KEYS:
            home = self.repo.path.stat()
            mark = self.mark(key)
            known = self.rows().get(key.name, "")
            if mark and re.match(f"{home.st_dev}:{home.st_ino} {mark[0]} .* {mark[1]}$", known):
                self.unknown.discard(key)
                self.theirs.pop(key, None)

    # What the user does

    @rule(key=keys)
    def user_gets(self, key: AnnexKey) -> None:
        """Their own ``git annex get``; of what is there already it does nothing."""
        self.settle()
        if self.mark(key) is None and not self.repo.partial_path(key).exists():
            self.repo.place(key)
            self.time_s += 1
            os.utime(self.repo.object_path(key), (self.time_s, self.time_s))
            mark = self.mark(key)
            assert mark is not None
            self.theirs[key] = mark

    @rule(key=keys)
    def user_drops(self, key: AnnexKey) -> None:
        """Their own ``git annex drop``, of whatever nobody holds just now."""
        self.settle()
        if key not in self.leased:
            self.repo.object_path(key).unlink(missing_ok=True)
            self.theirs.pop(key, None)

    @rule(key=keys)
    def user_checks(self, key: AnnexKey) -> None:
        """Their ``git annex fsck``: the file stays, and nobody's opinion changes."""
        if self.mark(key):
            self.repo.object_path(key).read_bytes()

    @rule()
    def user_moves_the_root(self) -> None:
        """While nobody runs."""
        self.close()
        self.moves += 1
        self.root = self.root.rename(self.folder / f"moved-{self.moves}")
        self.open()

    @rule()
    def user_deletes_the_ledger(self) -> None:
        """While nobody runs: whose it is what lies there, nobody knows then."""
        self.close()
        shutil.rmtree(self.root / "ledger")
        self.unknown = {key for key in KEYS if self.mark(key)}
        self.open()

    @rule()
    def user_deletes_the_ledger_in_use(self) -> None:
        """Neither engine goes on, and none is opened beside them."""
        self.settle()
        shutil.rmtree(self.root / "ledger")
        for engine in self.engines:
            with pytest.raises(LedgerError, match="doctor --repair"):
                engine.statistics()
        while self.leases:
            with contextlib.suppress(LedgerError):
                self.end(0)
        for engine in self.engines:
            engine.close()
        self.unknown = {key for key in KEYS if self.mark(key)}
        self.leases.clear()
        self.leased.clear()
        self.open()

    @rule()
    def reopen(self) -> None:
        """Engines are closed and opened again."""
        self.close()
        self.open()

    # What always holds

    def settle(self) -> None:
        """Let what is fetched ahead come to its end, and have no more of it."""
        for engine in self.engines:
            engine.prefetch([])
        for engine in self.engines:
            leases = engine._here()
            with leases.look_ahead._planning:
                pass
            while leases.fetches._known:
                leases.changes.wait_here(leases.changes.value, 0.01)

    @invariant()
    def nothing_is_lost_and_the_budget_holds(self) -> None:
        """The user's files are there, those leased too, and ours within the budget."""
        if not hasattr(self, "engines"):
            return
        for key, mark in self.theirs.items():
            assert self.mark(key) == mark
        assert all(self.mark(key) for key in self.leased)
        theirs_bytes = sum(key.size_bytes or 0 for key in self.theirs)
        assert self.repo.held_bytes() - theirs_bytes <= BUDGET_BYTES
        assert self.repo.noted("violations") == []

    @rule()
    def check(self) -> None:
        """What is charged and not there, or there and another's, is told; nothing else is."""
        self.settle()
        charged = self.rows()
        assert {key.name for key in KEYS if self.mark(key) and not self.is_theirs(key)} <= {
            *charged
        }
        absent = {key.name for key in KEYS if key.name in charged and not self.mark(key)}
        replaced = {key.name for key in self.theirs if key.name in charged}
        replaced -= {key.name for key in self.unknown}
        found = self.engines[0].check()
        assert len(found) == len(absent) + len(replaced)
        for names, words in ((absent, "and is absent"), (replaced, "was replaced")):
            told = [finding for finding in found if words in finding]
            assert all(any(name in finding for finding in told) for name in names)

    def teardown(self) -> None:
        """Ledger and disk agree once the doctor was there."""
        if not hasattr(self, "engines"):
            return
        while self.leases:
            self.end(0)
        self.check()
        self.doctor(0, adopt=False)
        known = sum(key.size_bytes or 0 for key in KEYS if self.mark(key))
        theirs_bytes = sum(key.size_bytes or 0 for key in self.theirs if self.is_theirs(key))
        assert self.engines[0].statistics().used_bytes == known - theirs_bytes
        for engine in self.engines:
            engine.close()
        shutil.rmtree(self.folder)


TestOfTheUser = OfTheUser.TestCase
TestOfTheUser.settings = settings(
    max_examples=15,
    derandomize=True,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
