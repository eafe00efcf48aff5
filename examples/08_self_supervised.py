"""Train without labels: a network that fills in what was cut out of a patch.

Shows: a dataset of images alone, so that every subject counts; what is asked of the network made
in the loop; the same patches in every run, by a seed.
Fetches: with the defaults 170 subjects of ds004199 (FLAIR, 1.2 GB), 200 MB at a time.
Takes: an estimated 7 minutes for three epochs on two cores.
Expected last line: "The error fell from ... to ...; 170 subjects, no label."
"""

import argparse
from statistics import mean

import torch
import torchio as tio
from torch import Tensor, nn
from torch.nn import functional

import tio_openneuro as tno

parser = argparse.ArgumentParser(description="Learn from images alone.")
parser.add_argument("--dataset", default="ds004199", help="accession, git URL, or path of a clone")
parser.add_argument("--image", default="sub-*/anat/*_FLAIR.nii.gz", help="glob from the root")
parser.add_argument("--disk-budget", default="200 MB", help="bytes held under the root, at most")
parser.add_argument("--patch-size", type=int, default=64, help="voxels a side")
parser.add_argument("--patches", type=int, default=8, help="of each subject in each epoch")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--root", help="folder of clones and ledger; default: the user's cache")


def make_network() -> nn.Module:
    """Return a network from an image to an image; its first half is what you keep."""
    encoder = nn.Sequential(nn.Conv3d(1, 16, 4, stride=2, padding=1), nn.ReLU())
    decoder = nn.ConvTranspose3d(16, 1, 4, stride=2, padding=1)
    return nn.Sequential(encoder, nn.Conv3d(16, 16, 3, padding=1), nn.ReLU(), decoder)


def loss_of(network: nn.Module, batch: dict) -> Tensor:
    """Return the error of what the network puts where a quarter of the blocks was cut out."""
    image = batch["image"][tio.DATA]
    coarse = torch.rand(len(image), 1, *(side // 4 for side in image.shape[2:])) < 1 / 4
    hidden = functional.interpolate(coarse.float(), image.shape[2:])
    guess = network(image * (1 - hidden))
    return (hidden * (guess - image) ** 2).sum() / hidden.sum().clamp(min=1)


def main() -> None:
    """Train, and see the error fall."""
    options = parser.parse_args()
    torch.manual_seed(0)
    dataset = tno.DataladSubjectsDataset(
        options.dataset,
        {"image": tno.Scalar(options.image)},
        root=options.root,
        disk_budget=options.disk_budget,
        preprocess=tio.Compose([tio.ToCanonical(), tio.ZNormalization()]),
        transform=tio.Compose([tio.RandomFlip(axes=(0, 1, 2)), tio.RandomGamma()]),
    )
    print(dataset)
    sampler = tio.UniformSampler(options.patch_size)
    queue = tno.BudgetedQueue(dataset, None, options.patches, sampler, seed=0)
    network = make_network()
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.01)
    errors: list[float] = []
    used: set[str] = set()
    with dataset, queue:
        for epoch in range(1, options.epochs + 1):
            losses = []
            for batch in tio.SubjectsLoader(queue, batch_size=4, num_workers=0):
                optimiser.zero_grad()
                loss = loss_of(network, batch)
                loss.backward()
                optimiser.step()
                losses.append(loss.item())
                used.update(batch["subject_id"])
            errors.append(mean(losses))
            print(f"epoch {epoch}: error {errors[-1]:.3f}")
        held = dataset.statistics()
    assert errors[-1] < errors[0]
    assert used == {row["subject_id"] for row in dataset.dry_iter()}
    assert held.peak_bytes <= held.budget_bytes
    print(
        f"The error fell from {errors[0]:.3f} to {errors[-1]:.3f}; {len(used)} subjects, no label."
    )


if __name__ == "__main__":
    main()
