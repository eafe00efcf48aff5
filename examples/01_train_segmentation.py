"""Train a segmentation network on an OpenNeuro dataset larger than the disk budget.

Shows: a dataset by accession, git URL or path; BudgetedQueue in TorchIO's loader; a plain loop;
whole held-out subjects after each epoch; the budget checked at the end.
Fetches: with the defaults 85 subjects of ds004199 (FLAIR and lesion, 638 MB), 200 MB at a time.
Takes: an estimated 25 minutes per epoch on two cores.
Expected last line: "Held ... of 200,000,000 B; 85 subjects used."
"""

import argparse
from statistics import mean

import torch
import torchio as tio
from torch import Tensor, nn
from torch.nn import functional

import tio_openneuro as tno

parser = argparse.ArgumentParser(description="Train a segmentation network under two budgets.")
parser.add_argument("--dataset", default="ds004199", help="accession, git URL, or path of a clone")
parser.add_argument("--image", default="sub-*/anat/*_FLAIR.nii.gz", help="glob from the root")
parser.add_argument("--label", default="sub-*/anat/*_FLAIR_roi.nii.gz", help="glob from the root")
parser.add_argument("--spacing", type=float, help="resample to this many millimetres")
parser.add_argument("--disk-budget", default="200 MB", help="bytes held under the root, at most")
parser.add_argument("--ram-budget", default="4 GB", help="bytes that the queue may allocate")
parser.add_argument("--patch-size", type=int, default=64, help="voxels a side, a multiple of 8")
parser.add_argument("--patches", type=int, default=8, help="of each subject in each epoch")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--root", help="folder of clones and ledger; default: the user's cache")


class Beside(nn.Sequential):
    """Layers whose output stands beside their input."""

    def forward(self, volume: Tensor) -> Tensor:
        """Return the channels of both."""
        return torch.cat([volume, super().forward(volume)], dim=1)


def convolution(before: int, after: int) -> nn.Module:
    """Return a convolution with its normalisation and activation."""
    return nn.Sequential(nn.Conv3d(before, after, 3, padding=1), nn.BatchNorm3d(after), nn.ReLU())


def unet(before: int = 1, width: int = 8, levels: int = 3) -> nn.Module:
    """Return a 3D U-Net without its head: one level, and below it a U-Net of twice the width."""
    layers = [convolution(before, width), convolution(width, width)]
    if levels:
        beside = Beside(nn.MaxPool3d(2), unet(width, 2 * width, levels - 1), nn.Upsample(None, 2))
        layers += [beside, convolution(3 * width, width)]
    return nn.Sequential(*layers)


def make_network() -> nn.Module:
    """Return a U-Net that tells two classes apart."""
    return nn.Sequential(unet(), nn.Conv3d(8, 2, kernel_size=1))


def loss_of(network: nn.Module, batch: dict) -> Tensor:
    """Return soft Dice loss plus cross entropy."""
    logits, label = network(batch["image"][tio.DATA]), batch["label"][tio.DATA][:, 0]
    guess = logits.softmax(dim=1)[:, 1]
    overlap = (2 * (guess * label).sum() + 1) / (guess.sum() + label.sum() + 1)
    return 1 - overlap + functional.cross_entropy(logits, label.long())


def dice_of(network: nn.Module, subject: tio.Subject, patch_size: int) -> float:
    """Segment a whole subject in overlapping patches, and compare it with its label."""
    grid = tio.GridSampler(subject, patch_size, patch_size // 4)
    aggregator = tio.GridAggregator(grid, overlap_mode="average")
    network.eval()
    with torch.inference_mode():
        for batch in tio.SubjectsLoader(grid, batch_size=4):
            aggregator.add_batch(network(batch["image"][tio.DATA]), batch[tio.LOCATION])
    guess, truth = aggregator.get_output_tensor().argmax(dim=0), subject["label"].data[0]
    return float(2 * (guess * truth).sum() / (guess.sum() + truth.sum()))


def main() -> None:
    """Train, and check what the budget promised."""
    options = parser.parse_args()
    torch.manual_seed(0)
    one_grid = [tio.Resample(options.spacing or "image", include=["image"]), tio.Resample("image")]
    zero_or_one = tio.Lambda(torch.sign, types_to_apply=[tio.LABEL])
    once = tio.Compose([tio.ToCanonical(), *one_grid, zero_or_one, tio.ZNormalization()])
    images = {"image": tno.Scalar(options.image), "label": tno.Label(options.label)}
    dataset = tno.DataladSubjectsDataset(
        options.dataset, images, root=options.root, disk_budget=options.disk_budget, preprocess=once
    )
    print(dataset, *dataset.skipped, sep="\n  ")
    train, held_out = dataset.split({"train": 0.8, "held out": 0.2}, seed=0).values()
    train.set_transform(tio.RandomFlip(axes=0))  # left to right, in each epoch anew
    sampler = tio.LabelSampler(options.patch_size, "label", {0: 1, 1: 1})
    queue = tno.BudgetedQueue(train, None, options.patches, sampler, ram_budget=options.ram_budget)
    network = make_network()
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.01)
    used: set[str] = set()
    with dataset, queue:
        for epoch in range(1, options.epochs + 1):
            network.train()
            losses = []
            for batch in tio.SubjectsLoader(queue, batch_size=4, num_workers=0):
                loss = loss_of(network, batch)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(loss.item())
                used.update(batch["subject_id"])
            scores = {s["subject_id"]: dice_of(network, s, options.patch_size) for s in held_out}
            print(f"epoch {epoch}: loss {mean(losses):.3f}, Dice {mean(scores.values()):.3f}")
        held, used = dataset.statistics(), used | scores.keys()
        assert held.peak_bytes <= held.budget_bytes
        assert used == {row["subject_id"] for row in dataset.dry_iter()}
        print(f"Held {held.peak_bytes:,} of {held.budget_bytes:,} B; {len(used)} subjects used.")


if __name__ == "__main__":
    main()
