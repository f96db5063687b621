"""The quality that a run measures: the distance of samples from the data, and how alike samples are."""

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.common.imaging import Pixels
from pipeline.common.ranks import ALONE, Ranks
from pipeline.evaluation.images import ArrayImages
from pipeline.evaluation.metrics.ms_ssim import ms_ssim
from pipeline.evaluation.metrics.swd import Projections, Sampling, distances, project

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
    ranks: Ranks = ALONE,
    patches: int = PATCHES,
    directions: int = DIRECTIONS,
    device: torch.device | str = "cpu",
) -> Reference:
    """Precompute the real side of `quality`."""
    images = ArrayImages(reals)
    sampling = Sampling(seed, patches, directions)
    projections = project(images, sampling, real=True, ranks=ranks, device=device)
    return Reference(projections, ms_ssim(images, ranks=ranks, device=device))


def quality(
    reals: Pixels | Reference,
    fakes: Pixels,
    *,
    seed: int,
    ranks: Ranks = ALONE,
    patches: int = PATCHES,
    directions: int = DIRECTIONS,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Return {"swd", "swd_64", "swd_32", "swd_16" (times 1000, small is near), "ms_ssim", "ms_ssim_real"}.

    Images are uint8 NHWC and held by every rank; each does its share of the blocks on its device, and the result is
    the same, bit for bit, for every world size.
    """
    if not isinstance(reals, Reference):
        reals = reference(reals, seed=seed, ranks=ranks, patches=patches, directions=directions, device=device)
    images = ArrayImages(fakes)
    mine = project(images, Sampling(seed, patches, directions), real=False, ranks=ranks, device=device)
    return {
        **distances(reals.projections, mine),
        "ms_ssim": ms_ssim(images, ranks=ranks, device=device),
        "ms_ssim_real": np.float64(reals.ms_ssim).item(),
    }
