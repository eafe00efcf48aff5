"""A plan against a run of the real queue and engine over the loopback: the bytes are the same."""

import threading
import time

import pytest
import torchio as tio
from conftest import heads

import tio_openneuro as tno
from tio_openneuro.plan.training import Play, Training

ACCESSION = "ds900095"
SUBJECTS = 12
PATCHES = 4
WINDOW = 8
EPOCHS = 3
SEED = 3
IMAGES = {
    "t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz"),
    "lesion": tno.Label("sub-*/anat/*_label-lesion_mask.nii.gz"),
}
_TIMEOUT_S = 60


@pytest.fixture(scope="session")
def _subjects(_published):
    _published.publish(ACCESSION, heads(SUBJECTS, shape=(40, 36, 32)))


def rests(queue, dataset):
    """Return whether nothing more is made or fetched before the consumer goes on."""
    filler, leases = queue._filler, dataset._engine._here()
    ahead = leases.look_ahead
    with filler._changed:
        if filler._running or filler._schedule.next() is not None:
            return False
    with ahead._mutex:
        waits = ahead._first_unready() is not None
    return not leases.fetches._known and (not waits or ahead._blocked == leases.changes.moment())


def wait_for_rest(queue, dataset):
    """Wait until nothing happens any more."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    while not rests(queue, dataset):
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.005)


@pytest.mark.usefixtures("_subjects", "openneuro")
@pytest.mark.parametrize("share", [0.3, 0.55, 0.8, 1.0])
def test_a_plan_tells_the_bytes_of_a_run(share, tmp_path):
    """Of each epoch, what is fetched ahead of the next one included, and the peak."""
    with tno.DataladSubjectsDataset(ACCESSION, IMAGES, root=tmp_path / "root") as dataset:
        files = [row.content.files for row in dataset._rows]
        units = [{str(file.key): file.key.size_bytes for file in unit} for unit in files]
        budget_bytes = round(share * dataset.nbytes)
        total_bytes = dataset.nbytes
    told = Play(
        Training(
            units=units,
            make_s=[0.01] * SUBJECTS,
            step_s=1e6,
            rate=1e7,
            epochs=EPOCHS,
            seed=SEED,
            window=WINDOW,
            samples=PATCHES,
            workers=1,
            batch=PATCHES,
        ),
        budget_bytes,
    )
    fetched_bytes = []
    with (
        tno.DataladSubjectsDataset(
            ACCESSION, IMAGES, root=tmp_path / "root", disk_budget=budget_bytes
        ) as dataset,
        tno.BudgetedQueue(
            dataset, WINDOW, PATCHES, tio.UniformSampler(8), num_workers=1, seed=SEED
        ) as queue,
    ):
        for _ in range(EPOCHS):
            for number, _patch in enumerate(queue, 1):
                if number % PATCHES == 0:
                    wait_for_rest(queue, dataset)
            fetched_bytes.append(dataset.statistics().fetched_bytes)
        peak_bytes = dataset.statistics().peak_bytes
    assert fetched_bytes == [mark.fetched_bytes[0] for mark in told.marks[:EPOCHS]]
    assert peak_bytes == told.peak_bytes
    assert (fetched_bytes[-1] == total_bytes) == (share == 1)
