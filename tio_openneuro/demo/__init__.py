"""The whole path on an embedded data set: heads, loopback OpenNeuro, training, report.

Importing this package starts nothing. :func:`run_demo` does the work and reports events;
:func:`render` shows them on a console. Prints nothing itself.
"""

from tio_openneuro.demo.live import render
from tio_openneuro.demo.run import run_demo

__all__ = ["render", "run_demo"]
