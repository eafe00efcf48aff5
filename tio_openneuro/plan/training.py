"""A training played on a clock of its own: consumer, workers, disk and link. Pure.

Owns events and the time between them. What a queue makes next, how far ahead and which patch comes
next are its own decisions; what is fetched and gives way is the ledger's. Ranks step together, as
gradients that are averaged make them. All connections of a link have equal shares of it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from tio_openneuro.content import ContentId
from tio_openneuro.plan.root import Files, Order, PlayedRoot, Row
from tio_openneuro.queue import Ranks, Script, chosen_twice, is_within_reach, write_script

_ROUNDING_BYTES = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What is to be played.

    Attributes:
        units: Bytes of each annex key of a unit, in the dataset's order.
        make_s: Seconds of one worker for each unit, from files to patches.
        step_s: Seconds of the model for a batch.
        rate: Bytes per second of each node's link.
        latency_s: Seconds from a request to its first byte.
        epochs: Passes over the units, one at least.
        seed: The queue's.
        window: Its ``max_length``.
        samples: Its ``samples_per_volume``.
        workers: Its ``num_workers``, one at least.
        batch: Patches of a batch.
        jobs: Fetches at once, of each process.
        ranks: Processes that train.
        nodes: Machines that they are on, equally many on each.
    """

    units: Sequence[dict[str, int]]
    make_s: Sequence[float]
    step_s: float
    rate: float
    latency_s: float = 0.0
    epochs: int = 3
    seed: int = 0
    window: int = 256
    samples: int = 8
    workers: int = 4
    batch: int = 4
    jobs: int = 8
    ranks: int = 1
    nodes: int = 1

    def scripts(self) -> list[Script]:
        """Return what each rank makes and takes, whatever its machine is like."""
        counts = [self.samples] * len(self.units)
        every = (Ranks(rank, self.ranks, share=True) for rank in range(self.ranks))
        return [
            write_script(counts, self.epochs, self.window, seed=self.seed, ranks=ranks)
            for ranks in every
        ]


@dataclass(frozen=True, slots=True)
class Mark:
    """Where everything stands at a moment.

    Attributes:
        seconds: Since the beginning.
        fetched_bytes: Of each node.
        busy_s: Seconds in which the link of each was busy.
        link_s: Seconds that the consumer has waited for the link.
        making_s: Seconds that it has waited for workers.
    """

    seconds: float
    fetched_bytes: tuple[int, ...]
    busy_s: tuple[float, ...]
    link_s: float
    making_s: float


@dataclass(eq=False, slots=True)
class _Rank:
    """One process: its queue and what it fetches."""

    number: int
    owner: int
    script: Script
    idle: int
    units: list[int] = field(default_factory=list)
    twice: set[int] = field(default_factory=set)
    epoch: int = 0
    taken: int = 0
    step: int = 0
    due: int = 0
    claimed: int = 0
    loading: list[int] = field(default_factory=list)
    left: dict[int, int] = field(default_factory=dict)
    queued: list[tuple[int, ContentId, Row]] = field(default_factory=list)
    running: int = 0

    @property
    def awaited(self) -> int:
        """The position of the subject of the next patch."""
        return self.script.takes[self.epoch][self.taken]


@dataclass(eq=False)
class _Node:
    """A machine: its root, its link, and its processes.

    Connections are given equally many bytes: ``given`` counts those of any since the beginning.
    """

    root: PlayedRoot
    rate: float
    ranks: list[_Rank] = field(default_factory=list)
    requests: list[tuple[_Rank, int]] = field(default_factory=list)
    asked: list[tuple[float, ContentId, Row, _Rank]] = field(default_factory=list)
    coming: list[tuple[float, ContentId, Row, _Rank]] = field(default_factory=list)
    now_s: float = 0.0
    given: float = 0.0
    fetched_bytes: int = 0
    busy_s: float = 0.0

    def next_s(self) -> float:
        """Return when the next thing happens on the link."""
        asked_s = self.asked[0][0] if self.asked else inf
        if not self.coming:
            return asked_s
        left = max(self.coming[0][0] - self.given, 0)
        return min(asked_s, self.now_s + left * len(self.coming) / self.rate)

    def advance(self, now_s: float) -> None:
        """Go on, no further than to what happens next."""
        passed_s, self.now_s = now_s - self.now_s, now_s
        self.busy_s += passed_s if self.asked or self.coming else 0
        self.given += passed_s * self.rate / max(len(self.coming), 1)
        while self.coming and self.coming[0][0] <= self.given + _ROUNDING_BYTES:
            _, content, row, rank = heapq.heappop(self.coming)
            rank.running -= 1
            if self.root.arrived(content, row):
                self.fetched_bytes += row.size_bytes
        while self.asked and self.asked[0][0] <= now_s:
            _, content, row, rank = heapq.heappop(self.asked)
            heapq.heappush(self.coming, (self.given + row.size_bytes, content, row, rank))


