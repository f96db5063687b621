"""MS-SSIM of random pairs: how alike the images of a set are (Wang et al. 2003; Odena et al. 2017; Karras et al. 2018).

Where a map is smaller than the window of 11 pixels, the window and its deviation shrink to the map. The evaluation
behind the published numbers at 64 pixels does so too: the five scales of a 64-pixel image end at 4 pixels.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import DataError
from pipeline.common.imaging import Pixels
from pipeline.common.ranks import ALONE, Ranks
from pipeline.evaluation.images import Images, num_blocks

WEIGHTS = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])
WINDOW = 11
DEVIATION = 1.5
SMALLEST = 32

Maps = NDArray[np.float32]


def _window_matrix(length: int) -> Maps:
    """Return the matrix (length - window + 1, length) that applies the Gaussian window to a row of pixels."""
    size = min(WINDOW, length)
    deviation = size * DEVIATION / WINDOW
    taps = np.exp(-0.5 * ((np.arange(size) - (size - 1) / 2) / deviation) ** 2)
    matrix = np.zeros((length - size + 1, length))
    for row in range(len(matrix)):
        matrix[row, row : row + size] = taps / taps.sum()
    return matrix.astype(np.float32)


def _scale(a: Maps, b: Maps) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean structural similarity of each pair at one scale, and its contrast-and-structure part."""
    rows, columns = _window_matrix(a.shape[2]), _window_matrix(a.shape[3])
    stack = np.stack([a, b, a * a, b * b, a * b])
    # The window is separable, so two matrix products apply it; BLAS is far faster than a convolution.
    mean_a, mean_b, square_a, square_b, product = rows @ (stack @ columns.T)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    structure = (2 * (product - mean_a * mean_b) + c2) / (square_a - mean_a**2 + square_b - mean_b**2 + c2)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    mean = (1, 2, 3)
    return (luminance * structure).mean(mean, dtype=np.float64), structure.mean(mean, dtype=np.float64)


def ms_ssim_of_pairs(a: Pixels, b: Pixels) -> NDArray[np.float64]:
    """Return MS-SSIM of a[i] and b[i], float64 (n,). Images are uint8 (n, height, width, channels)."""
    left, right = (np.ascontiguousarray(x.transpose(0, 3, 1, 2), np.float32) for x in (a, b))
    result = np.ones(len(a))
    for last, weight in enumerate(WEIGHTS, start=1 - len(WEIGHTS)):
        similarity, structure = _scale(left, right)
        result *= np.maximum(similarity if last == 0 else structure, 0) ** weight
        left, right = _halve(left), _halve(right)
    return result


def _halve(maps: Maps) -> Maps:
    total: Maps = maps[..., ::2, ::2] + maps[..., 1::2, ::2] + maps[..., ::2, 1::2] + maps[..., 1::2, 1::2]
    return total / np.float32(4)


def ms_ssim(images: Images, *, ranks: Ranks = ALONE) -> float:
    """Return the mean MS-SSIM of images 0 and 1, 2 and 3, ...: random pairs, because the order of a set is random.

    It is near 0 for varied images and 1 for copies. The result is the same, bit for bit, for every number of ranks.
    Raises DataError for images that are too small.
    """
    if images.shape[0] < SMALLEST:
        raise DataError(f"images of {images.shape[0]} pixels are too small for MS-SSIM: five scales need {SMALLEST}")
    sums = np.zeros(num_blocks(images.count))
    for block, pixels in images.blocks(ranks.rank, ranks.world_size):
        even = len(pixels) // 2 * 2
        sums[block] = ms_ssim_of_pairs(pixels[0:even:2], pixels[1:even:2]).sum()
    return float(np.asarray(ranks.sum(sums)).sum() / (images.count // 2))
