"""Maps of patch samplers at 192**3: TorchIO's own, ours computed anew, and ours kept before.

One thread, eight patches of 64**3 of each subject. Peaks are those of NumPy's arrays while the
map is computed, without the volume itself; a kept map lies beside the prepared volume.
"""

import time
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torchio as tio
from measure import interleaved, median
from rich.console import Console
from rich.table import Table
from scipy.ndimage import gaussian_filter

from tio_openneuro.torchio_seams.sampler_maps import SamplerMap, compute_map, draw_patches

RUNS = 7
SIDE = 192
_PATCHES = 8


def measure(runs: int, folder: Path, console: Console) -> dict[str, object]:
    """Run it, print its table and return its figures."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    subject = _subject()
    samplers = {
        "labels": tio.LabelSampler(64, "label"),
        "labels, probabilities": tio.LabelSampler(64, "label", {0: 1, 1: 1}),
        "weights": tio.WeightedSampler(64, "weights"),
    }
    table = Table(title=f"ms for {_PATCHES} patches, medians of {runs}; bytes per voxel")
    for name in ("sampler", "TorchIO", "anew", "kept", "peak, TorchIO", "peak, anew", "kept bytes"):
        table.add_column(name, justify="left" if name == "sampler" else "right")
    found: dict[str, object] = {"runs": runs}
    for name, sampler in samplers.items():
        kept = compute_map(sampler, subject)
        assert kept is not None
        cases = _cases(sampler, subject, kept)
        seconds = interleaved(cases, runs, lambda _: None)
        peaks = [_peak(cases[case]) / SIDE**3 for case in ("TorchIO", "anew")]
        kept_bytes = kept.size_bytes / SIDE**3
        times = [f"{median(seconds[case]) * 1e3:.1f}" for case in cases]
        bytes_shown = [f"{peaks[0]:.1f}", f"{peaks[1]:.1f}", f"{kept_bytes:.3f}"]
        table.add_row(name, *times, *bytes_shown)
        found[name] = {"seconds": seconds, "peak_bytes": peaks, "kept_bytes": kept_bytes}
    torch.set_num_threads(threads)
    console.print(table)
    return found


def _cases(
    sampler: tio.WeightedSampler, subject: tio.Subject, kept: SamplerMap
) -> dict[str, Callable[[], float]]:
    def timed(draw: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            began_s = time.perf_counter()
            draw()
            return time.perf_counter() - began_s

        return run

    return {
        "TorchIO": timed(lambda: list(islice(sampler(subject), _PATCHES))),
        "anew": timed(lambda: list(islice(draw_patches(sampler, subject), _PATCHES))),
        "kept": timed(lambda: list(islice(draw_patches(sampler, subject, kept), _PATCHES))),
    }


def _peak(run: Callable[[], float]) -> float:
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return float(peak)


def _subject() -> tio.Subject:
    rng = np.random.default_rng(0)
    smooth = gaussian_filter(rng.normal(size=(SIDE,) * 3).astype(np.float32), 4)
    label = torch.from_numpy((smooth > 1.5 * smooth.std()).astype(np.uint8))
    return tio.Subject(
        weights=tio.ScalarImage(tensor=torch.from_numpy(np.abs(smooth))[None]),
        label=tio.LabelMap(tensor=label[None]),
    )
