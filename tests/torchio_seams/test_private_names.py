"""The private names of TorchIO's that are relied on: a new TorchIO fails here, with the name."""

import ast
import importlib
from pathlib import Path

import pytest
import torch
import torchio as tio
from torchio_names import ROOTS, is_private, private_names

import tio_openneuro.torchio_seams
from tio_openneuro.torchio_seams.private_names import (
    is_loaded,
    leave_unfilled,
    share_subjects,
    transform_of,
)
from tio_openneuro.torchio_seams.randomness import METHODS
from tio_openneuro.volumes import ImageSize

ROOM = Path(tio_openneuro.torchio_seams.__file__).parent


def names_of(path: Path) -> tuple[set[str], set[str]]:
    """Return the private names that a module touches, and those that its own classes bring."""
    tree = ast.parse(path.read_text())
    module = importlib.import_module(f"tio_openneuro.torchio_seams.{path.stem}")
    touched = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    touched |= {
        node.args[1].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in {"getattr", "setattr"}
        and isinstance(node.args[1], ast.Constant)
    }
    own: set[str] = set()
    for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        derived = issubclass(getattr(module, cls.name), ROOTS)
        for node in ast.walk(cls):
            if isinstance(node, ast.FunctionDef):
                own.add(node.name)
            elif isinstance(node, ast.AnnAssign):
                own.add(ast.unparse(node.target).removeprefix("self."))
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                # What a child of TorchIO's sets may be TorchIO's.
                own |= set() if derived else {node.attr}
    return set(filter(is_private, touched)), own


FOUND = [names_of(path) for path in sorted(ROOM.glob("*.py")) if path.stem != "__init__"]
RELIED_ON = set().union(*(touched for touched, _ in FOUND)) - set().union(*(o for _, o in FOUND))
RELIED_ON |= set(filter(is_private, METHODS))
# Torch's and Python's own.
RELIED_ON -= {*dir(torch.Tensor), *dir(ImageSize)}


def test_what_is_relied_on_is_found() -> None:
    """The names are read from the source; these are among them as of 1.2.1."""
    known = {"_loaded", "_transform", "_subjects", "_subjects_iterable", "_parse_affine"}
    assert known | {"_use_seed", "_get_crop_transform"} <= RELIED_ON


@pytest.mark.parametrize("name", sorted(RELIED_ON))
def test_torchio_still_has_what_the_seams_rely_on(name: str) -> None:
    """Each private name that is touched here is one of the installed TorchIO's."""
    assert name in private_names(), f"TorchIO {tio.__version__} has no {name} any more"


def test_private_names_mean_what_they_are_taken_for() -> None:
    """An image is loaded once its voxels are there; datasets and queues give what was set."""
    image = tio.ScalarImage("nowhere.nii", verify_path=False)
    assert not is_loaded(image)
    loaded = tio.ScalarImage(tensor=torch.zeros(1, 2, 2, 2))
    assert is_loaded(loaded)
    subjects = [tio.Subject(t1=loaded), tio.Subject(t1=loaded, age=3)]
    transform = tio.RandomFlip()
    dataset = tio.SubjectsDataset(subjects, transform=transform)
    assert transform_of(dataset) is transform
    share_subjects(dataset, subjects[1:])
    assert (len(dataset), dataset.dry_iter()[0]["age"]) == (1, 3)
    queue = tio.Queue.__new__(tio.Queue)
    leave_unfilled(queue)
    own = tio.Queue(dataset, 1, 1, tio.UniformSampler(1), start_background=False)
    assert vars(queue).items() <= vars(own).items()
