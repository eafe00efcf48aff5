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

from tio_openneuro.errors import RamBudgetError

DEADLINE_S = 10.0


def subjects(folder: Path) -> list[tio.Subject]:
    """Return subjects of local files whose shape cannot be known before they are read."""
    found = []
    for number in range(3):
        path = folder / f"{number}.nrrd"
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.zeros((8, 8, 8), np.int16)), path)
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
