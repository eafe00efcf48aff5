"""A training played on a clock of its own: consumer, workers, RAM, disk and link. Pure.

Owns events and the time between them. What a queue makes next, how far ahead, which patch comes
next and what the RAM has room for are the queue's own decisions; what is fetched and gives way are
the ledger's. Ranks step together, as gradients that are averaged make them.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf

from tio_openneuro.content import ContentId
from tio_openneuro.plan.link import Link, PlayedLink
from tio_openneuro.plan.root import Files, Order, PlayedRoot
from tio_openneuro.queue import (
    EpochPlan,
    Pass,
    PassStart,
    Planner,
    Ranks,
    chosen_twice,
    is_within_reach,
)
from tio_openneuro.ram import BASE_BYTES, Admission


@dataclass(frozen=True, slots=True)
class UnitCost:
    """What making one unit's patches takes.

    Attributes:
        seconds: Of one worker, from files to patches.
        work_bytes: RAM held meanwhile, beside the patches.
        patch_bytes: RAM of each patch.
    """

    seconds: float
    work_bytes: int = 0
    patch_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What is to be played.

    Attributes:
        units: Bytes of each annex key of a unit, in the dataset's order.
        costs: What each unit takes.
        link: Of each node.
        step_s: Seconds that the model takes for a batch.
        epochs: Passes over the units, one at least.
        ram_bytes: RAM budget of each process.
        seed: The queue's.
        window: Its ``max_length``.
        samples: Its ``samples_per_volume``.
        workers: Its ``num_workers``, one at least.
        batch: Patches of a batch.
        ranks: Processes that train.
        nodes: Machines that they are on, equally many on each.
    """

    units: Sequence[dict[str, int]]
    costs: Sequence[UnitCost]
    link: Link
    step_s: float = 0.0
    epochs: int = 3
    ram_bytes: int = 1 << 62
    seed: int = 0
    window: int = 256
    samples: int = 8
    workers: int = 4
    batch: int = 4
    ranks: int = 1
    nodes: int = 1


@dataclass(frozen=True, slots=True)
class Mark:
    """Where everything stood at a moment.

    Attributes:
        seconds: Since the beginning.
        fetched_bytes: Of each node.
        busy_s: Seconds in which the link of each was busy.
        waits: Seconds that the consumer waited for the link and for decoding.
    """

    seconds: float
    fetched_bytes: tuple[int, ...]
    busy_s: tuple[float, ...]
    waits: Counter[str]


@dataclass(frozen=True, slots=True)
class Played:
    """What became of it.

    Attributes:
        marks: At each epoch's end.
        settled_bytes: Fetched once the link of each node came to rest after that.
        disk_bytes: Most that a node held.
        ram_bytes: Most that was charged in a process.
    """

    marks: tuple[Mark, ...]
    settled_bytes: tuple[int, ...]
    disk_bytes: int
    ram_bytes: int


@dataclass(frozen=True, slots=True)
class Script:
    """What one rank makes and takes, whatever its machine is like.

    Attributes:
        plans: Of each epoch, and the next one.
        takes: Position in the order of all epochs of the subject that each patch is of.
    """

    plans: tuple[EpochPlan, ...]
    takes: tuple[tuple[int, ...], ...]


def write_scripts(training: Training) -> list[Script]:
    """Return what each rank makes and takes; the same for every budget, link and speed."""
    counts = [training.samples] * len(training.units)
    scripts = []
    for rank in range(training.ranks):
        dealt = Ranks(rank, training.ranks, share=training.ranks > 1)
        planner = Planner(counts, None, seed=training.seed, shuffled=True, ranks=dealt)
        plans = tuple(planner.plan(epoch) for epoch in range(training.epochs + 1))
        takes, before = [], 0
        for plan in plans[:-1]:
            current = Pass(
                plan, PassStart(), seed=training.seed, window=training.window, shuffled=True
            )
            taken = []
            while not current.finished:
                taken.append(before + current.next()[0].position)
                current.take()
            takes.append(tuple(taken))
            before += len(plan.order)
        scripts.append(Script(plans, tuple(takes)))
    return scripts


@dataclass(eq=False)
class _Rank:
    """One process: its queue and what it fetches."""

    number: int
    node: int
    owner: int
    order: Order
    admission: Admission
    script: Script
    idle: int
    units: list[int] = field(default_factory=list)
    twice: set[int] = field(default_factory=set)
    epoch: int = -1
    taken: int = 0
    step: int = 0
    due: int = 0
    claimed: int = 0
    lacking: dict[int, set[ContentId]] = field(default_factory=dict)
    left: dict[int, int] = field(default_factory=dict)
    running: int = 0
    leased: deque[ContentId] = field(default_factory=deque)
    ahead: deque[ContentId] = field(default_factory=deque)

    @property
    def awaited(self) -> int:
        """The position of the subject of the next patch."""
        return self.script.takes[self.epoch][self.taken]


