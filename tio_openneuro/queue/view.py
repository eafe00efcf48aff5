"""What a queue shows of itself: TorchIO's attributes, sizes, counts and statistics."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torchio as tio

from tio_openneuro.queue.checks import OTHER_PROCESS
from tio_openneuro.queue.source import INTRA_OP_THREADS
from tio_openneuro.queue.state import QueueStatistics

if TYPE_CHECKING:
    from tio_openneuro.queue.draw import Pass, PassStart
    from tio_openneuro.queue.filler import Filler
    from tio_openneuro.queue.order import Planner, SubjectOrder
    from tio_openneuro.queue.source import SubjectSource
    from tio_openneuro.queue.state import SkippedSubject
    from tio_openneuro.ram import Admission


class QueueView(tio.Queue):
    """The part of a queue that changes nothing."""

    max_length: int
    samples_per_volume: int
    ram_budget_bytes: int
    skipped: list[SkippedSubject]
    _source: SubjectSource
    _order: SubjectOrder
    _planner: Planner
    _admission: Admission
    _filler: Filler
    _pass: Pass | None
    _next: PassStart
    _delivered: int

    def _pass_at(self, start: PassStart) -> Pass:
        raise NotImplementedError

    def __len__(self) -> int:
        """Return the patches of this pass, or of the next one, drawing nothing of the user's."""
        # A torch sampler asks when an iteration begins, which may abandon a pass: what counts
        # then is the pass that comes.
        caller = sys._getframe(1)  # noqa: SLF001
        sampling = caller.f_globals.get("__name__", "").startswith("torch")
        return self._length(begins=sampling and caller.f_code.co_name == "__iter__")

    def _length(self, *, begins: bool) -> int:
        current = self._pass
        if current is not None and not current.finished and not (begins and current.begun):
            return current.length
        if self._next.step:
            return self._pass_at(self._next).length
        return self._planner.total(self._next.epoch)

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
        raise RuntimeError(OTHER_PROCESS)

    @property
    def iterations_per_epoch(self) -> int:
        """Patches of an epoch; after a resume, what is left of it until the pass ends."""
        return self._length(begins=False)

    @property
    def num_subjects(self) -> int:
        """Subjects of an epoch."""
        return len(self._order)

    @property
    def num_patches(self) -> int:
        """Patches that can be drawn now."""
        return len(self.patches_list)

    @property
    def patches_list(self) -> list[tio.Subject]:  # type: ignore[override]
        """Patches that are made and within the window, in the order of production."""
        if self._pass is None:
            made = self._filler.buffered(self._next.epoch)
            return [made[key] for key in sorted(made)][: self.max_length]
        epoch = self._pass.plan.epoch
        made = self._filler.buffered(epoch)
        indices = self._pass.candidates()
        return [made[epoch, index] for index in indices if (epoch, index) in made]

    def get_max_memory(self, subject: tio.Subject | None = None) -> int:
        """Return the most RAM that the patches of a full window take, in bytes; load nothing.

        Args:
            subject: Decides the number of channels; by default the first of the dataset, where
                an image that was not loaded counts as one channel unless its header is there.
        """
        if subject is not None:
            channels = sum(len(im.data) for im in subject.get_images(intensity_only=False))
        else:
            size = self._source.size(0)
            channels = self._source.images(0) if size is None else size.channels
        return self._source.patch_bytes(channels) * self.max_length

    def statistics(self) -> QueueStatistics:
        """Return what was done and what is held."""
        start = self._next if self._pass is None else self._pass.here()
        replaced = sum(replacement.count for replacement in start.replacements)
        return QueueStatistics(
            patches=self._delivered,
            subjects=self._filler.subjects,
            skipped=len(self.skipped),
            wait_s=self._filler.wait_s,
            ram_budget_bytes=self.ram_budget_bytes,
            ram_charged_bytes=self._admission.charged_bytes,
            ram_peak_bytes=self._admission.peak_bytes,
            buffer_patches=len(self._filler.buffered()),
            window=self.max_length,
            epoch=start.epoch,
            epoch_patches=start.step,
            epoch_total=self._planner.total(start.epoch) + replaced,
            intra_op_threads=INTRA_OP_THREADS,
        )
