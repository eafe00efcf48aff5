"""Ranks share the subjects out, and a wrong set-up is told what is wrong with it.

First in one process, where ranks are given by hand, then two real ranks under torchrun with gloo.
"""

from collections import Counter
from pathlib import Path

import pytest
import torchio as tio
from conftest import heads
from rank_dealing import EPOCHS, SAMPLES, SUBJECTS, make_dataset, make_queue
from test_queue import BrokenDataset
from torch.utils.data import DataLoader, Subset
from torch.utils.data.distributed import DistributedSampler
from torchrun import run_ranks

from tio_openneuro.loopback import LoopbackOpenNeuro

ACCESSION = "ds900094"
SHARE = -(-SUBJECTS // 2)
ALL = {f"sub-{number}" for number in range(SUBJECTS)}


def names(queue: object) -> list[str]:
    """Return the subjects of an epoch's patches, in order."""
    return [patch["subject_id"] for patch in queue]


def assert_dealt(first: list[str], second: list[str], subjects: set[str] = ALL) -> None:
    """Two ranks' epochs have equal counts, every subject, and share none but to fill up."""
    share = -(-len(subjects) // 2)
    assert len(first) == len(second) == share * SAMPLES
    counts = Counter(first) + Counter(second)
    assert set(counts) == subjects
    extra = 2 * share - len(subjects)
    assert sorted(counts.values())[len(counts) - extra :] == [2 * SAMPLES] * extra
    assert len(set(first) & set(second)) <= extra


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1), (None, None)])
def test_ranks_given_by_hand_share_the_subjects(seeds: tuple[int | None, int | None]) -> None:
    """Whatever the seeds: the deal depends on the epoch alone, and epochs differ."""
    epochs = []
    for rank, seed in enumerate(seeds):
        with make_queue(make_dataset(), ranks=(rank, 2), seed=seed) as queue:
            assert (len(queue), queue.num_subjects) == (SHARE * SAMPLES, SHARE)
            assert queue.iterations_per_epoch == queue.left == len(queue)
            epochs.append([names(queue) for _ in range(EPOCHS)])
    for first, second in zip(*epochs, strict=True):
        assert_dealt(first, second)
    assert len({frozenset(epoch) for epoch in epochs[0]}) > 1


def test_the_deal_is_the_same_whatever_came_before() -> None:
    """Epoch 2 has one deal, also where it is the first one that is read."""
    found = []
    for first in (0, 2):
        with make_queue(make_dataset(), ranks=(1, 2)) as queue:
            queue.set_epoch(first)
            found.append([names(queue) for _ in range(first, 3)][-1])
    assert found[0] == found[1]


@pytest.mark.parametrize("ranks", [(2, 2), (-1, 2), (0, 0), "two", (0,)])
def test_ranks_out_of_range_are_refused(ranks: object) -> None:
    """By the parameter's name."""
    with pytest.raises(ValueError, match="ranks"):
        make_queue(make_dataset(), ranks=ranks).close()


def test_a_state_without_skips_is_valid_on_every_rank() -> None:
    """Lightning saves rank 0's alone: each rank goes on with its own share."""
    whole = []
    for rank in range(2):
        with make_queue(make_dataset(), ranks=(rank, 2)) as queue:
            whole.append([names(queue) for _ in range(2)])
    with make_queue(make_dataset(), ranks=(0, 2)) as queue:
        for index in range(3):
            queue[index]
        state = queue.state_dict()
    for rank in range(2):
        with make_queue(make_dataset(), ranks=(rank, 2)) as queue:
            queue.load_state_dict(state)
            assert [names(queue), names(queue)] == [whole[rank][0][3:], whole[rank][1]]


def test_ranks_beside_a_subject_sampler_are_refused() -> None:
    """One of the two deals the subjects out."""
    dataset = make_dataset()
    sampler = DistributedSampler(dataset, num_replicas=2, rank=0)
    with pytest.raises(ValueError, match=r"subject_sampler.*ranks|ranks.*subject_sampler"):
        make_queue(dataset, ranks=(0, 2), subject_sampler=sampler, shuffle_subjects=False).close()


