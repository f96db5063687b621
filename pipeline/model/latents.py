"""z as a pure function of (seed, purpose, index): the same on every machine, batch and process count."""

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UsageError
from pipeline.common.randomness import Purpose, raw_bits, spread_bits

if TYPE_CHECKING:
    from pipeline.config import RunConfig

Distribution = Literal["uniform", "normal"]

LARGEST = 1.0 - 2.0**-53
"""The largest float64 below 1."""
VALUES_AHEAD = 1 << 16
"""Values of z to draw at once: half a megabyte in float64, which stays in a core's cache."""


def latents(
    seed: int,
    purpose: Purpose,
    start: int,
    count: int,
    dim: int,
    distribution: Distribution = "uniform",
    *,
    rows: slice = slice(None),
) -> NDArray[np.float32]:
    """Return z of images `start` to `start + count`, or of those `rows` of them, float32 of shape (count, dim).

    Image i owns the ceil(dim/4) Philox blocks that begin at i*ceil(dim/4), so any range can be computed
    alone. A value is (k + 1/2) * 2^-53 of a draw's upper 53 bits, mapped in float64 to U(-1, 1) (the paper's)
    or through the inverse CDF to N(0, 1) (the tutorials'), and cast last.

    Raises UsageError when a number is negative or the distribution unknown.
    """
    if start < 0 or count < 0 or dim < 1:
        raise UsageError(f"latents of images {start} to {start + count} with {dim} values: all must be positive")
    if distribution not in get_args(Distribution):
        raise UsageError(f"latent distribution {distribution!r} is unknown: expected uniform or normal")
    blocks = -(-dim // 4)
    first, end, step = rows.indices(count)
    images = range(start + first, start + end, step)
    if step == 1:
        words = raw_bits(seed, purpose, images.start * blocks, len(images) * blocks * 4).reshape(-1, blocks * 4)
    else:
        words = spread_bits(seed, purpose, range(images.start * blocks, images.stop * blocks, step * blocks), blocks)
    upper = np.right_shift(words[:, :dim], np.uint64(11), out=words[:, :dim])
    unit = np.add(upper.view(np.int64), 0.5)  # float64; from uint64 the conversion takes ten times as long
    z = np.empty(unit.shape, np.float32)
    if distribution == "uniform":
        np.multiply(unit, 2.0**-52, out=unit)
        return np.subtract(unit, 1.0, out=z, dtype=np.float64, casting="same_kind")
    from scipy.special import ndtri

    np.multiply(unit, 2.0**-53, out=unit)
    np.minimum(unit, LARGEST, out=unit)  # k + 1/2 of the very largest k rounds to 2^53, whose normal z is infinite
    z[:] = ndtri(unit, out=unit)
    return z


def latent_batches(
    config: "RunConfig", *, start: int, rank: int = 0, world_size: int = 1
) -> Iterator[NDArray[np.float32]]:
    """Yield z of one batch of a run after the other, from image `start` on, without end.

    Of each batch the rows of this rank, which are `rank`, `rank + world_size`, …: float32 (batch / world_size,
    latent_dim).
    """
    return chain.from_iterable(latent_blocks(config, start=start, rank=rank, world_size=world_size))


def latent_blocks(
    config: "RunConfig", *, start: int, rank: int = 0, world_size: int = 1
) -> Iterator[NDArray[np.float32]]:
    """Yield what `latent_batches` does, several batches at once: float32 (batches, batch / world_size, latent_dim).

    A rank draws the rows of no other rank, and so many batches that numpy's fixed costs are small.
    """
    recipe, network = config.recipe, config.network
    share = recipe.batch // world_size
    ahead = max(1, VALUES_AHEAD // (share * network.latent_dim))
    rows = slice(rank, None, world_size)
    while True:
        drawn = (recipe.seed, Purpose.TRAIN, start, ahead * recipe.batch)
        z = latents(*drawn, network.latent_dim, network.latent_distribution, rows=rows)
        yield z.reshape(ahead, share, network.latent_dim)
        start += ahead * recipe.batch
