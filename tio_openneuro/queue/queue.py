"""A queue of patches that never drains, keeps a RAM budget, and gives the same patches each time.

Owns the façade: TorchIO's parameters and attributes, passes and indices, errors, state. Threads
and RAM are :mod:`~tio_openneuro.queue.filler`'s, the draw is :mod:`~tio_openneuro.queue.draw`'s.
"""

from __future__ import annotations

import os
import sys
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torchio as tio
from torch.utils.data import get_worker_info

from tio_openneuro.queue import checks
from tio_openneuro.queue.draw import Draw, Pass, PassStart, choose_window
from tio_openneuro.queue.filler import Filler
from tio_openneuro.queue.order import Planner, SubjectOrder
from tio_openneuro.queue.source import SubjectSource
from tio_openneuro.queue.state import (
    LONGEST_SKIPPED,
    QueueState,
    QueueStatistics,
    SkippedSubject,
    compare_parts,
)
from tio_openneuro.queue.view import QueueView
from tio_openneuro.ram import FLOAT_BYTES, Admission, available_bytes, read_budget
from tio_openneuro.torchio_seams import identify_parts, install_seed_guard, leave_unfilled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

__all__ = ["BudgetedQueue", "QueueStatistics", "SkippedSubject"]


class BudgetedQueue(QueueView):
    """Fill a buffer of patches in the background, within a RAM budget.

    A drop-in for :class:`torchio.Queue`. With ``seed``, the sequence of patches is the same for
    any number of workers, timing or restarts. Use it as the dataset of a loader that has
    ``num_workers=0``, or iterate over it: one epoch each time.

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
    ) -> None:
        """Begin to fill, unless told to wait.

        Args:
            subjects_dataset: The subjects; any ``tio.SubjectsDataset``.
            max_length: Patches from which the next one is drawn, the most that wait in
                ``patches_list``; None chooses it from the RAM budget and the patch size.
            samples_per_volume: Patches of each subject that has no ``num_samples``.
            sampler: The patch sampler; by default ``tio.UniformSampler(96)``.
            subject_sampler: Gives the indices of the subjects of each epoch; it needs a length.
            num_workers: Threads that fill; with zero, the consumer's thread does.
            shuffle_subjects: Whether subjects are permuted in each epoch.
            shuffle_patches: Whether patches are drawn from the window, or come in order.
            start_background: Whether filling begins now, or with the first patch.
            verbose: As in TorchIO.
            ram_budget: Bytes, text like ``"4 GB"``, or ``"auto"``: half of what is available.
            seed: Decides every draw; None takes one from the system.
            on_error: ``"raise"`` or ``"skip"`` a subject that cannot be made into patches. With
                ranks, its share is taken by the rank's next subjects.
            patch_transform: Applied to each patch, ``(C, I, J, K)`` an image, after sampling:
                in the background, under its subject's seed, and charged to the RAM budget.
            on_release: ``"keep"`` or ``"drop"`` a subject's content once its patches are made.

        Raises:
            ValueError: A parameter is out of range, or two exclude each other.
            RamBudgetError: The budget cannot hold a subject whose size is known.
        """
        checks.check_choices(
            max_length=max_length,
            samples_per_volume=samples_per_volume,
            num_workers=num_workers,
            on_error=on_error,
            on_release=on_release,
            shuffles_sampled=shuffle_subjects and subject_sampler is not None,
        )
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
        if seed is not None:
            checks.refuse_other_generators(subjects_dataset, self.sampler, patch_transform)
        self.seed = int.from_bytes(os.urandom(4), "little") if seed is None else int(seed)
        self.ram_budget_bytes = read_budget(ram_budget, available_bytes())
        self.max_length = self._choose_length() if max_length is None else int(max_length)
        self.skipped: list[SkippedSubject] = []
        leave_unfilled(self)
        self._chosen_length = max_length is None
        self._start_background = start_background
        self._pid = os.getpid()
        self._parts: dict[str, str] = {}
        self._delivered = 0
        install_seed_guard()
        self._build(PassStart())
        self._has_ranks = checks.count_ranks(subject_sampler) > 1
        if self._has_ranks:
            checks.refuse_unequal_ranks(self._planner)
        checks.refuse_large_subjects(
            self._source,
            self._planner,
            window=self.max_length,
            budget_bytes=self.ram_budget_bytes,
        )
        self._fill_ahead()

    def _build(self, start: PassStart) -> None:
        """Make what depends on the seed and the window, to go on from there."""
        self._order = SubjectOrder(
            len(self.subjects_dataset),
            self.subject_sampler,
            seed=self.seed,
            shuffled=self.shuffle_subjects,
        )
        self._source = SubjectSource(
            self.subjects_dataset,
            self.sampler,
            samples_per_volume=self.samples_per_volume,
            patch_transform=self.patch_transform,
            seed=self.seed,
            drop=self.on_release == "drop",
            again=self._order.likeliest(),
            ram_budget_bytes=self.ram_budget_bytes,
        )
        self._planner = Planner(self._order, self._source.count, len(self.subjects_dataset))
        self._admission = Admission(self.ram_budget_bytes, base_bytes=self._source.base_bytes)
        self._filler = Filler(
            self._source,
            self._admission,
            num_workers=self.num_workers,
            window=self.max_length,
        )
        self._pass: Pass | None = None
        self._before: PassStart | None = None
        self._rewound: PassStart | None = None
        self._next = start
        # The threads hold the filler and never the queue: rebinding the name ends them.
        self._finalizer = weakref.finalize(self, self._filler.close)

    # --- patches ---

    def __iter__(self) -> Iterator[tio.Subject]:
        """Give the patches of one epoch."""
        index = 0
        while True:
            try:
                patch = self[index]
            except StopIteration:
                return
            yield patch
            index += 1

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
            self._begin_pass(keep_indices=index > 0)
        current = self._pass
        if current is not None and current.finished and index >= current.expected:
            raise StopIteration
        if current is None or index != current.expected:
            expected = 0 if current is None else current.expected
            message = (
                f"Cannot give patch {index}: patch {expected} comes next. A queue is read in "
                f"order, 0, 1, 2, ..., and shuffles by itself. Give its loader shuffle=False and "
                f"num_workers=0."
            )
            raise RuntimeError(message)
        self._rewound = None
        self._before = current.here()
        patch = self._next_patch(current)
        self._delivered += 1
        return patch

    def __getitems__(self, indices: list[int]) -> list[tio.Subject]:
        """Return the next patches of the pass, fewer where it ends short.

        Args:
            indices: Consecutive ones; see :meth:`__getitem__`.

        Raises:
            StopIteration: The pass has no patch left.
        """
        patches: list[tio.Subject] = []
        before = None
        try:
            for index in indices:
                patches.append(self[index])
                before = before or self._before
        except StopIteration:
            if not patches:
                raise
        except BaseException:
            # The batch is lost to the consumer: a state taken now begins with its patches.
            self._rewound = before
            raise
        return patches

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be that of an epoch; nothing changes where it would be anyway.

        Args:
            epoch: Number of the epoch, from zero.
        """
        if epoch < 0:
            message = f"Cannot set epoch {epoch}: epochs are numbered from zero."
            raise ValueError(message)
        if epoch != self._next.epoch:
            self._next = PassStart(epoch)

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Return where the queue is: everything that a new one needs to go on from here."""
        start = self._next
        if self._rewound is not None:
            start = self._rewound
        elif self._pass is not None and not self._pass.finished:
            start = self._pass.here()
        keeps_order = start.step > 0 and not self._order.foreseeable
        return QueueState(
            seed=self.seed,
            window=self.max_length,
            start=start,
            order=self._order.of(start.epoch) if keeps_order else None,
            skipped=tuple(self.skipped[-LONGEST_SKIPPED:]),
            parts=self._identify(),
        ).to_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from where a queue was: the next pass gives what was left of its epoch.

        Args:
            state_dict: What :meth:`state_dict` returned, in this process or another.

        Raises:
            ValueError: It was taken from another dataset, selection, transform, sampler or
                TorchIO version, which the message names.
        """
        state = QueueState.from_dict(state_dict)
        parts = self._identify()
        if self._chosen_length:
            parts["max_length"] = str(state.window)
        compare_parts(state.parts, parts)
        # torchdata's StatefulDataLoader goes on at the next index, with the length of a whole
        # epoch; every other loader begins at 0, with the length of what is left.
        caller = sys._getframe(1).f_globals.get("__name__", "")  # noqa: SLF001
        keeps_indices = caller.startswith("torchdata.") and state.start.step > 0
        self._finalizer()
        self.seed = state.seed
        self.max_length = state.window
        self.skipped = list(state.skipped)
        self._parts = {}
        self._build(replace(state.start, keeps_indices=keeps_indices))
        if state.order is not None:
            self._order.recall(state.start.epoch, state.order)
        self._fill_ahead()

    # --- end ---

    def close(self) -> None:
        """End the background threads; the queue gives no more patches. Idempotent."""
        self._finalizer()

    def __enter__(self) -> Self:
        """Return the queue itself."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close it."""
        self.close()

    # --- inner ---

    def _pass_at(self, start: PassStart) -> Pass:
        plan = self._planner.plan(start.epoch)
        return Pass(start, Draw(self.seed, plan, self.max_length, shuffled=self.shuffle_patches))

    def _fill_ahead(self) -> None:
        if self._start_background and self.num_workers > 0:
            self._produce(self._pass_at(self._next))

    def _produce(self, current: Pass) -> None:
        following = self._planner.following(current.plan.epoch)
        afresh = self._pass is not None and self._pass.failed
        self._filler.begin(current.plan, current.left(), following, afresh=afresh)

    def _begins(self, index: int) -> bool:
        """Tell whether an index begins a pass: 0, or where a resumed loader goes on."""
        current = self._pass
        if current is None:
            return index == 0 or (self._next.keeps_indices and index == self._next.next_index)
        return index == 0 and (current.begun or current.finished)

    def _begin_pass(self, *, keep_indices: bool) -> None:
        current = self._pass_at(replace(self._next, keeps_indices=keep_indices))
        self._produce(current)
        self._pass = current
        self._next = PassStart(current.plan.epoch + 1)

    def _next_patch(self, current: Pass) -> tio.Subject:
        while not current.finished:
            index = current.peek()
            epoch = current.plan.epoch
            made = self._filler.take(epoch, index, current.step)
            if not isinstance(made, BaseException):
                current.take()
                self._filler.taken(epoch, index, current.step)
                return made
            position = current.plan.locate(index)[0]
            subject = current.plan.order[position]
            name = self._source.name(subject)
            if self.on_error == "raise" or isinstance(made, checks.NEVER_SKIPPED):
                current.failed = True
                raise checks.name_error(name, made) from made
            self.skipped.append(SkippedSubject.because(name, made, index=subject, epoch=epoch))
            if not self._has_ranks:
                current.skip(position)
            elif current.replace(position):
                self._filler.extend(current.plan)
            else:
                current.failed = True
                raise checks.name_error(name, made) from made
        raise StopIteration

    def _choose_length(self) -> int:
        subject = self.subjects_dataset.dry_iter()[0]
        images = max(len(subject.get_images(intensity_only=False)), 1)
        voxels = int(self.sampler.patch_size.astype(int).prod())
        return choose_window(self.ram_budget_bytes, voxels * images * FLOAT_BYTES)

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
