"""What is released: a source archive, and a wheel made of it, that work where nothing else is."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from gallery import EXAMPLES, GALLERY

import tio_openneuro as tno

CHECKOUT = EXAMPLES.parent


def build(source: Path, kind: str, folder: Path) -> Path:
    """Build one archive of a source tree."""
    folder.mkdir()
    _run([sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)], cwd=source)
    (made,) = folder.iterdir()
    return made


def _run(command: list[str], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.usefixtures("stand_ins")
def test_archives_build_install_and_run_an_example(tmp_path: Path) -> None:
    """The wheel of the source archive is the checkout's; installed alone, it runs example 02."""
    sdist = build(CHECKOUT, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    assert (source / "examples/02_from_torchio.py").is_file()
    wheel = build(source, "wheel", tmp_path / "wheel")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names == set(zipfile.ZipFile(build(CHECKOUT, "wheel", tmp_path / "own")).namelist())
    assert "tio_openneuro/py.typed" in names
    assert wheel.name.startswith(f"tio_openneuro-{tno.__version__}-")

    # An environment with this one's dependencies, and nothing of the checkout on any path.
    environment = tmp_path / "environment"
    _run([sys.executable, "-m", "venv", "--without-pip", str(environment)])
    python = str(environment / "bin/python")
    (packages,) = environment.glob("lib/python*/site-packages")
    paths = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(paths), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    _run([*pip, "--no-deps", "--no-index", str(wheel)], cwd=tmp_path)
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    alone["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    where = "import tio_openneuro; print(tio_openneuro.__file__)"
    found = _run([python, "-c", where], cwd=tmp_path, env=alone)
    assert Path(found.strip()).is_relative_to(environment)
    example = GALLERY[1]
    printed = _run(
        [python, str(EXAMPLES / f"{example.name}.py"), *example.options],
        cwd=tmp_path, env=alone, timeout=240,
    )  # fmt: skip
    assert printed.splitlines()[-1].startswith("Equal: ")
