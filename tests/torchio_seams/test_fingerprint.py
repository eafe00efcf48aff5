"""What tells two transforms apart, for a state of the queue and for the name of a volume."""

import copy
import enum
import functools
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FunctionType

import numpy as np
import pytest
import torch
import torchio as tio

from tio_openneuro.torchio_seams.fingerprint import UnpinnedError, identify, identify_parts, pin


def image(value: int) -> tio.ScalarImage:
    return tio.ScalarImage(tensor=torch.full((1, 3, 3, 3), float(value)))


DIFFERENT = [
    (lambda: tio.Resample(2), lambda: tio.Resample(2, include=["t1"])),
    (lambda: tio.Resample(2), lambda: tio.Resample(2, exclude=["t1"])),
    (lambda: tio.Resample(2), lambda: tio.Resample(2, keep={"t1": "u1"})),
    (lambda: tio.Resample(2), lambda: tio.Resample(2, copy=False)),
    (lambda: tio.Resample(2), lambda: tio.Resample(2, p=0.5)),
    (lambda: tio.Resample(2), lambda: tio.Resample(2.5)),
    (lambda: tio.Resample("t1"), lambda: tio.Resample("t2")),
    (lambda: tio.Mask("m"), lambda: tio.Mask("m", outside_value=3)),
    (lambda: tio.Mask("m"), lambda: tio.Mask("m", labels=[1])),
    (lambda: tio.ToReferenceSpace(image(1)), lambda: tio.ToReferenceSpace(image(2))),
    (lambda: tio.Compose([tio.OneHot()]), lambda: tio.Compose([tio.OneHot(num_classes=9)])),
    (tio.ZNormalization, lambda: tio.ZNormalization(tio.ZNormalization.mean)),
    (
        lambda: tio.HistogramStandardization({"t1": np.arange(13.0)}),
        lambda: tio.HistogramStandardization({"t1": np.arange(13.0) * 1.5}),
    ),
    (lambda: tio.Clamp(np.float32(1), 2), lambda: tio.Clamp(np.float32(1.5), 2)),
    (lambda: tio.CropOrPad(9), lambda: tio.CropOrPad(9, padding_mode="mean")),
    (lambda: tio.Pad((2, 20, 0, 0, 0, 0)), lambda: tio.Pad((22, 0, 0, 0, 0, 0))),
    (tio.RandomFlip, lambda: tio.RandomFlip(axes=(0, 1))),
    (tio.RandomAffine, lambda: tio.RandomAffine(scales=0.3)),
    (lambda: tio.To(torch.float16), lambda: tio.To(torch.float32)),
    (lambda: tio.Compose([tio.ToCanonical()] * 2), lambda: tio.Compose([tio.ToCanonical()])),
]


@pytest.mark.parametrize("number", range(len(DIFFERENT)))
def test_every_attribute_tells_transforms_apart(number: int) -> None:
    """Equal transforms have one digest, also nested; whatever differs gives another."""
    one, other = DIFFERENT[number]
    for digest in (identify, pin):
        assert digest(one()) == digest(one()) == digest(copy.deepcopy(one()))
        assert digest(one()) != digest(other())
        assert digest(tio.Compose([one()])) == digest(tio.Compose([one()]))
        assert digest(tio.Compose([one()])) != digest(tio.Compose([other()]))
    assert pin(one()) != pin(one(), "an id") != pin(one(), "another id")


class Slotted:
    """What keeps its number in a slot, beside another one in its dictionary."""

    __slots__ = ("__dict__", "number")

    def __init__(self, number: int, other: int = 0) -> None:
        self.number = number
        self.other = other

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * self.number + self.other


class Child(Slotted):
    """What has its parent's slots, and one of its own under a private name."""

    __slots__ = ("__more",)

    def __init__(self, number: int, more: int) -> None:
        super().__init__(number)
        self.__more = more


class Shape(enum.Enum):
    """Kinds that a user may tell apart by an enum."""

    BOX = 1
    BALL = 2


def default(number: object) -> Callable[..., object]:
    def function(tensor: torch.Tensor, scale: object = number) -> object:
        return tensor, scale

    return function


def keyword_default(number: object) -> Callable[..., object]:
    def function(tensor: torch.Tensor, *, scale: object = number) -> object:
        return tensor, scale

    return function


def closure(number: object) -> Callable[..., object]:
    return lambda tensor: (tensor, number)


def named_one(tensor: torch.Tensor) -> torch.Tensor:
    return torch.flip(tensor, (1,))


def inner(number: int) -> Callable[..., object]:
    if number == 1:
        return lambda tensor: map(lambda part: part + 1, tensor)  # noqa: C417
    return lambda tensor: map(lambda part: part + 2, tensor)  # noqa: C417


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def recursive(number: int) -> list[object]:
    found: list[object] = [number]
    found.append(found)
    return found


