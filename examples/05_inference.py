"""Segment held-out subjects, fetched on demand, and write a BIDS derivative.

Shows: whole subjects in overlapping patches by TorchIO's GridSampler and GridAggregator; the next
subjects being fetched meanwhile, each dropped once it is done; predictions on the images' own
grids, in a folder that BIDS tools and this library read.
Fetches: with the defaults 34 subjects of ds004199 (FLAIR, 236 MB), each once, 50 MB at a time.
Takes: an estimated 2 minutes on two cores.
Expected last line: "Wrote 34 masks to predictions; 0 B of 50,000,000 B still held."
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torchio as tio
from torch import nn

import tio_openneuro as tno

BRIGHT = 2  # standard deviations above the mean

parser = argparse.ArgumentParser(description="Segment the held-out subjects of a dataset.")
parser.add_argument("--dataset", default="ds004199", help="accession, git URL, or path of a clone")
parser.add_argument("--image", default="sub-*/anat/*_FLAIR.nii.gz", help="glob from the root")
parser.add_argument("--output", type=Path, default=Path("predictions"), help="the derivative")
parser.add_argument("--disk-budget", default="50 MB", help="bytes held under the root, at most")
parser.add_argument("--patch-size", type=int, default=64, help="voxels a side")
parser.add_argument("--root", help="folder of clones and ledger; default: the user's cache")


def load_network() -> nn.Module:
    """Return a network; yours comes from torch.load. This one has nothing to learn."""
    return nn.AvgPool3d(kernel_size=3, stride=1, padding=1).eval()


def segment(network: nn.Module, subject: tio.Subject, patch_size: int) -> tio.LabelMap:
    """Return the mask of a whole subject, on its image's grid."""
    grid = tio.GridSampler(subject, patch_size, patch_overlap=patch_size // 4)
    aggregator = tio.GridAggregator(grid, overlap_mode="hann")
    with torch.inference_mode():
        for batch in tio.SubjectsLoader(grid, batch_size=4):
            aggregator.add_batch(network(batch["image"][tio.DATA]), batch[tio.LOCATION])
    mask = (aggregator.get_output_tensor() > BRIGHT).to(torch.uint8)
    return tio.LabelMap(tensor=mask, affine=subject["image"].affine)


def describe(dataset: tno.DataladSubjectsDataset, folder: Path) -> None:
    """Write what makes a folder a BIDS derivative: of what, at which version, by what."""
    folder.mkdir(parents=True, exist_ok=True)
    source = {"URL": f"https://openneuro.org/datasets/{dataset.dataset_id}"}
    description = {
        "Name": f"Lesions of {dataset.dataset_id}",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "05_inference.py"}],
        "SourceDatasets": [{**source, "Version": dataset.version}],
    }
    text = json.dumps(description, indent=2)
    Path(folder, "dataset_description.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Segment, write, and read back."""
    options = parser.parse_args()
    dataset = tno.DataladSubjectsDataset(
        options.dataset,
        {"image": tno.Scalar(options.image)},
        root=options.root,
        disk_budget=options.disk_budget,
        transform=tio.ZNormalization(),  # leaves the grid as it is, and so is the prediction's
    )
    held_out = dataset.split({"train": 0.8, "held out": 0.2}, seed=0)["held out"]
    print(held_out)
    network = load_network()
    describe(dataset, options.output)
    with dataset:
        for index, subject in enumerate(held_out):  # the next ones are being fetched
            mask = segment(network, subject, options.patch_size)
            name = Path(subject["subject_id"], "anat", subject["subject_id"] + "_desc-lesion_mask")
            path = (options.output / name).with_suffix(".nii.gz")
            path.parent.mkdir(parents=True, exist_ok=True)
            mask.save(path)
            print(f"{path}: {int(mask.data.sum()):,} voxels")
            held_out[[index]].evict()

        predicted = tno.DataladSubjectsDataset(
            options.output, {"lesion": tno.Label("sub-*/anat/*_desc-lesion_mask.nii.gz")}
        )
        names = [row["subject_id"] for row in held_out.dry_iter()]
        assert [row["subject_id"] for row in predicted.dry_iter()] == names
        image, lesion = held_out[0]["image"], predicted[0]["lesion"]
        assert lesion.spatial_shape == image.spatial_shape
        assert np.allclose(lesion.affine, image.affine, atol=1e-4)
        held_out.evict()
        held = dataset.statistics()
        assert held.peak_bytes <= held.budget_bytes
        print(
            f"Wrote {len(predicted)} masks to {options.output}; {held.used_bytes:,} B of "
            f"{held.budget_bytes:,} B still held."
        )


if __name__ == "__main__":
    main()
