"""z must depend on (seed, purpose, index) alone, and never change between versions."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.common.errors import UsageError
from pipeline.common.randomness import Purpose, permutation, raw_bits, spread_bits
from pipeline.config import RunConfig
from pipeline.model.latents import Distribution, latent_batches, latents


@given(st.integers(0, 2**40), st.integers(0, 300), st.integers(1, 40), st.integers(1, 130))
def test_any_range_equals_the_slice_of_a_longer_one(start: int, skip: int, count: int, dim: int) -> None:
    whole = latents(7, Purpose.SAMPLE, start, skip + count, dim)
    assert np.array_equal(whole[skip:], latents(7, Purpose.SAMPLE, start + skip, count, dim))
    every_third = latents(7, Purpose.SAMPLE, start, skip + count, dim, rows=slice(1, None, 3))
    assert np.array_equal(whole[1::3], every_third)


@given(st.integers(0, 2**70), st.integers(1, 30), st.integers(1, 9), st.integers(1, 7))
def test_spread_bits_are_those_of_one_long_draw(start: int, blocks: int, rows: int, step: int) -> None:
    whole = raw_bits(7, Purpose.TRAIN, start, rows * step * blocks * 4).reshape(rows * step, -1)
    found = spread_bits(7, Purpose.TRAIN, range(start, start + rows * step * blocks, step * blocks), blocks)
    assert np.array_equal(found, whole[::step])


@pytest.mark.parametrize(("batch", "world_size", "latent_dim"), [(16, 1, 100), (24, 3, 7), (8192, 64, 100)])
@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_batches_are_the_ranks_rows_of_the_run(
    batch: int, world_size: int, latent_dim: int, distribution: Distribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than are drawn at once."""
    monkeypatch.setattr("pipeline.model.latents.VALUES_AHEAD", 3 * batch // world_size * latent_dim)
    network = {"latent_dim": latent_dim, "latent_distribution": distribution}
    config = RunConfig.model_validate({"network": network, "recipe": {"batch": batch, "streams": 1, "seed": 5}})
    start, count, rank = 7 * batch, 4, world_size - 1
    found = list(islice(latent_batches(config, start=start, rank=rank, world_size=world_size), count))
    expected = latents(5, Purpose.TRAIN, start, count * batch, latent_dim, distribution)
    assert np.array_equal(np.concatenate(found), expected[rank::world_size])


def test_golden_values_do_not_change() -> None:
    assert latents(3, Purpose.GRID, 5, 1, 3).tolist() == [GOLDEN_UNIFORM]
    assert latents(3, Purpose.GRID, 5, 1, 3, "normal").tolist() == [pytest.approx(GOLDEN_NORMAL, abs=1e-7)]
    assert permutation(8, 3, Purpose.SHARD_ORDER, lane=2).tolist() == GOLDEN_ORDER


def test_moments_and_ranges() -> None:
    uniform = latents(0, Purpose.SAMPLE, 0, 20_000, 10)
    assert uniform.dtype == np.float32
    assert np.abs(uniform).max() <= 1
    assert uniform.var() == pytest.approx(1 / 3, rel=0.01)
    normal = latents(0, Purpose.SAMPLE, 0, 20_000, 10, "normal")
    assert (normal.mean(), normal.std()) == (pytest.approx(0, abs=0.01), pytest.approx(1, rel=0.01))


def test_purposes_and_seeds_share_nothing() -> None:
    draws = [latents(seed, purpose, 0, 4, 8) for seed in (0, 1) for purpose in Purpose]
    assert len({draw.tobytes() for draw in draws}) == len(draws)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(UsageError, match="seed"):
        latents(seed, Purpose.SAMPLE, 0, 1, 8)


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
@pytest.mark.parametrize("word", [0, 2**64 - 1, 2**64 - 2**11 - 1, 2**63])
def test_the_most_extreme_draws_are_finite(
    word: int, distribution: Distribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.model.latents.raw_bits", lambda *_: np.full(4, word, np.uint64))
    z = latents(0, Purpose.SAMPLE, 0, 1, 4, distribution)
    assert np.isfinite(z).all()
    assert np.abs(z).max() <= (1 if distribution == "uniform" else 8.3)


GOLDEN_UNIFORM = [-0.666147768497467, 0.08593065291643143, 0.5169968605041504]
GOLDEN_NORMAL = [-0.966383695602417, 0.10790715366601944, 0.7014806270599365]
GOLDEN_ORDER = [4, 2, 0, 1, 7, 5, 6, 3]
