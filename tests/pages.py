"""The pages of the public names, made by pdoc from their docstrings.

``python tests/pages.py FOLDER`` writes them; whatever pdoc warns of ends it.
"""

import sys
import warnings
from pathlib import Path

import pdoc

import tio_openneuro


def build(folder: Path) -> Path:
    """Write the pages and return the package's."""
    for name in tio_openneuro.__all__:  # pdoc sees what stands in a module, and asks for no more
        setattr(tio_openneuro, name, getattr(tio_openneuro, name))
    pdoc.render.configure(docformat="google")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc("tio_openneuro", "!tio_openneuro.", output_directory=folder)
    return folder / "tio_openneuro.html"


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))  # noqa: T201
