"""Train with Lightning: validation, checkpoints, and resuming in the middle of an epoch.

Shows: the queue in a data module, its state in checkpoints; whole held-out subjects as validation;
a second program that goes on where the first was stopped. Needs: pip install lightning
Fetches: with the defaults 85 subjects of ds004199 (FLAIR and lesion, 638 MB), 200 MB at a time.
Takes: an estimated 3 minutes for its two epochs on two cores.
Expected last line: "Stopped at step 40, resumed: 68 subjects gave all their patches."
"""

import argparse
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning
import torch
import torchio as tio
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import tio_openneuro as tno

parser = argparse.ArgumentParser(description="Train with Lightning, stop, and resume.")
parser.add_argument("--dataset", default="ds004199", help="accession, git URL, or path of a clone")
parser.add_argument("--image", default="sub-*/anat/*_FLAIR.nii.gz", help="glob from the root")
parser.add_argument("--label", default="sub-*/anat/*_FLAIR_roi.nii.gz", help="glob from the root")
parser.add_argument("--disk-budget", default="200 MB", help="bytes held under the root, at most")
parser.add_argument("--patch-size", type=int, default=64, help="voxels a side")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--stop", type=int, default=40, help="steps after which the first part ends")
parser.add_argument("--root", help="folder of clones and ledger; default: the user's cache")


class Data(lightning.LightningDataModule):
    """The queue for training, whole subjects for validation."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Open the dataset; nothing is fetched."""
        super().__init__()
        self.dataset = tno.DataladSubjectsDataset(
            options.dataset,
            {"image": tno.Scalar(options.image), "label": tno.Label(options.label)},
            root=options.root,
            disk_budget=options.disk_budget,
            preprocess=tio.Compose([tio.ToCanonical(), tio.ZNormalization()]),
        )
        train, self.val = self.dataset.split({"train": 0.8, "val": 0.2}).values()
        sampler = tio.UniformSampler(options.patch_size)
        self.queue = tno.BudgetedQueue(train, sampler=sampler, seed=0)

    def train_dataloader(self) -> tio.SubjectsLoader:
        """Return the queue's loader."""
        return tio.SubjectsLoader(self.queue, batch_size=4, num_workers=0)

    def val_dataloader(self) -> tio.SubjectsLoader:
        """Return a loader of whole subjects, one at a time since their shapes differ."""
        return tio.SubjectsLoader(self.val, batch_size=1, num_workers=0)

    def state_dict(self) -> dict:
        """Return what Lightning puts into a checkpoint."""
        return self.queue.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from a checkpoint, also in the middle of an epoch."""
        self.queue.load_state_dict(state_dict)


class Segmenter(lightning.LightningModule):
    """A small network; it counts the patches of each subject that it was trained on."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.network = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 2, 1))
        self.seen: Counter[str] = Counter()

    def training_step(self, batch: dict, _number: int) -> Tensor:
        """Return the loss of a batch of patches."""
        self.seen.update(batch["subject_id"])
        logits = self.network(batch["image"][tio.DATA])
        return nn.functional.cross_entropy(logits, batch["label"][tio.DATA][:, 0].long())

    def validation_step(self, batch: dict, _number: int) -> None:
        """Log how many voxels of a whole subject are told right."""
        guess = self.network(batch["image"][tio.DATA]).argmax(dim=1, keepdim=True)
        right = (guess == batch["label"][tio.DATA]).float().mean()
        self.log("accuracy", right, prog_bar=True, batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters())


def fit(options: argparse.Namespace, folder: str, resume: Path | None = None) -> Counter:
    """Train as a program does that was just started: everything is made anew."""
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        max_steps=-1 if resume else options.stop,
        callbacks=ModelCheckpoint(folder, "{step}", every_n_train_steps=options.stop),
        use_distributed_sampler=False,  # the queue deals subjects out to ranks by itself
        logger=False,
    )
    data, module = Data(options), Segmenter()
    with data.dataset, data.queue:
        trainer.fit(module, data, ckpt_path=resume)
    return module.seen


def main() -> None:
    """Train in two parts, and count what the network saw."""
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        seen = fit(options, folder)
        seen += fit(options, folder, resume=Path(folder, f"step={options.stop}.ckpt"))
    assert set(seen.values()) == {8 * options.epochs}  # no patch lost, none given twice
    print(f"Stopped at step {options.stop}, resumed: {len(seen)} subjects gave all their patches.")


if __name__ == "__main__":
    main()
