"""Draws that depend on a seed and not on the thread: compared with torch's own seeding."""

import functools
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torchio as tio

from tio_openneuro.torchio_seams.randomness import drawing_from, find_other_generator

_TRANSFORMS = {
    "affine": tio.RandomAffine(),
    "elastic": tio.RandomElasticDeformation(num_control_points=5, max_displacement=2),
    "noise": tio.RandomNoise(),
    "flip": tio.RandomFlip(axes=(0, 1, 2)),
    "bias": tio.RandomBiasField(),
    "blur": tio.RandomBlur(),
    "gamma": tio.RandomGamma(),
    "motion": tio.RandomMotion(),
    "ghosting": tio.RandomGhosting(),
    "spike": tio.RandomSpike(),
    "swap": tio.RandomSwap(patch_size=4),
    "anisotropy": tio.RandomAnisotropy(),
    "one of": tio.OneOf([tio.RandomNoise(), tio.RandomFlip()], p=0.7),
    "labels to image": tio.RandomLabelsToImage(label_key="label"),
}


def _subject():
    generator = torch.Generator().manual_seed(0)
    label = torch.zeros(1, 16, 16, 16, dtype=torch.uint8)
    label[:, 4:12, 4:12, 4:12] = 1
    return tio.Subject(
        t1=tio.ScalarImage(tensor=torch.rand(1, 16, 16, 16, generator=generator) + 1),
        label=tio.LabelMap(tensor=label),
    )


def _outcome(subject):
    return [image.data.clone() for image in subject.get_images(intensity_only=False)]


def _same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", _TRANSFORMS)
def test_a_transform_gives_in_any_thread_what_torch_seeding_gives_alone(name):
    """Eight threads at once repeat the serial run, and the global state stays as it was."""
    transform = _TRANSFORMS[name]
    expected = []
    for seed in range(8):
        torch.manual_seed(seed)
        expected.append(_outcome(transform(_subject())))
    state = torch.get_rng_state()

    def run(seed):
        with drawing_from(seed):
            return _outcome(transform(_subject()))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(run, range(8)))
    assert all(_same(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "sampler",
    [tio.UniformSampler(6), tio.LabelSampler(6, "label"), tio.WeightedSampler(6, "label")],
    ids=lambda sampler: type(sampler).__name__,
)
def test_a_patch_sampler_gives_what_torch_seeding_gives(sampler):
    """Patch locations are those of the same seed in the global generator."""
    torch.manual_seed(3)
    expected = [patch[tio.LOCATION].tolist() for patch in sampler(_subject(), 5)]
    with drawing_from(3):
        found = [patch[tio.LOCATION].tolist() for patch in sampler(_subject(), 5)]
    assert found == expected


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(3),
        lambda: torch.randn((2, 2)),
        lambda: torch.randint(9, (4,)),
        lambda: torch.randperm(7),
        lambda: torch.rand_like(torch.ones(3)),
        lambda: torch.randn_like(torch.ones(3)),
        lambda: torch.randint_like(torch.ones(3), 9),
        lambda: torch.normal(torch.zeros(3), torch.ones(3)),
        lambda: torch.normal(0.0, 1.0, (3,)),
        lambda: torch.bernoulli(torch.full((9,), 0.5)),
        lambda: torch.poisson(torch.full((9,), 3.0)),
        lambda: torch.multinomial(torch.ones(9), 3),
        lambda: torch.ones(9).multinomial(3),
        lambda: torch.ones(3).uniform_(2, 3),
        lambda: torch.ones(3).normal_(),
        lambda: torch.ones(3).random_(),
        lambda: torch.ones(3).bernoulli_(0.5),
        lambda: torch.ones(3).exponential_(),
        lambda: torch.ones(3).cauchy_(),
        lambda: torch.ones(3).geometric_(0.5),
        lambda: torch.ones(3).log_normal_(),
        lambda: torch.nn.init.normal_(torch.ones(3)),
        lambda: torch.distributions.Normal(0.0, 1.0).sample((3,)),
        lambda: torch.distributions.Gamma(torch.ones(3), torch.ones(3)).sample(),
    ],
)
def test_each_of_torchs_draws_comes_from_the_given_seed(draw):
    """The numbers are those of the global generator with that seed, which is left alone."""
    torch.manual_seed(11)
    expected = draw()
    state = torch.get_rng_state()
    with drawing_from(11):
        found = draw()
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_that_cannot_be_repeated_are_refused():
    """Dropout takes no generator: it raises instead of drawing from everybody's."""
    with drawing_from(0):
        with pytest.raises(NotImplementedError, match="dropout"):
            torch.nn.functional.dropout(torch.ones(3))
        kept = torch.nn.functional.dropout(torch.ones(3), training=False)
    assert kept.tolist() == [1, 1, 1]


