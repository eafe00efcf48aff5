"""The whole path on an embedded data set: heads, loopback OpenNeuro, training, report.

Importing this package starts nothing, and imports what it needs when that is asked for.
:func:`run_demo` does the work and reports events; :func:`render` shows them on a console. Prints
nothing itself.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tio_openneuro.demo.live import render
    from tio_openneuro.demo.run import run_demo

__all__ = ["render", "run_demo"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    """Import a name of the door: its watch over a folder needs no torch, which takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = {"render": "live", "run_demo": "run"}[name]
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
