"""Kill a training, start it again, and end with the same network, bit for bit.

Shows: a checkpoint of network, optimiser and queue, replaced whole or not at all; kill -9 in the
middle of an epoch; the same patches afterwards, in the same order.
Fetches: with the defaults 8 subjects of ds004199 (FLAIR and lesion, 58 MB).
Takes: an estimated 1 minute on two cores.
Expected last line: "Killed after step 13, resumed from step 12: all ... weights are equal."
"""

import argparse
import multiprocessing
import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torchio as tio
from torch import nn
from torch.nn import functional

import tio_openneuro as tno

parser = argparse.ArgumentParser(description="Train, be killed, resume.")
parser.add_argument("--dataset", default="ds004199", help="accession, git URL, or path of a clone")
parser.add_argument("--image", default="sub-*/anat/*_FLAIR.nii.gz", help="glob from the root")
parser.add_argument("--label", default="sub-*/anat/*_FLAIR_roi.nii.gz", help="glob from the root")
parser.add_argument("--subjects", type=int, default=8, help="the first so many")
parser.add_argument("--patch-size", type=int, default=48, help="voxels a side")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--every", type=int, default=4, help="steps between checkpoints")
parser.add_argument("--kill", type=int, default=13, help="the step after which it is killed")
parser.add_argument("--disk-budget", default="200 MB", help="bytes held under the root, at most")
parser.add_argument("--root", help="folder of clones and ledger; default: the user's cache")


def train(options: argparse.Namespace, checkpoint: Path, kill: int | None = None) -> None:
    """Train to the end from where the checkpoint is, or until killed."""
    torch.manual_seed(0)
    dataset = tno.DataladSubjectsDataset(
        options.dataset,
        {"image": tno.Scalar(options.image), "label": tno.Label(options.label)},
        root=options.root,
        disk_budget=options.disk_budget,
        preprocess=tio.Compose([tio.ToCanonical(), tio.ZNormalization()]),
        transform=tio.Compose([tio.RandomFlip(axes=0), tio.RandomNoise()]),
    )[: options.subjects]
    queue = tno.BudgetedQueue(dataset, 16, 4, tio.UniformSampler(options.patch_size), seed=0)
    network = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 2, 1))
    optimiser = torch.optim.AdamW(network.parameters())
    saved = {"network": network, "optimiser": optimiser, "queue": queue}
    step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        step = state.pop("step")
        for name, part in saved.items():
            part.load_state_dict(state[name])
    with dataset, queue:
        for _ in range(queue.statistics().epoch, options.epochs):
            for batch in tio.SubjectsLoader(queue, batch_size=4, num_workers=0):
                logits = network(batch["image"][tio.DATA])
                loss = functional.cross_entropy(logits, batch["label"][tio.DATA][:, 0].long())
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                step += 1
                if step % options.every == 0:
                    state = {name: part.state_dict() for name, part in saved.items()}
                    torch.save({"step": step, **state}, checkpoint.with_suffix(".new"))
                    checkpoint.with_suffix(".new").replace(checkpoint)
                    print(f"step {step}: loss {loss.item():.6f}, saved")
                if step == kill:
                    print(f"step {step}: killed", flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)


def run(*arguments: object) -> int | None:
    """Train in a process of its own, and return how it ended."""
    process = multiprocessing.get_context("spawn").Process(target=train, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def main() -> None:
    """Train once without and once with a kill, and compare the networks."""
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        whole, parts = Path(folder, "whole.pt"), Path(folder, "parts.pt")
        assert run(options, whole) == 0
        assert run(options, parts, options.kill) == -signal.SIGKILL
        resumed_from = torch.load(parts, weights_only=True)["step"]
        assert run(options, parts) == 0
        expected, found = (torch.load(path, weights_only=True) for path in (whole, parts))
    assert resumed_from < options.kill < found["step"] == expected["step"]
    weights = 0
    for name, weight in expected["network"].items():
        assert torch.equal(weight, found["network"][name])
        weights += weight.numel()
    print(
        f"Killed after step {options.kill}, resumed from step {resumed_from}: "
        f"all {weights} weights are equal."
    )


if __name__ == "__main__":
    main()
