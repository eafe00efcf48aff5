"""Move a script from TorchIO: two names change, and the training is the same.

Shows: TorchIO's own dataset and queue over files that were all downloaded first, beside
DataladSubjectsDataset and BudgetedQueue over the same subjects, fetched as they are needed; one
training function that cannot tell which it was given.
Fetches: with the defaults 4 subjects of ds004199 (FLAIR and lesion, 29 MB).
Takes: an estimated 1 minute on two cores.
Expected last line: "Equal: ... voxels of 4 subjects, and 4 patches of each in both epochs."
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import torch
import torchio as tio
from torch import nn
from torch.nn import functional

import tio_openneuro as tno

parser = argparse.ArgumentParser(description="TorchIO's training, with two names changed.")
parser.add_argument("--dataset", default="ds004199", help="accession, git URL, or path of a clone")
parser.add_argument("--image", default="sub-*/anat/*_FLAIR.nii.gz", help="glob from the root")
parser.add_argument("--label", default="sub-*/anat/*_FLAIR_roi.nii.gz", help="glob from the root")
parser.add_argument("--subjects", type=int, default=4, help="the first so many")
parser.add_argument("--patch-size", type=int, default=64, help="voxels a side")
parser.add_argument("--disk-budget", default="200 MB", help="bytes held under the root, at most")
parser.add_argument("--root", help="folder of clones and ledger; default: the user's cache")

TRANSFORM = tio.Compose([tio.ToCanonical(), tio.ZNormalization(), tio.RandomFlip(axes=0)])


def train(queue: tio.Queue, epochs: int = 2) -> Counter[str]:
    """Train a network, and count the patches of each subject."""
    network = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 2, 1))
    optimiser = torch.optim.AdamW(network.parameters())
    seen: Counter[str] = Counter()
    for _ in range(epochs):
        for batch in tio.SubjectsLoader(queue, batch_size=4, num_workers=0):
            logits = network(batch["image"][tio.DATA])
            loss = functional.cross_entropy(logits, batch["label"][tio.DATA][:, 0].long())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            seen.update(batch["subject_id"])
    return seen


def before(files: list[dict[str, Path]], patch_size: int) -> tuple[tio.Queue, tio.SubjectsDataset]:
    """Make TorchIO's queue; all files lie on the disk."""
    subjects = [
        tio.Subject(
            image=tio.ScalarImage(each["image"]),
            label=tio.LabelMap(each["label"]),
            subject_id=each["image"].name.split("_")[0],
        )
        for each in files
    ]
    dataset = tio.SubjectsDataset(subjects, transform=TRANSFORM)
    return tio.Queue(dataset, 16, 4, tio.UniformSampler(patch_size), num_workers=1), dataset


def after(options: argparse.Namespace) -> tuple[tno.BudgetedQueue, tno.DataladSubjectsDataset]:
    """Make ours; nothing lies on the disk."""
    dataset = tno.DataladSubjectsDataset(
        options.dataset,
        {"image": tno.Scalar(options.image), "label": tno.Label(options.label)},
        root=options.root,
        disk_budget=options.disk_budget,
        transform=TRANSFORM,
    )[: options.subjects]
    sampler = tio.UniformSampler(options.patch_size)
    return tno.BudgetedQueue(dataset, 16, 4, sampler, num_workers=1), dataset


def main() -> None:
    """Train both ways, and compare what each was given."""
    options = parser.parse_args()
    queue, dataset = after(options)
    with dataset, queue, tempfile.TemporaryDirectory() as folder:
        print("tio_openneuro:", dataset)
        ours = train(queue)

        # What TorchIO needs before it can start: every file, downloaded and kept.
        dataset.set_transform(None)
        files = []
        for subject in dataset:
            name = subject["subject_id"]
            files.append({each: Path(folder, f"{name}_{each}.nii") for each in ("image", "label")})
            for each, path in files[-1].items():
                subject[each].save(path)
        stock, downloaded = before(files, options.patch_size)
        print("TorchIO:", stock)
        theirs = train(stock)

        downloaded.set_transform(None)
        voxels = 0
        for mine, other in zip(dataset, downloaded, strict=True):
            assert torch.equal(mine["image"].data.float(), other["image"].data.float())
            assert torch.equal(mine["label"].data, other["label"].data)
            voxels += mine["image"].data.numel()
    assert ours == theirs
    assert set(ours.values()) == {8}
    print(
        f"Equal: {voxels:,} voxels of {len(ours)} subjects, and 4 patches of each in both epochs."
    )


if __name__ == "__main__":
    main()