def test_in_order_the_subjects_are_dealt_in_turns() -> None:
    """Without shuffling, each rank has every other one, and the first again to fill up."""
    for rank in range(2):
        options = {"shuffle_subjects": False, "shuffle_patches": False}
        with make_queue(make_dataset(), ranks=(rank, 2), **options) as queue:
            expected = [f"sub-{number % SUBJECTS}" for number in range(rank, 8, 2)]
            assert names(queue) == [name for name in expected for _ in range(SAMPLES)]


def test_ranks_with_unequal_numbers_of_patches_are_refused() -> None:
    """They would wait for one another for ever; ranks that share nothing may have them."""
    subjects = list(make_dataset().dry_iter())
    subjects[1]["num_samples"] = 3
    dataset = tio.SubjectsDataset(subjects)
    with pytest.raises(ValueError, match="num_samples"):
        make_queue(dataset, ranks=(0, 2)).close()
    make_queue(dataset, ranks=None).close()
    make_queue(dataset, ranks=(0, 1)).close()


@pytest.mark.parametrize("broken", [[1], [0, 3, 4]])
def test_a_skipped_share_is_taken_by_the_ranks_own_next_subjects(broken: list[int]) -> None:
    """Also where the queue deals: as many patches, of the rank's own subjects."""
    shares = []
    for rank in range(2):
        options = {"ranks": (rank, 2), "on_error": "skip", "max_length": 100}
        with make_queue(BrokenDataset(broken), **options) as queue:
            own = {f"sub-{index:02d}" for index in queue._planner.plan(0).order}
            found = [patch["name"] for patch in queue]
            assert len(found) == len(queue) == 3 * SAMPLES
            assert set(found) == own - {f"sub-{index:02d}" for index in broken}
            shares.append(own)
    assert shares[0].isdisjoint(shares[1])


# Loaders that lead astray, in one process


def zipped(queue: object) -> None:
    """Read two iterators over one loader in turns."""
    loader = tio.SubjectsLoader(queue, batch_size=2)
    list(zip(loader, loader, strict=True))


def interleaved(queue: object) -> None:
    """Begin one iterator while another one is read."""
    loader = tio.SubjectsLoader(queue, batch_size=2)
    first = iter(loader)
    next(first)
    next(first)
    next(iter(loader))
    next(first)


def skipping(queue: object) -> None:
    """Leave out the first batches, as Accelerate recommends after a restart."""
    pytest.importorskip("accelerate")
    from accelerate.data_loader import skip_first_batches

    list(skip_first_batches(tio.SubjectsLoader(queue, batch_size=2), 2))


def distributed(queue: object) -> None:
    """Have a trainer's sampler in the loader, of another rank."""
    sampler = DistributedSampler(queue, num_replicas=2, rank=1, shuffle=False)
    list(tio.SubjectsLoader(queue, batch_size=2, sampler=sampler))


def shuffled(queue: object) -> None:
    """Let the loader shuffle."""
    list(tio.SubjectsLoader(queue, batch_size=2, shuffle=True))


def one_by_one(queue: object) -> None:
    """Have a trainer's sampler ask for single patches through a dataset of the user's."""
    sampler = DistributedSampler(queue, num_replicas=2, rank=0, shuffle=False)
    list(DataLoader(Subset(queue, range(len(queue))), collate_fn=list, sampler=sampler))


def shuffled_by_a_list(queue: object) -> None:
    """Give the loader batches of the user's own."""
    list(DataLoader(queue, collate_fn=list, batch_sampler=[[0, 1], [4, 5]]))


def parts(queue: object) -> None:
    """Read a part of the queue."""
    list(tio.SubjectsLoader(Subset(queue, range(4, 8)), batch_size=2))


def two_loaders(queue: object) -> None:
    """Read one queue by two loaders in turns."""
    loaders = [tio.SubjectsLoader(queue, batch_size=size) for size in (2, 3)]
    list(zip(*loaders, strict=False))


def looked_at(queue: object) -> None:
    """Look at a batch, as many do, before a trainer's sampler asks."""
    next(iter(tio.SubjectsLoader(queue, batch_size=2)))
    one_by_one(queue)


def prepared(queue: object) -> None:
    """Have Accelerate deal the batches out, on the first of two ranks."""
    pytest.importorskip("accelerate")
    from accelerate.data_loader import prepare_data_loader

    loader = DataLoader(queue, collate_fn=list, batch_size=2)
    list(prepare_data_loader(loader, num_processes=2, process_index=0, put_on_device=False))