def test_another_thread_draws_as_if_nobody_else_did():
    """While background threads add noise, the consumer's draws are those of its own seed."""
    torch.manual_seed(0)
    expected = torch.rand(400)
    ended = threading.Event()

    def disturb(seed):
        noise = tio.RandomNoise()
        with drawing_from(seed):
            while not ended.is_set():
                noise(_subject())

    threads = [threading.Thread(target=disturb, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    torch.manual_seed(0)
    found = torch.cat([torch.rand(1) for _ in range(400)])
    ended.set()
    for thread in threads:
        thread.join()
    assert torch.equal(found, expected)


def test_transforms_outside_behave_as_torchio_made_them():
    """In a thread that draws from the global generator, a seeded transform restores its state."""
    torch.manual_seed(5)
    with drawing_from(0):
        pass
    noise = tio.Noise(mean=0, std=1, seed=42)
    first = _outcome(noise(_subject()))
    torch.manual_seed(6)
    assert _same(first, _outcome(noise(_subject())))


class _Jitter(tio.Transform):
    """A user's transform that draws from NumPy."""

    def apply_transform(self, subject):
        """Scale by a random factor."""
        scale = np.random.uniform(0.9, 1.1)  # noqa: NPY002 - what users write
        subject.t1.set_data(subject.t1.data * scale)
        return subject


def _from_random(tensor):
    return tensor * random.random()


def test_generators_other_than_torchs_are_seen_in_a_transforms_code():
    """NumPy and random are named, through Compose, Lambda and partial; torch is none of them."""
    assert find_other_generator(_Jitter()) == "numpy.random"
    assert find_other_generator(tio.Compose([tio.RandomFlip(), _Jitter()])) == "numpy.random"
    assert find_other_generator(tio.OneOf({_Jitter(): 1.0})) == "numpy.random"
    assert find_other_generator(tio.Lambda(_from_random)) == "random"
    assert find_other_generator(lambda x: x * np.random.rand()) == "numpy.random"  # noqa: NPY002
    assert find_other_generator(functools.partial(_from_random)) == "random"
    assert find_other_generator(tio.Lambda(lambda tensor: tensor + torch.rand(1))) == ""
    assert find_other_generator(lambda x: np.flip(x) + 1) == ""
    for transform in _TRANSFORMS.values():
        assert find_other_generator(transform) == ""


_SHARED = np.random.default_rng(0)


def _closure():
    generator = np.random.default_rng(0)
    return lambda tensor: tensor + generator.normal()


def _imports(tensor):
    from numpy.random import rand

    return tensor + rand()  # noqa: NPY002


def _jitter(tensor):
    return tensor + _SHARED.normal()


class _Calls(tio.Transform):
    def apply_transform(self, subject):
        subject.t1.set_data(_jitter(subject.t1.data))
        return subject


@pytest.mark.parametrize(
    "draw",
    [
        _closure(),
        _imports,
        _jitter,
        lambda tensor: _jitter(tensor) + 1,
        lambda tensor, generator=_SHARED: tensor + generator.normal(),
        lambda tensor: tensor + np.random.default_rng().normal(),
        lambda tensor: [_jitter(part) for part in tensor],
        _Calls(),
    ],
)
def test_numpys_generators_are_seen_wherever_a_function_reaches_them(draw):
    """In a closure, an import, a global, a default, a comprehension, and in functions called."""
    assert find_other_generator(draw) == "numpy.random"
    if not isinstance(draw, tio.Transform):
        assert find_other_generator(tio.Compose([tio.Lambda(draw)])) == "numpy.random"
