"""Background production: which thread makes the next subject, with what RAM.

Owns the threads, the buffer and the RAM charges, and knows nothing of the queue that it serves,
so that the queue can be collected while threads run. Subjects are claimed in the order of
production; whoever claims one has its RAM first, and then asks the dataset for it. A thread that
waits holds nothing of the dataset.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, replace
from itertools import count as count_from
from typing import TYPE_CHECKING

import torch

from tio_openneuro.queue.schedule import Buffer, Place, Schedule
from tio_openneuro.queue.source import Production, fix_intra_op_threads
from tio_openneuro.queue.threads import Workers
from tio_openneuro.ram import FreedMemory, bound_free_memory, give_back, make_room, refuse_subject
from tio_openneuro.torchio_seams import CancelledWorkError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torchio as tio

    from tio_openneuro.queue.draw import EpochPlan
    from tio_openneuro.queue.source import Need, SubjectSource
    from tio_openneuro.ram import Admission

_LOGGER = logging.getLogger(__name__)
_DIAGNOSIS_S = 60.0
_IDLE_S = 2.0


@dataclass(frozen=True, slots=True)
class _Job:
    """One subject to be made, and what is charged for it."""

    generation: int
    place: Place
    index: int
    occurrence: int
    wanted: frozenset[int]
    charge_bytes: int
    work_bytes: int


class Filler:
    """Makes the patches of the current epoch, and of the next, ahead of the consumer."""

    def __init__(
        self,
        source: SubjectSource,
        admission: Admission,
        *,
        num_workers: int,
        window: int,
    ) -> None:
        """Begin with nothing to make, and no thread.

        Args:
            source: Makes a subject's patches.
            admission: The RAM charges; the filler locks them.
            num_workers: Threads; with zero the consumer's own thread makes what it takes.
            window: Patches from which the consumer draws.
        """
        self._source = source
        self._admission = admission
        self._num_workers = num_workers
        self._schedule = Schedule(window=window, subjects_ahead=num_workers or None)
        self._lock = threading.RLock()
        self._room = threading.Condition(self._lock)
        self._ready = threading.Condition(self._lock)
        self._turn = threading.Lock()
        self._workers = Workers(num_workers, self._work)
        self._closed = False
        self._generation = 0
        self._made = Buffer(admission)
        self._running: dict[int, _Job] = {}
        self._tickets = count_from()
        self._awaited: Place | None = None
        self._sized = source.cost.known
        self._freed = FreedMemory(admission.capacity_bytes, max(num_workers, 1), window)
        self.subjects = 0
        self.wait_s = 0.0

    # --- the consumer's side ---

    def begin(
        self,
        plan: EpochPlan,
        left: Iterable[int],
        following: EpochPlan | None,
        *,
        afresh: bool = False,
    ) -> None:
        """Make an epoch's patches from now on; what was made of it ahead stays.

        Args:
            plan: The epoch.
            left: Production indices that are still to be delivered.
            following: The epoch that may be begun before this one ends, or None.
            afresh: Keep nothing: after an error, what was made ahead may be the same one again.
        """
        if not self._closed:
            self._freed.begin()
            self._workers.start()
        with self._lock:
            if afresh:
                self._schedule.forget()
            continues = self._schedule.begin(plan, left, following)
            if not continues:
                self._generation += 1
            self._made.discard(lambda place: not continues or place[0] < plan.epoch)
            ahead = self._schedule.ahead()
        self._source.prefetch(ahead)
        self._wake()

    def extend(self, plan: EpochPlan) -> None:
        """Make also what was added to the end of the current epoch.

        Args:
            plan: Its plan, of which the present one is the beginning.
        """
        with self._lock:
            self._schedule.extend(plan)
            ahead = self._schedule.ahead()
        self._source.prefetch(ahead)
        self._wake()

    def take(self, epoch: int, index: int, step: int) -> tio.Subject | BaseException:
        """Return a patch once it is made, or what stopped its subject.

        Args:
            epoch: Number of the epoch that was begun last.
            index: Production index of the patch.
            step: Patches of the epoch that were delivered or skipped before.

        Raises:
            RuntimeError: The filler is closed, or no thread is left to make it.
        """
        position, number = self._schedule.plan(epoch).locate(index)
        place = (epoch, position)
        begun = time.monotonic()
        with self._lock:
            self._schedule.advance(epoch, step)
        try:
            (self._wait_for if self._num_workers else self._fill_until)(place)
        finally:
            self.wait_s += time.monotonic() - begun
        with self._lock:
            return self._made.get(place, number)

    def taken(self, epoch: int, index: int, step: int) -> None:
        """Let go of a patch that was delivered.

        Args:
            epoch: Number of the epoch that was begun last.
            index: Production index of the patch.
            step: As for :meth:`take`, this patch included.
        """
        position, number = self._schedule.plan(epoch).locate(index)
        place = (epoch, position)
        with self._lock:
            self._schedule.advance(epoch, step)
            self._made.take(place, number)
            self._room.notify_all()

    def buffered(self, epoch: int | None = None) -> dict[Place, tio.Subject]:
        """Return the patches that are made and not taken, by epoch and production index."""
        with self._lock:
            return {
                (place[0], self._schedule.plan(place[0]).start(place[1]) + number): patch
                for place, number, patch in self._made
                if epoch is None or place[0] == epoch
            }

    def close(self) -> None:
        """End the threads, drop what they made, and wait shortly until they are gone."""
        with self._lock:
            self._closed = True
            self._generation += 1
            self._schedule.forget()
            self._made.discard(lambda _place: True)
            self._room.notify_all()
            self._ready.notify_all()
        self._source.prefetch(())
        if not threading.main_thread().is_alive():
            # The interpreter ends: nobody else waits for what the threads are loading.
            self._source.close_dataset()
        self._workers.join()
        bound_free_memory()

    # --- the threads' side ---

    def _work(self) -> None:
        while True:
            with self._turn:
                claim = self._claim()
            if claim is None:
                return
            self._carry_out(*claim)
            del claim

    def _carry_out(self, ticket: int, job: _Job) -> None:
        production: Production | None = None
        try:
            production = self._source.produce(
                job.index,
                (job.place[0], job.occurrence),
                job.work_bytes,
                lambda: not self._current(job),
                self._wake,
            )
        except CancelledWorkError:
            pass
        except BaseException as error:
            if self._num_workers == 0:
                raise
            production = Production((), error=error)
        finally:
            # Also where an interrupt ends it: the charge must not outlive the work.
            self._deposit(ticket, job, production)
            del production

    def _claim(self) -> tuple[int, _Job] | None:
        """Wait until the next subject may be made; None once the filler is closed."""
        while True:
            with self._lock:
                while (place := self._schedule.next()) is None and not self._closed:
                    if self._num_workers == 0:
                        return None
                    self._rest()
                # Nobody would wake the consumer's own thread from a rest.
                if self._closed or place is None or self._served():
                    return None
                generation = self._generation
                index = self._schedule.index(place)
                occurrence = self._schedule.plan(place[0]).occurrences[place[1]]
                wanted = self._schedule.wanted(place)
            need = self._source.need(index)
            with self._lock:
                work_bytes = self._freed.bound(need.work_bytes, need.patch_bytes, known=need.known)
            charge_bytes = work_bytes + need.patch_bytes * self._source.count(index)
            job = _Job(generation, place, index, occurrence, wanted, charge_bytes, need.work_bytes)
            with self._lock:
                while self._still(job, need):
                    if self._admissible(job, need):
                        return self._enter(job)
                    if not self._stuck(job, need):
                        self._rest()
                    elif not self._make_way(job):
                        if need.known:
                            self._refuse(job)
                            break
                        return self._enter(self._squeeze(job))

    def _still(self, job: _Job, need: Need) -> bool:
        due = not self._closed and self._current(job) and self._schedule.next() == job.place
        return due and not (need.guessed and self._source.knows_sizes)

    def _wake(self) -> None:
        with self._lock:
            self._room.notify_all()

    def _served(self) -> bool:
        return self._num_workers == 0 and self._awaited in self._made

    def _current(self, job: _Job) -> bool:
        return job.generation == self._generation and self._schedule.covers(job.place[0])

    def _enter(self, job: _Job) -> tuple[int, _Job]:
        self._admission.charge(job.charge_bytes)
        self._schedule.claim(job.place)
        ticket = next(self._tickets)
        self._running[ticket] = job
        return ticket, job

    def _admissible(self, job: _Job, need: Need) -> bool:
        # A subject whose transform is unknown runs alone, and so does the first whose size is,
        # until its header tells: their bounds are guesses.
        if self._running and (need.guessed or not self._sized):
            return False
        return make_room(self._admission, job.charge_bytes)

    def _rest(self) -> None:
        """Wait for room, and return memory where that takes long."""
        holds = self._admission.retained_bytes > 0
        if not self._room.wait(_IDLE_S if holds else None):
            give_back(self._admission)

    def _stuck(self, job: _Job, need: Need) -> bool:
        """Tell whether waiting cannot help: nothing runs, and the consumer waits for this."""
        if self._running or self._admission.fits(job.charge_bytes):
            return False
        if need.known and job.charge_bytes > self._admission.capacity_bytes:
            return True
        awaited = self._awaited is not None and self._awaited >= job.place
        return awaited or self._admission.idle

    def _make_way(self, job: _Job) -> bool:
        """Drop a subject that was made too far ahead, to be made again; return whether one was.

        A subject that was given back, or added to the end of an epoch, comes before what was
        made meanwhile, and must not be refused for the room that this takes.
        """
        place = self._made.furthest(self._schedule.wanted)
        if place is None or place <= job.place:
            return False
        self._made.discard(lambda other: other == place)
        self._schedule.give_back(place)
        return True

    def _squeeze(self, job: _Job) -> _Job:
        """Return a job of unknown size with what the budget has left; its header will tell."""
        left = max(self._admission.budget_bytes - self._admission.charged_bytes, 0)
        patches_bytes = job.charge_bytes - job.work_bytes
        return replace(job, charge_bytes=left, work_bytes=max(left - patches_bytes, 0))

    def _refuse(self, job: _Job) -> None:
        held = self._admission.charged_bytes
        advice = (
            f"Its own work needs {job.charge_bytes} bytes, libraries and patches that wait for "
            f"delivery hold {held} bytes. Raise ram_budget, or lower max_length, the patch size "
            f"or samples_per_volume."
        )
        name = self._source.name(job.index)
        budget_bytes = self._admission.budget_bytes
        error = refuse_subject(name, held + job.charge_bytes, budget_bytes, advice)
        self._schedule.claim(job.place)
        self._made.fail(job.place, error)
        self._ready.notify_all()

    def _deposit(self, ticket: int, job: _Job, production: Production | None) -> None:
        with self._lock:
            if self._running.pop(ticket, None) is None:
                return
            if not self._current(job):
                self._admission.release(job.charge_bytes)
            elif production is None or production.larger:
                self._admission.release(job.charge_bytes)
                self._schedule.give_back(job.place)
            else:
                self._made.keep(job.place, production, job.wanted, job.charge_bytes)
                if production.error is None:
                    self._sized = True
                    self.subjects += 1
            self._room.notify_all()
            self._ready.notify_all()

    def _fill_until(self, place: Place) -> None:
        """Make subjects in this thread, in order, until one is made."""
        if self._closed:
            raise RuntimeError(_CLOSED)
        if place in self._made:
            return
        before = fix_intra_op_threads()
        self._awaited = place
        try:
            while place not in self._made and (claim := self._claim()) is not None:
                self._carry_out(*claim)
        finally:
            self._awaited = None
            torch.set_num_threads(before)
            for ticket, job in list(self._running.items()):
                self._deposit(ticket, job, None)

    def _wait_for(self, place: Place) -> None:
        begun = time.monotonic()
        with self._lock:
            self._awaited = place
            self._room.notify_all()
            try:
                while place not in self._made:
                    if self._closed:
                        raise RuntimeError(_CLOSED)
                    if not self._workers.alive:
                        raise RuntimeError(_NO_THREAD)
                    if not self._ready.wait(_DIAGNOSIS_S):
                        self._log_wait(place, time.monotonic() - begun)
            finally:
                self._awaited = None

    def _log_wait(self, place: Place, waited_s: float) -> None:
        busy = ", ".join(self._source.name(job.index) for job in self._running.values())
        name = self._source.name(self._schedule.index(place))
        charged = f"{self._admission.charged_bytes} of {self._admission.budget_bytes}"
        text = "The queue has waited %.0f s for %s; in work: %s; RAM charged: %s bytes"
        _LOGGER.warning(text, waited_s, name, busy or "nothing", charged)


_CLOSED = "Cannot take a patch: the queue is closed. Make a new one."
_NO_THREAD = "Cannot take a patch: no thread of the queue is alive. Begin the iteration again."
