"""Trainers that are interrupted and go on: the same batches as without, epoch by epoch.

Plain loops, torchdata's loader, Lightning and Accelerate really run; each part of a run makes
everything anew. Allowed are the loader's own empty pass, where torchdata's state is taken at an
epoch's end, and with ``drop_last`` one short batch: what the interrupted epoch had left beside
whole ones, which a queue, that knows of no batches, still owes.
"""

import importlib
import logging
from pathlib import Path
from types import ModuleType

import pytest
import trainers
from trainers import EPOCHS, Run

LOADERS = ["subjects", "torch", "stateful", "wrapped", "plain"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata 0.11
]


def without_short(run: Run) -> Run:
    """Return a run less the batches, and the passes, that are short of what they drop."""
    whole = [[batch for batch in batches if len(batch) == trainers.BATCH] for batches in run]
    return [batches for batches in whole if batches]


def assert_same(found: Run, expected: Run, *, drop_last: bool) -> None:
    """Each pass has the uninterrupted one's batches, in its order, as far as the run went."""
    if drop_last:
        assert sum(len(batch) < trainers.BATCH for batches in found for batch in batches) <= 1
        found = without_short(found)
    assert found[:-1] == expected[: len(found) - 1]
    last = expected[len(found) - 1]
    assert found[-1] == (last[: len(found[-1])] if drop_last else last)
    assert len(found) >= EPOCHS - drop_last


def stops(*, drop_last: bool) -> dict[str, int]:
    """Return the batches after which a run is interrupted: in an epoch, at its end, in the next."""
    whole = trainers.PATCHES // trainers.BATCH + (not drop_last)
    return {"middle": 2, "end": whole, "later": whole + 1}


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("loader", LOADERS)
def test_a_loop_of_ones_own_goes_on(loader: str, drop_last: bool) -> None:
    """Interrupted in an epoch, at its end and in the next one, by any loader."""
    per_epoch = stops(drop_last=drop_last)["end"]
    whole = EPOCHS * per_epoch
    expected, _ = trainers.train_plainly(loader, drop_last=drop_last, batches=whole)
    assert [len(batches) for batches in expected] == [per_epoch] * EPOCHS
    for place, stop in stops(drop_last=drop_last).items():
        first, saved = trainers.train_plainly(loader, drop_last=drop_last, batches=stop)
        second, _ = trainers.train_plainly(
            loader, drop_last=drop_last, batches=whole - stop, checkpoint=saved
        )
        found = trainers.join(first, second, whole=per_epoch)
        assert_same(found, expected, drop_last=drop_last)
        # The loader's own empty passes come before anything else.
        empty = sum(1 for batches in second if not batches)
        assert empty <= (2 if place == "end" else 0)
        assert all(batches for batches in second[empty:])


def test_a_resumed_loop_that_does_not_count_has_one_short_batch() -> None:
    """With ``drop_last``, what is left beside whole batches comes as a batch of its own."""
    first, saved = trainers.train_plainly("subjects", drop_last=True, batches=1)
    second, _ = trainers.train_plainly(
        "subjects", drop_last=True, batches=8, checkpoint=saved, counted=False
    )
    assert [len(batch) for batch in first[0]] == [4]
    assert [[len(batch) for batch in batches] for batches in second] == [[4, 4, 4, 2], [4] * 4]


@pytest.mark.parametrize("drop_last", [False, True])
def test_accelerate_saves_and_loads_the_queue(tmp_path: Path, drop_last: bool) -> None:
    """``register_for_checkpointing(queue)`` is enough, the loader being kept out of prepare."""
    pytest.importorskip("accelerate")
    per_epoch = stops(drop_last=drop_last)["end"]
    whole = EPOCHS * per_epoch
    expected, _ = trainers.train_plainly("subjects", drop_last=drop_last, batches=whole)
    for place, stop in stops(drop_last=drop_last).items():
        folder = tmp_path / place
        parts = [
            trainers.train_with_accelerate(
                "subjects", folder, drop_last=drop_last, batches=batches, resume=resume
            )
            for batches, resume in ((stop, False), (whole - stop, True))
        ]
        assert_same(trainers.join(*parts, whole=per_epoch), expected, drop_last=drop_last)


@pytest.fixture
def training() -> ModuleType:
    """Return the trainings with Lightning, where it is installed."""
    pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return importlib.import_module("lightning_training")


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers, and torch's on itself
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("holder", ["datamodule", "callback"])
def test_lightning_goes_on(
    training: ModuleType, tmp_path: Path, holder: str, drop_last: bool
) -> None:
    """From a checkpoint in an epoch, at its end, and of every n steps, in the epochs' numbers."""
    per_epoch = stops(drop_last=drop_last)["end"]
    seen = training.train("subjects", holder, tmp_path / "whole", drop_last=drop_last)
    plain, _ = trainers.train_plainly("subjects", drop_last=drop_last, batches=EPOCHS * per_epoch)
    expected = training.by_epoch(seen)
    assert expected == plain
    cases = {
        "middle": (3, 4, 3),
        "steps": (2, per_epoch + 3, 2 * ((per_epoch + 2) // 2)),
        "last step": (per_epoch, per_epoch + 2, per_epoch),
        "end": (None, per_epoch + 2, per_epoch),
    }
    for case, (every, stop, step) in cases.items():
        folder = tmp_path / case
        first = training.train(
            "subjects", holder, folder, drop_last=drop_last, stop=stop, every=every
        )
        assert len(first) == stop
        second = training.train(
            "subjects",
            holder,
            folder / "second",
            drop_last=drop_last,
            checkpoint=folder / f"step={step}.ckpt",
        )
        found = training.by_epoch(first[:step] + second)
        if drop_last and step == per_epoch:
            assert_same(found, expected, drop_last=True)
        else:
            assert found == expected, case


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loader", ["stateful", "wrapped"])
def test_lightning_goes_on_in_an_epoch_by_the_loaders_own_state(
    training: ModuleType, tmp_path: Path, loader: str
) -> None:
    """Lightning saves a loader that has a state; at an epoch's end it does not load it."""
    expected = training.train(loader, "loader", tmp_path / "whole", drop_last=False)
    first = training.train(loader, "loader", tmp_path, drop_last=False, stop=8, every=7)
    second = training.train(
        loader, "loader", tmp_path / "2", drop_last=False, checkpoint=tmp_path / "step=7.ckpt"
    )
    assert first[:7] + second == expected
