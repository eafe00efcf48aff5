"""What the trainings of some examples are made of: their network, their loss, their dataset."""

import importlib.util
from pathlib import Path
from types import ModuleType

import torchio as tio
from gallery import EXAMPLES

import tio_openneuro as tno

# Those whose network and loss are two functions, to be taken elsewhere.
PORTABLE = ["01_train_segmentation", "06_cross_validation", "08_self_supervised", "11_monai"]
PATCHES, EPOCHS = 2, 2


def load(name: str) -> ModuleType:
    """Import an example."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_dataset(example: ModuleType, root: Path) -> tno.DataladSubjectsDataset:
    """Return the dataset that an example's options name by default."""
    options = example.parser.parse_args([])
    images: dict[str, tno.Scalar | tno.Label] = {"image": tno.Scalar(options.image)}
    if hasattr(options, "label"):
        images["label"] = tno.Label(options.label)
    return tno.DataladSubjectsDataset(
        options.dataset,
        images,
        root=root,
        disk_budget="2 MB",
        preprocess=tio.Compose([tio.ToCanonical(), tio.ZNormalization()]),
    )


def make_queue(dataset: tno.DataladSubjectsDataset) -> tno.BudgetedQueue:
    """Return a queue of two patches of each subject."""
    sampler = tio.UniformSampler(16)
    return tno.BudgetedQueue(dataset, 8, PATCHES, sampler, ram_budget="2 GB", seed=0)
