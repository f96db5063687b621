"""The average follows its formula, and its BatchNorm statistics are those of its own samples."""

import math

import pytest
import torch
from torch import nn

from pipeline.common.randomness import Purpose
from pipeline.config import NetworkConfig
from pipeline.model.ema import BATCHNORM_BATCH, BATCHNORM_IMAGES, EMA, estimate_batchnorm
from pipeline.model.latents import latents
from pipeline.model.networks import Generator, build_generator, initialize

CONFIG = NetworkConfig(image_size=32, width=4, latent_dim=8)


def generator(seed: int = 0) -> Generator:
    network = build_generator(CONFIG)
    initialize(network, seed, lane=0)
    return network


def first_weight(network: nn.Module) -> torch.Tensor:
    return next(network.parameters()).detach().clone()


def after(images_seen: int, ema: EMA) -> EMA:
    """Put an average where a run has seen so many images."""
    ema.images_seen.fill_(images_seen)
    return ema


@pytest.mark.parametrize(
    ("images_seen", "batch", "half_life"),
    [
        (1_000_000, 16, 500.0),  # the half-life that was asked for
        (2_000, 16, 100.0),  # early: a twentieth of the images seen
        (2_000, 200, 100.0),
    ],
)
def test_after_a_half_life_half_of_the_old_weights_is_left(images_seen: int, batch: int, half_life: float) -> None:
    start, target = generator(0), generator(1)
    ema = after(images_seen - batch, EMA(start, half_life_images=500, ramp_up=0.05, batch=batch))
    ema.update(list(target.parameters()))
    kept = 0.5 ** (batch / half_life)
    expected = kept * first_weight(start) + (1 - kept) * first_weight(target)
    torch.testing.assert_close(first_weight(ema.generator), expected)


@pytest.mark.parametrize(("batch", "half_life_images", "ramp_up"), [(16, 500, 0.05), (128, 10_000, 0.05), (4, 7, 3e-9)])
def test_the_weight_on_the_device_is_that_of_the_host(batch: int, half_life_images: int, ramp_up: float) -> None:
    """Bit by bit, whatever computes powers there: checkpoints of the host's weights continue as they would have."""
    start, target = generator(0), generator(1)
    ema, expected = (
        EMA(start, half_life_images, ramp_up, batch),
        [weight.detach().clone() for weight in start.parameters()],
    )
    for update in range(1, 40):
        ema.update(list(target.parameters()))
        half_life = min(half_life_images, update * batch * ramp_up)
        torch._foreach_lerp_(expected, list(target.parameters()), 1.0 - 0.5 ** (batch / max(half_life, 1e-8)))
        assert all(map(torch.equal, ema.generator.parameters(), expected))


def test_updates_of_half_a_batch_add_up_to_one_of_a_batch() -> None:
    start, target = generator(0), generator(1)
    twice, once = (after(10**6, EMA(start, 500, 0.05, batch)) for batch in (50, 100))
    for _ in range(2):
        twice.update(list(target.parameters()))
    once.update(list(target.parameters()))
    torch.testing.assert_close(first_weight(twice.generator), first_weight(once.generator))


def test_the_first_update_takes_over_what_random_weights_have_no_part_in() -> None:
    start, target = generator(0), generator(1)
    ema = EMA(start, 10_000, ramp_up=0.05, batch=16)
    ema.update(list(target.parameters()))  # a half-life of 0.8 images
    torch.testing.assert_close(first_weight(ema.generator), first_weight(target), atol=1e-6, rtol=0)


def test_the_average_is_a_copy_that_learns_nothing_by_itself() -> None:
    network = generator(0)
    ema = EMA(network, 500, 0.05, batch=16)
    before = first_weight(ema.generator)
    with torch.no_grad():
        next(network.parameters()).add_(1)
    assert torch.equal(first_weight(ema.generator), before)
    assert not any(weight.requires_grad for weight in ema.generator.parameters())


def test_batchnorm_statistics_are_the_plain_mean_over_samples() -> None:
    network = generator(0)
    norm = next(module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    momentum, seen = norm.momentum, []
    handle = norm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].clone()))
    network.train()
    for start in range(0, BATCHNORM_IMAGES, BATCHNORM_BATCH):
        z = latents(7, Purpose.BATCHNORM, start, BATCHNORM_BATCH, CONFIG.latent_dim, CONFIG.latent_distribution)
        network(torch.from_numpy(z))
    handle.remove()
    assert len(seen) == math.ceil(BATCHNORM_IMAGES / BATCHNORM_BATCH)
    assert estimate_batchnorm(network, seed=7) is network
    assert not network.training
    assert norm.momentum == momentum
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, torch.stack([maps.mean((0, 2, 3)) for maps in seen]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([maps.var((0, 2, 3)) for maps in seen]).mean(0))


def test_batchnorm_statistics_follow_from_weights_and_seed_alone() -> None:
    network = generator(0)
    first = estimate_batchnorm(network, seed=1).state_dict()
    first = {name: value.clone() for name, value in first.items()}
    network.train()(torch.randn(64, CONFIG.latent_dim))  # statistics of other samples are forgotten
    again = estimate_batchnorm(network, seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = estimate_batchnorm(network, seed=2).state_dict()
    assert not all(torch.equal(first[name], other[name]) for name in first)
