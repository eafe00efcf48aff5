"""Train on several GPUs, or several machines, with torchrun.

    torchrun --nproc-per-node 2 04_torchrun.py

Shows: the queue deals the subjects out to the ranks by itself; the ranks of a machine share one
root and one disk budget; gloo without a GPU, NCCL with one.
Two machines, a root on each (its own disk), the same command on both:

    torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint FIRST:29500 \
        04_torchrun.py --root /local/disk

A cluster: --root $SLURM_TMPDIR. Nodes without a disk: --root /dev/shm/tio, where the disk budget
counts as RAM. A network file system (~/.cache often is one) is refused, by name.
Fetches: with the defaults 85 subjects of ds004199 (FLAIR and lesion, 638 MB), 200 MB at a time.
Takes: an estimated 2 minutes per epoch with two ranks on two cores.
Expected last line: "2 ranks: 85 subjects, 43 each; one network; held ... of 200,000,000 B."
"""

import argparse
import os

import torch
import torchio as tio
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import tio_openneuro as tno

parser = argparse.ArgumentParser(description="Train on several ranks, under torchrun.")
parser.add_argument("--dataset", default="ds004199", help="accession, git URL, or path of a clone")
parser.add_argument("--image", default="sub-*/anat/*_FLAIR.nii.gz", help="glob from the root")
parser.add_argument("--label", default="sub-*/anat/*_FLAIR_roi.nii.gz", help="glob from the root")
parser.add_argument("--disk-budget", default="200 MB", help="of each machine")
parser.add_argument("--ram-budget", default="2 GB", help="of each rank's queue")
parser.add_argument("--patch-size", type=int, default=64, help="voxels a side")
parser.add_argument("--patches", type=int, default=8, help="of each subject in each epoch")
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--root", help="a folder on the machine's own disk; default: the user's cache")


def gather(value: object) -> list:
    """Return what each rank gave."""
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def main() -> None:
    """Train, and compare the ranks."""
    options = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)

    dataset = tno.DataladSubjectsDataset(
        options.dataset,
        {"image": tno.Scalar(options.image), "label": tno.Label(options.label)},
        root=options.root,
        disk_budget=options.disk_budget,
        preprocess=tio.Compose([tio.ToCanonical(), tio.ZNormalization()]),
        transform=tio.RandomFlip(axes=0),
    )
    # After init_process_group: the queue asks how many ranks there are, and takes its share.
    queue = tno.BudgetedQueue(
        dataset,
        samples_per_volume=options.patches,
        sampler=tio.UniformSampler(options.patch_size),
        ram_budget=options.ram_budget,
        seed=0,
    )
    layers = nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 2, 1)
    network = DistributedDataParallel(nn.Sequential(*layers).to(device))
    optimiser = torch.optim.AdamW(network.parameters())
    with dataset, queue:
        for epoch in range(options.epochs):
            seen = set()
            for batch in tio.SubjectsLoader(queue, batch_size=4, num_workers=0):
                logits = network(batch["image"][tio.DATA].to(device))
                label = batch["label"][tio.DATA][:, 0].long().to(device)
                loss = functional.cross_entropy(logits, label)
                optimiser.zero_grad()
                loss.backward()  # the ranks' gradients are averaged here
                optimiser.step()
                seen.update(batch["subject_id"])
            print(f"rank {distributed.get_rank()}, epoch {epoch}: {len(seen)} subjects")
        held = dataset.statistics()

    shares = gather(seen)
    weights = gather([parameter.tolist() for parameter in network.parameters()])
    assert set.union(*shares) == {row["subject_id"] for row in dataset.dry_iter()}
    # Where the ranks do not divide the subjects, a few stand in two shares.
    assert sum(map(len, shares)) < len(dataset) + len(shares)
    assert all(other == weights[0] for other in weights)
    assert held.peak_bytes <= held.budget_bytes
    if distributed.get_rank() == 0:
        sizes = " or ".join(map(str, sorted({len(share) for share in shares})))
        print(
            f"{len(shares)} ranks: {len(dataset)} subjects, {sizes} each; one network; "
            f"held {held.peak_bytes:,} of {held.budget_bytes:,} B."
        )
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
