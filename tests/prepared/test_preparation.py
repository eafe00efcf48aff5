"""Prepared volumes: what names one, what it holds, what it may cost, and what it survives.

Real git-annex over the loopback OpenNeuro, real files; damage and deaths are real too.
"""

import copy
import hashlib
import itertools
import logging
import pickle
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchio as tio
from faulty import LoopbackOpenNeuro
from test_dataset import IMAGES, held_bytes
from workers import Nursery

import tio_openneuro as tno
from tio_openneuro.demo.watch import DiskWatch
from tio_openneuro.disk.engine import Engine
from tio_openneuro.prepared.file import DamagedVolumeError, encode, opened
from tio_openneuro.torchio_seams import sampler_maps
from tio_openneuro.torchio_seams.box_crop import with_box_crop
from tio_openneuro.torchio_seams.randomness import refuse_random
from tio_openneuro.volumes import listening

Make = Callable[..., tno.DataladSubjectsDataset]


@pytest.fixture
def make(openneuro: LoopbackOpenNeuro) -> Iterator[Make]:
    """Return a function that opens the six heads, and closes them at the test's end."""
    made = []

    def opened_dataset(**options: object) -> tno.DataladSubjectsDataset:
        made.append(
            tno.DataladSubjectsDataset("ds900001", IMAGES, **{"disk_budget": "1 GB", **options})
        )
        return made[-1]

    yield opened_dataset
    for dataset in made:
        dataset.close()


def prepared_files(root: Path) -> list[Path]:
    """Return the files of prepared volumes, as an outsider sees them."""
    return sorted((root / "prepared").glob("*/*"))


def prepared_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in prepared_files(root))


def assert_same(one: tio.Subject, other: tio.Subject) -> None:
    """Compare everything that a subject is: voxels, places, attributes, history."""
    assert list(one) == list(other)
    assert type(one) is type(other)
    for name, value in one.items():
        twin = other[name]
        if not isinstance(value, tio.Image):
            assert repr(value) == repr(twin), name
            continue
        assert type(value) is type(twin)
        assert value.data.dtype == twin.data.dtype
        assert torch.equal(value.data, twin.data)
        assert value.data.is_contiguous() == twin.data.is_contiguous()
        np.testing.assert_array_equal(value.affine, twin.affine)
        assert value.keys() == twin.keys()
        for key in value.keys() - {"data", "affine"}:
            assert repr(value[key]) == repr(twin[key]), key
        sources = [vars(each).get("_source") for each in (value, twin)]
        assert len({source and source.files for source in sources}) == 1
    assert repr(one.applied_transforms) == repr(other.applied_transforms)


