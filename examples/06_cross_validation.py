"""Train five networks in five-fold cross-validation, stratified by a column.

Shows: folds that keep a column's proportions and never divide a participant; a queue for each
fold over one root and one disk budget; what all folds share being fetched once where it fits.
Fetches: with the defaults 85 subjects of ds004199 (FLAIR and lesion, 638 MB), 200 MB at a time.
Takes: an estimated 6 minutes on two cores, one epoch for each fold.
Expected last line: "85 subjects validated once; each fold has 7 of F, 10 of M."
"""

import argparse
from collections import Counter
from statistics import mean

import torch
import torchio as tio
from torch import Tensor, nn
from torch.nn import functional

import tio_openneuro as tno

parser = argparse.ArgumentParser(description="Cross-validate a segmentation network.")
parser.add_argument("--dataset", default="ds004199", help="accession, git URL, or path of a clone")
parser.add_argument("--image", default="sub-*/anat/*_FLAIR.nii.gz", help="glob from the root")
parser.add_argument("--label", default="sub-*/anat/*_FLAIR_roi.nii.gz", help="glob from the root")
parser.add_argument("--stratify", default="sex", help="a column of participants.tsv")
parser.add_argument("--folds", type=int, default=5)
parser.add_argument("--epochs", type=int, default=1, help="of each fold")
parser.add_argument("--patch-size", type=int, default=64, help="voxels a side")
parser.add_argument("--patches", type=int, default=8, help="of each subject in each epoch")
parser.add_argument("--disk-budget", default="200 MB", help="bytes held under the root, at most")
parser.add_argument("--root", help="folder of clones and ledger; default: the user's cache")


def make_network() -> nn.Module:
    """Return a network; any of yours goes here."""
    return nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 2, 1))


def loss_of(network: nn.Module, batch: dict) -> Tensor:
    """Return the cross entropy of a batch of patches, or of whole subjects."""
    logits, label = network(batch["image"][tio.DATA]), batch["label"][tio.DATA][:, 0]
    return functional.cross_entropy(logits, label.long())


def train(network: nn.Module, queue: tno.BudgetedQueue, epochs: int) -> None:
    """Train on one fold's subjects."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.01)
    for _ in range(epochs):
        for batch in tio.SubjectsLoader(queue, batch_size=4, num_workers=0):
            optimiser.zero_grad()
            loss = loss_of(network, batch)
            loss.backward()
            optimiser.step()


def main() -> None:
    """Train on each fold, and check that the folds are what they should be."""
    options = parser.parse_args()
    torch.manual_seed(0)
    dataset = tno.DataladSubjectsDataset(
        options.dataset,
        {"image": tno.Scalar(options.image), "label": tno.Label(options.label)},
        root=options.root,
        disk_budget=options.disk_budget,
        preprocess=tio.Compose([tio.ToCanonical(), tio.ZNormalization()]),
    )
    print(dataset)
    augment = {"train": tio.RandomFlip(axes=0), "val": None}
    folds = dataset.k_fold(options.folds, stratify=options.stratify, seed=0, transforms=augment)
    validated: list[str] = []
    classes: list[Counter[str]] = []
    losses: list[float] = []
    with dataset:
        for number, (train_view, val_view) in enumerate(folds, start=1):
            network, sampler = make_network(), tio.UniformSampler(options.patch_size)
            with tno.BudgetedQueue(train_view, None, options.patches, sampler, seed=0) as queue:
                train(network, queue, options.epochs)
            fold = []
            with torch.inference_mode():
                for subject in tio.SubjectsLoader(val_view, batch_size=1):
                    fold.append(loss_of(network, subject).item())
                    validated += subject["subject_id"]
            losses.append(mean(fold))
            classes.append(Counter(str(row[options.stratify]) for row in val_view.dry_iter()))
            shares = ", ".join(f"{count} {name}" for name, count in sorted(classes[-1].items()))
            print(f"fold {number}: {len(val_view)} held out ({shares}), loss {losses[-1]:.4f}")
        held = dataset.statistics()

    assert sorted(validated) == sorted(row["subject_id"] for row in dataset.dry_iter())
    assert held.peak_bytes <= held.budget_bytes
    balance = []
    for name in sorted(set().union(*classes)):
        counts = sorted({fold[name] for fold in classes})
        assert counts[-1] - counts[0] <= 1
        balance.append(f"{' or '.join(map(str, counts))} of {name}")
    print(f"{len(validated)} subjects validated once; each fold has {', '.join(balance)}.")


if __name__ == "__main__":
    main()
