"""One queue in a process of its own, whose memory is watched from outside.

``measure_cell`` starts this file as a program, which tells when its imports are done, waits until
its base was measured, iterates over some epochs keeping nothing, and ends.
"""

import json
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torchio as tio

from tio_openneuro.loopback.volume import Volume, write_content
from tio_openneuro.queue.queue import BudgetedQueue
from tio_openneuro.ram.admission import BASE_BYTES

SUBJECTS = 4
SAMPLES = 4
WINDOW = 8
EPOCHS = 2
PATCH = 48
_TIMEOUT_S = 280
_SAMPLE_S = 0.01


@dataclass(frozen=True)
class Cell:
    """What is measured.

    Attributes:
        side: Voxels of the subjects' images in each direction.
        sampler: ``"uniform"``, ``"weighted"`` or ``"label"``.
        workers: Threads of the queue.
        budget: RAM budget in bytes; 0 for the smallest that is accepted, -1 for the smallest with
            which freed memory is used again.
        transform: A key of ``TRANSFORMS``.
        ballast_bytes: What the consumer allocates itself after the queue was made.
    """

    side: int
    sampler: str
    workers: int
    budget: int
    transform: str = "light"
    ballast_bytes: int = 0


TRANSFORMS = {
    "none": lambda _side: None,
    "light": lambda _side: [tio.ToCanonical(), tio.ZNormalization(), tio.RandomFlip()],
    "heavy": lambda _side: [
        tio.ToCanonical(),
        tio.ZNormalization(),
        tio.RandomFlip(),
        tio.RandomAffine(),
        tio.RandomNoise(),
    ],
    "nnU-Net-like": lambda side: [
        tio.ToCanonical(),
        tio.Resample(1),
        tio.CropOrPad(side),
        tio.ZNormalization(),
        tio.RandomAffine(),
        tio.RandomElasticDeformation(),
        tio.RandomNoise(),
        tio.RandomGamma(),
        tio.RandomBiasField(),
        tio.RandomFlip(),
    ],
    "geometry": lambda _side: [tio.RandomFlip(), tio.RandomAffine(), tio.RandomAnisotropy()],
    "motion": lambda _side: [tio.RandomMotion(num_transforms=10)],
    "spectra": lambda _side: [tio.RandomGhosting(), tio.RandomSpike()],
    "bias": lambda _side: [tio.RandomBiasField()],
    "padded": lambda side: [tio.CropOrPad(side + 64), tio.RandomFlip()],
    "edged": lambda _side: [tio.Pad((0, 0, 9, 9, 60, 60)), tio.RandomBlur()],
    "finer": lambda _side: [tio.ToCanonical(), tio.Resample(0.75), tio.RandomGamma()],
    "resized": lambda side: [tio.Resize(side * 5 // 4)],
    "multiple": lambda side: [tio.EnsureShapeMultiple(side * 5 // 8)],
    "classes": lambda _side: [tio.OneHot(3)],
    "kept": lambda _side: [tio.RandomAffine(keep={"t1": "before"}), tio.RescaleIntensity((0, 1))],
}
"""Light, heavy and nnU-Net-like are the ones of which figures are told."""


@dataclass(frozen=True)
class Reading:
    """What an observer outside saw, and what the queue said.

    Attributes:
        budget: The RAM budget in bytes.
        peak_pss: Peak PSS over the base, in bytes, sampled.
        peak_rss: Peak RSS over the base, in bytes, as the kernel kept it.
        charged: The most that was charged at once.
        patches: Patches delivered.
        took_s: Seconds from the queue's construction to the end.
        status: How the process ended; -9 where it was killed.
    """

    budget: int
    peak_pss: int
    peak_rss: int
    charged: int
    patches: int
    took_s: float
    status: int


def write_subjects(folder: Path, side: int, kind: str = "int16", channels: int = 1) -> None:
    """Write subjects of side**3: an image of a type and some channels, and a uint8 label."""
    folder.mkdir()
    for number in range(SUBJECTS):
        shape = (side,) * 3 if channels == 1 else (side, side, side, channels)
        image = np.random.default_rng(number).integers(0, 9, shape, dtype=np.int16).astype(kind)
        label = np.zeros((side,) * 3, np.uint8)
        label[side // 4 : side // 2, side // 4 : side // 2, side // 4 : side // 2] = 1
        nib.save(nib.Nifti1Image(image, np.eye(4)), folder / f"{number}_t1.nii.gz")
        write_content(Volume(label, np.eye(4)), folder / f"{number}_label.nii.gz")


def measure_cell(cell: Cell, folder: Path, cgroup: Path | None = None) -> Reading:
    """Run a cell in a process of its own, and watch it.

    Args:
        cell: What to run.
        folder: Of its subjects.
        cgroup: A memory cgroup to put it in once its base is measured, limited to the budget.
    """
    command = [sys.executable, __file__, json.dumps(asdict(cell)), str(folder)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        budget = int(process.stdout.readline())
        if cgroup is not None:
            set_limit(cgroup, budget)
            (cgroup / "cgroup.procs").write_text(str(process.pid))
        base_pss, base_rss = _pss(process.pid), _status(process.pid, "VmRSS")
        # Restarts the kernel's peak of RSS; see proc(5), clear_refs.
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")
        process.stdin.write("go\n")
        peak_pss, peak_rss = 0, 0
        deadline_s = time.monotonic() + _TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline_s:
            peak_pss = max(peak_pss, _pss(process.pid))
            peak_rss = max(peak_rss, _status(process.pid, "VmHWM"))
            time.sleep(_SAMPLE_S)
        text = process.stdout.read() if process.poll() is not None else ""
    finally:
        process.kill()
        process.communicate()
    found = json.loads(text) if text else {"charged": 0, "patches": 0, "took_s": 0.0}
    return Reading(budget, peak_pss - base_pss, peak_rss - base_rss, status=process.poll(), **found)


@contextmanager
def memory_cgroup(name: str):
    """Make a memory control group, of version 1 or 2; None where this machine does not let us."""
    root = Path("/sys/fs/cgroup")
    base = root / "memory" if (root / "memory").is_dir() else root
    group = base / f"tio-openneuro-{name}"
    try:
        group.mkdir()
        limits = [group / "memory.limit_in_bytes", group / "memory.max"]
        if not any(limit.exists() for limit in limits):
            group.rmdir()
            group = None
    except OSError:
        group = None
    try:
        yield group
    finally:
        if group is not None:
            deadline_s = time.monotonic() + 10
            while group.exists() and time.monotonic() < deadline_s:
                try:
                    group.rmdir()
                except OSError:
                    time.sleep(_SAMPLE_S)


def set_limit(cgroup: Path, size_bytes: int) -> None:
    """Limit the memory of a control group."""
    old = cgroup / "memory.limit_in_bytes"
    (old if old.exists() else cgroup / "memory.max").write_text(str(size_bytes))


def _pss(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(r.split()[1]) for r in text.splitlines() if r.startswith("Pss:")), 0) * 1024


def _status(pid: int, name: str) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(r.split()[1]) for r in text.splitlines() if r.startswith(name)), 0) * 1024


# The program


def main() -> None:
    """Say the budget, wait for a line, iterate, and say what came."""
    cell, folder = Cell(**json.loads(sys.argv[1])), Path(sys.argv[2])
    budget = cell.budget if cell.budget > 0 else smallest_budget(cell, folder)
    sys.stdout.write(f"{budget}\n")
    sys.stdout.flush()
    sys.stdin.readline()
    began_s = time.monotonic()
    ballast = []
    with make_queue(cell, folder, budget, start=True) as queue:
        patches = 0
        for _ in range(EPOCHS):
            for patch in queue:
                del patch
                patches += 1
                if cell.ballast_bytes and not ballast:
                    ballast.append(torch.ones(cell.ballast_bytes, dtype=torch.uint8))
        charged = queue.statistics().ram_peak_bytes
    took_s = time.monotonic() - began_s
    sys.stdout.write(json.dumps({"charged": charged, "patches": patches, "took_s": took_s}))


def make_queue(cell: Cell, folder: Path, budget: int, *, start: bool) -> BudgetedQueue:
    """Return the cell's queue."""
    transforms = TRANSFORMS[cell.transform](cell.side)
    samplers = {
        "uniform": lambda: tio.UniformSampler(PATCH),
        "weighted": lambda: tio.WeightedSampler(PATCH, "label"),
        "label": lambda: tio.LabelSampler(PATCH, "label"),
    }
    subjects = [
        tio.Subject(
            t1=tio.ScalarImage(folder / f"{number}_t1.nii.gz"),
            label=tio.LabelMap(folder / f"{number}_label.nii.gz"),
        )
        for number in range(SUBJECTS)
    ]
    return BudgetedQueue(
        tio.SubjectsDataset(subjects, transform=tio.Compose(transforms) if transforms else None),
        WINDOW,
        SAMPLES,
        samplers[cell.sampler](),
        num_workers=cell.workers,
        ram_budget=budget,
        start_background=start,
    )


def smallest_budget(cell: Cell, folder: Path) -> int:
    """Return what a subject's work, its patches, a full window and the libraries need.

    Or what lets threads use freed memory again, where the cell asks for that.
    """
    with make_queue(cell, folder, 64 * 2**30, start=False) as queue:
        bounds = queue._source.bounds(0)
        window_bytes = bounds.patch_bytes * WINDOW
        least = bounds.work_bytes + bounds.patch_bytes * SAMPLES + window_bytes + BASE_BYTES
        # Half of what work takes at first is left for what is free.
        threads = (3 * cell.workers + 1) * (bounds.work_bytes // 2 + 1)
        roomy = threads + window_bytes + BASE_BYTES
    return least if cell.budget == 0 else max(least, roomy)


if __name__ == "__main__":
    main()
