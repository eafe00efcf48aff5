"""A run as one HTML file: no script, nothing fetched, light and dark, also on a phone.

Owns the words and the drawings; the look is ``report.html``'s. Every text that comes from a dataset
is escaped, and every number is one that ``statistics()`` told.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from html import escape
from importlib import metadata, resources
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from string import Template
from typing import TypeAlias

from tio_openneuro.dataset import DataladSubjectsDataset
from tio_openneuro.queue import BudgetedQueue, Reading, read
from tio_openneuro.sizes import format_size
from tio_openneuro.torchio_seams import transform_of
from tio_openneuro.watch.citing import describe
from tio_openneuro.watch.gauge import HELD_UP, between
from tio_openneuro.watch.live import require_queue

_Rows: TypeAlias = Iterable[tuple[str, ...]]

_WIDTH, _HEIGHT = 1000, 100
_FEW = 8
_LONGEST = 1000
_LANES = {
    "fetch": ("files being fetched", ["disk.fetch_s"]),
    "decode": ("subjects being decoded", ["queue.decode_s"]),
    "transform": ("those transformed and sampled", ["queue.transform_s", "queue.sample_s"]),
    "wait": ("the training loop waits for a patch", ["queue.wait_s"]),
    "evict": ("files being evicted", ["disk.evict_s"]),
}
_PARAMETERS = ("samples_per_volume", "max_length", "num_workers", "seed", "on_error", "on_release")
_LIBRARIES = ("tio-openneuro", "torchio", "torch", "numpy", "SimpleITK", "datalad", "git-annex")


def report(queue: BudgetedQueue, path: str | Path) -> Path:
    """Write how a queue's run went so far as one HTML file, and return its path.

    It has the timeline of fetching, decoding, transforms, waiting and evicting; disk and RAM
    against their budgets; the bytes of each epoch beside the least that any order must fetch;
    skipped subjects with reasons; settings, versions and commits; each dataset's licence and how to
    cite it. It needs no network. The file is replaced whole, never left half written.

    Args:
        queue: Also one that is closed, or was never read from.
        path: The file; its folder is made where it is missing.

    Raises:
        TypeError: It is no queue of this library.

    Example:
        >>> import tempfile, torch, torchio as tio, tio_openneuro as tno
        >>> image = tio.ScalarImage(tensor=torch.zeros(1, 16, 16, 16))
        >>> dataset = tio.SubjectsDataset([tio.Subject(t1=image)])
        >>> with (
        ...     tempfile.TemporaryDirectory() as folder,
        ...     tno.BudgetedQueue(dataset, 10, 3, tio.UniformSampler(8)) as queue,
        ... ):
        ...     seen = sum(1 for patch in queue)
        ...     tno.report(queue, f"{folder}/run.html").name
        'run.html'
    """
    require_queue(queue, "report on")
    moments = (*queue.record.moments.readings(), read(queue))
    dataset, now = queue.subjects_dataset, moments[-1]
    whole, told, disk = between(moments[0], now), now.queue, now.disk
    ours = dataset if isinstance(dataset, DataladSubjectsDataset) else None
    name = type(dataset).__name__ if ours is None else ours.dataset_id
    span = timedelta(seconds=round(now.time_s - moments[0].time_s))
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime(queue.record.began_s))
    axis = f'<div class="axis note"><span>0:00:00</span><span>{span}</span></div>'
    ram = format_size(told.ram_peak_bytes), format_size(told.ram_budget_bytes)
    held = format_size(disk.peak_bytes), format_size(disk.budget_bytes)
    cards = [
        ("patches per second", f"{whole.patches_per_s:.1f}", f"{told.patches:,} in all"),
        ("time waiting", f"{whole.wait_share:.0%}", f"{told.wait_s:.1f} s"),
        ("fetched", format_size(disk.fetched_bytes), f"{disk.fetched_files:,} files"),
        ("disk, at most", held[0], f"of {held[1]}"),
        ("RAM, at most", ram[0], f"of {ram[1]}"),
    ]
    budgets = [
        ("Disk held", held, [at.disk.used_bytes for at in moments], disk.budget_bytes),
        ("RAM held", ram, [at.queue.ram_charged_bytes for at in moments], told.ram_budget_bytes),
    ]
    figures = [
        (of, field, f'<span data-figure="{of}.{field}">{value}</span>')
        for of, record in (("queue", told), ("dataset", disk))
        for field, value in asdict(record).items()
    ]
    page = Template(resources.files(__package__).joinpath("report.html").read_text("utf-8"))
    text = page.substitute(
        title=escape(f"{name}: {told.patches:,} patches of {queue.num_subjects} subjects"),
        when=f"Began {began}, {span} so far.",
        cards="".join(f"<div><i>{a}</i><b>{b}</b><i>{c}</i></div>" for a, b, c in cards),
        verdict=f"Held up by <b>{whole.held_up_by}</b>: {HELD_UP[whole.held_up_by]}.",
        timeline="".join(_lane(lane, moments) for lane in _LANES) + axis,
        budgets="".join(
            _figure(what, _KEY.format(*of), moments, values, budget)
            for what, of, values, budget in budgets
            if budget
        )
        + axis,
        epochs=_table(("epoch", "fetched", "floor"), _epochs(queue, now)),
        skipped=_table(("reason", "units", "which"), _skipped(queue, ours)),
        datasets="".join(map(_terms, map(describe, getattr(ours, "parts", ())))),
        settings=_terms(_settings(queue)),
        figures=_table(("of", "figure", "value"), figures),
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.part")
    partial.write_text(text, "utf-8")
    return partial.replace(target)


_KEY = '<span class="key">at most {}</span> <span class="key budget">budget {}</span>'


def _lane(lane: str, moments: Sequence[Reading]) -> str:
    """Draw how many threads did something, over time."""
    said, names = _LANES[lane]
    seconds = [sum(attrgetter(name)(at) for name in names) for at in moments]
    rates = [0.0]
    for (before, after), (old, new) in zip(pairwise(moments), pairwise(seconds), strict=True):
        rates.append(max(new - old, 0.0) / max(after.time_s - before.time_s, 1e-9))
    said = f"{said}: {seconds[-1] - seconds[0]:.1f} s, up to {max(rates):.1f} at once"
    return _figure(lane, said, moments, rates, 0)


def _figure(
    name: str, said: str, moments: Sequence[Reading], values: Sequence[float], budget: int
) -> str:
    """Draw steps that end at each moment, and a line where there is a budget."""
    began_s, span_s = moments[0].time_s, max(moments[-1].time_s - moments[0].time_s, 1e-9)
    top = 1.05 * max(budget, 1.0, *values)
    steps = "".join(
        f"V{_HEIGHT * (1 - value / top):.1f}H{_WIDTH * (at.time_s - began_s) / span_s:.1f}"
        for at, value in zip(moments, values, strict=True)
    )
    line = f'<path class="line" d="M0 {_HEIGHT * (1 - budget / top):.1f}H{_WIDTH}"/>'
    return (
        f"<figure><figcaption><b>{name}</b><span>{said}</span></figcaption>"
        f'<svg class="{"tall" if budget else "low"}" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'preserveAspectRatio="none" role="img" aria-label="{name}">'
        f'<path class="area" d="M0 {_HEIGHT}{steps}V{_HEIGHT}Z"/>{line if budget else ""}</svg>'
        f"</figure>"
    )


def _epochs(queue: BudgetedQueue, now: Reading) -> _Rows:
    """Tell what each epoch fetched, and the least that any order of its subjects must fetch."""
    dataset = queue.subjects_dataset
    nbytes, whole = getattr(dataset, "nbytes", 0), queue.num_subjects == len(dataset)
    began = queue.record.moments.readings()[:1] if now.disk.budget_bytes else ()
    ends = (*queue.record.epochs.readings()[1:], now) if began else ()
    for before, after in pairwise((*began, *ends)):
        first, last = before.queue.epoch, after.queue.epoch - (after is not now)
        fresh = max(nbytes - now.disk.budget_bytes, 0)
        at_first = max(nbytes - before.disk.used_bytes, 0)
        floor = (at_first if before in began else fresh) + (last - first) * fresh
        fetched = format_size(after.disk.fetched_bytes - before.disk.fetched_bytes)
        name = f"{first}" if first >= last else f"{first} to {last}"
        yield name, fetched, format_size(floor) if whole else "not known"


def _skipped(queue: BudgetedQueue, ours: DataladSubjectsDataset | None) -> _Rows:
    """List who is left out, by reason."""
    units: dict[str, list[str]] = {}
    for skip in (*getattr(ours, "skipped", ()), *queue.skipped):
        units.setdefault(skip.reason, []).append(skip.unit)
    for reason, names in units.items():
        listed = escape(", ".join(names))
        if len(names) > _FEW:
            listed = f"<details><summary>{escape(names[0])}, …</summary>{listed}</details>"
        yield escape(reason), f"{len(names):,}", listed


def _settings(queue: BudgetedQueue) -> Iterable[tuple[str, str]]:
    dataset, sampler = queue.subjects_dataset, queue.sampler
    yield "sampler", f"{type(sampler).__name__} of {getattr(sampler, 'patch_size', '')}"
    yield "preprocess", str(getattr(dataset, "preprocess", None))
    yield "transform", str(transform_of(dataset))
    yield from ((name, str(getattr(queue, name))) for name in _PARAMETERS)
    for library in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):  # The system's git-annex is no package.
            yield library, metadata.version(library)
    yield "Python", f"{platform.python_version()} on {platform.platform()}"


def _terms(terms: Iterable[tuple[str, str]]) -> str:
    rows = (f"<dt>{name}</dt><dd>{escape(said[:_LONGEST])}</dd>" for name, said in terms)
    return f"<section><dl>{''.join(rows)}</dl></section>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    head = "".join(f"<th>{head}</th>" for head in heads)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>' if body else "None."
