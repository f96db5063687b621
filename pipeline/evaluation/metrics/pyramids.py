"""The Laplacian pyramids of SWD: PGGAN's, and mmagic's, which published numbers of DCGAN are of."""

from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.common.errors import DataError
from pipeline.common.shapes.size import in_words, written

Pyramid = Literal["pggan", "mmagic"]
"""`pggan` is that of Karras et al. 2018's code: edges are mirrored, a level is doubled by zeros between its pixels and
a blur, the last level has 16 pixels. `mmagic` is open-mmlab's (mmgeneration, mmagic): edges are black, a level is
doubled by doubling its pixels and a blur, so its details are others, and there are at most four levels.
"""

SMALLEST_LEVEL = 16
MOST_LEVELS = {"pggan": 99, "mmagic": 4}


def resolutions(height: int, width: int, pyramid: Pyramid = "pggan") -> list[int | str]:
    """Return the sizes of the pyramid's levels, as `written` writes them: halved while no side is below 16.

    Raises DataError if there is none.
    """
    if min(height, width) < SMALLEST_LEVEL:
        raise DataError(
            f"images of {in_words(width, height)} pixels are too small for SWD: it needs at least {SMALLEST_LEVEL}"
        )
    levels = [written(width, height)]
    while min(height, width) >= 2 * SMALLEST_LEVEL and len(levels) < MOST_LEVELS[pyramid]:
        height, width = -(-height // 2), -(-width // 2)
        levels.append(written(width, height))
    return levels


def laplacian_pyramid(maps: Tensor, pyramid: Pyramid = "pggan") -> list[Tensor]:
    """Return the detail of each level of maps float32 (n, channels, h, w), of the same type, finest first.

    The last level is the remaining image, not a detail.
    """
    levels = []
    height, width = maps.shape[2:]
    for _ in resolutions(height, width, pyramid)[:-1]:
        (halve_rows, double_rows), (halve, double) = (_matrices(n, pyramid, maps.device) for n in maps.shape[2:])
        smaller = halve_rows @ (maps @ halve.T)
        levels.append(maps - double_rows @ (smaller @ double.T))
        maps = smaller
    return [*levels, maps]


@cache
def _matrices(length: int, pyramid: Pyramid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the matrices (half, length) and (length, half) that resize a row by half, rounded up, and back.

    Both blur with the binomial 1-4-6-4-1 filter: one before it leaves out every other pixel, one after it has doubled
    the number. Matrix products are far faster than convolutions of so few channels.
    """
    half = -(-length // 2)
    if pyramid == "pggan":
        matrix = _blur(length, mirror=True)
        return torch.tensor(matrix[::2], device=device), torch.tensor(2 * matrix[:, ::2], device=device)
    halve = _blur(length, mirror=False)[::2]
    double = (_blur(2 * half, mirror=False) @ np.repeat(np.eye(half, dtype=np.float32), 2, 0))[:length]
    return torch.tensor(halve, device=device), torch.tensor(double, device=device)


def _blur(length: int, *, mirror: bool) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Return the matrix (length, length) of the binomial filter; what is beyond the edges is mirrored, or 0."""
    matrix = np.zeros((length, length), np.float32)
    places = np.arange(length)
    for offset, weight in zip(range(-2, 3), (1, 4, 6, 4, 1), strict=True):
        read = (length - 1) - np.abs((length - 1) - np.abs(places + offset)) if mirror else places + offset
        inside = (read >= 0) & (read < length)
        np.add.at(matrix, (places[inside], read[inside]), weight / 16)
    return matrix
