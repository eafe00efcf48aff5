"""Training over the loopback under half of the dataset's bytes: what is fetched, what is held."""

import torchio as tio
from conftest import heads
from workers import Observer

import tio_openneuro as tno
from tio_openneuro.annex.repo import AnnexRepo

EPOCHS = 4
HEADS = 16


def test_each_epoch_fetches_again_little_more_than_what_cannot_be_kept(openneuro, root):
    """The least that any order of eviction fetches is what the budget cannot hold; a window more.

    The server's own count is compared, so that a download that was cancelled counts too.
    """
    openneuro.publish("ds900016", heads(HEADS))
    images = {
        "t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz"),
        "lesion": tno.Label("sub-*/anat/*_mask.nii.gz"),
    }
    with tno.DataladSubjectsDataset("ds900016", images, disk_budget="1 GB") as dataset:
        total_bytes = dataset.nbytes
        largest_bytes = max(row.content.size_bytes for row in dataset._rows)
    budget_bytes = total_bytes // 2
    openneuro.reset_counters()
    sent_bytes = []
    with tno.DataladSubjectsDataset("ds900016", images, disk_budget=budget_bytes) as dataset:
        clone = AnnexRepo(dataset.parts[0].folder)
        with (
            Observer(clone) as observer,
            tno.BudgetedQueue(
                dataset, 8, 2, tio.UniformSampler(8), num_workers=2, seed=3, ram_budget="1 GB"
            ) as queue,
        ):
            for _ in range(EPOCHS):
                seen = [patch["subject_id"] for patch in queue]
                assert sorted(seen) == sorted(2 * [f"sub-{n + 1:02}" for n in range(HEADS)])
                sent_bytes.append(openneuro.total("ds900016").bytes)
        statistics = dataset.statistics()
    again_bytes = (sent_bytes[-1] - sent_bytes[0]) / (EPOCHS - 1)
    floor_bytes = total_bytes - budget_bytes
    assert 0.9 * floor_bytes <= again_bytes <= 1.02 * (floor_bytes + 2 * largest_bytes)
    assert budget_bytes - 2 * largest_bytes < observer.peak_bytes <= budget_bytes
    # The observer looks now and then; the ledger counts every byte.
    assert 0.9 * budget_bytes < statistics.peak_bytes <= budget_bytes
    assert statistics.evicted_bytes >= 2 * floor_bytes
