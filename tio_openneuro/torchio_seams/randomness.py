"""Random draws that depend on a subject and not on the thread that makes them; what is random.

TorchIO's transforms and samplers draw from torch's global generator, which all threads share.
Inside :func:`drawing_from`, draws of this thread come from a generator of its own instead; those
of other threads, and the global generator's state, are left alone. The numbers are those that
``torch.manual_seed`` with the same seed would give.
"""

from __future__ import annotations

import dis
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
import torchio as tio
from torch.overrides import TorchFunctionMode
from torchio.transforms.augmentation import RandomTransform

from tio_openneuro.errors import SelectionError
from tio_openneuro.torchio_seams.parts import parts_of, walk_parts

_DRAWS = frozenset(
    (
        *("rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm"),
        *("multinomial", "normal", "bernoulli", "poisson", "binomial"),
        *("uniform_", "normal_", "random_", "bernoulli_", "exponential_", "cauchy_"),
        *("geometric_", "log_normal_", "_standard_gamma", "_sample_dirichlet"),
        *("trunc_normal_", "xavier_uniform_", "xavier_normal_"),
        *("kaiming_uniform_", "kaiming_normal_"),
    )
)
_UNGUIDED = frozenset(
    (
        *("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"),
        *("feature_dropout", "feature_alpha_dropout", "rrelu", "rrelu_", "gumbel_softmax"),
        *("fractional_max_pool2d", "fractional_max_pool3d"),
    )
)
_LIBRARIES = frozenset({"torch", "torchio", "numpy", "scipy"})
# Those of a class that its objects' work is done by.
METHODS = ("__call__", "apply_transform", "_generate_patches")
_GUARD = "_tio_openneuro_thread_aware"
_GUARD_LOCK = threading.Lock()
_active: ContextVar[torch.Generator | None] = ContextVar("tio_openneuro_generator", default=None)


class CancelledWorkError(BaseException):
    """The work of this thread is no longer wanted; not for a user's ``except`` to catch."""


class _Redirect(TorchFunctionMode):
    """Give every draw of this thread the active generator, and end work that is cancelled."""

    def __init__(self, cancelled: Callable[[], bool]) -> None:
        super().__init__()
        self._cancelled = cancelled

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 - torch's own signature
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - torch's own signature
        if self._cancelled():
            raise CancelledWorkError
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _DRAWS and kwargs.get("generator") is None:
            kwargs = {**kwargs, "generator": _choose_generator(name, args, kwargs)}
        elif name in _UNGUIDED and kwargs.get("training", True):
            raise NotImplementedError(
                f"Cannot repeat torch's {name}: it draws from the global generator and takes no "
                f"other. Draw a mask with torch.rand or torch.bernoulli instead."
            )
        return func(*args, **kwargs)