@pytest.mark.parametrize(
    ("lead", "words", "wrong"),
    [
        (zipped, "two iterators", "shuffle="),
        (interleaved, "two iterators", "shuffle="),
        (skipping, "load_state_dict", "shuffle="),
        (distributed, "use_distributed_sampler=False", "shuffle="),
        (shuffled, "shuffle=False", "use_distributed_sampler"),
        (one_by_one, "use_distributed_sampler=False", "shuffle="),
        (looked_at, "use_distributed_sampler=False", "two iterators"),
        (shuffled_by_a_list, "asks by list", "shuffle="),
        (parts, "dataset[indices]", "shuffle="),
        (two_loaders, "two iterators", "shuffle="),
        (prepared, "prepare()", "use_distributed_sampler"),
    ],
)
def test_indices_that_jump_name_what_made_them(lead, words: str, wrong: str) -> None:
    """The cause and the remedy, and nothing that the user has right."""
    with make_queue(make_dataset()) as queue:
        with pytest.raises(RuntimeError) as raised:
            lead(queue)
        assert words in str(raised.value)
        assert wrong not in str(raised.value)
        assert "num_workers" not in str(raised.value) or lead is shuffled


# Two real ranks


@pytest.fixture(scope="module")
def _subjects(_published: LoopbackOpenNeuro) -> None:
    _published.publish(ACCESSION, heads(SUBJECTS))


@pytest.mark.usefixtures("_subjects", "openneuro")
def test_two_real_ranks_share_the_subjects_or_are_told_why_not(tmp_path: Path) -> None:
    """With and without sampler, seeds, roots; sharded already; made too early; led astray."""
    found = run_ranks("rank_dealing.py", tmp_path / "results", ACCESSION)
    by_case = {name: [rank[name] for rank in found] for name in found[0]}
    errors = {name: [case.get("error") for case in pair] for name, pair in by_case.items()}
    astray = {"made before", "a trainer's sampler", "accelerate"}
    assert {name: pair for name, pair in errors.items() if pair != [None, None]}.keys() == {
        *astray & by_case.keys()
    }
    assert all("init_process_group" in text for text in errors["made before"])
    assert all("use_distributed_sampler" in text for text in errors["a trainer's sampler"])
    assert all("prepare" in text for text in errors.get("accelerate", []))

    openneuro_ids = {f"sub-{number:02}" for number in range(1, SUBJECTS + 1)}
    for name in ("one seed", "seed of each rank", "no seed", "in order", "told", "one root"):
        subjects = openneuro_ids if name == "one root" else ALL
        for case in by_case[name]:
            assert (case["length"], case["num_subjects"]) == (SHARE * SAMPLES, SHARE), name
        for epoch in zip(*(case["epochs"] for case in by_case[name]), strict=True):
            assert_dealt(*epoch, subjects)
    for epoch in zip(*(case["epochs"] for case in by_case["two roots"]), strict=True):
        assert_dealt(*epoch, openneuro_ids)
    for epoch in zip(*(case["epochs"] for case in by_case["distributed sampler"]), strict=True):
        assert_dealt(*epoch)

    first, second = by_case["sharded already"]
    assert (first["length"], second["length"]) == (4 * SAMPLES, 3 * SAMPLES)
    assert set(first["epochs"][0]).isdisjoint(second["epochs"][0])
    first, second = by_case["the same on purpose"]
    assert first["epochs"] == second["epochs"]
    first, second = by_case["random sampler"]
    assert first["epochs"] != second["epochs"]

    warned = {
        name: [len(case.get("warnings", ())) for case in pair] for name, pair in by_case.items()
    }
    once = {"one seed", "seed of each rank", "no seed", "in order", "one root", "two roots"}
    assert {name for name, pair in warned.items() if pair == [1, 1]} == {*once, "random sampler"}
    assert all(sum(pair) in {0, 2} for pair in warned.values())


def test_lightning_on_two_ranks(tmp_path: Path) -> None:
    """Without Lightning's sampler the ranks share the subjects; with it they are told."""
    pytest.importorskip("lightning")
    found = run_ranks("rank_lightning.py", tmp_path / "dealt")
    for epoch in zip(*(rank["epochs"] for rank in found), strict=True):
        assert_dealt(*epoch)
    found = run_ranks("rank_lightning.py", tmp_path / "sampled", "--own-sampler")
    assert any("use_distributed_sampler=False" in rank.get("error", "") for rank in found)
