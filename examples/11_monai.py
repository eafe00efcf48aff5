"""Train a network of MONAI's with a loss of MONAI's, on patches from the queue.

Shows: TorchIO's batches are tensors, so that MONAI's networks, losses, metrics and sliding-window
inference take them as they are.
Needs: pip install monai
Fetches: with the defaults 85 subjects of ds004199 (FLAIR and lesion, 638 MB), 200 MB at a time.
Takes: an estimated 7 minutes for five epochs on two cores.
Expected last line: "Dice of 17 held-out subjects: ...; held ... of 200,000,000 B."
"""

import argparse
from statistics import mean

import torch
import torchio as tio
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import compute_dice
from monai.networks.nets import UNet
from torch import Tensor, nn

import tio_openneuro as tno

parser = argparse.ArgumentParser(description="Train a network of MONAI's.")
parser.add_argument("--dataset", default="ds004199", help="accession, git URL, or path of a clone")
parser.add_argument("--image", default="sub-*/anat/*_FLAIR.nii.gz", help="glob from the root")
parser.add_argument("--label", default="sub-*/anat/*_FLAIR_roi.nii.gz", help="glob from the root")
parser.add_argument("--disk-budget", default="200 MB", help="bytes held under the root, at most")
parser.add_argument("--patch-size", type=int, default=64, help="voxels a side, a multiple of 8")
parser.add_argument("--patches", type=int, default=8, help="of each subject in each epoch")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--root", help="folder of clones and ledger; default: the user's cache")


def make_network() -> nn.Module:
    """Return MONAI's U-Net."""
    return UNet(3, 1, 2, channels=(8, 16, 32, 64), strides=(2, 2, 2), norm="batch")


def loss_of(network: nn.Module, batch: dict) -> Tensor:
    """Return MONAI's Dice loss plus cross entropy."""
    loss = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
    return loss(network(batch["image"][tio.DATA]), batch["label"][tio.DATA].float())


def dice_of(network: nn.Module, batch: dict, patch_size: int) -> float:
    """Segment a whole subject by MONAI's sliding window, and compare it with its label."""
    image, label = batch["image"][tio.DATA], batch["label"][tio.DATA]
    network.eval()
    with torch.inference_mode():
        logits = sliding_window_inference(image, (patch_size,) * 3, 4, network, mode="gaussian")
    guess = logits.argmax(dim=1, keepdim=True)
    return float(compute_dice(guess, label, ignore_empty=False))


def main() -> None:
    """Train, and segment who was held out."""
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
    train, held_out = dataset.split({"train": 0.8, "held out": 0.2}, seed=0).values()
    train.set_transform(tio.RandomFlip(axes=0))
    sampler = tio.LabelSampler(options.patch_size, "label", {0: 1, 1: 1})
    queue = tno.BudgetedQueue(train, None, options.patches, sampler)
    network = make_network()
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.01)
    with dataset, queue:
        for epoch in range(1, options.epochs + 1):
            network.train()
            losses = []
            for batch in tio.SubjectsLoader(queue, batch_size=4, num_workers=0):
                optimiser.zero_grad()
                loss = loss_of(network, batch)
                loss.backward()
                optimiser.step()
                losses.append(loss.item())
            print(f"epoch {epoch}: loss {mean(losses):.3f}")
        scores = {}
        for batch in tio.SubjectsLoader(held_out, batch_size=1):
            scores[batch["subject_id"][0]] = dice_of(network, batch, options.patch_size)
        held = dataset.statistics()
    assert scores.keys() == {row["subject_id"] for row in held_out.dry_iter()}
    assert all(0 <= score <= 1 for score in scores.values())
    assert held.peak_bytes <= held.budget_bytes
    print(
        f"Dice of {len(scores)} held-out subjects: {mean(scores.values()):.3f}; "
        f"held {held.peak_bytes:,} of {held.budget_bytes:,} B."
    )


if __name__ == "__main__":
    main()
