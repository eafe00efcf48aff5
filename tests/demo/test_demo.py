"""The demo: heads that resemble heads, a network that learns, a picture, the whole path."""

import io
import itertools
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
import torchio as tio
from rich.console import Console
from scipy import ndimage

from tio_openneuro.demo import training
from tio_openneuro.demo.live import render
from tio_openneuro.demo.network import UNet, dice_and_cross_entropy
from tio_openneuro.demo.observer import held_bytes
from tio_openneuro.demo.phantom import Head, make_head, make_heads
from tio_openneuro.demo.records import DemoEvent, DemoResult, Illustration, Stage
from tio_openneuro.demo.report import write_report
from tio_openneuro.demo.run import ACCESSION, REPORT, run_demo
from tio_openneuro.demo.training import SubjectScore
from tio_openneuro.demo.watch import DiskWatch, HeldSample
from tio_openneuro.errors import TioOpenNeuroError


@pytest.fixture(scope="module", autouse=True)
def _torch_has_its_own_folder() -> None:
    """Let torch make the folder of its compiler, which the first optimiser does, before a test."""
    torch.optim.SGD([torch.zeros(1)]).step()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Let PyTorch use one thread: several wait for one another where others share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def heads() -> list[Head]:
    """Return six heads."""
    return list(make_heads(6))


def subject_of(head: Head) -> tio.Subject:
    """Return the head as a subject in RAM, scaled as the demo scales it."""
    subject = tio.Subject(
        subject_id=head.name,
        flair=tio.ScalarImage(tensor=torch.from_numpy(head.image)[None], affine=head.affine),
        lesion=tio.LabelMap(tensor=torch.from_numpy(head.label)[None], affine=head.affine),
    )
    return tio.RescaleIntensity((-1, 1), percentiles=(0.5, 99.5))(subject)


def test_a_head_depends_on_its_number_and_the_seed_alone(heads: list[Head]) -> None:
    """A head drawn alone is the head of the series, bit for bit; another seed is another head."""
    alone = make_head(3)
    assert np.array_equal(alone.image, heads[3].image)
    assert np.array_equal(alone.label, heads[3].label)
    assert (alone.age, alone.sex) == (heads[3].age, heads[3].sex)
    other = make_head(3, seed=1)
    assert other.image.shape != alone.image.shape or not np.array_equal(other.image, alone.image)


def test_heads_differ_as_scans_do(heads: list[Head]) -> None:
    """Shapes, spacings, orientations and gains vary within their stated ranges."""
    sides = np.array([head.image.shape for head in heads])
    spacings = np.array([np.abs(np.diag(head.affine)[:3]) for head in heads])
    assert sides.min() >= 56
    assert sides.max() <= 80
    assert spacings.min() >= 0.9
    assert spacings.max() <= 1.4
    assert len({tuple(side) for side in sides}) == len(heads)
    orientations = {
        tio.ScalarImage(tensor=h.image[None], affine=h.affine).orientation for h in heads
    }
    assert orientations == {("R", "A", "S"), ("L", "A", "S")}


def test_each_lesion_is_one_blob_inside_the_brain_and_brighter(heads: list[Head]) -> None:
    """The label is one connected part of the brain, of 0.05 to 2 % of the volume."""
    for head in heads:
        lesion = head.label > 0
        assert head.label.dtype == np.uint8
        assert head.image.dtype == np.int16
        assert ndimage.label(lesion)[1] == 1
        assert not (lesion & ~head.brain).any()
        assert 0.0005 < lesion.mean() < 0.02
        brain = head.image[head.brain & ~lesion]
        assert head.image[lesion].mean() > brain.mean() + brain.std()
        scalp = head.image > np.percentile(head.image[lesion], 10)
        assert scalp[~head.brain].sum() > lesion.sum()  # a threshold alone does not find it


def test_the_network_learns_two_heads_by_heart(heads: list[Head]) -> None:
    """On a queue over two heads in RAM the loss falls to under half, and Dice rises above 0.5."""
    torch.manual_seed(0)
    around = tio.CropOrPad(32, mask_name="lesion")
    dataset = tio.SubjectsDataset([around(subject_of(head)) for head in heads[:2]])
    sampler = tio.LabelSampler(16, "lesion", {0: 1, 1: 1})
    queue = tio.Queue(dataset, 16, 16, sampler, num_workers=0)
    loader = tio.SubjectsLoader(queue, batch_size=4, num_workers=0)
    network = UNet(levels=2)
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.01)
    schedule = training.warm_up_and_cosine(optimiser, 5 * len(loader))
    before = training.score(network, dataset)
    losses: list[list[float]] = [
        list(training.train_epoch(network, loader, optimiser, schedule)) for _ in range(5)
    ]
    after = training.score(network, dataset)
    assert [len(epoch) for epoch in losses] == 5 * [8]
    assert np.mean(losses[-1]) < 0.5 * np.mean(losses[0])
    assert [score.name for score in after] == ["sub-01", "sub-02"]
    assert np.mean([score.dice for score in before]) < 0.15
    assert np.mean([score.dice for score in after]) > 0.5


