"""One rank of several under torchrun: how queues of many kinds deal the subjects out.

Writes what each case gave to a file of this rank: subjects of each epoch, counts and warnings, or
the error's message.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torchio as tio
from torch import distributed
from torch.utils.data import RandomSampler
from torch.utils.data.distributed import DistributedSampler

import tio_openneuro as tno

SUBJECTS, SAMPLES, EPOCHS = 7, 2, 3
Case = dict[str, Any]


def make_dataset(count: int = SUBJECTS) -> tio.SubjectsDataset:
    """Return subjects in RAM."""
    return tio.SubjectsDataset(
        [
            tio.Subject(
                t1=tio.ScalarImage(tensor=torch.full((1, 8, 8, 8), float(number))),
                subject_id=f"sub-{number}",
            )
            for number in range(count)
        ]
    )


def make_queue(dataset: tio.SubjectsDataset, **options: Any) -> tno.BudgetedQueue:
    """Return a queue of two patches of each subject."""
    options = {"max_length": 4, "num_workers": 1, "ram_budget": "4 GB", "seed": 0, **options}
    options |= {"samples_per_volume": SAMPLES, "sampler": tio.UniformSampler(4)}
    return tno.BudgetedQueue(dataset, **options)


def follow(make: Callable[[], tno.BudgetedQueue]) -> Case:
    """Make a queue and read it; return what came of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with make() as queue:
                found: Case = {"length": len(queue), "num_subjects": queue.num_subjects}
                loader = tio.SubjectsLoader(queue, batch_size=2)
                found["epochs"] = [
                    [name for batch in loader for name in batch["subject_id"]]
                    for _ in range(EPOCHS)
                ]
        except (RuntimeError, ValueError, TypeError) as error:
            return {"error": f"{type(error).__name__}: {error}"}
    words = [str(warning.message) for warning in caught]
    return found | {"warnings": [text for text in words if "rank" in text]}


def lead_astray(make_loader: Callable[[tno.BudgetedQueue], Any]) -> Case:
    """Read a queue by a loader of a trainer's; return the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with make_queue(make_dataset(), ranks=None) as queue:
                return {"batches": len(list(make_loader(queue)))}
        except RuntimeError as error:
            return {"error": str(error)}


def prepared_by_accelerate(queue: tno.BudgetedQueue) -> Any:
    """Return what Accelerate makes of the queue's loader."""
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(tio.SubjectsLoader(queue, batch_size=2))


def openneuro(root: Path, accession: str, **options: Any) -> tno.DataladSubjectsDataset:
    """Return a dataset with a budget under a root."""
    images = {"t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz")}
    return tno.DataladSubjectsDataset(accession, images, root=root, disk_budget="1 MB", **options)


def cases(rank: int, root: Path, accession: str) -> dict[str, Callable[[], Case]]:
    """Return the cases by name."""
    whole = make_dataset()
    shard = make_dataset()
    shard = tio.SubjectsDataset(list(shard.dry_iter())[rank::2])
    return {
        "one seed": lambda: follow(lambda: make_queue(whole)),
        "seed of each rank": lambda: follow(lambda: make_queue(whole, seed=rank)),
        "no seed": lambda: follow(lambda: make_queue(whole, seed=None)),
        "in order": lambda: follow(lambda: make_queue(whole, shuffle_subjects=False)),
        "told": lambda: follow(lambda: make_queue(whole, ranks=(rank, 2))),
        "sharded already": lambda: follow(lambda: make_queue(shard, ranks=None)),
        "the same on purpose": lambda: follow(lambda: make_queue(whole, ranks=None)),
        "distributed sampler": lambda: follow(
            lambda: make_queue(
                whole, subject_sampler=DistributedSampler(whole), shuffle_subjects=False
            )
        ),
        "random sampler": lambda: follow(
            lambda: make_queue(whole, subject_sampler=RandomSampler(whole), shuffle_subjects=False)
        ),
        "one root": lambda: follow(lambda: make_queue(openneuro(root / "both", accession))),
        "two roots": lambda: follow(lambda: make_queue(openneuro(root / str(rank), accession))),
        "a trainer's sampler": lambda: lead_astray(
            lambda queue: tio.SubjectsLoader(
                queue, batch_size=2, sampler=DistributedSampler(queue, shuffle=False)
            )
        ),
        "accelerate": lambda: lead_astray(prepared_by_accelerate),
    }


def main() -> None:
    """Run every case, and write what came to a file of this rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("accession")
    arguments = parser.parse_args()
    early = make_queue(make_dataset())
    distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank = distributed.get_rank()
    found = {"made before": follow(lambda: early)}
    for name, run in cases(rank, arguments.results / "roots", arguments.accession).items():
        if name == "accelerate":
            try:
                import accelerate  # noqa: F401
            except ImportError:
                continue
        found[name] = run()
        distributed.barrier()
    Path(arguments.results / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
