"""The queue's memory as an observer outside sees it: never above the RAM budget.

Each cell is a process of its own. The long version is ``tests/benchmarks memory``.
"""

import sys

import pytest
from memory_cell import Cell, measure_cell, memory_cgroup, write_subjects

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.alone  # who else maps the same libraries counts in the proportional set size
@pytest.mark.parametrize(
    "cell",
    [
        Cell(96, "uniform", 2, budget=0, transform="heavy"),
        Cell(96, "label", 4, budget=0),
        Cell(128, "weighted", 2, budget=0, transform="none"),
    ],
    ids=str,
)
def test_the_smallest_budget_holds_the_process(tmp_path, cell):
    """All patches come, the peak stays within the budget, and most of the budget was needed."""
    write_subjects(tmp_path / "subjects", cell.side)
    reading = measure_cell(cell, tmp_path / "subjects")
    assert (reading.status, reading.patches) == (0, 32)
    assert reading.budget // 4 < reading.peak_rss <= reading.budget
    assert reading.peak_pss <= reading.budget


def test_a_control_group_of_the_budgets_size_kills_nobody(tmp_path):
    """The kernel itself holds the process to the budget, from the moment the queue is made."""
    write_subjects(tmp_path / "subjects", 128)
    with memory_cgroup("test") as cgroup:
        if cgroup is None:
            pytest.skip("needs the right to make a memory control group")
        cell = Cell(128, "label", 2, budget=0)
        reading = measure_cell(cell, tmp_path / "subjects", cgroup)
    assert (reading.status, reading.patches) == (0, 32)
    assert reading.peak_rss > reading.budget // 3


def test_what_the_consumer_allocates_stalls_nothing(tmp_path):
    """With 2 GB of the consumer's own, allocated after the queue was made, every patch comes."""
    write_subjects(tmp_path / "subjects", 96)
    cell = Cell(96, "uniform", 2, budget=0, ballast_bytes=2_000_000_000)
    reading = measure_cell(cell, tmp_path / "subjects")
    assert (reading.status, reading.patches) == (0, 32)
    assert reading.peak_rss > 2_000_000_000
    assert reading.charged <= reading.budget
