"""What names a prepared volume: all that its result may depend on, here and after a snapshot."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torchio as tio
from faulty import LoopbackOpenNeuro
from truths import CHANGES, IMAGES, STEPS, Step, publish_truths, told

import tio_openneuro as tno
from tio_openneuro.prepared import preparation

Make = Callable[..., tno.DataladSubjectsDataset]


@pytest.fixture(scope="session")
def _truths(_published: LoopbackOpenNeuro) -> None:
    publish_truths(_published, "ds900015", 0)


@pytest.fixture
def make(_truths: None, openneuro: LoopbackOpenNeuro, tmp_path: Path) -> Iterator[Make]:
    """Return a function that opens a snapshot under a root, and closes it at the test's end."""
    made = []

    def opened(root: str = "root", version: str = "1.0.0", **options: object) -> object:
        made.append(
            tno.DataladSubjectsDataset(
                "ds900015",
                IMAGES,
                root=tmp_path / root,
                version=version,
                disk_budget="1 GB",
                **options,
            )
        )
        return made[-1]

    yield opened
    for dataset in made:
        dataset.close()


def prepared_files(root: Path) -> list[Path]:
    return sorted((root / "prepared").glob("*/*"))


def all_of(dataset: tno.DataladSubjectsDataset) -> list[object]:
    return [told(dataset[n], dataset._root) for n in range(len(dataset))]


READING = ["age", "age, as attribute", "echo", "id", "stem", "other image", "number of items"]


@pytest.mark.parametrize("word", READING)
def test_whatever_preprocess_reads_of_a_subject_names_its_volume(word: str, make: Make) -> None:
    """Snapshots that change tables, sidecars or files, and shared files: as in a fresh root."""
    options = {"preprocess": Step(word), "preprocess_id": "1"}
    for number in range(len(CHANGES) + 1):
        version = f"1.0.{number}"
        kept = make(version=version, **options)
        found = all_of(kept)
        assert found == all_of(make("fresh" + version, version, **options))
        assert found == all_of(kept)
        assert kept.statistics().hit_files >= 3


def test_volumes_of_torchios_own_transforms_outlive_new_values(make: Make, tmp_path: Path) -> None:
    """They read images alone; participants with the same files share one, under their own rows."""
    preprocess = tio.Compose([tio.ToCanonical(), tio.CropOrPad(9), tio.Crop(1)])
    assert len(all_of(make(preprocess=preprocess))) == 3
    before = prepared_files(tmp_path / "root")
    later = make(version="1.0.1", preprocess=preprocess)
    found = all_of(later)
    assert later.statistics().fetched_files == 0
    assert prepared_files(tmp_path / "root") == before
    assert found == all_of(make("fresh", "1.0.1", preprocess=preprocess))
    assert [later[n]["age"] for n in range(3)] == [90, 89, 88]


def test_transform_that_is_changed_later_has_another_name(make: Make) -> None:
    """What is kept before and after is what the transform gives then, also for later datasets."""
    clamp = tio.Clamp(0, 100)
    dataset = make(preprocess=tio.Compose([clamp]))
    assert float(dataset[0]["t1"].data.max()) == 100
    clamp.out_max = 200
    assert [float(dataset[0]["t1"].data.max()) for _ in range(2)] == [200, 200]
    with dataset.opened(0) as lazy:
        assert float(lazy["t1"].data.max()) == 200
    assert float(make(preprocess=tio.Clamp(0, 100))[0]["t1"].data.max()) == 100
    assert float(make(preprocess=tio.Clamp(0, 200))[0]["t1"].data.max()) == 200


class Counting(tio.Transform):
    """A transform that changes itself while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        """Add the number of calls."""
        self.calls += 1
        subject["t1"].set_data(subject["t1"].data + self.calls)
        return subject


def test_transform_that_changes_while_it_runs_is_refused(make: Make, tmp_path: Path) -> None:
    """It gives one subject another result the second time; nothing is kept."""
    dataset = make(preprocess=Counting(), preprocess_id="1")
    with pytest.raises(tno.SelectionError, match=r"Counting.*came out otherwise the second time"):
        dataset[0]
    assert prepared_files(tmp_path / "root") == []


class Remembering(Counting):
    """Changes while it runs, and what it returns does not."""

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        """Count the calls, and return the subject."""
        self.calls += 1
        return subject


def test_transform_that_changes_while_it_runs_is_not_kept(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its results have no name, which one line says."""
    dataset = make(preprocess=Remembering(), preprocess_id="1")
    with caplog.at_level(logging.INFO):
        assert torch.equal(dataset[0]["t1"].data, make()[0]["t1"].data)
    assert "changed while it ran" in caplog.text
    assert prepared_files(tmp_path / "root") == []