class Play:
    """A training under a disk budget of each node.

    Attributes:
        marks: At each epoch's end, and once the links have come to rest after that.
        peak_bytes: Most that a node held.
    """

    def __init__(
        self, training: Training, budget_bytes: int, scripts: Sequence[Script] | None = None
    ) -> None:
        """Play it.

        Args:
            training: What is played.
            budget_bytes: The disk budget, no less than the largest unit.
            scripts: The training's, where several budgets are played.
        """
        self._training = training
        keys = {key: size for unit in training.units for key, size in unit.items()}
        contents = {key: ContentId("", key) for key in keys}
        self._files: list[Files] = [tuple(contents[key] for key in u) for u in training.units]
        sizes = {contents[key]: size for key, size in keys.items()}
        self._nodes = [
            _Node(PlayedRoot(self._files, sizes, budget_bytes), training.rate)
            for _ in range(training.nodes)
        ]
        self.marks: list[Mark] = []
        self._now_s = self._link_s = self._making_s = 0.0
        self._making: list[tuple[float, int, int]] = []
        self._step_ends_s = inf
        self._ranks: list[_Rank] = []
        for number, script in enumerate(scripts or training.scripts()):
            node = self._nodes[number * training.nodes // training.ranks]
            node.ranks.append(_Rank(number, len(node.ranks), script, training.workers))
            node.root.orders.append(Order())
            self._ranks.append(node.ranks[-1])
            self._know(node.ranks[-1], 0)
            self._know(node.ranks[-1], 1)
            self._begin(node.ranks[-1])
        self._play()
        self.peak_bytes = max(node.root.peak_bytes for node in self._nodes)

    def _play(self) -> None:
        while True:
            for node in self._nodes:
                self._settle(node)
            steps, ends = self._step_ends_s < inf, len(self.marks) == self._training.epochs
            waits = not steps and not ends and any(rank.due for rank in self._ranks)
            if not waits and not steps and not ends:
                self._step_ends_s = self._now_s + self._training.step_s
            making_s = self._making[0][0] if self._making else inf
            next_s = min(self._step_ends_s, making_s, *(node.next_s() for node in self._nodes))
            if next_s == inf:
                break
            passed_s, self._now_s = next_s - self._now_s, next_s
            if waits and self._waits_for_link():
                self._link_s += passed_s
            elif waits:
                self._making_s += passed_s
            self._advance()
        self._mark()

    def _waits_for_link(self) -> bool:
        """Tell whether the consumer waits for files, its own or those that hold up all workers."""
        rank = next(rank for rank in self._ranks if rank.due)
        made = sum(number == rank.number for _, number, _ in self._making)
        awaited = rank.awaited
        making = any(rank.number == number and at == awaited for _, number, at in self._making)
        return not making and (rank.claimed > awaited or made < self._training.workers)

    # What comes at a moment

    def _advance(self) -> None:
        for node in self._nodes:
            node.advance(self._now_s)
            for rank in node.ranks:
                self._make(node, rank)
        while self._making and self._making[0][0] <= self._now_s:
            _, number, position = heapq.heappop(self._making)
            rank = self._ranks[number]
            self._node_of(rank).root.end_lease(self._files[rank.units[position]])
            rank.left[position] = self._training.samples
            rank.idle += 1
        if self._step_ends_s <= self._now_s:
            self._step_ends_s = inf
            if self._ranks[0].taken == len(self._ranks[0].script.takes[self._ranks[0].epoch]):
                self._mark()
            for rank in self._ranks:
                self._begin(rank)

    def _make(self, node: _Node, rank: _Rank) -> None:
        """Begin to make what has arrived."""
        for position in list(rank.loading):
            unit = rank.units[position]
            if all(node.root.rows[content].present for content in self._files[unit]):
                rank.loading.remove(position)
                ends_s = self._now_s + self._training.make_s[unit] * (1 + (position in rank.twice))
                heapq.heappush(self._making, (ends_s, rank.number, position))

    def _begin(self, rank: _Rank) -> None:
        """Begin a step, and an epoch where the last one has ended."""
        takes = rank.script.takes
        if rank.taken == len(takes[rank.epoch]) and rank.epoch + 1 < len(takes):
            rank.epoch, rank.taken = rank.epoch + 1, 0
            self._know(rank, rank.epoch + 1)
        rank.due = min(self._training.batch, len(takes[rank.epoch]) - rank.taken)

    def _know(self, rank: _Rank, epoch: int) -> None:
        order = rank.script.orders[epoch]
        rank.twice.add(len(rank.units) + chosen_twice(len(order), self._training.seed, epoch))
        rank.units += order
        root = self._node_of(rank).root
        root.extend(rank.owner, [self._files[unit] for unit in order])

    def _node_of(self, rank: _Rank) -> _Node:
        return self._nodes[rank.number * self._training.nodes // self._training.ranks]

    def _mark(self) -> None:
        fetched_bytes = tuple(node.fetched_bytes for node in self._nodes)
        busy_s = tuple(node.busy_s for node in self._nodes)
        self.marks.append(Mark(self._now_s, fetched_bytes, busy_s, self._link_s, self._making_s))

    # What can be done now

    def _settle(self, node: _Node) -> None:
        """Do all that can be done at this moment on one node."""
        changed = True
        while changed:
            changed = False
            for rank in node.ranks:
                changed |= self._take(rank)
                changed |= self._claim(node, rank)
            changed |= self._lease(node)
            for rank in node.ranks:
                changed |= self._fetch(node, rank)
                self._make(node, rank)

    def _take(self, rank: _Rank) -> bool:
        before = rank.due
        while rank.due and (position := rank.awaited) in rank.left:
            rank.left[position] -= 1
            if not rank.left[position]:
                del rank.left[position]
            rank.taken, rank.step, rank.due = rank.taken + 1, rank.step + 1, rank.due - 1
        return rank.due < before

    def _claim(self, node: _Node, rank: _Rank) -> bool:
        training = self._training
        before, samples = rank.claimed, training.samples
        while rank.idle and rank.claimed < len(rank.units):
            distance = rank.claimed * samples - rank.step
            if not is_within_reach(distance, samples, training.window, training.workers):
                break
            node.requests.append((rank, rank.claimed))
            rank.claimed, rank.idle = rank.claimed + 1, rank.idle - 1
        return rank.claimed > before

    def _lease(self, node: _Node) -> bool:
        leased = False
        while node.requests:
            rank, position = node.requests[0]
            missing = node.root.lease(rank.owner, position)
            if missing is None:
                break
            node.requests.pop(0)
            self._ask(node, rank, position, missing)
            rank.loading.append(position)
            leased = True
        return leased

    def _ask(self, node: _Node, rank: _Rank, position: int, missing: list[ContentId]) -> None:
        for content in missing:
            heapq.heappush(rank.queued, (position, content, node.root.rows[content]))

    def _fetch(self, node: _Node, rank: _Rank) -> bool:
        """Begin fetches, those that are used first before others; and reserve more ahead."""
        began = False
        while True:
            while rank.queued and rank.running < self._training.jobs:
                _, content, row = heapq.heappop(rank.queued)
                if node.root.rows.get(content) is row:
                    at_s = self._now_s + self._training.latency_s
                    heapq.heappush(node.asked, (at_s, content, row, rank))
                    rank.running += 1
            if len(rank.queued) >= self._training.jobs:
                return began
            ahead = node.root.prefetch(rank.owner)
            if ahead is None:
                return began
            self._ask(node, rank, *ahead)
            began = True
