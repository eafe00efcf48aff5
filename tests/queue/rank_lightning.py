"""One rank of a training with Lightning's ``ddp`` on the CPU, under torchrun."""

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import torchio as tio
from lightning_training import Module, make_trainer
from rank_dealing import make_dataset, make_queue
from torch.utils.data import DataLoader

EPOCHS = 2


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
    module, data = Module(note=lambda batch: batch["subject_id"]), Data()
    trainer = make_trainer(
        devices=2,
        strategy="ddp",
        max_epochs=EPOCHS,
        enable_checkpointing=False,
        use_distributed_sampler=arguments.own_sampler,
    )
    found: dict[str, Any] = {}
    try:
        trainer.fit(module, datamodule=data)
        found["epochs"] = [
            [name for number, names in module.seen if number == epoch for name in names]
            for epoch in range(EPOCHS)
        ]
    except RuntimeError as error:
        found["error"] = str(error)
    finally:
        data.queue.close()
    Path(arguments.results / f"{trainer.global_rank}.json").write_text(
        json.dumps(found), encoding="utf-8"
    )


if __name__ == "__main__":
    sys.exit(main())
