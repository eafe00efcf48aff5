"""One walk over what a transform, a sampler or a function is made of.

Owns the ways from a value to what it holds. Runs no code of what it looks at, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType

DEEPEST = 20
_ENTERED = (Mapping, list, tuple, CodeType)


def parts_of(value: object) -> list[object]:  # noqa: PLR0911 - one per kind of value
    """Return what a value holds, in the same order in every process, but for that of sets.

    Containers hold their items, a function its code, defaults and closure, code its names and
    constants, any other object its attributes, also those in ``__slots__``, by name. Classes,
    modules, arrays and whatever else is kept outside of Python hold nothing.
    """
    if isinstance(value, Mapping):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, BuiltinFunctionType):
        return [value.__self__]
    if isinstance(value, FunctionType):
        cells = value.__closure__ or ()
        return [value.__code__, value.__defaults__, value.__kwdefaults__, *map(_content, cells)]
    if isinstance(value, CodeType):
        names = (value.co_qualname, value.co_names, value.co_varnames)
        return [names, value.co_code, value.co_exceptiontable, value.co_consts]
    if isinstance(value, type | ModuleType):
        return []
    # A dictionary, a tuple of that and the slots, or None.
    state = object.__getstate__(value)
    held = [each for each in (state if isinstance(state, tuple) else (state,)) if each]
    attributes = {name: each[name] for each in held for name in each}
    return [part for name in sorted(attributes) for part in (name, attributes[name])]


def _content(cell: object) -> object:
    """Return what a function closes over; None where that is not there yet."""
    return getattr(cell, "cell_contents", None)


def walk_parts(
    value: object, parts: Callable[[object], Sequence[object]] = parts_of
) -> Iterator[object]:
    """Yield a value and what it holds at any depth, each once, and what holds before what is held.

    What can be called, and mappings, sequences and code, are entered; nothing else is.

    Args:
        value: A transform, a sampler, a function, or something that holds some.
        parts: Tells what each holds.
    """
    # Kept, so that no later object gets the id of one that was seen.
    seen: dict[int, object] = {}
    waiting = [(value, 0)]
    while waiting:
        found, depth = waiting.pop()
        if id(found) in seen:
            continue
        seen[id(found)] = found
        yield found
        if depth < DEEPEST and (callable(found) or isinstance(found, _ENTERED)):
            waiting += [(part, depth + 1) for part in reversed(parts(found))]


def inner_transforms(transform: object) -> list[object]:
    """Return the transforms that a compound holds, as TorchIO's ``Compose`` and ``OneOf`` do."""
    inner = getattr(transform, "transforms", None)
    found = list(inner) if isinstance(inner, list | tuple) else []
    return [*found, *getattr(transform, "transforms_dict", ())]
