"""Run two trainings over two datasets at once, under one disk budget.

Shows: tno.concat, one dataset over two; two processes that share a root, so that what one fetched
the other reads; one budget for both. Here they try two learning rates.
Fetches: with the defaults the T1w images of ds000001 and ds004199 (16 and 170 subjects, 3 GB), of
which 300 MB at most lie on disk at any instant, for both trainings together.
Takes: an estimated 6 minutes on two cores.
Expected last line: "2 trainings, 186 subjects of 2 datasets each; held ... of 300,000,000 B."
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
import torchio as tio
from torch import nn

import tio_openneuro as tno

parser = argparse.ArgumentParser(description="Two trainings, two datasets, one budget.")
parser.add_argument("--dataset", nargs="+", default=["ds000001", "ds004199"], help="two or more")
parser.add_argument("--image", default="sub-*/anat/*_T1w.nii.gz", help="glob from each root")
parser.add_argument("--rates", nargs="+", type=float, default=[0.01, 0.001], help="a training each")
parser.add_argument("--disk-budget", default="300 MB", help="of all trainings together")
parser.add_argument("--ram-budget", default="2 GB", help="of each training's queue")
parser.add_argument("--patch-size", type=int, default=64, help="voxels a side")
parser.add_argument("--patches", type=int, default=4, help="of each subject in each epoch")
parser.add_argument("--root", help="folder of clones and ledger; default: the user's cache")


def train(rate: float, options: argparse.Namespace) -> tuple[set[tuple[str, str]], int, int]:
    """Train a denoiser; return whom it saw, and the root's most bytes and its budget."""
    torch.manual_seed(0)
    once = tio.Compose([tio.ToCanonical(), tio.ZNormalization()])
    both = tno.concat(
        [
            tno.DataladSubjectsDataset(
                source,
                {"image": tno.Scalar(options.image)},
                on_multiple="first",
                root=options.root,
                disk_budget=options.disk_budget,
                preprocess=once,
            )
            for source in options.dataset
        ]
    )
    queue = tno.BudgetedQueue(
        both,
        samples_per_volume=options.patches,
        sampler=tio.UniformSampler(options.patch_size),
        ram_budget=options.ram_budget,
        seed=0,
    )
    network = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 1, 1))
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate)
    seen: set[tuple[str, str]] = set()
    with both, queue:
        for batch in tio.SubjectsLoader(queue, batch_size=4, num_workers=0):
            image = batch["image"][tio.DATA]
            loss = (network(image + torch.randn_like(image)) - image).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            seen.update(zip(batch["dataset_id"], batch["subject_id"], strict=True))
        held = both.statistics()
    fetched = f"fetched {held.fetched_bytes:,} B, found {held.hit_files} files there"
    print(f"learning rate {rate}: loss {loss.item():.3f}, {len(seen)} subjects; {fetched}")
    return seen, held.peak_bytes, held.budget_bytes


def main() -> None:
    """Train in two processes, and check what both held together."""
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(options.rates), mp_context=spawn) as pool:
        found = list(pool.map(partial(train, options=options), options.rates))
    seen = {frozenset(names) for names, _, _ in found}
    (subjects,) = seen  # each training saw the same ones
    datasets = {dataset for dataset, _ in subjects}
    peak_bytes, budget_bytes = max(peak for _, peak, _ in found), found[0][2]
    assert len(datasets) == len(options.dataset)
    assert peak_bytes <= budget_bytes
    print(
        f"{len(found)} trainings, {len(subjects)} subjects of {len(datasets)} datasets each; "
        f"held {peak_bytes:,} of {budget_bytes:,} B."
    )


if __name__ == "__main__":
    main()
