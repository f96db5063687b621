"""What the trainer asks now and then: how far are the samples from the data, and how alike are they?"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.images import ArrayImages, Pixels
from pipeline.evaluation.metrics.ms_ssim import ms_ssim
from pipeline.evaluation.metrics.swd import Projections, Sampling, Workers, distances, project

PATCHES = 32
DIRECTIONS = 128
"""Fewer than published, so that an evaluation costs seconds. Compare such numbers with each other only."""


@dataclass(frozen=True)
class Reference:
    """What is needed of the real images, made once."""

    projections: Projections
    ms_ssim: float


def reference(
    reals: Pixels,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    sum_over_ranks: Callable[[NDArray[Any]], NDArray[Any]] = lambda x: x,
    patches: int = PATCHES,
    directions: int = DIRECTIONS,
) -> Reference:
    """Precompute the real side of `quality`."""
    workers = Workers(rank, world_size, sum_over_ranks)
    images = ArrayImages(reals)
    sampling = Sampling(seed, patches, directions)
    return Reference(project(images, sampling, real=True, workers=workers), ms_ssim(images, workers=workers))


def quality(
    reals: Pixels | Reference,
    fakes: Pixels,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    sum_over_ranks: Callable[[NDArray[Any]], NDArray[Any]] = lambda x: x,
    patches: int = PATCHES,
    directions: int = DIRECTIONS,
) -> dict[str, float]:
    """Return {"swd", "swd_64", "swd_32", "swd_16" (times 1000, small is near), "ms_ssim", "ms_ssim_real"}.

    Images are uint8 NHWC and held by every rank; each does its share of the blocks, and the result is the
    same, bit for bit, for every world size. `sum_over_ranks` returns the sum of every rank's array.
    """
    workers = Workers(rank, world_size, sum_over_ranks)
    if not isinstance(reals, Reference):
        reals = reference(
            reals,
            seed=seed,
            rank=rank,
            world_size=world_size,
            sum_over_ranks=sum_over_ranks,
            patches=patches,
            directions=directions,
        )
    images = ArrayImages(fakes)
    mine = project(images, Sampling(seed, patches, directions), real=False, workers=workers)
    return {
        **distances(reals.projections, mine),
        "ms_ssim": ms_ssim(images, workers=workers),
        "ms_ssim_real": np.float64(reals.ms_ssim).item(),
    }
