"""The exponential moving average of G's weights, counted in images, with BatchNorm statistics of its own."""

import copy

import torch
from torch import nn

from pipeline.common.randomness import Purpose
from pipeline.model.batchnorm import measure_statistics
from pipeline.model.latents import latents
from pipeline.model.networks import Generator

BATCHNORM_IMAGES = 1_024
BATCHNORM_BATCH = 128


class EMA:
    """Holds the averaged generator.

    Only parameters are averaged: BatchNorm statistics that fit averaged weights can only be measured, so
    `estimate_batchnorm` runs before the generator is used or saved.
    """

    def __init__(self, generator: Generator, half_life_images: int, ramp_up: float) -> None:
        self.generator = copy.deepcopy(generator).requires_grad_(False)
        self.half_life_images = half_life_images
        self.ramp_up = ramp_up

    @torch.no_grad()
    def update(self, generator: nn.Module, images_seen: int, batch: int) -> None:
        """Move toward `generator` after an update on `batch` images, the last of which was image `images_seen`.

        The half-life is at most `ramp_up` of the images seen (Karras et al. 2020, StyleGAN2-ADA's code).
        """
        half_life = min(self.half_life_images, images_seen * self.ramp_up)
        weight = 1.0 - 0.5 ** (batch / max(half_life, 1e-8))
        torch._foreach_lerp_(list(self.generator.parameters()), list(generator.parameters()), weight)

    def estimate_batchnorm(self, seed: int) -> Generator:
        """Measure the BatchNorm statistics over z of a fixed purpose; return the generator in eval mode."""
        return estimate_batchnorm(self.generator, seed)


def estimate_batchnorm(generator: Generator, seed: int, images: int = BATCHNORM_IMAGES) -> Generator:
    """Replace the running BatchNorm statistics of `generator` by averages over `images` samples, and put it in eval.

    A pure function of the weights and the seed, so every process and every resumed run gets the same.
    """
    config = generator.config
    device = next(generator.parameters()).device
    batches = (
        latents(seed, Purpose.BATCHNORM, start, BATCHNORM_BATCH, config.latent_dim, config.latent_distribution)
        for start in range(0, images, BATCHNORM_BATCH)
    )
    return measure_statistics(generator, (torch.from_numpy(z).to(device) for z in batches))
