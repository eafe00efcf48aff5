"""Random draws that depend on a subject and not on the thread that makes them.

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
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
import torchio as tio
from torch.overrides import TorchFunctionMode

_DRAWS = frozenset(
    {
        "rand",
        "rand_like",
        "randn",
        "randn_like",
        "randint",
        "randint_like",
        "randperm",
        "multinomial",
        "normal",
        "bernoulli",
        "poisson",
        "binomial",
        "uniform_",
        "normal_",
        "random_",
        "bernoulli_",
        "exponential_",
        "cauchy_",
        "geometric_",
        "log_normal_",
        "trunc_normal_",
        "xavier_uniform_",
        "xavier_normal_",
        "kaiming_uniform_",
        "kaiming_normal_",
        "_standard_gamma",
        "_sample_dirichlet",
    },
)
_UNGUIDED = frozenset(
    {
        "dropout",
        "dropout_",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_dropout",
        "feature_alpha_dropout",
        "rrelu",
        "rrelu_",
        "gumbel_softmax",
        "fractional_max_pool2d",
        "fractional_max_pool3d",
    },
)
_DEEPEST = 12
_LIBRARIES = frozenset({"torch", "torchio", "numpy", "scipy"})
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
            message = (
                f"Cannot repeat torch's {name}: it draws from the global generator and takes no "
                f"other. Draw a mask with torch.rand or torch.bernoulli instead."
            )
            raise NotImplementedError(message)
        return func(*args, **kwargs)


def _choose_generator(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> torch.Generator | None:
    device = kwargs.get("device")
    if device is None:
        device = next((value.device for value in args if isinstance(value, torch.Tensor)), "cpu")
    if torch.device(device).type != "cpu":
        message = (
            f"Cannot repeat torch's {name} on {device}: subjects are transformed on the CPU. "
            f"Move the transform into the training loop."
        )
        raise NotImplementedError(message)
    return _active.get()


@contextmanager
def drawing_from(
    seed: int,
    cancelled: Callable[[], bool] = lambda: False,
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
    generator = torch.Generator()
    generator.manual_seed(seed)
    with _using(generator), _Redirect(cancelled):
        yield generator


@contextmanager
def _using(generator: torch.Generator) -> Iterator[None]:
    token = _active.set(generator)
    try:
        yield
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

        @contextmanager
        def use_seed(seed: int) -> Iterator[None]:
            if _active.get() is None:
                with original(seed):
                    yield
                return
            generator = torch.Generator()
            generator.manual_seed(int(seed))
            with _using(generator):
                yield

        setattr(use_seed, _GUARD, True)
        tio.Transform._use_seed = staticmethod(use_seed)  # type: ignore[method-assign] # noqa: SLF001


def find_other_generator(target: object) -> str:
    """Name the generator other than torch's that a callable is seen to draw from, or "".

    Sees MONAI's ``Randomizable``; NumPy's and Python's generators among attributes; and what a
    Python function names, closes over, has as default or imports, and the functions that it
    calls, other than those of torch, TorchIO, NumPy and SciPy. It cannot see into C++.

    Args:
        target: A transform, a function, or an object that holds some.
    """
    return _search(target, seen=set(), depth=0)


def _search(target: object, *, seen: set[int], depth: int) -> str:
    if id(target) in seen or depth > _DEEPEST:
        return ""
    seen.add(id(target))
    source = _name_generator(target)
    if source:
        return source
    found = (_search(child, seen=seen, depth=depth + 1) for child in _children(target))
    return next(filter(None, found), "")


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


def _children(target: object) -> list[object]:
    if isinstance(target, list | tuple):
        return list(target)
    if isinstance(target, dict):
        return [*target, *target.values()]
    if isinstance(target, FunctionType):
        library = (target.__module__ or "").partition(".")[0]
        return [] if library in _LIBRARIES else _parts_of_function(target)
    if isinstance(target, type) or not callable(target):
        return []
    children = list(getattr(target, "__dict__", {}).values())
    for name in ("__call__", "apply_transform", "_generate_patches"):
        method = getattr(type(target), name, None)
        if isinstance(method, FunctionType) and not method.__module__.startswith("torchio."):
            children.append(method)
    if isinstance(target, MethodType):
        children += [target.__func__, target.__self__]
    if isinstance(target, partial):
        children += [target.func, *target.args, *target.keywords.values()]
    return children


def _parts_of_function(function: FunctionType) -> list[object]:
    """Return what a function reaches by name: globals, closure, defaults, imports."""
    parts: list[object] = [
        *(function.__defaults__ or ()),
        *(function.__kwdefaults__ or {}).values(),
    ]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a cell that is empty still
            parts.append(cell.cell_contents)
    for code in _codes(function.__code__):
        used = {(i.opname, i.argval) for i in dis.get_instructions(code)}
        loaded = {name for operation, name in used if operation in {"LOAD_GLOBAL", "LOAD_NAME"}}
        imported = [name for operation, name in used if operation == "IMPORT_NAME"]
        values = [function.__globals__[n] for n in loaded if n in function.__globals__]
        values += [sys.modules.get(name) for name in imported]
        if np in values and "random" in code.co_names:
            values.append(np.random)
        parts += values
    return parts


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
