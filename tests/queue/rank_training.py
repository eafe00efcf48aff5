"""One rank of a training under torchrun: draws its patches, and tells how many at each step.

The ranks meet at every step, so that one that had fewer patches would leave the others waiting.
"""

import argparse
import json
from datetime import timedelta
from pathlib import Path

import torch
import torchio as tio
from torch import distributed
from torch.utils.data.distributed import DistributedSampler

import tio_openneuro as tno


def main() -> None:
    """Train for some epochs, and write what came to a file of this rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("accession")
    parser.add_argument("root", type=Path)
    parser.add_argument("budget_bytes", type=int)
    parser.add_argument("--on-error", default="raise")
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = distributed.get_rank()
    images = {
        "t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz"),
        "lesion": tno.Label("sub-*/anat/*_label-lesion_mask.nii.gz"),
    }
    epochs = []
    with (
        tno.DataladSubjectsDataset(
            arguments.accession,
            images,
            root=arguments.root,
            disk_budget=arguments.budget_bytes,
            jobs=2,
        ) as dataset,
        tno.BudgetedQueue(
            dataset,
            6,
            2,
            tio.UniformSampler(8),
            subject_sampler=DistributedSampler(dataset),
            shuffle_subjects=False,
            num_workers=2,
            ram_budget="4 GB",
            seed=0,
            on_error=arguments.on_error,
        ) as queue,
    ):
        loader = tio.SubjectsLoader(queue, batch_size=2)
        for _ in range(arguments.epochs):
            names: list[str] = []
            for batch in loader:
                names += batch["subject_id"]
                meeting = torch.tensor([len(names)])
                distributed.all_reduce(meeting)
                assert int(meeting) == len(names) * distributed.get_world_size()
            epochs.append(names)
        skipped = [entry.unit for entry in queue.skipped]
        peak_bytes = dataset.statistics().peak_bytes
    found = {"epochs": epochs, "skipped": skipped, "peak_bytes": peak_bytes}
    Path(arguments.results / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
