"""Forks beside busy threads: calls to be caught in, calls that a child makes, trainings that fork.

Everything here runs in a process of its own, which somebody else kills at a deadline.
"""

import atexit
import gc
import gzip
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import blosc2
import nibabel
import numpy as np
import SimpleITK
import torch
import torchio as tio
from isal import igzip_lib

import tio_openneuro as tno
from tio_openneuro.loopback.volume import Volume, write_content

SIDE = 32
VOLUMES = 6
DEADLINE_S = 10.0
_INSIDE = 2
_LONGEST_PAUSE_S = 0.004
Call = Callable[[], object]


def write_volumes(folder: Path, *, suffix: str = ".nii.gz", side: int = SIDE) -> list[Path]:
    """Write some volumes that compress as scans do, and return their files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(VOLUMES):
        noise = np.random.default_rng(number).normal(400, 60, (side,) * 3)
        path = folder / f"{number}_t1{suffix}"
        if suffix.startswith(".nii"):
            write_content(Volume(noise.astype(np.int16), np.eye(4)), path)
        else:
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(noise.astype(np.int16)), str(path))
        paths.append(path)
    return paths


def calls(folder: Path) -> dict[str, Call]:
    """Return what a thread of a queue may be inside of, and what a child may do, by name."""
    path = folder / "0_t1.nii.gz"
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    image = SimpleITK.Cast(SimpleITK.ReadImage(str(path)), SimpleITK.sitkFloat32)
    identity = SimpleITK.Transform(3, SimpleITK.sitkIdentity)
    subject = tio.Subject(t1=tio.ScalarImage(path))
    subject.load()
    affine = tio.Affine((1.1, 1, 1), (5, 0, 0), (1, 2, 3))
    packed = gzip.compress(path.read_bytes() * 20)
    array = np.random.default_rng(0).normal(size=(1, 96, 96, 96)).astype(np.float32)
    frame = blosc2.asarray(
        array, cparams=blosc2.CParams(codec=blosc2.Codec.LZ4, clevel=1, nthreads=1)
    ).to_cframe()
    made = iter(range(1 << 30))

    def unpack() -> object:
        opened = blosc2.ndarray_from_cframe(frame, copy=False)
        opened.schunk.dparams = blosc2.DParams(nthreads=1)
        return opened[:]

    def header() -> None:
        mine = SimpleITK.ImageFileReader()
        mine.SetFileName(str(path))
        mine.ReadImageInformation()

    def write() -> None:
        target = folder / f"written-{os.getpid()}-{threading.get_ident()}-{next(made) % 4}.nii.gz"
        SimpleITK.WriteImage(image, str(target))
        target.unlink(missing_ok=True)

    return {
        "ReadImage": lambda: SimpleITK.ReadImage(str(path)),
        "header": header,
        "WriteImage": write,
        "Resample": lambda: SimpleITK.Resample(image, image, identity, SimpleITK.sitkBSpline),
        "Gaussian": lambda: SimpleITK.SmoothingRecursiveGaussian(image, 2.0),
        "tio.Affine": lambda: affine(subject),
        "isal inflate": lambda: igzip_lib.decompress(packed, igzip_lib.DECOMP_GZIP),
        "blosc2": unpack,
        "nibabel": lambda: np.asanyarray(nibabel.load(path).dataobj),
        "torch": lambda: torch.from_numpy(array).std(),
    }


def fork_beside(folder: Path, inside: str, then: str, forks: int, *, gated: bool) -> list[float]:
    """Fork while threads are inside a call, and let each child make another one.

    Returns:
        Children that did not end in time, children that failed, and the longest fork in seconds.
    """
    torch.set_num_threads(1)
    if gated:
        install_gate()
    known = calls(folder)
    known[then]()
    ended = threading.Event()

    def repeat() -> None:
        # Its threads are not to be those of the whole computer.
        SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
        while not ended.is_set():
            known[inside]()

    threads = [threading.Thread(target=repeat, daemon=True) for _ in range(_INSIDE)]
    for thread in threads:
        thread.start()
    pauses, children, longest_s = random.Random(f"{inside} {then}"), [], 0.0
    for _ in range(forks):
        time.sleep(pauses.random() * _LONGEST_PAUSE_S)
        begun_s = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                known[then]()
                status = 0
            finally:
                os._exit(status)
        longest_s = max(longest_s, time.perf_counter() - begun_s)
        children.append(pid)
    ended.set()
    hung, failed = await_children(children)
    return [hung, failed, longest_s]


def await_children(children: list[int], deadline_s: float = DEADLINE_S) -> tuple[int, int]:
    """Return how many children did not end in time, and are killed, and how many failed."""
    failed, left, end_s = 0, set(children), time.monotonic() + deadline_s
    while left and time.monotonic() < end_s:
        for pid in tuple(left):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                left.remove(pid)
                failed += status != 0
        time.sleep(0.01)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return len(left), failed


def install_gate() -> None:
    """Do what a queue does for forks when it is made."""
    image = tio.ScalarImage(tensor=torch.zeros(1, 4, 4, 4))
    tno.BudgetedQueue(
        tio.SubjectsDataset([tio.Subject(t1=image)]), 1, 1, tio.UniformSampler(2)
    ).close()


KINDS = ("local", "remote", "prepared")
TRANSFORMS = ("light", "heavy")
WHENS = ("before", "middle", "between")
IMAGES = {
    "t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz"),
    "lesion": tno.Label("sub-*/anat/*_label-lesion_mask.nii.gz"),
}
_EPOCHS = 2
_SUBJECTS = 6
_SAMPLES = 4


def make_transform(kind: str) -> tio.Transform:
    """Return cheap transforms, or such as pass through ITK."""
    parts: list[tio.Transform] = [tio.ToCanonical(), tio.ZNormalization(), tio.RandomFlip()]
    if kind == "heavy":
        parts += [tio.RandomAffine(), tio.RandomNoise(), tio.Resample((1.5, 1.5, 1.5))]
    return tio.Compose(parts)


def make_datasets(
    folder: Path, kind: str, transform: tio.Transform
) -> tuple[tio.SubjectsDataset, tio.SubjectsDataset]:
    """Return what is trained on, and local files for the validation."""
    local = [
        tio.Subject(t1=tio.ScalarImage(path), subject_id=path.name)
        for path in sorted((folder / "local").glob("*_t1.nii.gz"))
    ]
    validation = tio.SubjectsDataset(local[:4], transform=tio.ToCanonical())
    if kind == "local":
        return tio.SubjectsDataset(local, transform=transform), validation
    preprocess = tio.ToCanonical() if kind == "prepared" else None
    return (
        tno.DataladSubjectsDataset(
            "ds900001",
            IMAGES,
            root=folder / f"root-{os.getpid()}",
            disk_budget="1 MB" if kind == "prepared" else "14 kB",
            jobs=2,
            preprocess=preprocess,
            transform=transform,
        ),
        validation,
    )


def train(folder: Path, kind: str, threads: int, transforms: str, when: str) -> dict[str, int]:
    """Train for two epochs beside a validation with two forked workers; return what came."""
    torch.set_num_threads(1)
    dataset, validation = make_datasets(folder, kind, make_transform(transforms))
    seen = {"patches": 0, "validated": 0}

    def validate() -> None:
        for batch in tio.SubjectsLoader(validation, batch_size=1, num_workers=2):
            seen["validated"] += len(batch["subject_id"])

    with tno.BudgetedQueue(
        dataset, 8, _SAMPLES, tio.UniformSampler(8), num_workers=threads, ram_budget="4 GB", seed=0
    ) as queue:
        loader = tio.SubjectsLoader(queue, batch_size=4)
        if when == "before":
            validate()
        for _ in range(_EPOCHS):
            for number, batch in enumerate(loader):
                seen["patches"] += len(batch["subject_id"])
                if when == "middle" and number % 2:
                    validate()
            if when == "between":
                validate()
    if hasattr(dataset, "close"):
        dataset.close()
    return seen


def wanted(when: str) -> dict[str, int]:
    """Return what a training that lost nothing has seen."""
    validations = {"before": 1, "middle": 3 * _EPOCHS, "between": _EPOCHS}[when]
    return {"patches": _EPOCHS * _SUBJECTS * _SAMPLES, "validated": 4 * validations}


# One thread of a queue that certainly is inside ITK


class ReadingDataset(tio.SubjectsDataset):
    """A dataset that reads another file each time, by itself."""

    beside: Path

    def __getitem__(self, index: int) -> tio.Subject:
        """Read it, then load the subject."""
        tio.ScalarImage(self.beside, verify_path=False).load()
        return super().__getitem__(index)


def make_reading_dataset(pipe: Path, how: str) -> tio.SubjectsDataset:
    """Return a subject in RAM, and one whose file, transform or dataset reads a pipe."""
    plain = tio.Subject(t1=tio.ScalarImage(tensor=torch.zeros(1, 8, 8, 8)))
    if how == "file":
        return tio.SubjectsDataset(
            [plain, tio.Subject(t1=tio.ScalarImage(pipe, verify_path=False))]
        )
    if how == "dataset":
        dataset = ReadingDataset([plain, plain])
        dataset.beside = pipe
        return dataset

    def read_header(subject: tio.Subject) -> tio.Subject:
        assert tio.ScalarImage(pipe, verify_path=False).spatial_shape
        return subject

    return tio.SubjectsDataset([plain, plain], transform=read_header)


def fork_into_reading(folder: Path, how: str) -> list[int]:
    """Fork while a thread of a queue stands in ITK's reading; the child reads another file.

    The thread reads a pipe, which gets its end once the fork is over or waits for that.

    Returns:
        Children that did not end in time, and children that failed.
    """
    pipe, path = folder / "pipe.nrrd", folder / "0_t1.nii.gz"
    os.mkfifo(pipe)
    queue = tno.BudgetedQueue(
        make_reading_dataset(pipe, how),
        4,
        1,
        tio.UniformSampler(4),
        num_workers=1,
        shuffle_subjects=False,
        on_error="skip",
        ram_budget="4 GB",
    )
    entered = os.open(pipe, os.O_WRONLY)
    forked, over = threading.Event(), threading.Event()

    def feed() -> None:
        forked.wait(1)
        os.close(entered)
        while not over.wait(0.001):
            try:
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
            except OSError:
                continue

    feeder = threading.Thread(target=feed)
    feeder.start()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            tio.ScalarImage(path).load()
            status = 0
        finally:
            os._exit(status)
    forked.set()
    found = await_children([pid])
    queue.close()
    over.set()
    feeder.join()
    return list(found)


# Processes of other kinds


def read_header(path: Path) -> int:
    """Read an image's header in a child."""
    return len(tio.ScalarImage(path).shape)


