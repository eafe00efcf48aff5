"""A queue of patches that never drains, keeps a RAM budget, and gives the same patches each time.

Owns the façade: TorchIO's parameters and attributes, passes and indices, errors, state. Threads
and RAM are :mod:`~tio_openneuro.queue.filler`'s, the draw is :mod:`~tio_openneuro.queue.draw`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from typing import Any, Self

import torchio as tio
from torch.utils.data import get_worker_info

from tio_openneuro.closing import Closing
from tio_openneuro.queue import checks
from tio_openneuro.queue.draw import Pass, PassStart
from tio_openneuro.queue.filler import Filler
from tio_openneuro.queue.order import Planner
from tio_openneuro.queue.source import SubjectSource
from tio_openneuro.queue.state import (
    LONGEST_SKIPPED,
    WORK,
    QueueState,
    QueueStatistics,
    Record,
    SkippedSubject,
    compare_parts,
    pack_order,
    read,
)
from tio_openneuro.queue.threads import INTRA_OP_THREADS
from tio_openneuro.ram import available_bytes, read_budget
from tio_openneuro.torchio_seams import identify_parts, install_seed_guard, leave_unfilled
from tio_openneuro.volumes import install_reading_gate


class BudgetedQueue(tio.Queue):
    """Fill a buffer of patches in the background, within a RAM budget.

    A drop-in for :class:`torchio.Queue`. With ``seed``, the sequence of patches is the same for
    any number of workers, timing or restarts, for code that draws from torch. Code that is seen to
    draw from NumPy or ``random`` is refused then; what nobody sees beforehand is found out while
    it runs: one subject of each epoch is made a second time, and a difference raises
    NotImplementedError. Without ``seed`` any code goes, and no subject is made twice.

    What stops a filling thread is raised by the next patch that is asked for, as it was raised; the
    one after that goes on. Use it as the dataset of a loader that has ``num_workers=0``, or iterate
    over it: one epoch each time.

    Index 0 begins a pass over one epoch; ``len`` is that of the epoch that index 0 would begin,
    :attr:`left` what remains of the present one. After a state was loaded the first index may be 0
    or the next one, and the pass ends with its epoch, short of ``len``. A loader with
    ``drop_last=True`` gets a short batch then: take ``left // batch_size`` of it.

    Example:
        >>> import torch, torchio as tio, tio_openneuro as tno
        >>> image = tio.ScalarImage(tensor=torch.zeros(1, 16, 16, 16))
        >>> dataset = tio.SubjectsDataset([tio.Subject(t1=image)])
        >>> with tno.BudgetedQueue(dataset, 10, 3, tio.UniformSampler(8), seed=0) as queue:
        ...     len([patch for patch in queue])
        3
    """

    def __init__(
        self,
        subjects_dataset: tio.SubjectsDataset,
        max_length: int | None = None,
        samples_per_volume: int = 8,
        sampler: tio.data.PatchSampler | None = None,
        subject_sampler: Iterable[int] | None = None,
        num_workers: int = 4,
        shuffle_subjects: bool = True,  # noqa: FBT001, FBT002 - TorchIO's signature
        shuffle_patches: bool = True,  # noqa: FBT001, FBT002
        start_background: bool = True,  # noqa: FBT001, FBT002
        verbose: bool = False,  # noqa: FBT001, FBT002
        *,
        ram_budget: int | str = "auto",
        seed: int | None = None,
        on_error: str = "raise",
        patch_transform: Callable[[tio.Subject], tio.Subject] | None = None,
        on_release: str = "keep",
        ranks: str | tuple[int, int] | None = "auto",
    ) -> None:
        """Begin to fill, unless told to wait.

        Args:
            subjects_dataset: The subjects; any ``tio.SubjectsDataset``.
            max_length: Patches from which the next one is drawn, the most that wait in
                ``patches_list``; None chooses it from the RAM budget and the patch size.
            samples_per_volume: Patches of each subject that has no ``num_samples``, an integer
                from zero.
            sampler: The patch sampler; by default ``tio.UniformSampler(96)``.
            subject_sampler: Gives the indices of the subjects of each epoch; it needs a length.
            num_workers: Threads that fill; with zero, the consumer's thread does.
            shuffle_subjects: Whether subjects are permuted in each epoch.
            shuffle_patches: Whether patches are drawn from the window, or come in order.
            start_background: Whether filling begins now, or with the first patch.
            verbose: As in TorchIO.
            ram_budget: Bytes, text like ``"4 GB"``, or ``"auto"``: half of what is available.
            seed: Decides every draw, and has one subject of each epoch made twice to find whether
                it does; None takes one from the system.
            on_error: ``"raise"`` or ``"skip"`` a subject that cannot be made into patches. With
                ranks, its share is taken by the rank's next subjects.
            patch_transform: Applied to each patch, ``(C, I, J, K)`` an image, after sampling:
                in the background, under its subject's seed, and charged to the RAM budget.
            on_release: ``"keep"`` or ``"drop"`` a subject's content once its patches are made.
            ranks: ``"auto"`` deals the subjects out where ``torch.distributed`` has several ranks
                and there is no ``subject_sampler``: by a permutation of the epoch alone, equally,
                some subjects twice where they do not divide. The length is the share's. A sampler
                that knows no ranks draws from a generator of its own on each. Make the queue
                after ``init_process_group``. None says that the dataset is sharded already, or
                that all want the same; ``(rank, world_size)`` says which share. Give every rank
                the same ``seed``, so that the state of one resumes all of them exactly.

        Raises:
            ValueError: A parameter, or a subject's ``num_samples``, is out of range, or two
                parameters exclude each other.
            TypeError: The dataset is none of subjects, such as a ``Subset`` or a list.
            RamBudgetError: The budget cannot hold a subject whose size is known, or any.
        """
        checks.refuse_wrapped(subjects_dataset)
        checks.refuse_below(1, max_length=max_length, samples_per_volume=samples_per_volume)
        checks.refuse_below(0, num_workers=num_workers)
        checks.refuse_others("on_error", on_error, "raise", "skip")
        checks.refuse_others("on_release", on_release, "keep", "drop")
        checks.refuse_two_orders(subject_sampler, shuffled=shuffle_subjects)
        self.subjects_dataset = subjects_dataset
        self.samples_per_volume = samples_per_volume
        self.sampler = tio.UniformSampler(96) if sampler is None else sampler
        self.subject_sampler = subject_sampler  # type: ignore[assignment]
        self.num_workers = num_workers
        self.shuffle_subjects = shuffle_subjects
        self.shuffle_patches = shuffle_patches
        self.verbose = verbose
        self.on_error = on_error
        self.patch_transform = patch_transform
        self.on_release = on_release
        self.ranks = ranks
        self._ranks = checks.read_ranks(ranks, subject_sampler)
        if seed is not None:
            checks.refuse_other_generators(subjects_dataset, self.sampler, patch_transform)
        self._repeats = seed is not None
        self.seed = int.from_bytes(os.urandom(4), "little") if seed is None else int(seed)
        self._automatic, self._available_bytes = ram_budget == "auto", available_bytes()
        self.ram_budget_bytes = read_budget(ram_budget, self._available_bytes)
        self.max_length = max_length or 0  # until the size of a patch is known
        self.skipped: list[SkippedSubject] = []
        leave_unfilled(self)
        self._chooses_length = max_length is None
        self._start_background = start_background
        self._pid = os.getpid()
        self._parts: dict[str, str] = {}
        self._delivered = 0
        install_seed_guard()
        install_reading_gate()
        self._build(PassStart(), self._make_planner(self.seed))
        checks.check_ranks(ranks, self._ranks, subject_sampler, self._planner)
        self._source.require_room()
        self._fill_ahead()

    def _make_planner(self, seed: int) -> Planner:
        counts = checks.count_patches(self.subjects_dataset, self.samples_per_volume)
        shuffled, ranks = self.shuffle_subjects, self._ranks
        return Planner(counts, self.subject_sampler, seed=seed, shuffled=shuffled, ranks=ranks)

    def _build(self, start: PassStart, planner: Planner) -> None:
        """Make what depends on the seed and the window, to go on from there."""
        self._planner = planner
        self._source = SubjectSource(
            dataset=self.subjects_dataset,
            sampler=self.sampler,
            planner=planner,
            patch_transform=self.patch_transform,
            seed=self.seed,
            checked=self._repeats,
            drop=self.on_release == "drop",
            ram_budget_bytes=self.ram_budget_bytes,
            window=self.max_length or None,
            available_bytes=self._available_bytes if self._automatic else None,
        )
        self.max_length = self._source.window_of(self.ram_budget_bytes)
        self._filler = Filler(self._source, num_workers=self.num_workers, window=self.max_length)
        self._pass: Pass | None = None
        self._left_at: int | None = None
        self._ahead: Pass | None = None
        self._rewound: PassStart | None = None
        self._next = start
        # Of this filler alone: another one counts from zero.
        self.record = Record()
        # The threads hold the filler and never the queue: rebinding the name ends them.
        self._closing = Closing(self, self._filler.close)

    # --- patches ---

    def __iter__(self) -> Iterator[tio.Subject]:
        """Give the patches of one epoch."""
        # The StopIteration of the last one ends it.
        return map(self.__getitem__, count())

    def __getitem__(self, index: int) -> tio.Subject:
        """Return the next patch of the pass; index 0 begins a pass.

        Args:
            index: One more than the last one, or 0.

        Raises:
            RuntimeError: The index jumps, or another process asks.
            StopIteration: The pass has no patch left.
            Exception: A subject could not be made into patches: an error of the class that
                stopped it, whose message names the subject and whose cause is the original.
        """
        if get_worker_info() is not None or os.getpid() != self._pid:
            raise RuntimeError(checks.OTHER_PROCESS)
        index = int(index)
        if self._begins(index):
            self._begin_pass(index)
        current = self._pass
        expected = 0 if current is None else current.expected
        if current is not None and current.finished and index >= expected:
            raise StopIteration
        if current is None or index != expected:
            in_turns = self._left_at is not None and (index < expected or index == self._left_at)
            raise RuntimeError(checks.name_jump(index, expected, in_turns=in_turns))
        self._rewound = None
        patch = self._next_patch(current)
        self._delivered += 1
        self.record.note(self)
        return patch

    def __getitems__(self, indices: list[int]) -> list[tio.Subject]:
        """Return the next patches of the pass, fewer where it ends short.

        Args:
            indices: Consecutive ones; see :meth:`__getitem__`.

        Raises:
            StopIteration: The pass has no patch left.
        """
        patches: list[tio.Subject] = []
        before = self._here(*indices[:1])
        try:
            # Shorter where a StopIteration ends it.
            patches.extend(map(self.__getitem__, indices))
        except BaseException:
            # The batch is lost to the consumer: a state taken now begins with its patches.
            if patches:
                self._rewound = before
            raise
        if not patches:
            raise StopIteration
        return patches

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be that of an epoch; nothing changes where it would be anyway.

        Args:
            epoch: Number of the epoch, from zero.
        """
        if epoch < 0:
            raise ValueError(f"Cannot set epoch {epoch}: epochs are numbered from zero.")
        if epoch != self._next.epoch:
            self._next = PassStart(epoch)

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Return where the queue is: everything that a new one needs to go on from here.

        It counts patches handed out, not trained on: those that a loader had fetched ahead when
        it was taken are not given again. So take it where the loader holds none; torch's own with
        ``num_workers=0`` never does, Accelerate's prepared one is a batch ahead.
        """
        start = self._rewound or self._here()
        keeps_order = start.step > 0 and not self._planner.foreseeable
        return QueueState(
            seed=self.seed,
            window=self.max_length,
            start=start,
            order=pack_order(self._planner.plan(start.epoch).order) if keeps_order else None,
            skipped=tuple(self.skipped[-LONGEST_SKIPPED:]),
            parts=self._identify(),
            ranks=(self._ranks.rank, self._ranks.world),
        ).to_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from where a queue was: the next pass gives what was left of its epoch.

        Its first index may be 0 or the one that came next then, as the loader counts. The state
        may come from anybody; a queue that refuses one is as it was.

        Args:
            state_dict: What :meth:`state_dict` returned, in this process or another. One with
                skips or an order that cannot be drawn again is its rank's alone.

        Raises:
            ValueError: It was taken from another dataset, selection, transform, sampler, rank or
                TorchIO version, or has a value out of range; the message names which.
            RamBudgetError: The budget cannot hold its window.
        """
        state = QueueState.from_dict(state_dict)
        parts = self._identify()
        if self._chooses_length:
            parts["max_length"] = str(state.window)
        compare_parts(state.parts, parts)
        planner = self._make_planner(state.seed)
        state.check(planner, self._ranks)
        if self._chooses_length:
            checks.refuse_window(state.window, self._source)
        self._closing()
        self.seed, self.max_length = state.seed, state.window
        self.skipped = list(state.skipped)
        self._parts = {}
        self._build(state.start, planner)
        self._fill_ahead()

    # --- end ---

    def close(self) -> None:
        """End the background threads; the queue gives no more patches. Idempotent."""
        self._closing()

    def __enter__(self) -> Self:
        """Return the queue itself."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close it."""
        self.close()

    # --- what it shows ---

    @property
    def iterations_per_epoch(self) -> int:
        """Patches of the epoch that index 0 would begin, which ``len`` is; draw nothing."""
        current = None if self._begins(0) else self._pass
        return self._planner.total(self._next.epoch if current is None else current.plan.epoch)

    @property
    def left(self) -> int:
        """Patches that remain of the present epoch, also where a state was loaded within it.

        It is the epoch that is being read, or was last; before any is, the one that comes.
        """
        if self._pass is not None:
            return len(self._pass.left())
        return len(self._pass_at(self._next).left()) if self._next.step else len(self)

    @property
    def num_subjects(self) -> int:
        """Subjects of an epoch."""
        return len(self._planner)

    @property
    def patches_list(self) -> list[tio.Subject]:  # type: ignore[override]
        """Patches that are made and within the window, in the order of production."""
        current = self._pass or self._ahead
        if current is None:
            return []
        made = self._filler.buffered()
        keys = [(current.plan.epoch, index) for index in current.candidates()]
        return [made[key] for key in keys if key in made]

    def get_max_memory(self, subject: tio.Subject | None = None) -> int:
        """Return the most RAM that the patches of a full window take, in bytes; load nothing.

        Args:
            subject: Decides the number of channels; by default the first of the dataset, where
                an image that was not loaded counts as one channel unless its header is there.
        """
        if subject is not None:
            return super().get_max_memory(subject)
        return self._source.patch_bytes(self._source.channels(0)) * self.max_length

    def statistics(self) -> QueueStatistics:
        """Return what was done and what is held."""
        current, filler = self._pass, self._filler
        epoch = self._next.epoch if current is None else current.plan.epoch
        return QueueStatistics(
            patches=self._delivered,
            subjects=filler.subjects,
            skipped=len(self.skipped),
            wait_s=filler.wait_s,
            ram_budget_bytes=self.ram_budget_bytes,
            ram_charged_bytes=filler.admission.charged_bytes,
            ram_peak_bytes=filler.admission.peak_bytes,
            ram_held_peak_bytes=max(filler.held.size_bytes, 0),
            buffer_patches=len(filler.buffered()),
            window=self.max_length,
            epoch=epoch,
            epoch_patches=self._next.step if current is None else current.step,
            epoch_total=self._planner.total(epoch) if current is None else current.plan.total,
            intra_op_threads=INTRA_OP_THREADS,
            in_work=sum(map(self._source.activity.threads, WORK)),
            **{f"{work}_s": self._source.activity.seconds(work) for work in WORK},
        )

    def __repr__(self) -> str:
        """Return its sizes."""
        return (
            f"{type(self).__name__}(max_length={self.max_length}, "
            f"num_subjects={self.num_subjects}, num_patches={self.num_patches}, "
            f"samples_per_volume={self.samples_per_volume}, "
            f"iterations_per_epoch={self.iterations_per_epoch})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be pickled, as a loader's spawned workers would want.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(checks.OTHER_PROCESS)

    # --- inner ---

    def _pass_at(self, start: PassStart) -> Pass:
        """Return the pass that begins there; the same one when asked again."""
        if self._ahead is None or self._ahead.start != start:
            plan, shuffled = self._planner.plan(start.epoch), self.shuffle_patches
            self._ahead = Pass(
                plan, start, seed=self.seed, window=self.max_length, shuffled=shuffled
            )
        return self._ahead

    def _fill_ahead(self) -> None:
        if self._start_background and self.num_workers > 0:
            self.record.note(self)
            self._filler.begin(self._pass_at(self._next))

    def _begins(self, index: int) -> bool:
        """Tell whether an index begins a pass: 0, or where a resumed loader goes on."""
        if self._pass is None:
            return index in {0, self._next.next_index}
        return index == 0 and self._pass.begun

    def _here(self, index: int | None = None) -> PassStart:
        """Return where the queue is, or is to be once an index is asked for."""
        if self._pass is None or self._pass.finished or (index is not None and self._begins(index)):
            return self._next
        return self._pass.here()

    def _begin_pass(self, index: int) -> None:
        self._ranks = checks.read_ranks(self.ranks, self.subject_sampler, self._ranks)
        before = self._pass
        self._left_at = None if before is None or before.finished else before.expected
        current = self._pass_at(self._next)
        self.record.note(self)
        current.expected = index
        self._filler.begin(current)
        self._pass, self._ahead = current, None
        self._next = PassStart(current.plan.epoch + 1)
        self.record.epochs.add(read(self))

    def _next_patch(self, current: Pass) -> tio.Subject:
        while not current.finished:
            made = self._filler.take(current, lambda: self.record.note(self))
            if not isinstance(made, BaseException):
                return made
            turn, _ = current.next()
            name = self._source.name(turn.index)
            skips = self.on_error == "skip" and not isinstance(made, checks.NEVER_SKIPPED)
            if skips:
                self.skipped.append(SkippedSubject.because(made, name, turn))
            if skips and self._ranks.world == 1:
                current.skip(turn.position)
            elif skips and current.replace(turn.position):
                self._filler.extend(current.plan)
            else:
                current.failed = True
                raise checks.name_error(name, made) from made
        raise StopIteration

    def _identify(self) -> dict[str, str]:
        if not self._parts:
            self._parts = {
                **identify_parts(self.subjects_dataset, self.sampler, self.patch_transform),
                "subject sampler": type(self.subject_sampler).__name__,
                "samples_per_volume": str(self.samples_per_volume),
                "max_length": str(self.max_length),
                "shuffle": f"{self.shuffle_subjects}, {self.shuffle_patches}",
            }
        return dict(self._parts)
