"""The same patches over a real link: any number of threads, rates, budgets and restarts."""

import json

import pytest
import torchio as tio
from conftest import heads
from test_state import digest

import tio_openneuro as tno

ACCESSION = "ds900092"
SUBJECTS = 5
PATCHES = 3
EPOCHS = 3
LENGTH = SUBJECTS * PATCHES
IMAGES = {
    "t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz"),
    "lesion": tno.Label("sub-*/anat/*_label-lesion_mask.nii.gz"),
}


@pytest.fixture(scope="session")
def _subjects(_published):
    _published.publish(ACCESSION, heads(SUBJECTS, shape=(40, 36, 32)))


@pytest.fixture
def make_queue(_subjects, openneuro, tmp_path):
    """Return a function that makes a queue over a dataset with a root of its own."""
    opened = []

    def make(num_workers, *, ram_budget="4 GB", disk_budget="1 GB", root="root"):
        transform = tio.Compose([tio.RandomAffine(), tio.RandomNoise(), tio.ZNormalization()])
        dataset = tno.DataladSubjectsDataset(
            ACCESSION, IMAGES, root=tmp_path / root, disk_budget=disk_budget, transform=transform
        )
        queue = tno.BudgetedQueue(
            dataset,
            7,
            PATCHES,
            tio.UniformSampler(12),
            num_workers=num_workers,
            ram_budget=ram_budget,
            seed=5,
        )
        opened.extend([queue, dataset])
        return queue

    yield make
    for one in opened:
        one.close()
    openneuro.set_connection_rate(None)
    openneuro.set_latency(0)


def epochs(queue):
    """Return the digests of three epochs."""
    return [digest(patch) for _ in range(EPOCHS) for patch in queue]


def test_threads_links_and_budgets_change_no_patch(make_queue, openneuro):
    """Throttled and not, with room for all and for little, on 0, 1, 2 and 4 threads."""
    expected = epochs(make_queue(0))
    assert len(set(expected)) == EPOCHS * LENGTH
    openneuro.set_connection_rate(200_000)
    openneuro.set_latency(0.02)
    assert epochs(make_queue(1, root="slow", disk_budget="200 kB")) == expected
    openneuro.set_connection_rate(None)
    assert epochs(make_queue(2, root="late", ram_budget="75 MB")) == expected
    openneuro.set_latency(0)
    assert epochs(make_queue(4, disk_budget="200 kB")) == expected


@pytest.mark.parametrize("stops", [(4,), (4, LENGTH, LENGTH + 1), (LENGTH, LENGTH, 2 * LENGTH)])
def test_restarts_change_no_patch(make_queue, stops):
    """One to three, at an epoch's end too and twice in a row, with other numbers of threads."""
    expected = epochs(make_queue(2))
    found, state = [], None
    for number, stop in enumerate((*stops, EPOCHS * LENGTH)):
        queue = make_queue((2, 0, 4, 1)[number])
        if state is not None:
            queue.load_state_dict(json.loads(state))
        while len(found) < stop:
            left = min(stop, (len(found) // LENGTH + 1) * LENGTH) - len(found)
            patches = [queue[index] for index in range(left)]
            found += [digest(patch) for patch in patches]
        state = json.dumps(queue.state_dict())
        queue.close()
    assert found == expected
