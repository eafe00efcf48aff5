"""What a dataset holds of each subject, in RAM and in a pickle, before any is loaded."""

import copy
import gc
import pickle
import tracemalloc
from pathlib import Path

import pytest
from test_dataset import IMAGES
from test_habits import write_bids
from test_tables import open_bids, volumes

import tio_openneuro as tno


def test_a_subject_costs_what_its_names_do(tmp_path: Path) -> None:
    """A hundred more subjects take below 1,500 B each in RAM, and below 150 B in a pickle."""
    held, pickled, again = [], [], []
    for count in (20, 120):
        table = "".join(f"{n}\t{20 + n}\tsite{n % 7}\n" for n in range(1, count + 1))
        table = "participant_id\tage\tsite\n" + table
        folder = write_bids(tmp_path / f"bids-{count}", volumes(count), participants=table)
        open_bids(folder).close()
        gc.collect()
        tracemalloc.start()
        dataset = open_bids(folder)
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
        packed = pickle.dumps(dataset)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        copied = pickle.loads(packed)
        gc.collect()
        again.append(tracemalloc.get_traced_memory()[0] - before)
        tracemalloc.stop()
        pickled.append(len(packed))
        assert [dict(s) for s in copied.dry_iter()[:3]].__repr__() == str(
            [dict(s) for s in dataset.dry_iter()[:3]]
        )
        dataset.close()
    assert (held[1] - held[0]) / 100 < 1500
    assert (again[1] - again[0]) / 100 < 1500
    assert (pickled[1] - pickled[0]) / 100 < 150


def test_subjects_are_built_when_they_are_asked_for(tmp_path: Path) -> None:
    """Each time a new one, the same as the last; those of a view and of a copy are its own."""
    with open_bids(write_bids(tmp_path / "bids", volumes(3))) as dataset:
        subjects = dataset.dry_iter()
        assert len(subjects) == 3
        first, last = subjects[0], subjects[-1]
        assert last is not subjects[2]
        assert repr(dict(last)) == repr(dict(subjects[2]))
        first["changed"] = True
        assert "changed" not in subjects[0]
        assert [s["subject_id"] for s in subjects[1:]] == ["sub-02", "sub-03"]
        assert [s["subject_id"] for s in dataset[[2, 0]].dry_iter()] == ["sub-03", "sub-01"]
        for twin in (copy.copy(dataset), copy.deepcopy(dataset)):
            assert [s["subject_id"] for s in twin.dry_iter()] == ["sub-01", "sub-02", "sub-03"]
        with pytest.raises(IndexError):
            subjects[3]


@pytest.mark.usefixtures("openneuro")
def test_a_pickled_dataset_has_one_engine() -> None:
    """What its subjects lease is counted where the dataset's own leases are, also once loaded."""
    with (
        tno.DataladSubjectsDataset("ds900001", IMAGES) as dataset,
        pickle.loads(pickle.dumps(tno.concat([dataset, dataset]))) as copied,
    ):
        unloaded = copied.dry_iter()[5]
        assert unloaded["t1"].data.shape == copied[11]["t1"].data.shape
        statistics = copied.statistics()
        assert (statistics.fetched_files, statistics.hit_files) == (2, 1)
