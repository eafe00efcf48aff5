"""Networks and losses of the gallery elsewhere: under Lightning, on two ranks, on two machines."""

import importlib.util
import logging
import math
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torchio as tio
from gallery import EXAMPLES
from parts import EPOCHS, PATCHES, PORTABLE, load, make_queue, open_dataset
from torchrun import run_ranks

pytestmark = pytest.mark.usefixtures("stand_ins")


def installed(names: list[str]) -> list[str]:
    """Return the examples whose libraries are there."""
    return [name for name in names if "monai" not in name or importlib.util.find_spec("monai")]


@pytest.mark.filterwarnings("ignore")  # Lightning's and MONAI's advice, and torch's on itself
@pytest.mark.parametrize("name", PORTABLE)
def test_lightning_trains_what_an_example_does(name: str, tmp_path: Path) -> None:
    """Its network and loss in a module, the queue's loader as it is: each patch once an epoch."""
    lightning = pytest.importorskip("lightning")
    if not installed([name]):
        pytest.skip("NOT TESTED WITH MONAI: not installed")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    example = load(name)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = example.make_network()
            self.seen: list[Counter[str]] = [Counter() for _ in range(EPOCHS)]
            self.losses: list[float] = []

        def training_step(self, batch: dict, _number: int) -> torch.Tensor:
            loss = example.loss_of(self.network, batch)
            self.seen[self.current_epoch].update(batch["subject_id"])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    torch.manual_seed(0)
    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with open_dataset(example, tmp_path / "root") as dataset, make_queue(dataset) as queue:
        trainer.fit(module, tio.SubjectsLoader(queue, batch_size=4))
        everybody = {row["subject_id"]: PATCHES for row in dataset.dry_iter()}
        held = dataset.statistics()
    assert module.seen == [everybody] * EPOCHS
    assert module.losses[-1] < module.losses[0]
    assert held.peak_bytes <= held.budget_bytes
    assert held.evicted_files > 0


def test_two_ranks_train_what_the_examples_do(tmp_path: Path) -> None:
    """Under DDP: shares without a subject in common but for padding, and one network."""
    names = installed(PORTABLE)
    ranks = run_ranks(
        Path(__file__).with_name("rank_gallery.py"), tmp_path / "r", str(tmp_path / "root"), *names
    )
    for name in names:
        first, second = (rank[name] for rank in ranks)
        assert first["weights"] == second["weights"], name
        assert math.isfinite(first["loss"] + second["loss"])
        for one, other in zip(first["seen"], second["seen"], strict=True):
            assert set(one) | set(other) == set(first["everybody"])
            assert sum(one.values()) == sum(other.values())
            assert len(set(one) & set(other)) == len(first["everybody"]) % 2


@pytest.mark.slow
def test_two_machines_train_with_a_root_each(tmp_path: Path) -> None:
    """Two torchruns of two ranks meet; each has its own root, which its ranks share."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    run_nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node",
             "2", "--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port",
             port, str(EXAMPLES / "04_torchrun.py"), "--root", str(tmp_path / node),
             "--disk-budget", "2 MB", "--patch-size", "32", "--patches", "1"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
                 "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for node in ("0", "1")
    ]  # fmt: skip
    printed = [node.communicate(timeout=240)[0] for node in run_nodes]
    assert [node.returncode for node in run_nodes] == [0, 0], "\n".join(printed)
    assert "4 ranks: 11 subjects, 3 each; one network" in printed[0]
    for node in ("0", "1"):
        assert any((tmp_path / node / "clones").iterdir())
