"""Each attempt of the campaign of ``tests/benchmarks`` once; the races it makes twenty times."""

from pathlib import Path

import campaign
import pytest
from faulty import LoopbackOpenNeuro
from workers import Nursery


@pytest.fixture(scope="session")
def _campaign(_published: LoopbackOpenNeuro) -> None:
    campaign.publish(_published)


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, campaign.WAYS[number % 2]) for number, name in enumerate(campaign.ATTEMPTS)],
    indirect=["way"],
)
@pytest.mark.usefixtures("_campaign")
def test_the_budget_holds_and_the_user_loses_nothing(
    openneuro: LoopbackOpenNeuro, nursery: Nursery, tmp_path: Path, name: str, way: str
) -> None:
    """All that is wrong is told, and mended by the doctor; the root goes on to serve."""
    row = campaign.make(name, openneuro, nursery, tmp_path / "place", way, 1)
    assert row.holds, row
