"""SWD agrees with a sort of every projection, and orders sets as their distance is."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from evaluation_cases import Unheld
from numpy.typing import NDArray

from pipeline.common.errors import DataError
from pipeline.common.imaging import Pixels
from pipeline.common.randomness import Purpose, raw_bits
from pipeline.common.ranks import Ranks
from pipeline.evaluation.device import full_float32
from pipeline.evaluation.images import ArrayImages
from pipeline.evaluation.metrics import swd
from pipeline.evaluation.metrics.ms_ssim import ms_ssim
from pipeline.evaluation.metrics.pyramids import Pyramid, laplacian_pyramid, resolutions
from pipeline.evaluation.metrics.quality import quality, reference


def brute_force(reals: Pixels, fakes: Pixels, sampling: swd.Sampling) -> dict[str, float]:
    """Every step in the plainest form: 2-D convolutions, python loops, scipy's 1-D Wasserstein distance."""
    binomial = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    ours = sampling.pyramid == "pggan"
    blur = partial(scipy.ndimage.convolve, weights=binomial[..., None], mode="mirror" if ours else "constant")

    def pyramid(image: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        levels = [image]
        while levels[-1].shape[0] > 16 and (ours or len(levels) < 4):
            smaller = blur(levels[-1])[::2, ::2]
            spread = np.zeros_like(levels[-1])
            if ours:
                spread[::2, ::2] = 4 * smaller
            else:
                for row, column in np.ndindex(2, 2):
                    spread[row::2, column::2] = smaller
            levels[-1] = levels[-1] - blur(spread)
            levels.append(smaller)
        return levels

    def described(images: Pixels, level: int, lane: int) -> NDArray[np.float64]:
        rows = []
        for index, image in enumerate(images):
            detail = pyramid(image.astype(np.float64))[level]
            words = raw_bits(sampling.seed, Purpose.PROJECTIONS, index * (sampling.patches // 4),
                                 sampling.patches, lane=lane)  # fmt: skip
            for word in words.tolist():
                room = detail.shape[0] - 6
                top, left = (word >> 32) * room >> 32, (word & 0xFFFFFFFF) * room >> 32
                rows.append(detail[top : top + 7, left : left + 7].transpose(2, 0, 1))
        stacked = np.stack(rows)
        stacked -= stacked.mean((0, 2, 3), keepdims=True)
        stacked /= stacked.std((0, 2, 3), keepdims=True)
        return stacked.reshape(len(stacked), -1)

    result = {}
    for level, resolution in enumerate(resolutions(reals.shape[1], reals.shape[2], sampling.pyramid)):
        a, b = described(reals, level, 3 * level + 1), described(fakes, level, 3 * level + 2)
        directions = swd._directions(a.shape[1], 3 * level, sampling).astype(np.float64)
        each = [scipy.stats.wasserstein_distance(a @ d, b @ d) for d in directions.T]
        result[f"swd_{resolution}"] = float(np.mean(each)) * 1e3
    return result


def distance(reals: Pixels, fakes: Pixels, sampling: swd.Sampling = swd.Sampling(0, 32, 64)) -> dict[str, float]:
    return swd.distances(
        swd.project(ArrayImages(reals), sampling, real=True), swd.project(ArrayImages(fakes), sampling, real=False)
    )


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("pyramid", ["pggan", "mmagic"])
def test_agrees_with_sorting_every_projection(pictures: Pixels, size: int, pyramid: Pyramid) -> None:
    sampling = swd.Sampling(seed=3, patches=16, directions=24, pyramid=pyramid)
    step = 64 // size
    reals, fakes = pictures[:24, ::step, ::step], pictures[200:224, ::step, ::step] // 2
    ours = distance(reals, fakes, sampling)
    independent = brute_force(reals, fakes, sampling)
    for level, expected in independent.items():
        assert ours[level] == pytest.approx(expected, rel=2e-3, abs=0.05), level
    assert ours["swd"] == pytest.approx(np.mean(list(independent.values())), rel=2e-3)


def test_the_pyramids_differ_in_detail_and_in_depth(pictures: Pixels) -> None:
    """mmagic's details of 64 pixels are others, its black edges too; it ends after four levels."""
    maps = torch.from_numpy(pictures[:8]).permute(0, 3, 1, 2).float()
    kinds: tuple[Pyramid, Pyramid] = ("pggan", "mmagic")
    one, other = (laplacian_pyramid(maps, kind) for kind in kinds)
    inner = (..., slice(8, -8), slice(8, -8))
    assert (one[0] - other[0])[inner].abs().max() > 1, "doubled in another way"
    torch.testing.assert_close(one[2][..., 4:-4, 4:-4], other[2][..., 4:-4, 4:-4])  # blurred and halved alike
    assert resolutions(256, 256, "mmagic") == [256, 128, 64, 32]
    assert resolutions(256, 256) == [256, 128, 64, 32, 16]
    for kind in kinds:
        sizes = [level.shape[2:] for level in laplacian_pyramid(torch.rand(1, 3, 75, 50), kind)]
        assert sizes == [(75, 50), (38, 25)], "of odd sides too"


def test_the_digits_are_those_of_the_first_release(pictures: Pixels) -> None:
    """It computed in numpy, with convolutions. Levels of a run that goes on must not jump with the release."""
    numpy = {"swd": 35.1721843, "swd_64": 23.4052539, "swd_32": 26.3658538, "swd_16": 55.7454452}
    found = quality(pictures[:256], pictures[256:], seed=7)
    assert found == pytest.approx({**numpy, "ms_ssim": 0.159772016, "ms_ssim_real": 0.200112259}, rel=5e-5)


def test_products_are_in_full_precision_whatever_training_has_chosen() -> None:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        with full_float32():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
    assert torch.get_float32_matmul_precision() == "highest", "the older interface agrees"


def test_sets_of_unequal_size_are_compared_as_distributions(pictures: Pixels) -> None:
    ours = distance(pictures[:200], pictures[200:300])
    assert ours["swd"] == pytest.approx(distance(pictures[:200], pictures[200:400])["swd"], rel=0.5)


def test_orders_a_split_a_blurred_a_noisy_and_another_set(pictures: Pixels) -> None:
    real, other = pictures[:256], pictures[256:]
    blurred = scipy.ndimage.gaussian_filter(other, (0, 1.5, 1.5, 0))
    noise = np.random.default_rng(0).integers(0, 256, other.shape, dtype=np.uint8)
    split, soft, noisy = (distance(real, x)["swd"] for x in (other, blurred, noise))
    assert split * 2 < soft
    assert soft * 2 < noisy
    # A blur leaves the coarsest level nearly alone and destroys the finest: the levels must tell.
    levels = distance(real, blurred)
    assert levels["swd_16"] * 3 < levels["swd_64"]


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_quality_is_equal_for_every_world_size(pictures: Pixels, world_size: int) -> None:
    import threading

    reals, fakes = pictures[:256], pictures[256:]
    alone = quality(reals, fakes, seed=7, patches=8, directions=16)
    barrier = threading.Barrier(world_size)
    slots: list[NDArray[np.generic]] = [np.zeros(0)] * world_size
    results: list[dict[str, float]] = [{}] * world_size

    def one(rank: int) -> None:
        def total(array: NDArray[np.generic]) -> NDArray[np.generic]:
            slots[rank] = array
            barrier.wait()
            summed = np.sum(slots, axis=0)
            barrier.wait()
            return np.asarray(summed)

        ranks = Ranks(rank, world_size, total)
        real_side = reference(reals, patches=8, directions=16, seed=7, ranks=ranks)
        results[rank] = quality(real_side, fakes, patches=8, directions=16, seed=7, ranks=ranks)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result == alone for result in results)
    assert set(alone) == {"swd", "swd_64", "swd_32", "swd_16", "ms_ssim", "ms_ssim_real"}


def test_the_seed_decides_and_nothing_else(pictures: Pixels) -> None:
    halves = pictures[:128], pictures[128:256]
    assert distance(*halves) == distance(*halves)
    assert distance(*halves) != distance(*halves, swd.Sampling(1, 32, 64))


def test_memory_is_flat_in_the_number_of_images(peak_bytes: Callable[[Callable[[], object]], int]) -> None:
    sampling = swd.Sampling(patches=4, directions=4)

    def measure(count: int) -> None:
        swd.project(Unheld(count), sampling, real=True)
        ms_ssim(Unheld(count))

    few, many = (peak_bytes(partial(measure, count)) for count in (256, 2_560))
    assert many < few + 200_000  # the further images are 7 MB


def test_too_small_images_are_refused() -> None:
    with pytest.raises(DataError, match="8x8 pixels are too small"):
        distance(np.zeros((4, 8, 8, 3), np.uint8), np.zeros((4, 8, 8, 3), np.uint8))
