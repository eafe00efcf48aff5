"""The gallery's examples, and what stands in for the datasets that they name.

The stand-ins are laid out as ``ds004199`` and ``ds000001`` are, with the demo's heads as images;
they are published on 127.0.0.1 under the same accessions, so that the examples run as they stand.
``python tests/examples/gallery.py`` runs all, and prints what ``examples/README.md`` shows.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tio_openneuro.demo.phantom import make_heads
from tio_openneuro.loopback import LoopbackOpenNeuro, Volume

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
HEADS, HEADS_ELSEWHERE = 12, 3
WITHOUT_LESION = "sub-00003"
_TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
_TORCHRUN += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]


@dataclass(frozen=True)
class Example:
    """An example, and the arguments that make it small.

    Attributes:
        name: Its file, less the ending.
        options: What it is given beside its root.
        launcher: Arguments of Python before its file.
    """

    name: str
    options: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()

    def command(self, *more: str | Path) -> list[str]:
        """Return the command line."""
        script = str(EXAMPLES / f"{self.name}.py")
        return [sys.executable, *self.launcher, script, *self.options, *map(str, more)]


def _small(disk: str, *more: str) -> tuple[str, ...]:
    return ("--disk-budget", disk, "--patch-size", "32", *more)


GALLERY = [
    Example("01_train_segmentation", _small("2 MB", "--epochs", "2", "--patches", "2")),
    Example("02_from_torchio", _small("2 MB")),
    Example("03_lightning", _small("2 MB", "--stop", "20")),
    Example("04_torchrun", _small("2 MB", "--patches", "2"), tuple(_TORCHRUN)),
    Example("05_inference", _small("2 MB")),
    Example("06_cross_validation", _small("4 MB", "--patches", "2")),
    Example("07_classification", ("--disk-budget", "2 MB", "--side", "32", "--epochs", "2")),
    Example("08_self_supervised", _small("2 MB", "--patches", "2")),
    Example("09_two_trainings", _small("4 MB", "--patches", "2")),
    Example("10_resume", _small("2 MB", "--subjects", "6", "--kill", "7")),
    Example("11_monai", _small("2 MB", "--patches", "2", "--epochs", "2")),
]


def publish_stand_ins(openneuro: LoopbackOpenNeuro) -> None:
    """Publish ``ds004199`` (FLAIR and roi, one subject without) and ``ds000001`` (T1w)."""
    files: dict[str, Volume | str] = {"dataset_description.json": '{"Name": "Heads"}'}
    elsewhere = dict(files)
    table = "participant_id\tgroup\tsex\n"
    for number, head in enumerate(make_heads(HEADS + HEADS_ELSEWHERE), start=1):
        if number > HEADS:
            name = f"sub-{number - HEADS:02}"
            elsewhere[f"{name}/anat/{name}_T1w.nii.gz"] = Volume(head.image, head.affine)
            continue
        name = f"sub-{number:05}"
        table += f"{name}\tfcd\t{'FM'[number % 2]}\n"
        files[f"{name}/anat/{name}_FLAIR.nii.gz"] = Volume(head.image, head.affine)
        if name != WITHOUT_LESION:
            files[f"{name}/anat/{name}_FLAIR_roi.nii.gz"] = Volume(head.label, head.affine)
        if number <= HEADS_ELSEWHERE:
            darker = (head.image * 0.7).astype(np.int16)
            files[f"{name}/anat/{name}_T1w.nii.gz"] = Volume(darker, head.affine)
    openneuro.publish("ds004199", {**files, "participants.tsv": table})
    openneuro.publish("ds000001", elsewhere)


def run(command: list[str], folder: Path) -> str:
    """Run an example in a folder, with a root of its own, and return what it prints.

    Raises:
        AssertionError: It failed, or its own claim did; with all that it said.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, cwd=folder,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def run_notebook(folder: Path) -> list[Any]:
    """Run the notebook in a kernel of its own, made small, and return its cells' outputs."""
    import nbclient
    import nbformat

    notebook = nbformat.read(EXAMPLES / "12_notebook.ipynb", as_version=4)
    (given,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    small = {"DISK_BUDGET": "2 MB", "PATCH_SIZE": 32, "PATCHES": 2, "ROOT": str(folder / "12")}
    given.source += "".join(f"\n{name} = {value!r}" for name, value in small.items())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    client = nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3")
    client.execute(cwd=folder, env=environment)
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def shown_last(outputs: list[Any]) -> str:
    """Return the text of the notebook's last two outputs: its renewed line, and its claim."""
    texts = [output.get("data", {}).get("text/plain", output.get("text")) for output in outputs]
    return "\n".join(text.strip() for text in texts[-2:])


def words_of(printed: str) -> list[str]:
    """Return the lines less their numbers, which a machine's speed and torch's version change."""
    lines = [re.sub(r"[0-9a-f]{8}\b|[\d.,]*\d(e-\d+)?", "#", line) for line in printed.splitlines()]
    return [line.rstrip() for line in lines if line.strip()]


def _show(name: str, began_s: float, printed: str) -> None:
    print(f"=== {name}: {time.monotonic() - began_s:.1f} s\n{printed}", flush=True)  # noqa: T201


def main() -> None:
    """Run all examples, and print each with its output and seconds."""
    wanted = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder, LoopbackOpenNeuro(Path(folder, "on")) as server:
        publish_stand_ins(server)
        for example in GALLERY:
            if wanted and not example.name.startswith(tuple(wanted)):
                continue
            began_s = time.monotonic()
            printed = run(example.command("--root", Path(folder, example.name)), Path(folder))
            _show(example.name, began_s, printed)
        if not wanted or "12" in wanted:
            began_s = time.monotonic()
            printed = shown_last(run_notebook(Path(folder)))
            _show("12_notebook", began_s, printed)


if __name__ == "__main__":
    main()