def test_another_preprocess_may_be_assigned(make: Make) -> None:
    """It holds from then on, for that view alone; what is random is refused; an id does not go."""
    dataset = make(preprocess=tio.Clamp(0, 100), preprocess_id="1")
    view = dataset[:2]
    assert float(view[0]["t1"].data.max()) == 100
    view.preprocess = tio.Clamp(0, 200)
    assert [float(view[0]["t1"].data.max()) for _ in range(2)] == [200, 200]
    assert float(dataset[0]["t1"].data.max()) == 100
    with pytest.raises(tno.SelectionError, match="RandomNoise"):
        view.preprocess = tio.RandomNoise()
    view.preprocess = tio.Lambda(lambda tensor: tensor * 0)
    assert float(view[0]["t1"].data.max()) == 0
    view.preprocess = tio.Lambda(lambda tensor: tensor * 0 + 1)
    assert float(view[0]["t1"].data.max()) == 1
    view.preprocess = None
    assert view.preprocess is None
    assert float(view[0]["t1"].data.max()) > 200


@pytest.mark.parametrize("library", ["tio-openneuro", "isal", "scikit-learn"])
def test_what_computes_is_part_of_the_name(
    library: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of us, or of what inflates, prepares anew."""
    assert make(preprocess=tio.ToCanonical())[0] is not None
    real = preparation.version
    monkeypatch.setattr(preparation, "version", lambda name: real(name) + "x" * (name == library))
    assert make(preprocess=tio.ToCanonical())[0] is not None
    assert len(prepared_files(tmp_path / "root")) == 2


@pytest.mark.parametrize("word", [word for word in STEPS if word not in READING])
def test_what_comes_back_is_what_was_returned(word: str, make: Make, tmp_path: Path) -> None:
    """Class, order, items, attributes and history, also of patches, whole or cut from a box."""
    dataset = make(preprocess=Step(word), preprocess_id="1")
    cold = told(dataset[0], dataset._root)
    assert len(prepared_files(tmp_path / "root")) == 1
    assert told(dataset[0], dataset._root) == cold
    patches = []
    for subject in (None, dataset[0]):
        torch.manual_seed(1)
        if subject is not None:
            patches.append(told(next(tio.UniformSampler(4)(subject)), dataset._root))
            continue
        with dataset.opened(0) as lazy:
            patches.append(told(next(tio.UniformSampler(4)(lazy)), dataset._root))
    assert patches[0] == patches[1]
    with_noise = make(preprocess=Step(word), preprocess_id="1", transform=tio.RandomNoise())
    for index in (0, 1):
        found = []
        for _ in range(2):
            torch.manual_seed(2)
            found.append(told(with_noise[index], os.sep))
        assert found[0] == found[1]


ONES = tio.ScalarImage(tensor=torch.ones(1, 9, 9, 9))
ALIASES = {
    "one image twice": lambda s: s.add_image(s["t1"], "again"),
    "shared voxels": lambda s: s.add_image(tio.ScalarImage(tensor=s["t1"].data), "again"),
    "an image left as attribute": lambda s: s.__setitem__("t1", ONES),
    "an object": lambda s: s.__setitem__("x", object()),
    "a function": lambda s: s.__setitem__("x", lambda: 0),
    "a class of its own": lambda s: setattr(s, "__class__", type("Own", (tio.Subject,), {})),
}


@pytest.mark.parametrize("word", ALIASES)
def test_what_cannot_be_told_is_not_kept(
    word: str,
    make: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is prepared each time, which a line says with the reason."""
    monkeypatch.setitem(STEPS, word, ALIASES[word])
    dataset = make(preprocess=Step(word), preprocess_id="1")
    with caplog.at_level(logging.INFO):
        assert dataset[0] is not None
    assert "is not kept" in caplog.text
    assert prepared_files(tmp_path / "root") == []
