"""MS-SSIM agrees with torchmetrics where their settings coincide, and with a plain convolution elsewhere."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from pipeline.common.errors import DataError
from pipeline.common.imaging import Pixels
from pipeline.evaluation.images import ArrayImages
from pipeline.evaluation.metrics.ms_ssim import WEIGHTS, ms_ssim, ms_ssim_of_pairs


def test_agrees_with_torchmetrics_where_the_window_fits_every_scale(make_scenes: Callable[..., Pixels]) -> None:
    images = make_scenes(4, seed=2, size=192)
    a, b = images[:2], (images[:2] * 0.7 + images[2:] * 0.3).astype(np.uint8)
    x, y = (torch.tensor(pixels).permute(0, 3, 1, 2).double() for pixels in (a, b))
    # torchmetrics crops its padding off every contrast map but not off the last scale's similarity: crop it here.
    weights = tuple(WEIGHTS.tolist())
    structure = multiscale_structural_similarity_index_measure(
        x, y, data_range=255.0, betas=(*weights[:4], 0.0), reduction="none"
    )
    small_x, small_y = (torch.nn.functional.avg_pool2d(pixels, 16) for pixels in (x, y))
    _, full = structural_similarity_index_measure(small_x, small_y, data_range=255.0, return_full_image=True)
    expected = (torch.as_tensor(structure) * full[..., 5:-5, 5:-5].mean((1, 2, 3)) ** weights[4]).numpy()
    assert 0.2 < expected.min() < expected.max() < 0.999
    np.testing.assert_allclose(ms_ssim_of_pairs(a, b), expected, atol=1e-4)


def test_the_window_shrinks_with_the_map_as_in_the_published_evaluation(pictures: Pixels) -> None:
    def similarity(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float]:
        size = min(11, a.shape[0])
        place = np.arange(size) - (size - 1) / 2
        window = np.exp(-(place[:, None] ** 2 + place**2) / (2 * (size * 1.5 / 11) ** 2))
        window = (window / window.sum())[..., None]

        def smooth(x: NDArray[np.float64]) -> NDArray[np.float64]:
            views = np.lib.stride_tricks.sliding_window_view(x, (size, size), (0, 1))
            return np.asarray((views * window.transpose(2, 0, 1)).sum((-2, -1)))

        ma, mb = smooth(a), smooth(b)
        cs = (2 * (smooth(a * b) - ma * mb) + 58.5225) / (smooth(a * a) - ma**2 + smooth(b * b) - mb**2 + 58.5225)
        return float((cs * (2 * ma * mb + 6.5025) / (ma**2 + mb**2 + 6.5025)).mean()), float(cs.mean())

    for first, second in zip(pictures[:6], pictures[6:12], strict=True):
        expected = 1.0
        a, b = first.astype(float), second.astype(float)
        for scale, weight in enumerate(WEIGHTS):
            whole, structure = similarity(a, b)
            expected *= max(0.0, whole if scale == 4 else structure) ** weight
            a, b = (x.reshape(len(x) // 2, 2, len(x) // 2, 2, 3).mean((1, 3)) for x in (a, b))
        assert ms_ssim_of_pairs(first[None], second[None])[0] == pytest.approx(expected, abs=1e-4)


def test_copies_score_one_and_noise_near_zero(pictures: Pixels) -> None:
    assert ms_ssim(ArrayImages(np.repeat(pictures[:8], 2, axis=0))) == pytest.approx(1, abs=1e-6)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), dtype=np.uint8)
    assert ms_ssim(ArrayImages(noise)) < 0.1 < ms_ssim(ArrayImages(pictures[:64]))


def test_an_odd_last_image_has_no_partner_and_is_left_out(pictures: Pixels) -> None:
    assert ms_ssim(ArrayImages(pictures[:131])) == ms_ssim(ArrayImages(pictures[:130]))


def test_too_small_images_are_refused() -> None:
    with pytest.raises(DataError, match="3x16 pixels are too small"):
        ms_ssim(ArrayImages(np.zeros((4, 16, 3, 3), np.uint8)))
