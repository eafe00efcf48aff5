"""Which subjects an epoch visits, and which it may."""

import pytest
import torch
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from tio_openneuro.queue.order import Planner, Ranks


class Drifting:
    """A subject sampler of unknown class, whose weights training may change."""

    def __init__(self, weights):
        """Keep the weights."""
        self.weights = weights

    def __len__(self):
        """Return the subjects of an epoch."""
        return 2

    def __iter__(self):
        """Give the two heaviest."""
        return iter(sorted(range(len(self.weights)), key=lambda n: -self.weights[n])[:2])


@pytest.mark.parametrize(
    ("sampler", "foreseeable", "likeliest"),
    [
        (None, True, [0, 1, 2, 3]),
        (SubsetRandomSampler([3, 1]), True, [1, 3]),
        (WeightedRandomSampler([1, 9, 3, 3], 4), True, [1, 2, 3, 0]),
        (Drifting([0.1, 0.2, 0.9, 0.3]), False, [2, 3, 1, 0]),
        (Drifting([0.5]), False, [0, 1, 2, 3]),
    ],
)
def test_the_likeliest_subjects_come_first(sampler, foreseeable, likeliest):
    """By the sampler's weights where it has one for each subject, else in the dataset's order."""
    order = Planner([2] * 4, sampler, seed=0, shuffled=True)
    assert order.foreseeable is foreseeable
    assert order.likeliest() == likeliest


def test_weighted_draws_with_replacement_are_foreseen():
    """Asking for a later epoch first changes neither, and the user's sampler is not advanced."""
    sampler = WeightedRandomSampler([1.0, 2.0, 3.0], 12)
    asked, kept = (Planner([2] * 3, sampler, seed=5, shuffled=False) for _ in range(2))
    later = asked.plan(1)
    assert (asked.plan(0), later) == (kept.plan(0), kept.plan(1))
    assert kept.plan(0).order != kept.plan(1).order
    assert sampler.generator is None


def test_a_distributed_samplers_epoch_is_set_and_an_own_generators_passes_are_counted():
    """Epochs are those of the sampler itself, whatever the order in which they are asked for."""
    distributed = DistributedSampler(range(9), num_replicas=2, rank=1, seed=4)
    planner = Planner([1] * 9, distributed, seed=0, shuffled=False)
    for epoch in (2, 0, 1):
        order = planner.plan(epoch).order
        other = DistributedSampler(range(9), num_replicas=2, rank=1, seed=4)
        other.set_epoch(epoch)
        assert order == tuple(other)
    assert distributed.epoch == 0
    passes = RandomSampler(range(9), generator=torch.Generator().manual_seed(6))
    expected = [tuple(passes) for _ in range(3)]
    own = RandomSampler(range(9), generator=torch.Generator().manual_seed(6))
    planner = Planner([1] * 9, own, seed=0, shuffled=False)
    for epoch in (2, 0, 1, 2):
        assert planner.plan(epoch).order == expected[epoch]


@pytest.mark.parametrize("own", [False, True])
def test_a_sampler_that_knows_no_ranks_draws_for_itself_on_each(own):
    """From the queue's seed or from a generator of the user's; not where ranks share nothing."""
    orders = {}
    for share in (False, True):
        for rank in range(3):
            generator = torch.Generator().manual_seed(4) if own else None
            sampler = RandomSampler(range(50), generator=generator)
            ranks = Ranks(rank, 3, share=share)
            planner = Planner([1] * 50, sampler, seed=1, shuffled=False, ranks=ranks)
            orders[share, rank] = tuple(planner.plan(epoch).order for epoch in range(2))
            if generator is not None:
                assert generator.initial_seed() == 4
    assert len({orders[False, rank] for rank in range(3)}) == 1
    assert len({orders[True, rank] for rank in range(3)}) == 3
