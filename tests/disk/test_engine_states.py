"""A state machine over two engines of one root, against a model that a reader can check."""

import contextlib
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from fakes import FailingRepo, FakeRepo, content_of, make_key
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tio_openneuro.content import AnnexKey, ContentFile, ContentUnit
from tio_openneuro.disk.engine import Engine
from tio_openneuro.errors import DiskBudgetError, FetchError

BUDGET_BYTES = 1000
SIZES = (100, 150, 200, 300, 400, 600)
KEYS = [make_key(f"key-{place}", size) for place, size in enumerate(SIZES)]
# Two of the units share keys with others, one is as large as the budget.
UNITS = {"a": (0, 1), "b": (1, 2), "c": (3,), "d": (4, 5), "e": (0, 5), "f": (2, 3, 4)}

unit_names = st.sampled_from(sorted(UNITS))
engine_numbers = st.integers(0, 1)


class Engines(RuleBasedStateMachine):
    """Leases, prefetches, failures, evictions and restarts, in any order.

    The model: which keys are the user's own, which are leased how often. A lease must be granted
    exactly when the leased keys and the wanted ones, less the user's, fit into the budget.
    """

    @initialize()
    def begin(self) -> None:
        """Open two engines on an empty root."""
        self.folder = Path(tempfile.mkdtemp())
        self.repo = FailingRepo(self.folder / "clones" / "ds1", share=0.0)
        self.engines = [self.open(), self.open()]
        self.leases: list[tuple[int, str, contextlib.ExitStack]] = []
        self.leased: Counter[AnnexKey] = Counter()
        self.foreign: set[AnnexKey] = set()

    def open(self) -> Engine:
        """Open an engine."""
        return Engine(self.folder, disk_budget=BUDGET_BYTES, jobs=2, open_repo=FakeRepo.reopen)

    def unit(self, name: str) -> ContentUnit:
        """Return a unit."""
        keys = [KEYS[place] for place in UNITS[name]]
        return ContentUnit(name, tuple(ContentFile(self.repo, key, str(key)) for key in keys))

    def fits(self, name: str) -> bool:
        """Return what the model says of a lease."""
        wanted = {KEYS[place] for place in UNITS[name]} | set(self.leased)
        return sum(key.size_bytes or 0 for key in wanted - self.foreign) <= BUDGET_BYTES

    @rule(number=engine_numbers, name=unit_names)
    def lease(self, number: int, name: str) -> None:
        """A lease is granted when the model says so, and refused when it does not."""
        stack = contextlib.ExitStack()
        fits = self.fits(name)
        lease = self.engines[number].lease(self.unit(name), timeout_s=20 if fits else 0.02)
        if not fits:
            with pytest.raises(DiskBudgetError, match=name):
                stack.enter_context(lease)
            return
        for key, path in stack.enter_context(lease).items():
            assert path.read_bytes() == content_of(key)
            self.leased[key] += 1
        self.leases.append((number, name, stack))

    @rule(number=engine_numbers, name=unit_names)
    def lease_that_fails(self, number: int, name: str) -> None:
        """A remote that refuses everything fails a lease that needs it, and no other."""
        if not self.fits(name):
            return
        self.repo.share = 1.0
        with contextlib.suppress(FetchError), self.engines[number].lease(self.unit(name)) as paths:
            assert all(path.read_bytes() == content_of(key) for key, path in paths.items())
        self.repo.share = 0.0

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 99))
    def end(self, which: int) -> None:
        """A lease ends."""
        _, name, stack = self.leases.pop(which % len(self.leases))
        stack.close()
        self.leased.subtract({KEYS[place] for place in UNITS[name]})
        self.leased = +self.leased

    @rule(number=engine_numbers, names=st.lists(unit_names, max_size=6))
    def prefetch(self, number: int, names: list[str]) -> None:
        """An order becomes known."""
        self.engines[number].prefetch([self.unit(name) for name in names])

    @rule(number=engine_numbers, name=unit_names, drop=st.booleans())
    def release(self, number: int, name: str, drop: bool) -> None:
        """A unit is done with."""
        self.engines[number].release(self.unit(name), drop=drop)

    @rule(number=engine_numbers, names=st.lists(unit_names, max_size=3))
    def fetch(self, number: int, names: list[str]) -> None:
        """Units are fetched at the prompt, as far as there is room."""
        self.engines[number].fetch([self.unit(name) for name in names])

    @rule(number=engine_numbers, name=unit_names)
    def evict(self, number: int, name: str) -> None:
        """A unit is evicted by hand; what is leased or foreign stays."""
        self.engines[number].evict([self.unit(name)])

    @rule(key=st.sampled_from(KEYS))
    def place(self, key: AnnexKey) -> None:
        """The user fetches something himself, if nobody of us has it."""
        for engine in self.engines:
            engine.prefetch([])
        self.settle()
        if self.repo.locate(key) is None and not self.repo.partial_path(key).exists():
            self.repo.place(key)
            self.foreign.add(key)

    @rule(number=engine_numbers, name=unit_names)
    def adopt(self, number: int, name: str) -> None:
        """The user's own content is handed over, if nothing is leased and so all can give way."""
        if not self.leased:
            self.engines[number].adopt([self.unit(name)])
            known = {content.key for content in self.engines[number]._here().ledger.rows()}
            # A download ahead that has not ended yet may leave too little room for it.
            self.foreign = {key for key in self.foreign if key.name not in known}

    @rule(number=engine_numbers)
    def restart(self, number: int) -> None:
        """An engine is closed and opened again; its leases are over."""
        for lease in [lease for lease in self.leases if lease[0] == number]:
            self.end(self.leases.index(lease))
        self.engines[number].close()
        self.engines[number] = self.open()

    def settle(self) -> None:
        """Wait until no fetch is under way."""
        for engine in self.engines:
            leases = engine._here()
            # Whoever looks ahead may just have found something to fetch.
            with leases.look_ahead._planning:
                pass
            while leases.fetches._known:
                leases.changes.wait_here(leases.changes.value, 0.01)

    @invariant()
    def within_budget(self) -> None:
        """What is held, less the user's own, is charged, and within the budget."""
        if not hasattr(self, "engines"):
            return
        foreign_bytes = sum(key.size_bytes or 0 for key in self.foreign)
        assert self.engines[0].statistics().peak_bytes <= BUDGET_BYTES
        assert self.repo.held_bytes() - foreign_bytes <= BUDGET_BYTES
        assert all(self.repo.locate(key) for key in self.leased)
        assert all(self.repo.locate(key) for key in self.foreign)
        assert self.repo.noted("violations") == []

    def teardown(self) -> None:
        """Ledger and disk agree at the end."""
        if not hasattr(self, "engines"):
            return
        for _, _, stack in self.leases:
            stack.close()
        for engine in self.engines:
            engine.prefetch([])
        self.settle()
        assert self.engines[0].check() == []
        used_bytes = self.engines[0].statistics().used_bytes
        foreign_bytes = sum(key.size_bytes or 0 for key in self.foreign)
        assert used_bytes == self.repo.held_bytes() - foreign_bytes
        for engine in self.engines:
            engine.close()
        shutil.rmtree(self.folder)


TestEngines = Engines.TestCase
TestEngines.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
