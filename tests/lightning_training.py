"""A training with Lightning that is interrupted and goes on; see :mod:`trainers`."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from trainers import EPOCHS, Run, digests, make_loader, make_queue

Seen = list[tuple[int, list[str]]]


class Interrupt(Exception):  # noqa: N818 - what a user's Ctrl-C does
    """The program ends here."""


class Module(lightning.LightningModule):
    """A model of one number, which notes what it is given."""

    def __init__(self, stop: int | None = None, note: Callable[[Any], list[str]] = digests) -> None:
        """End the program after so many batches, or never; note this of each batch."""
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: Seen = []
        self._stop = stop
        self._note = note

    def training_step(self, batch: Any, _number: int) -> torch.Tensor:
        """Note the epoch and the batch's patches."""
        # Here, since Lightning writes checkpoints after all callbacks.
        if len(self.seen) == self._stop:
            raise Interrupt
        self.seen.append((self.current_epoch, self._note(batch)))
        return self.layer(torch.ones(1, 1)).sum()

    def transfer_batch_to_device(self, batch: Any, *_: object) -> Any:
        """Leave it where it is."""
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return one."""
        return torch.optim.SGD(self.parameters(), 0.1)


def make_trainer(**options: Any) -> lightning.Trainer:
    """Return a trainer on the CPU that prints and logs nothing."""
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


class Data(lightning.LightningDataModule):
    """A queue, and loaders of it; its state is somebody else's."""

    def __init__(self, kind: str, *, drop_last: bool) -> None:
        """Make the queue."""
        super().__init__()
        self.queue = make_queue()
        self._kind = kind
        self._drop_last = drop_last

    def train_dataloader(self) -> DataLoader:
        """Return a loader of the kind."""
        return make_loader(self._kind, self.queue, drop_last=self._drop_last)


class DataWithState(Data):
    """One that saves and loads the queue's state."""

    def state_dict(self) -> dict[str, Any]:
        """Return it."""
        return self.queue.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self.queue.load_state_dict(state_dict)


class Keeper(lightning.Callback):
    """A callback that saves and loads the queue's state."""

    def __init__(self, data: Data) -> None:
        """Keep the data."""
        self._data = data

    def state_dict(self) -> dict[str, Any]:
        """Return it."""
        return self._data.queue.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self._data.queue.load_state_dict(state_dict)


def train(
    kind: str,
    holder: str,
    folder: Path,
    *,
    drop_last: bool,
    stop: int | None = None,
    every: int | None = None,
    checkpoint: Path | None = None,
) -> Seen:
    """Train; return the epoch and the patches of each batch.

    Args:
        kind: Of the loader.
        holder: Of the queue's state: ``"datamodule"``, ``"callback"``, or ``"loader"``, which
            has one of its own.
        folder: For checkpoints.
        drop_last: As the loader's.
        stop: Batches after which the program ends.
        every: Steps between two checkpoints; None: one at each epoch's end.
        checkpoint: From which it goes on.
    """
    data = (DataWithState if holder == "datamodule" else Data)(kind, drop_last=drop_last)
    keeping: dict[str, Any] = {"save_top_k": -1, "filename": "{step}"}
    if every is None:
        keeping |= {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    else:
        keeping |= {"every_n_train_steps": every}
    module = Module(stop)
    keepers = [Keeper(data)] if holder == "callback" else []
    callbacks = [ModelCheckpoint(folder, **keeping), *keepers]
    trainer = make_trainer(devices=1, max_epochs=EPOCHS, callbacks=callbacks)
    with contextlib.closing(data.queue), contextlib.suppress(Interrupt):
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint and str(checkpoint))
    return module.seen


def by_epoch(seen: Seen) -> Run:
    """Return what was seen as a run, whose passes are the numbered epochs."""
    return [[batch for number, batch in seen if number == epoch] for epoch in range(EPOCHS)]
