"""What a user sees of the package before anything else: its public names, and they alone."""

import pydoc
import subprocess
import sys
from importlib import metadata

import tio_openneuro as tno
from tio_openneuro import errors


def test_completion_offers_public_names_alone() -> None:
    """``dir`` gives the public names, also once rooms were imported."""
    assert tno.BudgetedQueue.__module__ == "tio_openneuro.queue.queue"
    assert dir(tno) == sorted(tno.__all__)


def test_version_is_the_distributions() -> None:
    """``__version__`` is what was installed."""
    assert tno.__version__ == metadata.version("tio-openneuro")


def test_help_names_the_public_before_the_internal() -> None:
    """``help(tio_openneuro)`` names what users call before it lists the rooms."""
    said = pydoc.plain(pydoc.render_doc(tno))
    internal = said.index("PACKAGE CONTENTS")
    called = [name for name in tno.__all__ if not hasattr(errors, name)]
    assert max(said.index(name) for name in [*called, "TioOpenNeuroError"]) < internal


def test_importing_the_package_loads_no_torch() -> None:
    """``import tio_openneuro`` is quick: torch and DataLad come with the names that need them."""
    script = (
        "import sys, tio_openneuro; tio_openneuro.DiskBudgetError; "
        "sys.exit(bool({'torch', 'torchio', 'datalad', 'sqlite3'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
