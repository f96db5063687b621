"""95 % confidence intervals of shares and means."""

import math
from collections.abc import Sequence

import numpy as np

NORMAL_95 = 1.96


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share that was seen in `count` trials (Wilson 1927)."""
    z = NORMAL_95**2 / count
    center = (share + z / 2) / (1 + z)
    half = NORMAL_95 / (1 + z) * math.sqrt(share * (1 - share) / count + z / (4 * count))
    return center - half, center + half


def interval_of_mean(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of independent values; the mean itself when there is only one."""
    mean = float(np.mean(values))
    half = NORMAL_95 * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean - half, mean + half
