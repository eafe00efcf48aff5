"""The command line: arguments become calls, records become text. The only place that prints."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import logging
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import rich
import typer
from rich.console import Console
from rich.logging import RichHandler

from tio_openneuro.cli import options
from tio_openneuro.cli.tables import print_json, report
from tio_openneuro.display import transferring
from tio_openneuro.errors import SelectionError, TioOpenNeuroError
from tio_openneuro.ledger import Ledger
from tio_openneuro.sizes import parse_size

# What a command needs is imported when it runs: `--help` and `status` wait for no torch.
if TYPE_CHECKING:
    from tio_openneuro.dataset import DataladSubjectsDataset
    from tio_openneuro.disk import Engine

app = typer.Typer(
    name="tio-openneuro",
    help="Train on OpenNeuro MRI datasets that are larger than the disk and the RAM at hand.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

_ENDING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
_NEUTRAL_BUDGET = "1000 PB"  # the smallest stated budget of a root holds: this one never is


def _tell_version(wanted: bool) -> None:  # noqa: FBT001 - typer
    if wanted:
        typer.echo(f"tio-openneuro {importlib.metadata.version('tio-openneuro')}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log fetches, evictions.")] = False,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    if verbose:
        logger = logging.getLogger("tio_openneuro")
        logger.setLevel(logging.INFO)
        logger.addHandler(RichHandler(console=Console(stderr=True), show_path=False))


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Option(help="Where demo-report/ with the picture is written.")
    ] = Path(),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training heads.")] = 6,
) -> None:
    """Train a small U-Net on synthetic heads under a quarter of their bytes; no network needed."""
    from tio_openneuro.demo import render, run_demo

    render(functools.partial(run_demo, folder, epochs=epochs), rich.get_console())


@app.command()
def info(
    source: options.Source,
    root: options.Root,
    image: options.Images = [],  # noqa: B006 - typer copies it
    label: options.Labels = [],  # noqa: B006
    version: options.Version = None,
    unit: options.UnitOf = "subject",
    on_multiple: options.Multiple = "raise",
    on_incomplete: options.Incomplete = "raise",
    as_json: options.Json = False,  # noqa: FBT002 - typer
) -> None:
    """Show what a dataset has and what patterns select of it, from git metadata alone."""
    from tio_openneuro.cli.summary import opened, summarise, usable_units

    patterns = options.read_patterns(image, label)
    with opened(source, root, version) as catalog:
        record = dataclasses.asdict(summarise(catalog))
        if patterns:
            how = {"on_multiple": on_multiple, "on_incomplete": on_incomplete}
            record |= dataclasses.asdict(usable_units(catalog, patterns, unit, **how)[1])
    report(str(source), record, as_json=as_json)


@app.command()
def plan(
    source: options.Source,
    root: options.Root,
    image: options.Images,
    label: options.Labels = [],  # noqa: B006 - typer copies it
    version: options.Version = None,
    unit: options.UnitOf = "subject",
    on_multiple: options.Multiple = "raise",
    on_incomplete: options.Incomplete = "raise",
    disk_budget: options.DiskBudget = "auto",
    rate: options.Rate = "20 MB",
    epochs: options.Epochs = 10,
    seed: options.Seed = 0,
    step: options.Step = 0.1,
    batch: options.Batch = 4,
    samples: options.Samples = 8,
    workers: options.Workers = 4,
    unit_seconds: options.UnitSeconds = None,
    patch_size: options.PatchSize = 96,
    ram_budget: options.DiskBudget = "auto",
    latency: options.Latency = 0.1,
    remote_rate: options.RemoteRate = None,
    ranks: options.Ranks = 1,
    nodes: options.Nodes = 1,
    probe: options.Probe = 0,
    png: options.Picture = None,
    as_json: options.Json = False,  # noqa: FBT002 - typer
) -> None:
    """Tell what training fetches, holds, and waits for, from git metadata alone."""
    from tio_openneuro.cli.plan import answer, draw, probe_headers, show
    from tio_openneuro.cli.summary import opened, usable_units

    if ranks % nodes:
        raise typer.BadParameter(f"{ranks} ranks cannot be shared equally by {nodes} nodes.")
    patterns = options.read_patterns(image, label)
    with opened(source, root, version) as catalog:
        how = {"on_multiple": on_multiple, "on_incomplete": on_incomplete}
        units, selected = usable_units(catalog, patterns, unit, **how)
        if not units:
            why = "; ".join(selected.skipped_reasons)
            raise SelectionError(f"Cannot plan {catalog.dataset_id}: no unit can be had ({why}).")
        voxels_per_byte = probe_headers(catalog, units, probe)
    automatic = disk_budget == "auto"
    told = answer(
        units,
        Ledger.planned_budget(root) if automatic else parse_size(disk_budget),
        epochs=epochs,
        voxels_per_byte=voxels_per_byte,
        patch_size=patch_size,
        ram_budget=ram_budget,
        remote_rate=None if remote_rate is None else parse_size(remote_rate),
        unit_s=unit_seconds,
        rate=parse_size(rate),
        seed=seed,
        step_s=step,
        batch=batch,
        samples=samples,
        workers=workers,
        latency_s=latency,
        ranks=ranks,
        nodes=nodes,
    )
    skipped = {"skipped": selected.skipped, "skipped_reasons": selected.skipped_reasons}
    record = {"dataset": catalog.dataset_id, "commit": catalog.commit, **told, **skipped}
    if png is not None:
        draw(png, catalog.dataset_id, record)
    if as_json:
        print_json(record)
    else:
        show(f"Plan for {source}", record, Console())


@app.command()
def fetch(
    source: options.Source,
    root: options.Root,
    image: options.Images = [],  # noqa: B006 - typer copies it
    label: options.Labels = [],  # noqa: B006
    version: options.Version = None,
    unit: options.UnitOf = "subject",
    on_multiple: options.Multiple = "raise",
    on_incomplete: options.Incomplete = "raise",
    disk_budget: options.DiskBudget = "auto",
    as_json: options.Json = False,  # noqa: FBT002 - typer
) -> None:
    """Fetch the selected images, or every NIfTI, as far as the disk budget holds them."""
    how: Any = {"unit": unit, "on_multiple": on_multiple, "on_incomplete": on_incomplete}
    with _open(source, root, image, label, version, disk_budget, how) as dataset:
        done_bytes = total_bytes = 0
        # On standard error, so that what is printed for programs stays as it is.
        console = Console(stderr=True)
        bar = transferring(f"Fetching {dataset.dataset_id}", console)
        with bar if console.is_terminal else nullcontext() as show:

            def tell(*now: int) -> None:
                nonlocal done_bytes, total_bytes
                done_bytes, total_bytes = now
                if show is not None:
                    show(*now)

            fetched_bytes = dataset.fetch(progress=tell)
        statistics = dataset.statistics()
        record = {
            "dataset": dataset.dataset_id,
            "version": dataset.version,
            "units": len(dataset),
            "skipped": len(dataset.skipped),
            "selected_bytes": dataset.nbytes,
            "fetched_bytes": fetched_bytes,
            "stopped": "the disk budget is full" if done_bytes < total_bytes else "done",
            "used_bytes": statistics.used_bytes,
            "budget_bytes": statistics.budget_bytes,
        }
    report("Fetched", record, as_json=as_json)


@app.command()
def status(root: options.Root, as_json: options.Json = False) -> None:  # noqa: FBT002 - typer
    """Show what is held under the root, the budget that binds, and who is at work."""
    with _engine(root) as engine:
        record = dataclasses.asdict(engine.status())
    report(f"Held under {root}", record, as_json=as_json)


@app.command()
def evict(
    root: options.Root,
    source: Annotated[str | None, typer.Argument(help="One dataset; default: all.")] = None,
    image: options.Images = [],  # noqa: B006 - typer copies it
    label: options.Labels = [],  # noqa: B006
    version: options.Version = None,
    unit: options.UnitOf = "subject",
    on_multiple: options.Multiple = "raise",
    on_incomplete: options.Incomplete = "raise",
    as_json: options.Json = False,  # noqa: FBT002 - typer
) -> None:
    """Drop what this library fetched and nobody leases; what was yours before stays."""
    if source is None:
        with _engine(root) as engine:
            evicted_bytes, used_bytes = engine.evict_all(), engine.statistics().used_bytes
    else:
        from tio_openneuro.cli.summary import refuse_unused

        refuse_unused(root)
        how: Any = {"unit": unit, "on_multiple": on_multiple, "on_incomplete": on_incomplete}
        with _open(source, root, image, label, version, _NEUTRAL_BUDGET, how) as dataset:
            evicted_bytes, used_bytes = dataset.evict(), dataset.statistics().used_bytes
    record = {"evicted_bytes": evicted_bytes, "used_bytes": used_bytes}
    report("Evicted", record, as_json=as_json)


@app.command()
def adopt(
    source: options.Source,
    root: options.Root,
    image: options.Images = [],  # noqa: B006 - typer copies it
    label: options.Labels = [],  # noqa: B006
    version: options.Version = None,
    unit: options.UnitOf = "subject",
    on_multiple: options.Multiple = "raise",
    on_incomplete: options.Incomplete = "raise",
    disk_budget: options.DiskBudget = "auto",
    as_json: options.Json = False,  # noqa: FBT002 - typer
) -> None:
    """Hand content that was there before, and that a remote can give back, to the budget."""
    how: Any = {"unit": unit, "on_multiple": on_multiple, "on_incomplete": on_incomplete}
    with _open(source, root, image, label, version, disk_budget, how) as dataset:
        adopted_bytes, used_bytes = dataset.adopt(), dataset.statistics().used_bytes
    record = {"adopted_bytes": adopted_bytes, "used_bytes": used_bytes}
    report("Adopted", record, as_json=as_json)


@app.command()
def forget(source: options.Source, root: options.Root, as_json: options.Json = False) -> None:  # noqa: FBT002 - typer
    """Remove the clone of a dataset, and what this library fetched of it; what is yours stays."""
    from tio_openneuro.sources import forget as forget_clone

    with _engine(root) as engine:
        record = dataclasses.asdict(forget_clone(source, root, engine.forget))
    report(f"Forgot {source}", record, as_json=as_json)


@app.command()
def doctor(
    root: options.Root,
    repair: Annotated[bool, typer.Option("--repair", help="Mend what can be mended.")] = False,  # noqa: FBT002 - typer
    adopt: Annotated[  # noqa: FBT002 - typer
        bool, typer.Option("--adopt", help="With --repair: take what is nobody's for fetched.")
    ] = False,
    as_json: options.Json = False,  # noqa: FBT002 - typer
) -> None:
    """Compare ledger and disk; exit with 1 where they disagree."""
    with _engine(root) as engine:
        findings = engine.check(repair=repair, adopt=repair and adopt)
    if as_json:
        print_json({"findings": findings})
    else:
        for finding in findings:
            typer.echo(finding)
        typer.echo(f"{root}: {len(findings) or 'no'} inconsistencies")
    if findings:
        raise typer.Exit(1)


def _engine(root: Path) -> Engine:
    from tio_openneuro.cli.summary import refuse_unused
    from tio_openneuro.disk import Engine

    refuse_unused(root)
    return Engine(root, disk_budget=_NEUTRAL_BUDGET)


def _open(
    source: str,
    root: Path,
    image: list[str],
    label: list[str],
    version: str | None,
    disk_budget: str,
    how: Any,  # noqa: ANN401 - what a unit is, and what to do where that is not clear
) -> DataladSubjectsDataset:
    from tio_openneuro.dataset import DataladSubjectsDataset

    patterns = options.read_patterns(image, label) or None
    how |= {"version": version, "root": root, "disk_budget": disk_budget}
    return DataladSubjectsDataset(source, patterns, **how)


class _EndedError(SystemExit):
    """A signal that ends the command: what is under way is left as after any error."""


def _end(number: int, _frame: object) -> None:
    """Raise, once: what a second signal would interrupt ends children and has deadlines."""
    for each in _ENDING:
        signal.signal(each, signal.SIG_IGN)
    raise _EndedError(128 + number)


def main() -> None:
    """Run the command line; exit with 0 done, 1 failed with one message, 2 wrong usage.

    On SIGINT, SIGTERM and SIGHUP it ends its children, and exits with 128 and the signal's number.
    """
    for each in _ENDING:
        # As nohup and a shell's background have it.
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, _end)
    try:
        sys.exit(app(standalone_mode=False))
    except options.UsageError as error:
        if said := options.in_one_line(error):  # Else the help was shown already.
            end = "" if said.endswith((".", "?")) else "."
            typer.echo(f"tio-openneuro: {said}{end} Try it with --help.", err=True)
        sys.exit(2)
    except (TioOpenNeuroError, OSError, NotImplementedError) as error:
        typer.echo(f"tio-openneuro: {options.in_one_line(error)}", err=True)
        sys.exit(1)
    except _EndedError as ended:
        name = signal.Signals(int(ended.code or 0) - 128).name
        typer.echo(f"tio-openneuro: interrupted ({name})", err=True)
        raise
