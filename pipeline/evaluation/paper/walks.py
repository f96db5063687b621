"""Points and paths in latent space, and the images they become."""

import numpy as np
from numpy.typing import NDArray

from pipeline.common.imaging import Pixels
from pipeline.common.randomness import Purpose
from pipeline.config import NetworkConfig
from pipeline.model.latents import latents

Z = NDArray[np.float32]

NOISE = 0.25
"""Uniform noise of up to so much on every value of z shows the neighborhood of a point, as in the paper (Figure 7)."""


def draw(config: NetworkConfig, seed: int, start: int, count: int) -> Z:
    """Return z (count, latent_dim) of the samples `start` to `start + count` of the analyses' own sequence."""
    return latents(seed, Purpose.ANALYSIS, start, count, config.latent_dim, config.latent_distribution)


def straight(a: Z, b: Z, steps: int) -> Z:
    """Return `steps` points from a to b in equal steps: (steps, dim)."""
    share = np.linspace(0, 1, steps, dtype=np.float32)[:, None]
    return a[None] * (1 - share) + b[None] * share


def spherical(a: Z, b: Z, steps: int) -> Z:
    """Return `steps` points (steps, dim) from a to b along the great circle (Shoemake 1985).

    Their lengths change evenly. A straight line between two random z passes nearer to the origin than any random z;
    this path does not.
    """
    norms = np.linalg.norm(a), np.linalg.norm(b)
    angle = np.arccos(np.clip(np.dot(a / norms[0], b / norms[1]), -1, 1))
    if angle < 1e-4:
        return straight(a, b, steps)
    share = np.linspace(0, 1, steps)[:, None]
    ways = (np.sin((1 - share) * angle) * a / norms[0] + np.sin(share * angle) * b / norms[1]) / np.sin(angle)
    return np.asarray(ways * ((1 - share) * norms[0] + share * norms[1]), np.float32)


def unevenness(images: Pixels) -> float:
    """Return the largest step of a walk (steps, H, W, C) over its mean step, by pixel distance; 1 is perfectly smooth.

    The paper regards sharp transitions as a sign of memorization (section 6.1).
    """
    steps = np.sqrt(np.square(np.diff(images.astype(np.float32), axis=0)).mean((1, 2, 3)))
    return float(steps.max() / max(float(steps.mean()), 1e-9))
