"""MS-SSIM of random pairs: how alike the images of a set are (Wang et al. 2003; Odena et al. 2017; Karras et al. 2018).

Where a map is smaller than the window of 11 pixels, the window and its deviation shrink to the map. The evaluation
behind the published numbers at 64 pixels does so too: the five scales of a 64-pixel image end at 4 pixels.
"""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.common.errors import DataError
from pipeline.common.imaging import Pixels
from pipeline.common.ranks import ALONE, Ranks
from pipeline.evaluation.device import full_float32, to_maps
from pipeline.evaluation.images import Images, num_blocks

WEIGHTS = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])
WINDOW = 11
DEVIATION = 1.5
SMALLEST = 4
"""Shorter side in pixels of the smallest images: two scales."""
SMALLEST_MAP = 2
"""Shorter side of the smallest map that still has a structure."""


@cache
def _window_matrix(length: int, device: torch.device) -> Tensor:
    """Return the matrix (length - window + 1, length) that applies the Gaussian window to a row of pixels."""
    size = min(WINDOW, length)
    deviation = size * DEVIATION / WINDOW
    taps = np.exp(-0.5 * ((np.arange(size) - (size - 1) / 2) / deviation) ** 2)
    matrix = np.zeros((length - size + 1, length))
    for row in range(len(matrix)):
        matrix[row, row : row + size] = taps / taps.sum()
    return torch.tensor(matrix, dtype=torch.float32, device=device)


def _similarity(a: Tensor, b: Tensor, *, luminance: bool) -> Tensor:
    """Return the mean structural similarity of each pair at one scale, float64 (n,): its part of contrast and
    structure, or all of it. Maps are (n, channels, height, width).
    """
    rows, columns = (_window_matrix(length, a.device) for length in a.shape[2:])
    # The window is separable, so two matrix products apply it, far faster than a convolution.
    products = torch.stack([a, b, a.square().addcmul_(b, b), a * b])
    mean_a, mean_b, squares, product = rows @ (products @ columns.T)
    squared_means, mean_product = mean_a.square().addcmul_(mean_b, mean_b), mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity: Tensor = ((product - mean_product) * 2).add_(c2).div_((squares - squared_means).add_(c2))
    if luminance:
        similarity *= (2 * mean_product + c1) / (squared_means + c1)
    return similarity.mean((1, 2, 3), dtype=torch.float64)


def num_scales(height: int, width: int) -> int:
    """Return the number of scales: five, or as many as leave a map of two pixels a side; from 32 pixels on five."""
    scales = 1
    while scales < len(WEIGHTS) and min(height, width) >> scales >= SMALLEST_MAP:
        scales += 1
    return scales


def _halve(maps: Tensor) -> Tensor:
    """Average over 2 x 2 pixels; of an odd number of rows or columns the last is left out."""
    maps = maps[..., : maps.shape[-2] // 2 * 2, : maps.shape[-1] // 2 * 2]
    total: Tensor = maps[..., ::2, ::2] + maps[..., 1::2, ::2] + maps[..., ::2, 1::2] + maps[..., 1::2, 1::2]
    return total / 4


@torch.no_grad()
def ms_ssim_of_pairs(a: Pixels, b: Pixels, device: torch.device | str = "cpu") -> NDArray[np.float64]:
    """Return MS-SSIM of a[i] and b[i], float64 (n,). Images are uint8 (n, height, width, channels).

    With fewer than five scales their weights are enlarged so that they sum to one.
    """
    weights = WEIGHTS[: num_scales(*a.shape[1:3])]
    if len(weights) < len(WEIGHTS):
        weights = weights / weights.sum()
    left, right = (to_maps(images, device) for images in (a, b))
    scales = []
    with full_float32():
        for last in range(1 - len(weights), 1):
            scales.append(_similarity(left, right, luminance=last == 0))
            left, right = (_halve(maps) if last else maps for maps in (left, right))
    found = torch.stack(scales, -1).cpu().numpy()
    return np.asarray(np.prod(np.maximum(found, 0) ** weights, axis=-1))


def ms_ssim(images: Images, *, ranks: Ranks = ALONE, device: torch.device | str = "cpu") -> float:
    """Return the mean MS-SSIM of images 0 and 1, 2 and 3, ...: random pairs, because the order of a set is random.

    It is near 0 for varied images and 1 for copies. It is computed on `device`, and the same, bit for bit, for every
    number of ranks. Raises DataError for images that are too small.
    """
    if min(images.shape[:2]) < SMALLEST:
        height, width, _ = images.shape
        raise DataError(f"images of {width}x{height} pixels are too small for MS-SSIM: it needs {SMALLEST}")
    sums = np.zeros(num_blocks(images.count))
    for block, pixels in images.blocks(ranks.rank, ranks.world_size):
        even = len(pixels) // 2 * 2
        sums[block] = ms_ssim_of_pairs(pixels[0:even:2], pixels[1:even:2], device).sum()
    return float(np.asarray(ranks.sum(sums)).sum() / (images.count // 2))
