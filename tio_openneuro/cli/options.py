"""What the options of the command line mean, checked before a command begins.

Owns no state. Knows the parameters of Python that messages name, as the options they are here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import platformdirs
import typer

from tio_openneuro.errors import SelectionError
from tio_openneuro.select import Label, OnIncomplete, OnMultiple, Scalar, Unit, check_images
from tio_openneuro.sizes import parse_size

# Typer may carry click within itself.
UsageError: Any = typer.BadParameter.__base__
# What messages call by the names of Python's parameters; what cannot be typed is left out of a list
# of ways.
_OPTION_OF = {
    r"\bpass on_multiple='first', 'all' (.*?) or 'stack'": r"--on-multiple first, all \1 or stack",
    r"\bon_(multiple|incomplete)='(\w+)'": r"--on-\1 \2",
    r" and a collate function of your own": "",
    r"\bScalar(?= cannot take)|(?<=an option of )Scalar": "--image",
    r"\bLabel(?= cannot take)|(?<=an option of )Label": "--label",
    r"(?<=an option of )the dataset": "the command",
    r" = (?:Scalar|Label)\((.*?)\)(?= among|, where|, and none)": r" = \1",
    r"(?:pass )?\b(version|unit)='([^']*)'": r"--\1 \2",
    r"\b(\w+=)'([^']*)'": r"\1\2",
    r"\bwith remotes=": "in Python with remotes=",
    r"\bdisk_budget\b=?": "--disk-budget",
    r"\b(version|unit)=": r"--\1 ",
    ", root=": "",
    "Value error, ": "",
}

Source = Annotated[str, typer.Argument(help="Accession (ds004199), git URL, or path of a clone.")]
Root = Annotated[
    Path,
    typer.Option(
        envvar="TIO_OPENNEURO_ROOT",
        help="Folder of clones and ledger.",
        default_factory=lambda: Path(platformdirs.user_cache_dir("tio_openneuro")),
        # Typer wants the text now; a command line's environment is the same a moment later.
        show_default=platformdirs.user_cache_dir("tio_openneuro"),
    ),
]
_BOOLEANS = {"true": True, "false": False}
_GLOB = "NAME=GLOB, or NAME:ENTITY=VALUE,…"
Images = Annotated[list[str], typer.Option("--image", metavar=_GLOB, help="Repeatable.")]
Labels = Annotated[list[str], typer.Option("--label", metavar=_GLOB, help="A label map.")]
Version = Annotated[str | None, typer.Option(help="Tag or commit.", show_default="the newest")]
UnitOf = Annotated[Unit, typer.Option(help="What one unit is.")]
Multiple = Annotated[OnMultiple, typer.Option(help="A unit with several files for one image.")]
Incomplete = Annotated[OnIncomplete, typer.Option(help="Units that differ in optional images.")]


def checked_size(text: str) -> str:
    """Return the text of a size, or refuse what is none."""
    try:
        parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return text


Rate = Annotated[str, typer.Option(help="What the link gives in a second.", callback=checked_size)]
_budget = typer.Option(
    help="Bytes, '10 GB', or 'auto'.", callback=lambda t: t if t == "auto" else checked_size(t)
)
DiskBudget = Annotated[str, _budget]
RemoteRate = Annotated[
    str | None,
    typer.Option(
        help="What the remote gives to all nodes in a second.",
        callback=lambda text: text and checked_size(text),
    ),
]
Epochs = Annotated[int, typer.Option(min=2, help="Passes over the units.")]
Seed = Annotated[int, typer.Option(help="The queue's seed, which decides the order.")]
Step = Annotated[float, typer.Option(min=0, help="Seconds of the model for a batch.")]
Batch = Annotated[int, typer.Option(min=1, help="Patches of a batch.")]
Samples = Annotated[int, typer.Option(min=1, help="Patches of each unit, an epoch.")]
Workers = Annotated[int, typer.Option(min=1, help="The queue's num_workers.")]
_unit_seconds = typer.Option(min=0, help="Of a worker for a unit; default: by its voxels.")
UnitSeconds = Annotated[float | None, _unit_seconds]
PatchSize = Annotated[int, typer.Option(min=1, help="Voxels along each axis.")]
Latency = Annotated[float, typer.Option(min=0, help="Seconds to a file's first byte.")]
Ranks = Annotated[int, typer.Option(min=1, help="Processes that train.")]
Nodes = Annotated[int, typer.Option(min=1, help="Machines that they are on.")]
Probe = Annotated[int, typer.Option(min=0, help="Units whose headers are fetched.")]
Picture = Annotated[Path | None, typer.Option("--png", help="File to draw the curve to.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]


def read_patterns(image: list[str], label: list[str]) -> dict[str, Scalar | Label]:
    """Return the patterns that ``--image`` and ``--label`` state, by their names."""
    patterns: dict[str, Scalar | Label] = {}
    for kind, texts in ((Scalar, image), (Label, label)):
        for text in texts:
            match = re.fullmatch(r"([^=:]+)([=:])(.+)", text)
            name, sign, wanted = match.groups() if match else ("", "", "")
            if name in patterns:
                raise typer.BadParameter(f"{name!r} is given twice: no two images have one name.")
            pairs = [pair.partition("=") for pair in wanted.split(",")]
            entities: dict[str, Any] = {e: _BOOLEANS.get(v.lower(), v) for e, _, v in pairs if v}
            if not match or (sign == ":" and len(entities) < len(pairs)):
                raise typer.BadParameter(
                    f"{text!r} is neither NAME=GLOB, as in 't1=sub-*/anat/*_T1w*', nor "
                    f"NAME:ENTITY=VALUE,…, as in t1:suffix=T1w,acq=mprage,required=false"
                )
            try:
                patterns[name] = kind(wanted) if sign == "=" else kind(**entities)
                check_images({name: patterns[name]})
            except SelectionError as error:
                raise typer.BadParameter(f"{text!r}: {error}") from error
    return patterns


def in_one_line(error: Exception) -> str:
    """Return an error's message in one line, with the options of the command line."""
    said = error.format_message() if isinstance(error, UsageError) else str(error)
    for parameter, option in _OPTION_OF.items():
        said = re.sub(parameter, option, said)
    return " ".join(said.split())
