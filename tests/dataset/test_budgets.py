"""Several disk budgets of one root: whose binds, who says so, and what a smaller one evicts."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from faulty import LoopbackOpenNeuro
from test_dataset import IMAGES, held_bytes
from test_habits import write_bids

import tio_openneuro as tno

_HERE = rf"30\.0 kB, stated by process {os.getpid()} \(this one\) since 20\d\d-"
_OTHER = """
import sys
import tio_openneuro as tno
with tno.DataladSubjectsDataset(
    "ds900001", {"t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz")}, disk_budget=sys.argv[1]
) as dataset:
    print(dataset, flush=True)
    sys.stdin.readline()
    print(dataset, flush=True)
"""


def opened(disk_budget: int | str) -> tno.DataladSubjectsDataset:
    """Open the six heads."""
    return tno.DataladSubjectsDataset("ds900001", IMAGES, disk_budget=disk_budget)


def test_a_larger_budget_that_is_not_the_one_that_binds_warns(openneuro: LoopbackOpenNeuro) -> None:
    """It names process and time, and what may hold the other; the binding one stands in repr."""
    with opened("30 kB") as old:
        assert repr(old).endswith("72.9 kB; disk budget 30.0 kB)")
        with pytest.warns(UserWarning, match=_HERE) as caught:
            new = opened("1 GB")
        assert "Out[" in str(caught[0].message)
        assert caught[0].filename == __file__
        with new:
            for view in (new, new[:2], new.split({"a": 0.5, "b": 0.5})["a"], tno.concat([new])):
                assert re.search(f"disk budget {_HERE}", repr(view))
            assert new.statistics().budget_bytes == 30_000
            old.close()
            assert "30.0 kB" not in repr(new)
            assert new.statistics().budget_bytes > 30_000
    assert new.dataset_id in repr(new)


def test_equal_and_smaller_budgets_do_not_warn(openneuro: LoopbackOpenNeuro, root: Path) -> None:
    """A smaller one evicts before it returns, and the others show it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with opened("1 GB") as first, opened(10**9) as second:
            first.fetch()
            assert held_bytes(root) == first.nbytes
            with opened("30 kB") as third:
                assert 0 < held_bytes(root) <= 30_000
                assert repr(third).endswith("; disk budget 30.0 kB)")
                assert re.search(_HERE, repr(first))
                assert re.search(_HERE, repr(second))
                # Who states none is content with any, and sees it.
                with opened("auto") as fourth:
                    assert re.search(_HERE, repr(fourth))
            assert repr(first).endswith("; disk budget 1.0 GB)")


def test_another_process_is_named_and_gone_with_it(
    openneuro: LoopbackOpenNeuro, root: Path
) -> None:
    """Its id is in warning, repr and the error of a unit that is too large, until it dies."""
    other = subprocess.Popen(
        [sys.executable, "-c", _OTHER, "30 kB"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    who = rf"30\.0 kB, stated by process {other.pid} since"
    assert "disk budget 30.0 kB)" in other.stdout.readline()
    with pytest.warns(UserWarning, match=who):
        dataset = opened("1 GB")
    with dataset:
        assert re.search(who, repr(dataset))
        with opened("20 kB"):
            other.stdin.write("\n")
            other.stdin.flush()
            mine = rf"20\.0 kB, stated by process {os.getpid()} since"
            assert re.search(mine, other.stdout.readline())
            other.kill()
            other.communicate()
        assert repr(dataset).endswith("; disk budget 1.0 GB)")


def test_a_unit_too_large_for_the_budget_of_another_names_it(openneuro: LoopbackOpenNeuro) -> None:
    """Raising one's own would not help."""
    labels = {"lesion": IMAGES["lesion"]}
    with (
        tno.DataladSubjectsDataset("ds900001", labels, disk_budget="1 kB"),
        pytest.raises(tno.DiskBudgetError, match=rf"process {os.getpid()} \(this one\) since"),
    ):
        opened("1 GB")


def test_what_has_no_budget_shows_none(tmp_path: Path) -> None:
    """A plain folder is not counted."""
    folder = write_bids(tmp_path / "plain", ["sub-01/anat/sub-01_T1w.nii.gz"])
    images = {"t1": tno.Scalar(suffix="T1w")}
    assert "budget" not in repr(tno.DataladSubjectsDataset(folder, images))
