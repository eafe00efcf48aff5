"""One rank under torchrun: trains the networks of some examples, and tells whom each was shown."""

import argparse
import hashlib
import json
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torchio as tio
from parts import EPOCHS, load, make_queue, open_dataset
from torch import distributed
from torch.nn.parallel import DistributedDataParallel


def train(name: str, root: Path) -> dict:
    """Train an example's network on this rank's share."""
    example = load(name)
    torch.manual_seed(distributed.get_rank())  # DDP begins from the first rank's weights
    network = DistributedDataParallel(example.make_network())
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.01)
    seen: list[Counter[str]] = []
    with open_dataset(example, root) as dataset, make_queue(dataset) as queue:
        for _ in range(EPOCHS):
            seen.append(Counter())
            for batch in tio.SubjectsLoader(queue, batch_size=2):
                optimiser.zero_grad()
                loss = example.loss_of(network, batch)
                loss.backward()
                optimiser.step()
                seen[-1].update(batch["subject_id"])
        everybody = [row["subject_id"] for row in dataset.dry_iter()]
    weights = b"".join(each.detach().numpy().tobytes() for each in network.parameters())
    digest = hashlib.sha256(weights).hexdigest()
    return {"seen": seen, "everybody": everybody, "weights": digest, "loss": loss.item()}


def main() -> None:
    """Train, and write what came to a file of this rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("root", type=Path)
    parser.add_argument("names", nargs="+")
    arguments = parser.parse_args()
    distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    found = {name: train(name, arguments.root) for name in arguments.names}
    file = arguments.results / f"{distributed.get_rank()}.json"
    file.write_text(json.dumps(found), encoding="utf-8")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
