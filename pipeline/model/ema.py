"""The exponential moving average of G's weights, counted in images, with BatchNorm statistics of its own."""

import copy
import math

import torch
from torch import Tensor

from pipeline.common.randomness import Purpose
from pipeline.model.batchnorm import measure_statistics
from pipeline.model.labels import generator_inputs
from pipeline.model.networks import Generator

BATCHNORM_IMAGES = 1_024
BATCHNORM_BATCH = 128


class EMA:
    """Holds the averaged generator, and the count of images that its weight depends on.

    Only parameters are averaged: BatchNorm statistics that fit averaged weights can only be measured, so
    `estimate_batchnorm` runs before the generator is used or saved.
    """

    def __init__(self, generator: Generator, half_life_images: int, ramp_up: float, batch: int) -> None:
        """`batch` images come with each update."""
        self.generator = copy.deepcopy(generator).requires_grad_(False)
        self.batch = batch
        self._averages: list[Tensor] = list(self.generator.parameters())
        dtype, device = self._averages[0].dtype, self._averages[0].device
        self.images_seen = torch.zeros((), dtype=torch.float64, device=device)
        """Images up to the last update: a scalar on the device, so that an update needs no number of the host."""
        # An update keeps exp(-ln 2 * batch / half_life) of the average: exponents times images seen, and after ramp-up.
        self._ramp = torch.full_like(self.images_seen, -math.log(2) * batch / ramp_up)
        self._lasting = -math.log(2) * batch / half_life_images
        self._weight, self._one = torch.ones((), dtype=dtype, device=device), torch.ones_like(self.images_seen)

    @torch.no_grad()
    def update(self, weights: list[Tensor]) -> None:
        """Move toward `weights`, a generator's parameters after an update on another batch.

        The half-life is at most `ramp_up` of the images seen (Karras et al. 2020, StyleGAN2-ADA's code).
        """
        self.images_seen += self.batch
        kept = torch.div(self._ramp, self.images_seen).clamp_(max=self._lasting).exp_()
        torch.sub(self._one, kept, out=self._weight)
        torch._foreach_lerp_(self._averages, weights, [self._weight] * len(self._averages))

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
        generator_inputs(config, seed, Purpose.BATCHNORM, start, BATCHNORM_BATCH)
        for start in range(0, images, BATCHNORM_BATCH)
    )
    return measure_statistics(
        generator, (tuple(torch.from_numpy(values).to(device) for values in batch) for batch in batches)
    )
