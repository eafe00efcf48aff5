"""The command line, and the tables that it prints.

Owns arguments, exit codes and words. Promises one clear message for each failure. Never does what
the library cannot be asked for in Python.
"""

from tio_openneuro.cli.commands import main

__all__ = [
    "main",
]
