"""One rank of a training with Lightning's ``ddp`` on the CPU, under torchrun."""

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
import torchio as tio
from rank_dealing import make_dataset, make_queue
from torch.utils.data import DataLoader

EPOCHS = 2


class Module(lightning.LightningModule):
    """A model of one number, which notes what it is given."""

    def __init__(self) -> None:
        """Have seen nothing."""
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[list[str]] = [[] for _ in range(EPOCHS)]

    def training_step(self, batch: Any, _number: int) -> torch.Tensor:
        """Note the batch's subjects."""
        self.seen[self.current_epoch] += batch["subject_id"]
        return self.layer(torch.ones(1, 1)).sum()

    def transfer_batch_to_device(self, batch: Any, *_: object) -> Any:
        """Leave it where it is."""
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return one."""
        return torch.optim.SGD(self.parameters(), 0.1)


class Data(lightning.LightningDataModule):
    """A queue that is made once Lightning has begun."""

    def setup(self, stage: str) -> None:
        """Make it."""
        self.queue = make_queue(make_dataset())

    def train_dataloader(self) -> DataLoader:
        """Return its loader."""
        return tio.SubjectsLoader(self.queue, batch_size=2)


def main() -> None:
    """Train with and without a sampler of Lightning's own, and write what came."""
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("--own-sampler", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module, data = Module(), Data()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=arguments.own_sampler,
    )
    found: dict[str, Any] = {}
    try:
        trainer.fit(module, datamodule=data)
        found["epochs"] = module.seen
    except RuntimeError as error:
        found["error"] = str(error)
    finally:
        data.queue.close()
    Path(arguments.results / f"{trainer.global_rank}.json").write_text(
        json.dumps(found), encoding="utf-8"
    )


if __name__ == "__main__":
    sys.exit(main())
