"""Sliced Wasserstein distance of image patches (Karras et al. 2018, section 5), in memory that does not grow with N.

On every level of a Laplacian pyramid, 7x7 patches are normalized by each channel's mean and deviation over the set and
projected onto random directions. The distance is the mean over the directions of the 1-D Wasserstein distance.

The published code sorts the projections of all patches. This code counts them in narrow bins and integrates the
difference of the two cumulative distributions. That gives the same distance up to the width of a bin; it adds up over
ranks exactly, and allows sets of different size.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.common.randomness import Purpose, raw_bits
from pipeline.common.ranks import ALONE, Ranks
from pipeline.evaluation.device import full_float32, to_maps
from pipeline.evaluation.images import BLOCK, Images, num_blocks
from pipeline.evaluation.metrics.pyramids import Pyramid, laplacian_pyramid, resolutions

PATCH = 7
BINS = 8192
REACH = 32.0
"""Bins cover projections from -REACH to REACH, in deviations; projections beyond count in the outermost bins."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Sampling:
    """Numbers of random draws. The defaults are the published setting."""

    seed: int = 0
    patches: int = 128
    """Patches of an image on every level."""
    directions: int = 512
    """Random projections on every level."""
    pyramid: Pyramid = "pggan"
    """Which kind of levels. Distances of one kind are compared with those of the same kind alone."""


@dataclass(frozen=True)
class Projections:
    """The histograms of a set's projected patches: all that a comparison with another set needs."""

    levels: list[int | str]
    """Resolutions, largest first."""
    counts: NDArray[np.int64]
    """(levels, directions, BINS)."""
    sampling: Sampling


def _patches(level: Tensor, first_image: int, lane: int, sampling: Sampling) -> Tensor:
    """Return patches at random places, (n, patches, channels, 49); the places depend on an image's index only."""
    count, channels, height, width = level.shape
    per_image = -(-sampling.patches // 4)  # Philox blocks of four words
    words = raw_bits(sampling.seed, Purpose.PROJECTIONS, first_image * per_image, count * per_image * 4, lane=lane)
    words = words.reshape(count, -1)[:, : sampling.patches]
    top = ((words >> np.uint64(32)) * np.uint64(height - PATCH + 1) >> np.uint64(32)).astype(np.int64)
    left = ((words & np.uint64(0xFFFFFFFF)) * np.uint64(width - PATCH + 1) >> np.uint64(32)).astype(np.int64)
    corners = (np.arange(count)[:, None] * channels * height + top) * width + left
    rows = (np.arange(channels)[:, None] * height + np.arange(PATCH)) * width
    pixels = level.reshape(-1)
    windows = pixels.as_strided((len(pixels) - PATCH + 1, PATCH), (1, 1))  # every row of 7 pixels, in place
    chosen = windows.index_select(0, torch.from_numpy((corners[..., None, None] + rows).reshape(-1)).to(level.device))
    return chosen.view(count, sampling.patches, channels, PATCH**2)


def _directions(features: int, lane: int, sampling: Sampling) -> Floats:
    """Return random unit vectors, (features, directions)."""
    from scipy.special import ndtri

    words = raw_bits(sampling.seed, Purpose.PROJECTIONS, 0, features * sampling.directions, lane=lane)
    normal = ndtri(((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)
    vectors = normal.reshape(features, sampling.directions)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=0), np.float32)


@torch.no_grad()
def project(
    images: Images,
    sampling: Sampling,
    *,
    real: bool,
    ranks: Ranks = ALONE,
    device: torch.device | str = "cpu",
) -> Projections:
    """Return the projections of a set, computed on `device`. `real` gives real images and samples different places.

    Reads the images twice: the first pass measures the means and deviations of the channels, the second one counts.
    The result is the same, bit for bit, for every number of ranks with the same device.
    """
    levels = resolutions(images.shape[0], images.shape[1], sampling.pyramid)
    channels = min(images.shape[2], 3)  # RGBA is measured as RGB over a background
    lanes = [(3 * index, 3 * index + (1 if real else 2)) for index in range(len(levels))]
    with full_float32():
        # One row for each block, zeros in those of other ranks: x + 0 is exact, so the sum does not depend on them.
        sums = torch.zeros(num_blocks(images.count), len(levels), 2, channels, dtype=torch.float64, device=device)
        for block, pixels in images.blocks(ranks.rank, ranks.world_size):
            for index, level in enumerate(laplacian_pyramid(to_maps(pixels, device), sampling.pyramid)):
                patches = _patches(level, block * BLOCK, lanes[index][1], sampling).double()
                for moment, values in enumerate((patches, patches.square())):
                    # First by image: a sum of few numbers does not depend on the number of threads.
                    sums[block, index, moment] = values.sum((1, 3)).sum(0)
        totals = np.asarray(ranks.sum(sums.cpu().numpy())).sum(0) / (images.count * sampling.patches * PATCH**2)
        means = totals[:, 0]
        deviations = np.sqrt(np.maximum(totals[:, 1] - means**2, 1e-12))

        # Normalizing, projecting and scaling to bins are one affine map of the raw patch.
        maps = []
        for index in range(len(levels)):
            unit = _directions(channels * PATCH**2, lanes[index][0], sampling).astype(np.float64)
            per_pixel = 1 / np.repeat(deviations[index], PATCH**2)
            scaled = unit * per_pixel[:, None] * (BINS / (2 * REACH))
            shift = BINS / 2 - np.repeat(means[index], PATCH**2) @ scaled
            maps.append([torch.tensor(part, dtype=torch.float32, device=device) for part in (scaled.T, shift[:, None])])
        counts = torch.zeros(len(levels), sampling.directions, BINS, dtype=torch.int64, device=device)
        one = torch.ones((), dtype=torch.int64, device=device)
        for block, pixels in images.blocks(ranks.rank, ranks.world_size):
            for index, level in enumerate(laplacian_pyramid(to_maps(pixels, device), sampling.pyramid)):
                patches = _patches(level, block * BLOCK, lanes[index][1], sampling)
                matrix, offset = maps[index]
                bins = torch.addmm(offset, matrix, patches.view(-1, channels * PATCH**2).T)
                bins = bins.clamp_(0, BINS - 1).long()
                counts[index].scatter_add_(1, bins, one.expand_as(bins))
    return Projections(levels, np.asarray(ranks.sum(counts.cpu().numpy()), np.int64), sampling)


def distances(reals: Projections, fakes: Projections) -> dict[str, float]:
    """Return {"swd": the mean over the levels, "swd_64": ..., ...}, each times 1000 as published."""
    assert reals.sampling == fakes.sampling
    assert reals.levels == fakes.levels
    result = {}
    for resolution, a, b in zip(reals.levels, reals.counts, fakes.counts, strict=True):
        gap = np.cumsum(a, 1) / a[0].sum() - np.cumsum(b, 1) / b[0].sum()
        result[f"swd_{resolution}"] = float(np.abs(gap).sum(1).mean() * (2 * REACH / BINS) * 1e3)
    return {"swd": float(np.mean(list(result.values()))), **result}