def test_the_loss_is_least_for_the_true_labels() -> None:
    """Certain and right costs nearly nothing, certain and wrong more than not knowing."""
    labels = torch.zeros(2, 8, 8, 8, dtype=torch.int64)
    labels[:, 2:5, 2:5, 2:5] = 1
    right = 20.0 * torch.stack([1 - labels, labels], dim=1).float()
    losses = [
        float(dice_and_cross_entropy(logits, labels)) for logits in (right, 0 * right, -right)
    ]
    assert losses[0] < 0.01
    assert losses[0] < losses[1] < losses[2]


def test_segmenting_pads_and_crops_any_shape() -> None:
    """A network that marks bright voxels gives back the bright voxels, in the image's own shape."""

    class Bright(torch.nn.Conv3d):
        multiple = 8

        def forward(self, volume: torch.Tensor) -> torch.Tensor:
            assert not [side for side in volume.shape[2:] if side % self.multiple]
            return super().forward(volume)

    network = Bright(1, 2, kernel_size=1)
    with torch.no_grad():
        network.weight[:] = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1, 1)
        network.bias[:] = torch.tensor([0.5, 0.0])
    image = torch.rand(1, 37, 50, 29, generator=torch.Generator().manual_seed(0))
    assert torch.equal(training.segment(network, image), image[0] > 0.5)


def test_dice_is_that_of_the_definition() -> None:
    """Twice what both hold over what each holds; 1 where neither holds anything."""
    truth = torch.tensor([[[False, True, True, True]]])
    guess = torch.tensor([[[True, True, True, False]]])
    assert training.dice_score(guess, truth) == pytest.approx(2 * 2 / (3 + 3))
    assert training.dice_score(guess & ~guess, truth & ~truth) == 1.0
    assert training.dice_score(guess & ~guess, truth) == 0.0


def test_the_observer_counts_content_and_partial_downloads_alone(tmp_path: Path) -> None:
    """Objects, downloads under way and prepared files count; git's metadata and the ledger not."""
    annex = tmp_path / "clones" / "ds1" / ".git" / "annex"
    counted = {
        annex / "objects" / "a" / "b" / "KEY" / "KEY": 1000,
        annex / "tmp" / "OTHER": 200,
        tmp_path / "prepared" / "volume": 30,
    }
    others = [
        annex / "index",
        annex.parent / "objects" / "pack" / "pack-1",
        tmp_path / "ledger" / "ledger.sqlite",
    ]
    for path in [*counted, *others]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(counted.get(path, 7)))
    assert held_bytes(str(tmp_path)) == sum(counted.values())
    assert held_bytes(str(tmp_path / "missing")) == 0
    shutil.rmtree(tmp_path / "ledger")  # no ledger that the suite could check


def test_the_watch_sees_what_came_and_went(tmp_path: Path) -> None:
    """Samples come in order, show a file that lay there, and the last one comes at the end."""
    with DiskWatch(tmp_path, interval_s=0.001) as watch:
        (tmp_path / "file").write_bytes(bytes(500))
        while watch.samples()[-1].held_bytes != 500:
            pass
        (tmp_path / "file").unlink()
    samples = watch.samples()
    assert samples[0].held_bytes in {0, 500}
    assert samples[-1].held_bytes == 0
    assert max(sample.held_bytes for sample in samples) == 500
    assert all(a.time_s <= b.time_s for a, b in itertools.pairwise(samples))


def some_result(report: Path, head: Head, *, epochs: int = 3) -> DemoResult:
    """Return a result with numbers that differ from one another, and a lesion found too large."""
    scored = tuple(
        DemoEvent(
            Stage.SCORED, epoch=epoch, epochs=epochs, loss=1.2 / epoch if epoch else None,
            scores=tuple(
                SubjectScore(name, 0.01 + 0.25 * epoch) for name in ("sub-01", "sub-05", "sub-09")
            ),
            elapsed_s=5 + 6.0 * epoch,
        )
        for epoch in range(epochs + 1)
    )  # fmt: skip
    at = int(head.label.sum(axis=(0, 1)).argmax())
    truth = head.label[:, :, at] > 0
    picture = Illustration(
        head=1, slice_index=at, image=head.image[:, :, at], truth=truth,
        untrained=np.zeros_like(truth), trained=ndimage.binary_dilation(truth), aspect=1.0,
    )  # fmt: skip
    held = [HeldSample(0.01 * n, 1_000_000 + 7_000 * (n % 100)) for n in range(2000)]
    return DemoResult(
        heads=12, epochs=scored, picture=picture, samples=tuple(held), dataset_bytes=8_000_000,
        budget_bytes=2_000_000, fetched_bytes=30_000_000, report=report,
    )  # fmt: skip


