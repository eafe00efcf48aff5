"""Background production: which thread makes the next subject, with what RAM.

Owns the threads, the buffer and the RAM charges, and knows nothing of the queue that it serves,
so that the queue can be collected while threads run. Subjects are claimed in the order of
production; whoever claims one has its RAM first, and then asks the dataset for it. A thread that
waits holds nothing of the dataset.

What goes wrong with one subject is kept in the place of its patches. Whatever else stops a thread
is raised by the next :meth:`Filler.take`, as it is; meanwhile no thread begins anything, and after
that all is made anew from where the consumer stands.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torchio as tio

from tio_openneuro.queue.draw import EpochPlan, Pass, Turn
from tio_openneuro.queue.schedule import Buffer, Schedule
from tio_openneuro.queue.source import Production, RamBounds, SubjectSource, forget_locals
from tio_openneuro.queue.threads import INTRA_OP_THREADS, Workers
from tio_openneuro.ram import Admission, FreedMemory, ResidentPeak, give_back, make_room
from tio_openneuro.recording import Activity

_LOGGER = logging.getLogger(__name__)
_DIAGNOSIS_S = 60.0
_STEP_S = 0.5
_IDLE_S = 2.0


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """One subject to be made, and what is charged for it."""

    generation: int
    turn: Turn
    charge_bytes: int
    work_bytes: int


class Filler:
    """Makes the patches of the current epoch, and of the next, ahead of the consumer."""

    def __init__(self, source: SubjectSource, *, num_workers: int, window: int) -> None:
        """Begin with nothing to make, and no thread.

        Args:
            source: Makes a subject's patches.
            num_workers: Threads; with zero the consumer's own thread makes what it takes.
            window: Patches from which the consumer draws.
        """
        self._source = source
        self._num_workers = num_workers
        self._schedule = Schedule(window=window, subjects_ahead=num_workers or None)
        self._changed = threading.Condition()
        self._claiming = threading.Lock()
        self._workers = Workers(num_workers, self._work)
        self._closed = False
        self._failure: BaseException | None = None
        self._generation = 0
        self.admission = Admission(source.ram_budget_bytes, base_bytes=source.base_bytes)
        self._made = Buffer(self.admission)
        self._running: set[_Job] = set()
        self._awaited: Turn | None = None
        self._freed = FreedMemory(self.admission.capacity_bytes, max(num_workers, 1), window)
        self.held = ResidentPeak()
        self.subjects = 0
        self._waiting = Activity()

    # --- the consumer's side ---

    def begin(self, current: Pass) -> None:
        """Make a pass's patches from now on; what was made for it ahead stays.

        Args:
            current: The pass, of which nothing was taken yet.
        """
        if self._closed:
            return
        following = self._source.planner.following(current.plan.epoch)
        self._freed.begin()
        self._workers.start()
        with self._changed:
            continues = self._schedule.begin(current, following)
            if not continues:
                self._generation += 1
            self._made.discard(lambda turn: not continues or turn.epoch < current.plan.epoch)
        self._look_ahead()

    def extend(self, plan: EpochPlan) -> None:
        """Make also what was added to the end of the current epoch.

        Args:
            plan: Its plan, of which the present one is the beginning.
        """
        with self._changed:
            self._schedule.extend(plan)
        self._look_ahead()

    @property
    def wait_s(self) -> float:
        """Seconds that the consumer stood waiting, the present wait included."""
        return self._waiting.seconds("wait")

    def take(
        self, current: Pass, meanwhile: Callable[[], None] = lambda: None
    ) -> tio.Subject | BaseException:
        """Return the next patch once it is made, or what stopped its subject.

        Args:
            current: The pass that was begun last, not finished. It goes on by the patch.
            meanwhile: Called now and then while it is not made, without any lock.

        Raises:
            RuntimeError: The filler is closed.
            BaseException: What stopped a thread, as it was raised, though the patch be made.
        """
        turn, number = current.next()
        self._awaited = turn
        self._wake()
        try:
            with self._waiting.doing("wait"):
                (self._wait_for if self._num_workers else self._fill_until)(turn, meanwhile)
        finally:
            self._awaited = None
        with self._changed:
            made = self._made.get(turn, number)
            if not isinstance(made, BaseException):
                current.take()
                self._made.take(turn, number)
                self._changed.notify_all()
            return made

    def buffered(self) -> dict[tuple[int, int], tio.Subject]:
        """Return the patches that are made and not taken, by epoch and production index."""
        with self._changed:
            return {
                (turn.epoch, self._schedule.index(turn, number)): patch
                for turn, number, patch in self._made
            }

    def close(self) -> None:
        """End the threads, drop what they made, and wait shortly until they are gone."""
        with self._changed:
            self._closed = True
            self._generation += 1
            self._schedule.forget()
            self._made.discard(lambda _turn: True)
            self._changed.notify_all()
        try:
            self._source.prefetch(())
            if not threading.main_thread().is_alive():
                # The interpreter ends: nobody else waits for what the threads are loading.
                self._source.content.close()
        finally:
            self._workers.join()
            self._freed.end()

    def _look_ahead(self) -> None:
        with self._changed:
            ahead = self._schedule.ahead(self._source.is_made_twice)
        self._source.prefetch(ahead)
        self._wake()

    def _wait_for(self, turn: Turn, meanwhile: Callable[[], None]) -> None:
        begun = told = time.monotonic()
        while not self._is_made(turn):
            meanwhile()
            with self._changed:
                # In steps, so that a signal which comes on the way into a wait is seen.
                if not self._is_made(turn) and self._changed.wait(_STEP_S):
                    told = time.monotonic()
            if time.monotonic() - told >= _DIAGNOSIS_S:
                told = time.monotonic()
                self._log_wait(turn, told - begun)

    def _log_wait(self, turn: Turn, waited_s: float) -> None:
        busy = ", ".join(self._source.name(job.turn.index) for job in self._running)
        charged = f"{self.admission.charged_bytes} of {self.admission.budget_bytes}"
        text = "The queue has waited %.0f s for %s; in work: %s; RAM charged: %s bytes"
        _LOGGER.warning(text, waited_s, self._source.name(turn.index), busy or "nothing", charged)

    def _fill_until(self, turn: Turn, meanwhile: Callable[[], None]) -> None:
        """Make subjects in this thread, in order, until one is made."""
        before = torch.get_num_threads()
        torch.set_num_threads(INTRA_OP_THREADS)
        try:
            while not self._is_made(turn):
                self._make_next()
                meanwhile()
        finally:
            torch.set_num_threads(before)

    def _is_made(self, turn: Turn) -> bool:
        """Tell whether a subject is made, or raise what keeps it from being made."""
        with self._changed:
            if self._closed:
                raise RuntimeError(_CLOSED)
            if self._failure is not None:
                error, self._failure = self._failure, None
                self._begin_anew()
                raise error
            return turn in self._made

    def _begin_anew(self) -> None:
        """Have nothing made and all to be made: what stopped a thread may have come between notes.

        Jobs that still run stay charged until they end.
        """
        self._generation += 1
        if not self._num_workers:
            # What was interrupted in the consumer's own thread may not have noted its end.
            self._running.clear()
        noted_bytes = self.admission.charged_bytes - self._source.base_bytes
        self.admission.settle(noted_bytes, sum(job.charge_bytes for job in self._running))
        self._made = Buffer(self.admission)
        self._schedule.begin_anew()

    # --- the threads' side ---

    def _work(self) -> None:
        while not self._closed:
            self._make_next()

    def _make_next(self) -> None:
        """Make the next subject; or return after a rest, where there is none or no room for it.

        What stops it in between is for the consumer to raise; until then nothing more is begun.
        """
        try:
            with self._claiming:
                job = self._claim()
            if job is not None:
                self._make(job)
        except BaseException as error:  # noqa: BLE001 - raised by the consumer
            with self._changed:
                forget_locals(error)
                self._failure = self._failure or error
                self._changed.notify_all()

    def _make(self, job: _Job) -> None:
        production: Production | None = None
        try:
            production = self._source.produce(
                job.turn, job.work_bytes, lambda: not self._current(job), self._wake
            )
        finally:
            # Also where an interrupt ends it: the charge must not outlive the work.
            self._deposit(job, production)

    def _deposit(self, job: _Job, production: Production | None) -> None:
        with self._changed:
            self._running.remove(job)
            if self._current(job) and production is not None:
                wanted = self._schedule.wanted(job.turn)
                self._made.keep(job.turn, production, wanted, job.charge_bytes)
                if production.error is None:
                    self.subjects += 1
            else:
                self.admission.release(job.charge_bytes)
                if self._current(job):
                    self._schedule.give_back(job.turn)
            self._changed.notify_all()

    def _current(self, job: _Job) -> bool:
        return job.generation == self._generation and self._schedule.covers(job.turn)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # --- room: wait, make way, or refuse ---

    def _claim(self) -> _Job | None:
        """Charge and claim the next subject; None where it must be looked for again."""
        with self._changed:
            turn = self._next()
            if turn is None:
                self._rest()
                return None
        # Reads headers, for which nobody should have to wait.
        bounds = self._source.bounds(turn.index)
        with self._changed:
            while self._is_next(turn, bounds):
                job = self._job(turn, bounds)
                if self._has_room(job, bounds):
                    return self._enter(job)
                if not self._stuck(job, bounds):
                    self._rest()
                elif not self._make_way(job):
                    if not bounds.known:
                        return self._enter(self._squeeze(job))
                    self._refuse(job)
        return None

    def _next(self) -> Turn | None:
        """Return the next turn; none until the consumer raised what stopped a thread."""
        return self._schedule.next() if self._failure is None else None

    def _is_next(self, turn: Turn, bounds: RamBounds) -> bool:
        """Tell whether a turn is still the next one, and its bounds the best that can be told."""
        outdated = bounds.guessed and self._source.knows_sizes
        return not outdated and self._next() == turn

    def _job(self, turn: Turn, bounds: RamBounds) -> _Job:
        patches_bytes = bounds.patch_bytes * self._source.counts[turn.index]
        work_bytes = self._freed.bound(bounds.work_bytes, bounds.patch_bytes, known=bounds.known)
        return _Job(self._generation, turn, work_bytes + patches_bytes, bounds.work_bytes)

    def _enter(self, job: _Job) -> _Job:
        self.admission.charge(job.charge_bytes)
        self._schedule.claim(job.turn)
        self._running.add(job)
        return job

    def _has_room(self, job: _Job, bounds: RamBounds) -> bool:
        # A subject whose transform is unknown runs alone, and so does the first whose size is,
        # until its header tells: their bounds are guesses.
        sure = not bounds.guessed and (self._source.costs_known or self.subjects > 0)
        return (sure or not self._running) and make_room(self.admission, job.charge_bytes)

    def _rest(self) -> None:
        """Wait for room, unless closed, and return memory where that takes long."""
        if not self._num_workers:
            # Nobody would wake the consumer's own thread.
            raise RuntimeError(_NOTHING_LEFT)
        holds = self.admission.retained_bytes > 0
        if not self._closed and not self._changed.wait(_IDLE_S if holds else None):
            give_back(self.admission)

    def _stuck(self, job: _Job, bounds: RamBounds) -> bool:
        """Tell whether waiting cannot help: nothing runs, and the consumer waits for this."""
        if self._running or self.admission.fits(job.charge_bytes):
            return False
        if bounds.known and job.charge_bytes > self.admission.capacity_bytes:
            return True
        awaited = self._awaited is not None and self._awaited >= job.turn
        return awaited or self.admission.idle

    def _make_way(self, job: _Job) -> bool:
        """Drop a subject that was made too far ahead, to be made again; return whether one was.

        A subject that was given back, or added to the end of an epoch, comes before what was
        made meanwhile, and must not be refused for the room that this takes.
        """
        last = self._made.furthest()
        if last is None or last <= job.turn:
            return False
        self._made.discard(lambda turn: turn == last)
        self._schedule.give_back(last)
        return True

    def _squeeze(self, job: _Job) -> _Job:
        """Return a job of unknown size with what the budget has left; its header will tell."""
        left = max(self.admission.budget_bytes - self.admission.charged_bytes, 0)
        patches_bytes = job.charge_bytes - job.work_bytes
        return replace(job, charge_bytes=left, work_bytes=max(left - patches_bytes, 0))

    def _refuse(self, job: _Job) -> None:
        held_bytes = self.admission.charged_bytes
        error = self._source.too_large(job.turn.index, job.charge_bytes, held_bytes)
        self._schedule.claim(job.turn)
        self._made.keep(job.turn, Production(error=error), (), 0)
        self._changed.notify_all()


_CLOSED = "Cannot take a patch: the queue is closed. Make a new one."
_NOTHING_LEFT = "Cannot take a patch: nothing is left to be made. Begin the iteration again."
