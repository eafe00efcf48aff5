"""TorchIO's private names, as its classes have them when the suite runs."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator

import torchio as tio

ROOTS = (
    tio.Image,
    tio.Subject,
    tio.SubjectsDataset,
    tio.Queue,
    tio.Transform,
    tio.data.PatchSampler,
)


def is_private(name: str) -> bool:
    """Return whether a name begins with one underscore, not two."""
    return name.startswith("_") and not name.startswith("__")


def torchio_classes() -> Iterator[type]:
    """Yield the classes that ours derive from or work with, and TorchIO's own children of them."""
    waiting = list(ROOTS)
    while waiting:
        found = waiting.pop()
        if found.__module__.startswith("torchio."):
            yield found
            waiting += found.__subclasses__()


@functools.cache
def private_names() -> frozenset[str]:
    """Return the private methods of TorchIO's classes, and the attributes that these set."""
    names: set[str] = set()
    for cls in torchio_classes():
        names |= set(vars(cls))
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls)))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
                names.add(node.attr)
    return frozenset(filter(is_private, names))