PIPELINES = {
    "canonical, z": lambda: tio.Compose([tio.ToCanonical(), tio.ZNormalization()]),
    "masked z": lambda: tio.ZNormalization(masking_method=tio.ZNormalization.mean),
    "resample": lambda: tio.Resample(1.7),
    "crop or pad": lambda: tio.CropOrPad((17, 30, 16)),
    "one hot": tio.OneHot,
    "copy kept": lambda: tio.RescaleIntensity((0, 1), keep={"t1": "original"}),
    "in place": lambda: tio.Compose([tio.Clamp(0, 500, copy=False), tio.To(torch.float16)]),
    "label by name": lambda: tio.Compose([tio.ToCanonical(), tio.Mask("lesion")]),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_prepared_subject_is_the_subject_that_preprocess_returned(
    name: str, make: Make, root: Path
) -> None:
    """Whole, by boxes and without a store, each bit, attribute and line of history agrees."""
    dataset = make(preprocess=PIPELINES[name]())
    first = dataset[1]
    assert len(prepared_files(root)) == 1
    dataset.evict()
    assert prepared_bytes(root) == held_bytes(root) == 0
    again = dataset[1]
    fetched_files = dataset.statistics().fetched_files
    from_file = dataset[1]
    assert dataset.statistics().fetched_files == fetched_files == 4
    assert_same(first, again)
    assert_same(again, from_file)
    plain = make()[1]
    torch.set_num_threads(1)
    expected = PIPELINES[name]()(plain)
    for image, wanted in zip(from_file.get_images(False), expected.get_images(False), strict=True):
        assert torch.equal(image.data, wanted.data)
        np.testing.assert_array_equal(image.affine, wanted.affine)
    assert [each.name for each in from_file.history] == [each.name for each in expected.history]


@pytest.mark.parametrize("sampler", ["uniform", "label", "weighted", "own"])
def test_patches_read_by_boxes_are_those_cut_from_the_whole(sampler: str, make: Make) -> None:
    """Of any sampler: voxels, location, place, attributes, history, and draws that follow."""

    class Own(tio.UniformSampler):
        """A sampler that is not known here."""

    samplers = {
        "uniform": tio.UniformSampler((5, 7, 16)),
        "label": tio.LabelSampler(6, "lesion"),
        "weighted": tio.WeightedSampler(6, "lesion"),
        "own": Own(6),
    }
    dataset = make(preprocess=PIPELINES["canonical, z"]())
    whole = dataset[2]
    torch.manual_seed(3)
    expected = list(itertools.islice(samplers[sampler](whole), 6))
    draw = torch.rand(1)
    torch.manual_seed(3)
    with dataset.opened(2) as lazy:
        loaded = [image._loaded for image in lazy.get_images(intensity_only=False)]
        assert not any(loaded)
        found = list(itertools.islice(with_box_crop(samplers[sampler])(lazy), 6))
        loaded = [image._loaded for image in lazy.get_images(intensity_only=False)]
    assert loaded == {"uniform": [False, False], "own": [True, True]}.get(sampler, [False, True])
    assert torch.rand(1) == draw
    for patch, twin in zip(expected, found, strict=True):
        if sampler != "own":
            assert_same(patch, twin)
        assert torch.equal(patch["t1"].data, twin["t1"].data)
        assert torch.equal(patch[tio.LOCATION], twin[tio.LOCATION])


def pickled(image: tio.Image) -> tio.Image:
    return pickle.loads(pickle.dumps(image))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_copies_of_an_open_volume_have_its_voxels(
    copied: Callable[[tio.Image], tio.Image], make: Make
) -> None:
    """An image that is read by boxes is read whole for a copy, which outlives the open file."""
    dataset = make(preprocess=PIPELINES["canonical, z"]())
    whole = dataset[2]
    with dataset.opened(2) as lazy:
        twin = copied(lazy["t1"])
    assert type(twin) is type(whole["t1"])
    assert torch.equal(twin.data, whole["t1"].data)
    np.testing.assert_array_equal(twin.affine, whole["t1"].affine)


def test_each_header_is_read_once_for_a_load(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the RAM that is announced, what is refused and the reader: two files, two reads."""
    read: list[object] = []
    real = zlib.decompressobj
    monkeypatch.setattr(zlib, "decompressobj", lambda kind: real(read.append(kind) or kind))
    announced: list[object] = []
    with listening(announced.append):
        assert make()[0]["t1"].shape == (1, 24, 20, 16)
    assert (len(read), len(announced)) == (2, 1)


def digest(
    dataset: tno.DataladSubjectsDataset,
    epochs: int,
    *,
    sampler: tio.data.PatchSampler | None = None,
    **options: object,
) -> list[str]:
    """Return a digest of each epoch's patches, in their order."""
    found = []
    with tno.BudgetedQueue(
        dataset, 8, 3, sampler or tio.UniformSampler(8), seed=5, ram_budget="4 GB", **options
    ) as queue:
        for _ in range(epochs):
            hashed = hashlib.sha256()
            for patch in queue:
                for image in patch.get_images(intensity_only=False):
                    hashed.update(image.data.numpy().tobytes())
                hashed.update(repr((patch[tio.LOCATION], patch.subject_id, patch.age)).encode())
                hashed.update(repr(patch.applied_transforms).encode())
            found.append(hashed.hexdigest())
    return found


@pytest.mark.parametrize("transform", [None, tio.RandomFlip((0, 1, 2))], ids=["none", "flip"])
def test_patches_are_the_same_cold_warm_and_without_a_store(
    transform: tio.Transform | None, make: Make, root: Path
) -> None:
    """Whether a volume was kept changes no patch and no draw, for any number of workers."""
    pipeline = tio.Compose([tio.ToCanonical(), tio.Resample(1.3), tio.ZNormalization()])
    cold = make(preprocess=pipeline, transform=transform)
    found = digest(cold, 2, num_workers=2)
    assert len(prepared_files(root)) == 6
    fetched_files = cold.statistics().fetched_files
    warm = make(preprocess=pipeline, transform=transform)
    assert digest(warm, 2, num_workers=0) == found
    assert (fetched_files, warm.statistics().fetched_files) == (12, 0)
    cold.evict()
    without = make(preprocess=pipeline, transform=transform, root=root.with_name("other"))
    without._preparation._engine = None
    assert digest(without, 2, num_workers=1) == found


def test_label_maps_of_prepared_volumes_are_computed_once(
    make: Make, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later epochs read no label map whole, and give the patches that they give without a store."""
    pipeline = tio.Compose([tio.ToCanonical(), tio.ZNormalization()])
    without = make(preprocess=pipeline, root=root.with_name("other"))
    without._preparation._engine = None
    expected = digest(without, 3, sampler=tio.LabelSampler(6, "lesion"), num_workers=1)
    computed: list[str] = []
    original = sampler_maps.compute_map

    def counting(sampler: tio.LabelSampler, subject: tio.Subject) -> object:
        computed.append(subject.subject_id)
        return original(sampler, subject)

    monkeypatch.setattr(sampler_maps, "compute_map", counting)
    dataset = make(preprocess=pipeline)
    assert dataset.fetch() > 0
    for index in range(len(dataset)):
        dataset[index]
    assert digest(dataset, 3, sampler=tio.LabelSampler(6, "lesion"), num_workers=1) == expected
    assert sorted(computed) == [f"sub-{n:02}" for n in range(1, 7)]


def test_damaged_volume_is_made_again(make: Make, root: Path) -> None:
    """Wherever its file is damaged, whole or by boxes, the right voxels come, from the files."""
    pipeline = PIPELINES["canonical, z"]
    dataset = make(preprocess=pipeline())
    expected = dataset[0]
    (file,) = prepared_files(root)
    sound = file.read_bytes()
    for place in [3, 12, 40, len(sound) // 3, len(sound) // 2, len(sound) - 2]:
        damaged = bytearray(sound)
        damaged[place] ^= 0x55
        file.write_bytes(damaged)
        assert_same(dataset[0], expected)
        assert file.read_bytes() == sound
    file.write_bytes(sound[: len(sound) // 2])
    assert_same(dataset[0], expected)
    patches = digest(dataset, 1, num_workers=1)
    for path in prepared_files(root):
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) * 2 // 3] ^= 0x55
        path.write_bytes(damaged)
    assert digest(make(preprocess=pipeline()), 1, num_workers=2) == patches


def read_all(path: Path) -> None:
    with opened(path) as file:
        assert file.note == b"note"
        for name in file.shapes():
            file.array(name).read()


def test_file_tells_any_damage(tmp_path: Path) -> None:
    """No byte can be changed unnoticed; arrays of one value, and thin ones, come back too."""
    rng = np.random.default_rng(0)
    arrays = {
        "noise": rng.standard_normal((2, 70, 20, 3)).astype(np.float32),
        "zeros": np.zeros((1, 65, 66, 2), np.uint8),
        "int": rng.integers(-900, 900, (1, 30, 1, 40)).astype(np.int16),
    }
    path = tmp_path / "volume"
    data = encode(arrays, b"note")
    path.write_bytes(data)
    with opened(path) as file:
        assert file.note == b"note"
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.array(name).read(), array)
            box = [(0, 1), (2, array.shape[1] - 3), (0, 1), (1, 2)]
            part = array[tuple(slice(*edge) for edge in box)]
            np.testing.assert_array_equal(file.array(name).read(box), part)
    for place in {*range(200), *rng.integers(0, len(data), 200).tolist()}:
        damaged = bytearray(data)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(DamagedVolumeError):
            read_all(path)


def test_full_budget_keeps_nothing_and_fails_nothing(
    make: Make, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where one unit alone fits, volumes larger than it are not kept, and all else goes on."""
    needed_bytes = max(row.content.size_bytes for row in make()._rows)
    dataset = make(preprocess=PIPELINES["resample"](), disk_budget=needed_bytes + 100)
    larger = make(preprocess=tio.Resample(0.5), disk_budget=needed_bytes + 100)
    peak_bytes = 0
    with caplog.at_level(logging.INFO):
        for index in range(6):
            assert larger[index]["t1"].shape[1:] == (48, 48, 48)
            assert dataset[index]["t1"].shape[0] == 1
            peak_bytes = max(peak_bytes, held_bytes(root) + prepared_bytes(root))
    assert needed_bytes * 0.5 < peak_bytes <= needed_bytes + 100
    assert "Not kept" in caplog.text
    assert larger.statistics().evicted_files >= 10


def test_raw_files_go_first_once_a_volume_is_kept(make: Make, root: Path) -> None:
    """Room for the volumes comes from the files that they stand for; later epochs fetch none."""
    probe = make(preprocess=PIPELINES["resample"]())
    for index in range(6):
        assert probe[index] is not None
    volumes_bytes = prepared_bytes(root)
    probe.evict()
    probe.close()
    largest_bytes = max(row.content.size_bytes for row in probe._rows)
    budget_bytes = volumes_bytes + 3 * largest_bytes
    assert budget_bytes < volumes_bytes + probe.nbytes
    dataset = make(preprocess=PIPELINES["resample"](), disk_budget=budget_bytes)
    digest(dataset, 3, num_workers=1)
    statistics = dataset.statistics()
    assert statistics.fetched_files == 12
    assert statistics.evicted_files > 0
    assert len(prepared_files(root)) == 6
    assert held_bytes(root) <= 3 * largest_bytes
    assert held_bytes(root) + prepared_bytes(root) <= budget_bytes


def test_larger_volumes_of_files_that_are_slow_to_fetch_take_free_room_alone(
    make: Make, root: Path, openneuro: LoopbackOpenNeuro
) -> None:
    """Raw files that save more time for each byte stay; volumes have what room is left."""
    openneuro.set_latency(0.2)
    largest_bytes = max(row.content.size_bytes for row in make()._rows)
    budget_bytes = make().nbytes + 3 * largest_bytes
    dataset = make(preprocess=PIPELINES["canonical, z"](), disk_budget=budget_bytes)
    digest(dataset, 3, num_workers=1)
    openneuro.set_latency(0)
    assert dataset.statistics().fetched_files == 12
    assert held_bytes(root) == dataset.nbytes
    assert len(prepared_files(root)) == 1
    assert held_bytes(root) + prepared_bytes(root) <= budget_bytes


def test_volumes_are_evicted_like_any_content(make: Make, root: Path) -> None:
    """A lease takes their room; ``evict``, ``status`` and ``statistics`` count them."""
    dataset = make(preprocess=PIPELINES["one hot"]())
    for index in range(6):
        assert dataset[index] is not None
    kept_bytes = prepared_bytes(root)
    assert dataset.statistics().used_bytes == kept_bytes + held_bytes(root)
    status = dataset._engine.status()
    assert status.clones[str(root.resolve() / "prepared")] == kept_bytes > 0
    assert dataset[:2].evict() > dataset[:2].nbytes
    assert len(prepared_files(root)) == 4
    budget_bytes = max(row.content.size_bytes for row in dataset._rows)
    dataset.close()
    with make(disk_budget=budget_bytes) as other:
        assert other.statistics().used_bytes <= budget_bytes
        assert other[5]["t1"].shape == (1, 24, 20, 16)
        assert prepared_bytes(root) + held_bytes(root) <= budget_bytes
        assert other.check() == []


_CHILD = """
import sys, torchio as tio, tio_openneuro as tno
from tio_openneuro.disk.prepared_volumes import PreparedRepo
from test_dataset import IMAGES
if sys.argv[1] == "die":
    whole = PreparedRepo.write
    def write(self, key, data):
        path = self.place(key)
        path.parent.mkdir(exist_ok=True)
        path.with_name(path.name + ".part").write_bytes(data[: len(data) // 2])
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    PreparedRepo.write = write
preprocess = tio.Compose([tio.ToCanonical(), tio.ZNormalization()])
with tno.DataladSubjectsDataset("ds900001", IMAGES, preprocess=preprocess) as dataset:
    total = float(dataset[3]["t1"].data.abs().sum())
    print(total, dataset.statistics().fetched_files)
"""


def in_child(word: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path}\n{_CHILD}", word]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_processes_share_volumes(make: Make, root: Path) -> None:
    """Another process names the same volume alike and fetches nothing; ours reads that one."""
    done = in_child("live")
    assert done.returncode == 0, done.stderr
    total, fetched_files = done.stdout.split()
    assert fetched_files == "2"
    assert len(prepared_files(root)) == 1
    dataset = make(preprocess=PIPELINES["canonical, z"]())
    assert float(dataset[3]["t1"].data.abs().sum()) == float(total)
    assert dataset.statistics().fetched_files == 0


def train_and_check(root: Path, budget_bytes: int) -> tuple[str, int, list[str]]:
    """Train two epochs; return their digests, files evicted and inconsistencies."""
    with tno.DataladSubjectsDataset(
        "ds900001",
        IMAGES,
        root=root,
        disk_budget=budget_bytes,
        preprocess=PIPELINES["canonical, z"](),
    ) as dataset:
        found = digest(dataset, 2, num_workers=2)
        return " ".join(found), dataset.statistics().evicted_files, dataset.check()


def test_trainings_that_share_volumes_stay_within_the_budget(
    make: Make, root: Path, nursery: Nursery
) -> None:
    """Two at once, whose files alone pass the budget: no byte too many, and the same patches."""
    nbytes = make().nbytes
    budget_bytes = nbytes * 7 // 10
    with DiskWatch(root, interval_s=0.002) as watch:
        workers = [nursery.start(train_and_check, root, budget_bytes) for _ in range(2)]
        results = [worker.result(timeout_s=120) for worker in workers]
    peak_bytes = max(sample.held_bytes for sample in watch.samples())
    assert budget_bytes * 0.5 < peak_bytes <= budget_bytes
    assert len({patches for patches, _, _ in results}) == 1
    assert sum(evicted for _, evicted, _ in results) > 0
    assert [found for _, _, found in results if found] == []


def test_killed_while_writing(make: Make, root: Path) -> None:
    """What a kill leaves is charged, and gives way; the next process makes the volume."""
    assert in_child("die").returncode == -9
    (partial,) = prepared_files(root)
    assert partial.suffix == ".part"
    with Engine(root, disk_budget="1 GB") as engine:
        used_bytes = engine.statistics().used_bytes
        assert held_bytes(root) + partial.stat().st_size <= used_bytes
        assert engine.check(repair=True) == []
    dataset = make(preprocess=PIPELINES["canonical, z"]())
    assert dataset[3] is not None
    (whole,) = prepared_files(root)
    assert whole.suffix != ".part"
    assert dataset.statistics().used_bytes == held_bytes(root) + whole.stat().st_size
    assert dataset.check() == []


def test_volume_that_nobody_charges_is_found_and_removed(make: Make, root: Path) -> None:
    """``check`` tells a file that the ledger does not know, whole or not; a repair removes it."""
    dataset = make(preprocess=PIPELINES["resample"]())
    assert dataset[0] is not None
    (known,) = prepared_files(root)
    stray = known.with_name(known.name[:-4] + "0000")
    stray.write_bytes(b"stray")
    half = known.with_name(known.name[:-4] + "1111.part")
    half.write_bytes(b"half")
    found = dataset.check()
    assert len(found) == 2
    assert all("not charged" in line for line in found)
    assert dataset._engine.check(repair=True) == []
    assert prepared_files(root) == [known]


def test_functions_need_an_id_to_be_kept(
    make: Make, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without one they work and are not kept, which one line says; with one they are, by it."""

    def halve(tensor: torch.Tensor) -> torch.Tensor:
        return tensor / 2

    transform = tio.Lambda(halve, types_to_apply=[tio.INTENSITY])
    with caplog.at_level(logging.INFO):
        unnamed = make(preprocess=transform)
    assert caplog.text.count("preprocess_id") == 1
    expected = unnamed[0]
    assert prepared_files(root) == []
    named = make(preprocess=transform, preprocess_id="halve 1")
    assert_same(named[0], expected)
    assert len(prepared_files(root)) == 1
    assert_same(named[0], expected)
    assert named[0].applied_transforms[0][1]["function"] is halve
    renamed = make(preprocess=transform, preprocess_id="halve 2")
    assert_same(renamed[0], expected)
    assert len(prepared_files(root)) == 2


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    RANDOM = {
        "RandomFlip": tio.RandomFlip(),
        "p=0.5": tio.ZNormalization(p=0.5),
        'location="random"': tio.CropOrPad(8, location="random"),
        "OneOf": tio.OneOf([tio.Clamp(0, 1)]),
        "numpy.random": tio.Lambda(lambda tensor: tensor * np.random.rand()),  # noqa: NPY002
    }


@pytest.mark.parametrize("word", RANDOM)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_random_preprocess_is_refused(word: str, depth: int, make: Make) -> None:
    """At construction, at any depth, with what is random in it and where it belongs."""
    transform = RANDOM[word]
    for _ in range(depth):
        transform = tio.Compose([tio.ToCanonical(), transform])
    with pytest.raises(tno.SelectionError, match="Give what is random as transform") as raised:
        make(preprocess=transform)
    assert word in str(raised.value)
    refuse_random(tio.Compose([tio.ToCanonical(), tio.CropOrPad(8)]))


def test_consumers_generator_is_left_alone(make: Make) -> None:
    """Preprocessing neither reads nor advances torch's global generator."""
    dataset = make(preprocess=PIPELINES["canonical, z"]())
    before = torch.get_rng_state()
    threads = torch.get_num_threads()
    assert dataset[0] is not None
    assert dataset[0] is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_preprocess_computes_on_one_thread(make: Make) -> None:
    """Whatever the consumer's number is, which holds again afterwards, also after an error."""
    found: list[int] = []

    def observe(tensor: torch.Tensor) -> torch.Tensor:
        found.append(torch.get_num_threads())
        # The first is made twice, in search of what is random.
        return tensor if len(found) < 3 else tensor[0]

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        dataset = make(preprocess=tio.Lambda(observe, types_to_apply=[tio.INTENSITY]))
        assert dataset[0] is not None
        with pytest.raises(Exception, match=r"4D|dimension"):
            dataset[0]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert found == [1, 1, 1]
