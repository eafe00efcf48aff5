"""What a dataset tells of the processes that it was handed to."""

import pytest
import torchio as tio
from test_dataset import IMAGES

import tio_openneuro as tno


@pytest.mark.usefixtures("openneuro")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_parent_tells_what_workers_fetched(method: str) -> None:
    """Files, bytes and evictions of a loader's workers are among the parent's counts."""
    with tno.DataladSubjectsDataset("ds900001", IMAGES) as dataset:
        loader = tio.SubjectsLoader(
            dataset, batch_size=1, num_workers=2, multiprocessing_context=method
        )
        assert len(list(loader)) == 6
        statistics = dataset.statistics()
        assert (statistics.fetched_files, statistics.http_files) == (12, 12)
        assert statistics.fetched_bytes == dataset.nbytes
        assert dataset.evict() == dataset.nbytes
        assert dataset.statistics().evicted_files == 12
