"""Train a segmentation network on an OpenNeuro dataset larger than the disk budget.

Shows: DataladSubjectsDataset by accession, git URL or path; BudgetedQueue in TorchIO's loader;
whole held-out subjects scored after each epoch; the budget checked at the end.
Fetches: with the defaults 85 subjects of ds004199 (FLAIR and lesion, 638 MB), most of them again
in each epoch, of which 200 MB at most lie on disk at any instant.
Takes: an estimated 25 minutes per epoch on two cores. On a dataset of your own, for example:

    python 01_train_segmentation.py --dataset PATH_OR_URL --image 'sub-*/anat/*_T1w.nii.gz' \
        --label 'derivatives/labels/sub-*/anat/*_dseg.nii.gz' --foreground --spacing 2

Expected last line: "Held at most ..., within the budget of 200.0 MB; ...; 85 subjects used."
"""

from __future__ import annotations

import argparse

import torch
import torchio as tio

import tio_openneuro as tno
from tio_openneuro.demo.network import UNet
from tio_openneuro.demo.training import EpochReport, Report, StepReport, Task, train
from tio_openneuro.sizes import format_size

parser = argparse.ArgumentParser(description="Train a segmentation network under two budgets.")
parser.add_argument("--dataset", default="ds004199", help="accession, git URL, or path of a clone")
parser.add_argument("--version", help="tag or commit; default: the newest snapshot")
parser.add_argument("--image", default="sub-*/anat/*_FLAIR.nii.gz", help="glob from the root")
parser.add_argument("--label", default="sub-*/anat/*_FLAIR_roi.nii.gz", help="glob from the root")
parser.add_argument("--foreground", action="store_true", help="any label above 0 is foreground")
parser.add_argument("--classes", type=int, default=2, help="labels are 0 to CLASSES - 1")
parser.add_argument("--spacing", type=float, help="resample to this many millimetres")
parser.add_argument("--disk-budget", default="200 MB", help="bytes held under the root, at most")
parser.add_argument("--ram-budget", default="4 GB", help="bytes that the queue may allocate")
parser.add_argument("--patch-size", type=int, default=64, help="voxels a side")
parser.add_argument("--samples-per-volume", type=int, default=8, help="patches per subject")
parser.add_argument("--batch-size", type=int, default=4, help="patches")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--workers", type=int, default=2, help="threads that fill the queue")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
parser.add_argument("--root", help="folder of clones and ledger; default: the user's cache")


def foreground(label: torch.Tensor) -> torch.Tensor:
    """Return 1 wherever a label is above 0."""
    return (label > 0).float()


def prepare(arguments: argparse.Namespace) -> tio.Transform:
    """Return what is done to each subject once: one orientation, one grid, one scale."""
    steps: list[tio.Transform] = [tio.ToCanonical()]
    if arguments.spacing:
        steps.append(tio.Resample(arguments.spacing, include=["image"]))
    steps.append(tio.Resample("image"))
    if arguments.foreground:
        steps.append(tio.Lambda(foreground, types_to_apply=[tio.LABEL]))
    steps.append(tio.RescaleIntensity((-1, 1), percentiles=(0.5, 99.5)))
    return tio.Compose(steps)


def show(report: Report) -> None:
    """Print each epoch, and every tenth step."""
    if isinstance(report, EpochReport):
        print(f"epoch {report.epoch}: loss {report.loss:.3f}, held-out Dice {report.dice:.3f}")
    elif isinstance(report, StepReport) and report.step % 10 == 0:
        print(f"  step {report.step} of {report.steps}: loss {report.loss:.3f}", flush=True)


def main() -> None:
    """Train, and check what the budget promised."""
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    images = {"image": tno.Scalar(arguments.image), "label": tno.Label(arguments.label)}
    with tno.DataladSubjectsDataset(
        arguments.dataset,
        images,
        version=arguments.version,
        root=arguments.root,
        disk_budget=arguments.disk_budget,
        preprocess=prepare(arguments),
    ) as dataset:
        print(dataset)
        for skipped in dataset.skipped:
            print(f"  skipped {skipped.unit}: {skipped.reason}")
        parts = dataset.split({"train": 0.8, "val": 0.2}, seed=arguments.seed)
        parts["train"].set_transform(tio.RandomFlip(axes=0))  # left to right
        classes = 2 if arguments.foreground else arguments.classes
        network = UNet(classes=classes).to(arguments.device)
        with tno.BudgetedQueue(
            parts["train"],
            samples_per_volume=arguments.samples_per_volume,
            sampler=tio.LabelSampler(
                arguments.patch_size, "label", dict.fromkeys(range(classes), 1)
            ),
            num_workers=arguments.workers,
            ram_budget=arguments.ram_budget,
            seed=arguments.seed,
        ) as queue:
            loader = tio.SubjectsLoader(queue, batch_size=arguments.batch_size, num_workers=0)
            optimiser = torch.optim.AdamW(network.parameters(), lr=0.01)
            task = Task("image", "label", classes)
            reports = train(network, loader, optimiser, task=task, epochs=arguments.epochs,
                            held_out=parts["val"], on_report=show)  # fmt: skip
        disk = dataset.statistics()
        used = set(reports[-1].trained_on) | {score.name for score in reports[-1].scores}
        assert disk.peak_bytes <= disk.budget_bytes
        assert used == {subject["subject_id"] for subject in dataset.dry_iter()}
        print(
            f"Held at most {format_size(disk.peak_bytes)}, within the budget of "
            f"{format_size(disk.budget_bytes)}; fetched {format_size(disk.fetched_bytes)}; "
            f"{len(used)} subjects used."
        )


if __name__ == "__main__":
    main()