def assert_header(path: Path) -> None:
    """Read an image's header, where nobody takes a result."""
    assert read_header(path) == 4


def start_processes(folder: Path, how: str) -> int:
    """Start processes that read, again and again, beside a queue that fills; return how many."""
    dataset, _ = make_datasets(folder, "local", make_transform("light"))
    paths = sorted((folder / "local").glob("*_t1.nii.gz"))
    done = 0
    with tno.BudgetedQueue(
        dataset, 8, 1, tio.UniformSampler(8), num_workers=4, ram_budget="4 GB", seed=0
    ) as queue:
        for _ in range(2 if how in {"spawn", "forkserver"} else 6):
            for patch in queue:
                assert patch.spatial_shape == (8, 8, 8)
                if how == "preexec_fn":
                    subprocess.run(
                        [sys.executable, "-S", "-c", ""],
                        check=True,
                        preexec_fn=lambda: assert_header(paths[0]),
                    )
                    done += 1
            if how != "preexec_fn":
                with multiprocessing.get_context(how).Pool(2) as pool:
                    done += sum(pool.map(read_header, paths)) // 4
    return done


def end_children(folder: Path) -> list[int]:
    """Let children beside a queue that fills end as Python does, before C++ ends what it has.

    A child that has torch 2.13 hangs there in any case.

    Returns:
        Children that did not end in time, and children that failed.
    """
    dataset, _ = make_datasets(folder, "local", make_transform("light"))
    queue = tno.BudgetedQueue(
        dataset, 8, 4, tio.UniformSampler(8), num_workers=4, ram_budget="4 GB"
    )
    children = []
    for number in range(72):
        if number % 24 == 0:
            patches = iter(queue)
        next(patches)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                if number % 2:
                    del queue, patches
                    gc.collect()
                atexit._run_exitfuncs()
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    found = await_children(children)
    queue.close()
    return list(found)