# Each is called with 1 and with 2.
TOLD_APART: dict[str, Callable[[int], object]] = {
    "slot": Slotted,
    "dictionary beside slots": lambda n: Slotted(0, n),
    "slot of a parent": lambda n: Child(n, 0),
    "private slot": lambda n: Child(0, n),
    "default": default,
    "keyword default": keyword_default,
    "closure": closure,
    "closure over a function": lambda n: closure(closure(n)),
    "inner function": inner,
    "number in the code": lambda n: (lambda t: t + 1) if n == 1 else (lambda t: t + 2),
    "tuple in the code": lambda n: (lambda t: t[(1, 2)]) if n == 1 else (lambda t: t[(1, 3)]),
    "None in the code": lambda n: (lambda t: None) if n == 1 else (lambda t: ...),
    "complex in the code": lambda n: (lambda t: t + 1j) if n == 1 else (lambda t: t + 2j),
    "set in the code": lambda n: (lambda t: t in {1, 2}) if n == 1 else (lambda t: t in {1, 3}),
    "name of a global": lambda n: (lambda t: len(t) + 1) if n == 1 else (lambda t: max(t) + 1),
    "caught error": lambda n: catching if n == 1 else not_catching,
    "where an error leads": lambda n: catching if n == 1 else never_caught(catching),
    "names of arguments": lambda n: (lambda a, b: (a, b)) if n == 1 else (lambda b, a: (b, a)),
    "partial": lambda n: functools.partial(named_one, n),
    "keyword of a partial": lambda n: functools.partial(named_one, tensor=n),
    "bound method": lambda n: Slotted(n).__call__,
    "method of a dictionary": lambda n: {"label": n}.get,
    "function of torch": lambda n: torch.abs if n == 1 else torch.neg,
    "method of torch": lambda n: torch.Tensor.abs if n == 1 else torch.Tensor.neg,
    "function of NumPy": lambda n: np.abs if n == 1 else np.negative,
    "generator's state": generator,
    "enum": Shape,
    "dtype of torch": lambda n: torch.float16 if n == 1 else torch.float32,
    "dtype of NumPy": lambda n: np.dtype(f"f{4 * n}"),
    "device": lambda n: torch.device("cpu", n - 1),
    "tensor": lambda n: torch.full((2,), n),
    "tensor's type": lambda n: torch.ones(2, dtype=torch.int32 if n == 1 else torch.float32),
    "tensor's shape": lambda n: torch.ones(n, 2 // n),
    "tensor of bfloat16": lambda n: torch.full((), n, dtype=torch.bfloat16),
    "array": lambda n: np.full(2, n),
    "array's shape": lambda n: np.ones((n, 2 // n)),
    "array of objects": lambda n: np.array([n, "x"], dtype=object),
    "scalar of NumPy": np.float32,
    "image": image,
    "class": lambda n: Slotted if n == 1 else Child,
    "module": lambda n: np if n == 1 else torch,
    "where a list ends": lambda n: [[1, 2], [3]] if n == 1 else [[1], [2, 3]],
    "where text ends": lambda n: ["ab", "c"] if n == 1 else ["a", "bc"],
    "text that looks like a number": lambda n: 1 if n == 1 else "1",
    "kind of number": lambda n: 1 if n == 1 else 1.0,
    "truth": lambda n: 1 if n == 1 else True,
    "key and value": lambda n: {"a": "b"} if n == 1 else {"b": "a"},
    "pairs and a mapping": lambda n: ["a", "b"] if n == 1 else {"a": "b"},
    "set": lambda n: {1, n + 5},
    "set of names": lambda n: {"t1", "t2", "label", "mask", f"{n}"},
    "queue": lambda n: deque([n]),
    "pattern": lambda n: re.compile(f"{n}"),
    "slice": slice,
    "range": range,
    "twice": lambda n: [Slotted(3)] * n,
    "recursion": recursive,
    "name of a file": lambda n: Path(f"/nowhere/{n}"),
}


def catching(tensor: torch.Tensor) -> object:
    try:
        return int(tensor)
    except ValueError:
        return None


def never_caught(function: FunctionType) -> FunctionType:
    return FunctionType(function.__code__.replace(co_exceptiontable=b""), function.__globals__)


def not_catching(tensor: torch.Tensor) -> object:
    return int(tensor)


@pytest.mark.parametrize("name", TOLD_APART)
def test_a_state_tells_whatever_a_transform_holds(name: str) -> None:
    """The same when it is made again; another where one thing in it differs, nested or not."""
    make = TOLD_APART[name]
    assert identify(make(1)) == identify(make(1))
    assert identify(make(1)) != identify(make(2))
    wrapped = [identify(tio.Lambda(functools.partial(print, make(n)))) for n in (1, 1, 2)]
    assert wrapped[0] == wrapped[1] != wrapped[2]


def test_a_state_has_a_digest_of_everything() -> None:
    """What tells nothing of itself counts by its class, and what is nested endlessly has an end."""
    deep: list[object] = []
    for _ in range(10_000):
        deep = [deep, deep]
    with open(__file__) as file:  # noqa: PTH123 - any object that cannot be saved
        for value in (object(), file, iter([1]), deep, np.random.default_rng(0), sys):
            assert identify(value) == identify(value)


def test_a_state_reads_no_file(tmp_path: Path) -> None:
    """An image that is not loaded stays so, and a log that grows makes no other transform."""
    path = tmp_path / "grid.nii"
    image(1).save(path)
    reference = tio.ScalarImage(path)
    found = [identify(value) for value in (reference, path, str(path))]
    image(2).save(path)
    assert [identify(value) for value in (reference, path, str(path))] == found
    assert not reference._loaded
    reference.load()
    assert identify(reference) != found[0]


_TOLD = """
from pathlib import Path
import test_fingerprint as told
from tio_openneuro.torchio_seams.fingerprint import identify, pin
digests = [identify([make(n) for n in (1, 2)]) for make in told.TOLD_APART.values()]
print(digests + [f(make()) for f in (pin, identify) for pair in told.DIFFERENT for make in pair])
"""


def test_digests_are_the_same_in_every_process() -> None:
    """Neither addresses nor the seed of hashes change one, nor the folder of a file."""
    found = [
        subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path}\n{_TOLD}"],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1]
    assert len(set(found[0].split())) > 40
    assert identify(Path("/here/grid.nii")) == identify(Path("/there/grid.nii"))


def test_a_state_names_what_differs() -> None:
    """Dataset, selection, transforms and patch sampler have a digest each."""
    dataset = tio.SubjectsDataset([tio.Subject(t1=image(1))], transform=tio.Pad(1))
    parts = identify_parts(dataset, tio.UniformSampler(2), None)
    others = {
        "selection": (tio.SubjectsDataset([tio.Subject(t2=image(1))], transform=tio.Pad(1)), 2),
        "transform": (tio.SubjectsDataset([tio.Subject(t1=image(1))], transform=tio.Pad(2)), 2),
        "patch sampler": (dataset, 3),
    }
    for name, (other, size) in others.items():
        found = identify_parts(other, tio.UniformSampler(size), None)
        assert {part for part in parts if parts[part] != found[part]} == {name}


def test_reference_files_count_by_content(tmp_path: Path) -> None:
    """A file that changes gives another name, though its path is the same; a copy the same."""
    path = tmp_path / "grid.nii"
    image(1).save(path)
    before = pin(tio.Resample(path))
    (tmp_path / "copy").mkdir()
    twin = tmp_path / "copy" / "grid.nii"
    twin.write_bytes(path.read_bytes())
    assert pin(tio.Resample(twin)) == before == pin(tio.Resample(str(path)))
    image(2).save(path)
    assert pin(tio.Resample(path)) != before


class Own(tio.transforms.IntensityTransform):
    """A class of the user's, whose code nobody can pin down."""

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        return subject


def holding(value: object) -> tio.Transform:
    """Return one of TorchIO's transforms that holds something beside its own."""
    transform = tio.ToCanonical()
    transform.held = value
    return transform


@pytest.mark.parametrize(
    "transform",
    [
        lambda tensor: tensor,
        tio.Lambda(lambda tensor: tensor),
        tio.ZNormalization(masking_method=lambda tensor: tensor > 0),
        tio.Compose([tio.ToCanonical(), tio.Lambda(lambda tensor: tensor)]),
        tio.Lambda(functools.partial(named_one)),
        tio.Lambda(Slotted(1)),
        tio.Lambda(Slotted(1).__call__),
        holding(generator(1)),
        holding(np.array([1, "x"], dtype=object)),
        holding(object()),
        Own(),
    ],
    ids=[
        "function",
        "Lambda",
        "mask",
        "nested",
        "partial",
        "slots",
        "method",
        "generator",
        "objects",
        "object",
        "class",
    ],
)
def test_code_of_the_users_is_not_pinned_down(transform: Callable[..., object]) -> None:
    """A function or class outside of TorchIO has no name but the one that the user gives."""
    with pytest.raises(UnpinnedError):
        pin(transform)
    assert pin(transform, "1") == pin(transform, "1") != pin(transform, "2")