def _choose_generator(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Generator | None:
    device = kwargs.get("device")
    if device is None:
        device = next((value.device for value in args if isinstance(value, torch.Tensor)), "cpu")
    if torch.device(device).type != "cpu":
        raise NotImplementedError(
            f"Cannot repeat torch's {name} on {device}: subjects are transformed on the CPU. "
            f"Move the transform into the training loop."
        )
    return _active.get()


@contextmanager
def drawing_from(
    seed: int, cancelled: Callable[[], bool] = lambda: False
) -> Iterator[torch.Generator]:
    """Let torch's draws in this thread come from a generator of their own.

    On exit this thread draws from where it drew before. The global generator is not touched.

    Args:
        seed: Seed below 2**63.
        cancelled: Asked at each of torch's functions; once true, the block ends with
            CancelledWorkError.

    Example:
        >>> with drawing_from(0):
        ...     first = torch.rand(1)
        >>> with drawing_from(0):
        ...     bool(torch.rand(1) == first)
        True
    """
    install_seed_guard()
    with _using(seed) as generator, _Redirect(cancelled):
        yield generator


@contextmanager
def _using(seed: int) -> Iterator[torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    token = _active.set(generator)
    try:
        yield generator
    finally:
        _active.reset(token)


def install_seed_guard() -> None:
    """Make TorchIO's ``Transform._use_seed`` leave the global generator to other threads.

    Outside :func:`drawing_from` it does what it did. Called again, it does nothing.

    Source: ``torchio.transforms.Transform._use_seed`` (1.2.1) saves, seeds and restores the
    global state, so that another thread's draws in between are repeated.
    """
    with _GUARD_LOCK:
        original = tio.Transform._use_seed  # noqa: SLF001 - there is no public seam
        if getattr(original, _GUARD, False):
            return

        def use_seed(seed: int) -> AbstractContextManager[object]:
            return original(seed) if _active.get() is None else _using(int(seed))

        setattr(use_seed, _GUARD, True)
        tio.Transform._use_seed = staticmethod(use_seed)  # type: ignore[assignment, method-assign] # noqa: SLF001


def find_other_generator(target: object) -> str:
    """Name the generator other than torch's that a callable is seen to draw from, or "".

    Sees MONAI's ``Randomizable``; NumPy's and Python's generators among attributes; and what a
    Python function names, closes over, has as default or imports, and the functions that it
    calls, other than those of torch, TorchIO, NumPy and SciPy. It cannot see into C++.

    Args:
        target: A transform, a function, or an object that holds some.
    """
    return next(filter(None, map(_name_generator, walk_parts(target, _reached_from))), "")


def _name_generator(target: object) -> str:
    """Name the generator that a module, an object or a function of a generator is."""
    owner = getattr(target, "__self__", target)
    if target is random or isinstance(owner, random.Random):
        return "random"
    module = getattr(target, "__module__", None) or ""
    if (
        target is np.random
        or isinstance(owner, np.random.RandomState | np.random.Generator)
        or (callable(target) and str(module).startswith("numpy.random"))
        or callable(getattr(target, "set_random_state", None))
    ):
        return "numpy.random"
    return ""


def _reached_from(value: object) -> list[object]:
    """Return what a value holds, and what its code reaches by name."""
    if isinstance(value, FunctionType):
        library = (value.__module__ or "").partition(".")[0]
        return [] if library in _LIBRARIES else [*parts_of(value), *_named_in(value)]
    methods = [getattr(type(value), name, None) for name in METHODS]
    own = [method for method in methods if isinstance(method, FunctionType)]
    return [*parts_of(value), *(m for m in own if not m.__module__.startswith("torchio."))]


def _named_in(function: FunctionType) -> list[object]:
    """Return the globals that a function names, and the modules that it imports."""
    parts: list[object] = []
    for code in walk_parts(function.__code__):
        if not isinstance(code, CodeType):
            continue
        used = {(i.opname, i.argval) for i in dis.get_instructions(code)}
        loaded = {name for operation, name in used if operation in {"LOAD_GLOBAL", "LOAD_NAME"}}
        values = [function.__globals__[n] for n in loaded if n in function.__globals__]
        values += [sys.modules.get(name) for operation, name in used if operation == "IMPORT_NAME"]
        if np in values and "random" in code.co_names:
            values.append(np.random)
        parts += values
    return parts


def refuse_random(preprocess: object) -> None:
    """Raise where a transform is random, or holds one that is.

    Args:
        preprocess: What is to be done once.

    Raises:
        SelectionError: It gives another result each time.
    """
    reasons = [_why_random(part) for part in walk_parts(preprocess)]
    drawn = find_other_generator(preprocess)
    reasons.append(f"it draws from {drawn}" if drawn else "")
    for why in filter(None, reasons):
        raise SelectionError(
            f"Cannot use {type(preprocess).__name__} as preprocess: {why}, and preprocess is "
            f"done once for all epochs. Give what is random as transform, which is done each time."
        )


def _why_random(part: object) -> str:
    name = type(part).__name__
    if isinstance(part, RandomTransform):
        return f"{name} is random"
    if isinstance(part, tio.Transform) and part.probability < 1:
        return f"{name} has p={part.probability:g}"
    if isinstance(part, tio.Transform) and getattr(part, "location", None) == "random":
        return f'{name} has location="random"'
    return ""
