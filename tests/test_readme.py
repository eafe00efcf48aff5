"""The README's blocks run as they stand, offline; the gallery has tests of its own."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from faulty import LoopbackOpenNeuro

from tio_openneuro.loopback import Volume

CHECKOUT = Path(__file__).parent.parent
README = (CHECKOUT / "README.md").read_text()


def marked(name: str) -> str:
    """Return the code block that follows ``<!-- name -->``."""
    block = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert block is not None, f"README.md has no block {name!r}"
    return block[1]


@pytest.fixture(scope="module")
def _like_ds004199(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Volume | bytes]:
    """Return files laid out as ds004199's: FLAIR and roi, one subject without roi."""
    rng = np.random.default_rng(0)
    files: dict[str, Volume | bytes] = {"dataset_description.json": b'{"Name": "FCD"}'}
    for number in range(1, 7):
        stem = f"sub-{number:05}/anat/sub-{number:05}_FLAIR"
        voxels = rng.integers(0, 500, (72, 80, 68)).astype(np.int16)
        roi = np.zeros(voxels.shape, np.uint8)
        roi[20:50, 20:50, 20:50] = 1
        affine = np.diag([-1.0, 1.0, 1.0, 1.0])
        files[f"{stem}.nii.gz"] = Volume(voxels, affine)
        if number != 3:
            files[f"{stem}_roi.nii.gz"] = Volume(roi, affine)
    return files


@pytest.fixture
def ds004199(
    openneuro: LoopbackOpenNeuro, _like_ds004199: dict[str, Volume | bytes]
) -> LoopbackOpenNeuro:
    """Return the loopback OpenNeuro with a small stand-in under the accession ds004199."""
    if "ds004199" not in {path.name for path in openneuro.folder.rglob("ds004199*")}:
        openneuro.publish("ds004199", _like_ds004199)
    return openneuro


def run_python(arguments: list[str]) -> str:
    """Run a script in a new interpreter and return what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.usefixtures("ds004199")
def test_readme_example_prints_what_the_readme_says(tmp_path: Path) -> None:
    """The twelve lines run by accession, and end with shapes, counts and one skipped unit."""
    script = tmp_path / "example.py"
    script.write_text(marked("example"))
    assert "torch.Size([4, 1, 64, 64, 64]) 1 skipped" in run_python([str(script)])


@pytest.mark.parametrize("name", ["demo command", "test command"])
def test_readme_commands_are_one_line_with_all_of_their_setup(name: str) -> None:
    """Each command makes the environment, installs, and runs, in one line."""
    (line,) = marked(name).strip().splitlines()
    assert line.startswith("python3 -m venv .venv && ")
    assert "pip install" in line