class _Play:
    """The state of one play."""

    def __init__(self, training: Training, scripts: Sequence[Script], budget_bytes: int) -> None:
        self.training = training
        keys = {key: size for unit in training.units for key, size in unit.items()}
        # One object for each: dictionaries find what is the same without comparing.
        contents = {key: ContentId("", key) for key in keys}
        sizes = {contents[key]: size for key, size in keys.items()}
        self.sizes = sizes
        self.files: list[Files] = [tuple(map(contents.__getitem__, u)) for u in training.units]
        self.links = [PlayedLink(training.link) for _ in range(training.nodes)]
        self.roots = [
            PlayedRoot(self.files, sizes, budget_bytes, lambda c, n=node: self._cancel(n, c))
            for node in range(training.nodes)
        ]
        self.now_s = 0.0
        self.waits: Counter[str] = Counter()
        self.marks: list[Mark] = []
        self.requests: list[deque[tuple[_Rank, int]]] = [deque() for _ in self.roots]
        self.fetchers: list[dict[ContentId, _Rank]] = [{} for _ in self.roots]
        self.decoding: list[tuple[float, int, int]] = []
        self.step_ends_s = inf
        self.ranks: list[_Rank] = []
        self.of_node: list[list[_Rank]] = [[] for _ in self.roots]
        each = training.ranks // training.nodes
        for number, script in enumerate(scripts):
            root = self.roots[number // each]
            root.orders.append(Order(sizes))
            admission = Admission(training.ram_bytes, base_bytes=BASE_BYTES)
            rank = _Rank(
                number, number // each, number % each, root.orders[-1], admission, script,
                training.workers,
            )  # fmt: skip
            self._know(rank, 0)
            self.ranks.append(rank)
            self.of_node[rank.node].append(rank)
        for rank in self.ranks:
            self._begin(rank)

    def run(self) -> Played:
        """Play until the last step has ended, and the links are at rest."""
        training = self.training
        nodes = range(training.nodes)
        while True:
            for node in nodes:
                self._settle(node)
            if len(self.marks) < training.epochs and self.step_ends_s == inf:
                if not any(rank.due for rank in self.ranks):
                    self.step_ends_s = self.now_s + training.step_s
            next_s = min(link.next_s() for link in self.links)
            if self.decoding:
                next_s = min(next_s, self.decoding[0][0])
            next_s = min(next_s, self.step_ends_s)
            if next_s == inf:
                break
            if self.step_ends_s == inf and len(self.marks) < training.epochs:
                self.waits[self._why()] += next_s - self.now_s
            self._advance(next_s)
        held = max(root.peak_bytes for root in self.roots)
        charged = max(rank.admission.peak_bytes for rank in self.ranks)
        settled = tuple(link.fetched_bytes for link in self.links)
        return Played(tuple(self.marks), settled, held, charged)

    # --- what comes at a moment ---

    def _advance(self, now_s: float) -> None:
        self.now_s = now_s
        for node, link in enumerate(self.links):
            for content in link.advance(now_s):
                self.roots[node].arrived(content)
                self.fetchers[node].pop(content).running -= 1
                for rank in self.of_node[node]:
                    self._arrived(rank, content)
        while self.decoding and self.decoding[0][0] <= now_s:
            _, number, position = heapq.heappop(self.decoding)
            self._deposit(self.ranks[number], position)
        if self.step_ends_s <= now_s:
            self.step_ends_s = inf
            for rank in self.ranks:
                self._begin(rank)

    def _arrived(self, rank: _Rank, content: ContentId) -> None:
        for position in [p for p, lacking in rank.lacking.items() if content in lacking]:
            rank.lacking[position].discard(content)
            if not rank.lacking[position]:
                self._decode(rank, position)

    def _decode(self, rank: _Rank, position: int) -> None:
        del rank.lacking[position]
        seconds = self.training.costs[rank.units[position]].seconds
        seconds *= 1 + (position in rank.twice)
        heapq.heappush(self.decoding, (self.now_s + seconds, rank.number, position))

    def _deposit(self, rank: _Rank, position: int) -> None:
        self.roots[rank.node].end_lease(rank.owner, position)
        cost, samples = self.training.costs[rank.units[position]], self.training.samples
        patches_bytes = cost.patch_bytes * samples
        rank.admission.settle(cost.work_bytes + patches_bytes, patches_bytes)
        rank.admission.measured(0)
        rank.left[position] = samples
        rank.idle += 1

    def _begin(self, rank: _Rank) -> None:
        """Begin the next step of a rank, and the next epoch where this one has ended."""
        takes = rank.script.takes
        if rank.epoch < 0 or rank.taken == len(takes[rank.epoch]):
            if rank.epoch >= 0 and rank is self.ranks[-1]:
                self._mark()
            if rank.epoch + 1 == len(takes):
                return
            rank.epoch, rank.taken = rank.epoch + 1, 0
            self._know(rank, rank.epoch + 1)
        rank.due = min(self.training.batch, len(takes[rank.epoch]) - rank.taken)

    def _know(self, rank: _Rank, epoch: int) -> None:
        plan = rank.script.plans[epoch]
        count = len(plan.order)
        rank.twice.add(len(rank.units) + chosen_twice(count, self.training.seed, epoch))
        rank.units += plan.order
        self.roots[rank.node].extend(rank.owner, [self.files[unit] for unit in plan.order])

    def _mark(self) -> None:
        fetched = tuple(link.fetched_bytes for link in self.links)
        busy = tuple(link.busy_s for link in self.links)
        self.marks.append(Mark(self.now_s, fetched, busy, self.waits.copy()))

    def _cancel(self, node: int, content: ContentId) -> None:
        rank = self.fetchers[node].pop(content)
        if self.links[node].cancel(content):
            rank.running -= 1
        else:
            rank.ahead.remove(content)

    # --- what can be done now ---

    def _settle(self, node: int) -> None:
        """Do all that can be done at this moment on one node."""
        ranks = self.of_node[node]
        changed = True
        while changed:
            changed = False
            for rank in ranks:
                changed |= self._take(rank)
                changed |= self._claim(rank)
            changed |= self._lease(node)
            for rank in ranks:
                changed |= self._prefetch(rank)
                self._fetch(rank)

    def _take(self, rank: _Rank) -> bool:
        before = rank.due
        while rank.due and rank.left.get(rank.awaited):
            position = rank.awaited
            rank.left[position] -= 1
            if not rank.left[position]:
                del rank.left[position]
            rank.admission.release(self.training.costs[rank.units[position]].patch_bytes)
            rank.admission.measured(0)
            rank.taken, rank.step, rank.due = rank.taken + 1, rank.step + 1, rank.due - 1
        return rank.due < before

    def _claim(self, rank: _Rank) -> bool:
        training, samples = self.training, self.training.samples
        claimed = False
        while rank.idle and rank.claimed < len(rank.units):
            distance = rank.claimed * samples - rank.step
            cost = training.costs[rank.units[rank.claimed]]
            charge = cost.work_bytes + cost.patch_bytes * samples
            if not is_within_reach(distance, samples, training.window, training.workers):
                break
            if not rank.admission.fits(charge):
                break
            rank.admission.charge(charge)
            self.requests[rank.node].append((rank, rank.claimed))
            rank.claimed, rank.idle = rank.claimed + 1, rank.idle - 1
            claimed = True
        return claimed

    def _lease(self, node: int) -> bool:
        root, requests, leased = self.roots[node], self.requests[node], False
        while requests:
            rank, position = requests[0]
            missing = root.lease(rank.owner, position)
            root.waits = missing is None
            if missing is None:
                break
            requests.popleft()
            leased = True
            for content in missing:
                rank.leased.append(content)
                self.fetchers[node][content] = rank
            files = rank.order.turns[position]
            rank.lacking[position] = {c for c in files if not root.has(c)}
            for content in rank.lacking[position]:
                fetcher = self.fetchers[node][content]
                if content in fetcher.ahead:
                    fetcher.ahead.remove(content)
                    fetcher.leased.append(content)
            if not rank.lacking[position]:
                self._decode(rank, position)
        return leased

    def _prefetch(self, rank: _Rank) -> bool:
        root, began = self.roots[rank.node], False
        while len(rank.ahead) < self.training.link.jobs:
            missing = root.prefetch(rank.owner)
            if missing is None:
                break
            began = True
            for content in missing:
                rank.ahead.append(content)
                self.fetchers[rank.node][content] = rank
        return began

    def _fetch(self, rank: _Rank) -> None:
        while rank.running < self.training.link.jobs and (rank.leased or rank.ahead):
            content = (rank.leased or rank.ahead).popleft()
            self.links[rank.node].begin(content, self.sizes[content])
            rank.running += 1

    def _why(self) -> str:
        """Return what the consumer waits for: the link, or decoding."""
        rank = next(rank for rank in self.ranks if rank.due)
        waits = rank.awaited in rank.lacking or any(
            one is rank and position <= rank.awaited
            for one, position in self.requests[rank.node]
        )
        free = rank.claimed <= rank.awaited and not rank.idle and len(rank.lacking) > 0
        return "link" if waits or free else "decoding"


def play(
    training: Training, budget_bytes: int, scripts: Sequence[Script] | None = None
) -> Played:
    """Play a training under a disk budget of each node.

    Args:
        training: What is played.
        budget_bytes: The disk budget, no less than the largest unit.
        scripts: From :func:`write_scripts`, where several budgets are played.
    """
    return _Play(training, scripts or write_scripts(training), budget_bytes).run()
