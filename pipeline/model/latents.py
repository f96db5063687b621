"""z as a pure function of (seed, purpose, index): the same on every machine, batch and process count."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UsageError
from pipeline.common.randomness import Purpose, raw_bits

Distribution = Literal["uniform", "normal"]

LARGEST = 1.0 - 2.0**-53
"""The largest float64 below 1."""


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
    blocks = -(-dim // 4)
    words = raw_bits(seed, purpose, start * blocks, count * blocks * 4).reshape(count, blocks * 4)[rows, :dim]
    unit = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    unit = np.minimum(unit, LARGEST)  # k + 1/2 of the very largest k rounds to 2^53, whose normal z would be infinite
    if distribution == "uniform":
        return (2.0 * unit - 1.0).astype(np.float32)
    if distribution == "normal":
        from scipy.special import ndtri

        return np.asarray(ndtri(unit), np.float32)
    raise UsageError(f"latent distribution {distribution!r} is unknown: expected uniform or normal")
