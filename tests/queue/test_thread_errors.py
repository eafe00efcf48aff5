"""What stops a filling thread reaches the consumer at once, as it was raised.

Also between two subjects, where nobody's patches are being made. Consumers that would wait for
ever are woken by closing their queue.
"""

import threading
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torchio as tio
from rank_dealing import make_dataset, make_queue

import tio_openneuro as tno
from tio_openneuro.errors import DiskBudgetError, RamBudgetError
from tio_openneuro.queue.source import NoContent

DEADLINE_S = 10.0


def subjects(folder: Path) -> list[tio.Subject]:
    """Return subjects of local files whose shape cannot be known before they are read."""
    found = []
    for number in range(3):
        path = folder / f"{number}.nrrd"
        voxels = np.full((8, 8, 8), number, np.int16)
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels), path)
        found.append(tio.Subject(t1=tio.ScalarImage(path), subject_id=f"sub-{number}"))
    return found


def first_answer(queue: tio.Queue) -> object:
    """Return the first patch, or what was raised instead; fail where neither comes in time."""
    found: list[object] = []

    def ask() -> None:
        try:
            found.append(next(iter(queue)))
        except Exception as error:  # noqa: BLE001 - handed over
            found.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(DEADLINE_S)
    in_time = not asking.is_alive()
    queue.close()
    asking.join()
    assert in_time, "nothing came"
    return found[0]


class Gone(tio.SubjectsDataset):
    """A dataset whose subjects cannot be listed any more once threads ask."""

    def dry_iter(self) -> list[tio.Subject]:
        """Return them, or raise."""
        if threading.current_thread() is not threading.main_thread():
            raise OSError("the share is gone")
        return super().dry_iter()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_an_error_between_two_subjects_is_raised_in_the_loop(
    tmp_path: Path, num_workers: int
) -> None:
    """The threads ask for the next subject's size, and that fails."""
    dataset = Gone(subjects(tmp_path))
    found = first_answer(make_queue(dataset, num_workers=num_workers, start_background=False))
    assert isinstance(found, OSError)
    assert "the share is gone" in str(found)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_budget_below_the_fixed_part_is_refused_when_the_queue_is_made(
    tmp_path: Path, num_workers: int
) -> None:
    """In bytes, also where no shape is known."""
    with pytest.raises(RamBudgetError, match=r"40000000 bytes"):
        first_answer_of_made(subjects(tmp_path), num_workers, "40 MB")


def first_answer_of_made(made: list[tio.Subject], num_workers: int, ram_budget: object) -> None:
    """Make a queue; where that is not refused, fail with what comes of it."""
    queue = make_queue(tio.SubjectsDataset(made), num_workers=num_workers, ram_budget=ram_budget)
    pytest.fail(f"was made, and gave {first_answer(queue)!r}")


@pytest.mark.parametrize("known", [False, True])
def test_a_budget_of_few_bytes_asks_for_the_unit(tmp_path: Path, known: bool) -> None:
    """``ram_budget=4`` is four bytes: were GB meant?"""
    made = list(make_dataset().dry_iter()) if known else subjects(tmp_path)
    with pytest.raises((RamBudgetError, ValueError), match="4 GB"):
        first_answer_of_made(made, 1, 4)


class Faulty(NoContent, tio.SubjectsDataset):
    """A dataset that raises once, in one of the calls that fill a queue."""

    def __init__(self, made: list[tio.Subject], call: str, calls: int, error: BaseException):
        """Raise that error in the call of that name and number, counted from when it is armed."""
        super().__init__(made)
        self.call, self.calls, self.error, self.armed = call, calls, error, False

    def _note(self, call: str) -> None:
        self.calls -= self.armed and call == self.call
        if not self.calls:
            self.calls = -1
            raise self.error

    def __getitem__(self, index: int) -> tio.Subject:
        """Load a subject, or raise."""
        self._note("load")
        return super().__getitem__(index)

    def prepared_size(self, index: int) -> None:
        """Know no size, or raise."""
        self._note("size")

    def dry_iter(self) -> list[tio.Subject]:
        """List the subjects, or raise."""
        self._note("list")
        return super().dry_iter()


def read(queue: tno.BudgetedQueue) -> tuple[list[bytes], list[BaseException]]:
    """Return the patches of an epoch, and the errors, after each of which the reader goes on."""
    found: list[bytes] = []
    errors: list[BaseException] = []

    def go_on() -> None:
        while len(errors) < 5:
            try:
                found.append(queue[len(found)].t1.data.numpy().tobytes())
            except StopIteration:
                return
            except BaseException as error:  # noqa: BLE001 - handed over
                errors.append(error)

    reading = threading.Thread(target=go_on, daemon=True)
    reading.start()
    reading.join(6 * DEADLINE_S)
    in_time = not reading.is_alive()
    queue.close()
    reading.join()
    assert in_time, f"nothing came after {errors}"
    return found, errors


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("size", KeyError("a programming error")),
        ("size", MemoryError()),
        ("list", OSError("the share is gone")),
        ("list", SystemExit(3)),
        ("load", KeyboardInterrupt()),
        ("load", SystemExit(3)),
    ],
)
def test_whatever_stops_a_thread_is_raised_once_and_no_patch_is_lost(
    tmp_path: Path, num_workers: int, calls: int, call: str, error: BaseException
) -> None:
    """As the object that was raised; whoever goes on gets the patches of an undisturbed epoch."""
    made = subjects(tmp_path)
    runs = []
    for disturbed in (False, True):
        dataset = Faulty(made, call, calls, error)
        options = {"num_workers": num_workers, "on_error": "skip", "start_background": False}
        queue = make_queue(dataset, **options)
        dataset.armed = disturbed
        runs.append(read(queue))
    assert runs[0][1] == []
    assert len(runs[1][1]) == 1
    assert runs[1][1][0] is error
    assert runs[1][0] == runs[0][0]


def test_a_disk_budget_of_few_bytes_asks_for_the_unit(openneuro: object, root: Path) -> None:
    """Before what the root holds is evicted for it."""
    images = {"t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz")}
    with tno.DataladSubjectsDataset("ds900001", images, disk_budget="1 MB") as dataset:
        held_bytes = dataset.fetch()
        assert held_bytes > 0
        with pytest.raises(DiskBudgetError, match="10 GB"):
            tno.DataladSubjectsDataset("ds900001", images, disk_budget=10)
        assert dataset.statistics().used_bytes == held_bytes
        with pytest.raises(RamBudgetError, match="4 GB"):
            list(dataset.batches(ram_budget=4))
