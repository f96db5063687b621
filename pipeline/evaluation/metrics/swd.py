"""Sliced Wasserstein distance of image patches (Karras et al. 2018, section 5), in memory that does not grow with N.

On every level of a Laplacian pyramid, 7x7 patches are normalized by each channel's mean and deviation over the set and
projected onto random directions. The distance is the mean over the directions of the 1-D Wasserstein distance.

The published code sorts the projections of all patches. This code counts them in narrow bins and integrates the
difference of the two cumulative distributions. That gives the same distance up to the width of a bin; it adds up over
ranks exactly, and allows sets of different size.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import DataError
from pipeline.common.imaging import Pixels
from pipeline.common.randomness import Purpose, raw_bits
from pipeline.common.ranks import ALONE, Ranks
from pipeline.evaluation.images import BLOCK, Images, num_blocks

PATCH = 7
SMALLEST_LEVEL = 16
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


@dataclass(frozen=True)
class Projections:
    """The histograms of a set's projected patches: all that a comparison with another set needs."""

    levels: list[int]
    """Resolutions, largest first."""
    counts: NDArray[np.int64]
    """(levels, directions, BINS)."""
    sampling: Sampling


def resolutions(size: int) -> list[int]:
    """Return the sizes of the pyramid's levels: `size`, halved down to 16. Raises DataError if there is none."""
    levels = []
    while size >= SMALLEST_LEVEL:
        levels.append(size)
        size //= 2
    if not levels:
        raise DataError(f"images of {size} pixels are too small for SWD: it needs at least {SMALLEST_LEVEL}")
    return levels


def laplacian_pyramid(images: Pixels) -> list[Floats]:
    """Return the detail of each level of images uint8 (n, h, w, channels): float32 (n, channels, h, w), finest first.

    The last level is the remaining image, not a detail.
    """
    current = np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32)
    pyramid = []
    for _ in resolutions(images.shape[1])[1:]:
        smaller = _blur(current)[..., ::2, ::2]
        spread = np.zeros_like(current)
        spread[..., ::2, ::2] = smaller
        pyramid.append(current - 4 * _blur(spread))
        current = smaller
    return [*pyramid, np.ascontiguousarray(current)]


def _blur(maps: Floats) -> Floats:
    """Convolve with the binomial 1-4-6-4-1 filter in both directions, mirrored at the edges."""
    for axis in (-2, -1):
        widths = [(2, 2) if axis + maps.ndim == other else (0, 0) for other in range(maps.ndim)]
        padded = np.moveaxis(np.pad(maps, widths, mode="reflect"), axis, 0)
        outer, inner, middle = padded[:-4] + padded[4:], padded[1:-3] + padded[3:-1], padded[2:-2]
        maps = np.moveaxis((outer + 4 * inner + 6 * middle) / np.float32(16), 0, axis)
    return maps


def _patches(level: Floats, first_image: int, lane: int, sampling: Sampling) -> Floats:
    """Return patches at random places, (n * patches, channels, 7, 7); the places depend on an image's index only."""
    count, channels, height, width = level.shape
    per_image = -(-sampling.patches // 4)  # Philox blocks of four words
    words = raw_bits(sampling.seed, Purpose.PROJECTIONS, first_image * per_image, count * per_image * 4, lane=lane)
    words = words.reshape(count, -1)[:, : sampling.patches].reshape(-1)
    top = ((words >> np.uint64(32)) * np.uint64(height - PATCH + 1) >> np.uint64(32)).astype(np.int64)
    left = ((words & np.uint64(0xFFFFFFFF)) * np.uint64(width - PATCH + 1) >> np.uint64(32)).astype(np.int64)
    corner = (np.repeat(np.arange(count), sampling.patches) * channels * height + top) * width + left
    offsets = np.ravel_multi_index(np.ogrid[:channels, :PATCH, :PATCH], (channels, height, width))
    patches: Floats = level.reshape(-1)[corner[:, None, None, None] + offsets]
    return patches


def _directions(features: int, lane: int, sampling: Sampling) -> Floats:
    """Return random unit vectors, (features, directions)."""
    from scipy.special import ndtri

    words = raw_bits(sampling.seed, Purpose.PROJECTIONS, 0, features * sampling.directions, lane=lane)
    normal = ndtri(((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)
    vectors = normal.reshape(features, sampling.directions)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=0), np.float32)


def project(images: Images, sampling: Sampling, *, real: bool, ranks: Ranks = ALONE) -> Projections:
    """Return the projections of a set. `real` gives real images and samples different patch positions.

    Reads the images twice: the first pass measures the means and deviations of the channels, the second one counts.
    The result is the same, bit for bit, for every number of ranks.
    """
    levels = resolutions(images.shape[0])
    channels = images.shape[2]
    lanes = [(3 * index, 3 * index + (1 if real else 2)) for index in range(len(levels))]
    # One row for each block, zeros in those of other ranks: x + 0 is exact, so the sum does not depend on the ranks.
    moments = np.zeros((num_blocks(images.count), len(levels), channels, 2))
    for block, pixels in images.blocks(ranks.rank, ranks.world_size):
        for index, level in enumerate(laplacian_pyramid(pixels)):
            patches = _patches(level, block * BLOCK, lanes[index][1], sampling).transpose(1, 0, 2, 3)
            values = patches.reshape(channels, -1).astype(np.float64)
            moments[block, index] = np.stack([values.sum(1), np.square(values).sum(1)], -1)
    totals = np.asarray(ranks.sum(moments)).sum(0) / (images.count * sampling.patches * PATCH**2)
    means = totals[..., 0]
    deviations = np.sqrt(np.maximum(totals[..., 1] - means**2, 1e-12))

    counts = np.zeros((len(levels), sampling.directions, BINS), np.int64)
    # Normalizing, projecting and scaling to bins are one affine map of the raw patch.
    maps = []
    for index in range(len(levels)):
        unit = _directions(channels * PATCH**2, lanes[index][0], sampling).astype(np.float64)
        per_pixel = 1 / np.repeat(deviations[index], PATCH**2)
        scaled = unit * per_pixel[:, None] * (BINS / (2 * REACH))
        shift = BINS / 2 - np.repeat(means[index], PATCH**2) @ scaled
        maps.append((np.ascontiguousarray(scaled.T, np.float32), shift.astype(np.float32)[:, None]))
    for block, pixels in images.blocks(ranks.rank, ranks.world_size):
        for index, level in enumerate(laplacian_pyramid(pixels)):
            patches = _patches(level, block * BLOCK, lanes[index][1], sampling)
            matrix, offset = maps[index]
            bins = matrix @ patches.reshape(len(patches), -1).T
            bins += offset
            np.clip(bins, 0, BINS - 1, out=bins)
            for direction, values in enumerate(bins):  # row by row, which stays in the CPU's cache
                counts[index, direction] += np.bincount(values.astype(np.int64), minlength=BINS)
    return Projections(levels, np.asarray(ranks.sum(counts), np.int64), sampling)


def distances(reals: Projections, fakes: Projections) -> dict[str, float]:
    """Return {"swd": the mean over the levels, "swd_64": ..., ...}, each times 1000 as published."""
    assert reals.sampling == fakes.sampling
    assert reals.levels == fakes.levels
    result = {}
    for resolution, a, b in zip(reals.levels, reals.counts, fakes.counts, strict=True):
        gap = np.cumsum(a, 1) / a[0].sum() - np.cumsum(b, 1) / b[0].sum()
        result[f"swd_{resolution}"] = float(np.abs(gap).sum(1).mean() * (2 * REACH / BINS) * 1e3)
    return {"swd": float(np.mean(list(result.values()))), **result}