def test_the_picture_shows_heads_lesion_and_dice(tmp_path: Path, heads: list[Head]) -> None:
    """The PNG is large, readable, and holds the colours of each thing that it claims to show."""
    path = tmp_path / "report" / "demo.png"
    write_report(some_result(path, heads[0]))
    assert [file.name for file in path.parent.iterdir()] == ["demo.png"]
    pixels = (255 * matplotlib.image.imread(path)[..., :3]).round().astype(int)
    assert pixels.shape[0] > 700
    assert pixels.shape[1] > 1500
    white = (pixels == 255).all(axis=-1).mean()
    assert 0.4 < white < 0.9
    for name, colour in {"truth": "35d07f", "Dice": "2f7ebc"}.items():
        distance = np.abs(pixels - [int(colour[at : at + 2], 16) for at in (0, 2, 4)]).max(axis=-1)
        assert (distance < 12).sum() > 200, name


def test_a_dataset_without_trained_lesion_is_drawn_too(tmp_path: Path, heads: list[Head]) -> None:
    """A network that finds nothing, and one epoch, make a picture."""
    result = some_result(tmp_path / "a.png", heads[1], epochs=1)
    nothing = replace(result.picture, trained=result.picture.untrained)
    write_report(replace(result, picture=nothing))
    assert matplotlib.image.imread(tmp_path / "a.png").std() > 0.05


def test_the_whole_path_keeps_the_budget_and_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six heads, two epochs: held within a quarter of the dataset, more fetched, loss falls."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    events: list[DemoEvent] = []
    result = run_demo(tmp_path, events.append, epochs=2, heads=6)
    assert result.budget_bytes == result.dataset_bytes // 4
    assert 0.5 * result.budget_bytes < result.peak_held_bytes <= result.budget_bytes
    assert result.fetched_bytes > 4 * result.budget_bytes
    assert len(result.samples) > 100
    assert result.epochs[2].loss < 0.9 * result.epochs[1].loss
    assert [score.name for score in result.epochs[-1].scores] == ["sub-01", "sub-05"]
    assert result.report == tmp_path / REPORT
    assert matplotlib.image.imread(result.report).std() > 0.05
    assert {event.stage for event in events} == set(Stage)
    assert [event.step for event in events if event.stage is Stage.TRAINING][-1] == 8
    disks = [event.moment.reading.disk for event in events if event.moment is not None]
    assert {disk.budget_bytes for disk in disks} == {result.budget_bytes}
    assert all(disk.used_bytes <= result.budget_bytes for disk in disks)
    assert result.budget_bytes < disks[-1].fetched_bytes <= result.fetched_bytes
    page = result.report.with_suffix(".html").read_text()
    assert f"{ACCESSION}: Synthetic heads" in page
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "file"])
def test_the_console_shows_epochs_and_the_closing_report(
    terminal: bool, tmp_path: Path, heads: list[Head]
) -> None:
    """On a terminal as in a file, each epoch has its line and the closing table its numbers."""
    result = some_result(tmp_path / "demo.png", heads[0])

    def run(on_event: object) -> DemoResult:
        assert callable(on_event)
        on_event(DemoEvent(Stage.HEADS, step=1, steps=12))
        scores = (SubjectScore("sub-01", 0.0), SubjectScore("sub-05", 0.02))
        on_event(DemoEvent(Stage.SCORED, epochs=2, scores=scores))
        for epoch in (1, 2):
            common = {"epoch": epoch, "epochs": 2}
            scores = (SubjectScore("sub-01", 0.3 * epoch),)
            on_event(DemoEvent(Stage.TRAINING, step=3, steps=8, scores=scores, **common))
            on_event(DemoEvent(Stage.SCORED, scores=scores, loss=0.5, **common))
        on_event(DemoEvent(Stage.REPORTING))
        return result

    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    assert render(run, console) is result
    text = console.file.getvalue()
    assert re.search(r"untrained +- +0\.010", text)
    assert re.search(r"2 +0\.500 +0\.600", text)
    assert "0.01 untrained" in text
    assert "1,693,000" in text
    assert ("\x1b[" in text) == terminal


def test_an_error_passes_through_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure in mid-training reaches the caller; no temporary file, process or report stays."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))

    def fail(event: DemoEvent) -> None:
        if event.stage is Stage.TRAINING:
            raise TioOpenNeuroError("Cannot go on.")

    console = Console(file=io.StringIO())
    with pytest.raises(TioOpenNeuroError, match="Cannot go on"):
        render(lambda on_event: run_demo(tmp_path, fail, epochs=1, heads=6), console)
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / REPORT).exists()
