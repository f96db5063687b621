"""Nearest neighbours are the nearest, curves fall, collisions are found, and the commands write what they found."""

import json
from pathlib import Path

import numpy as np
import pytest
from planted import NETWORK, legible_generator, planted

from pipeline.evaluation import memorization
from pipeline.evaluation.images import GeneratedImages
from pipeline.evaluation.memorization import collisions, distance_curves, nearest_code, run_memorization
from pipeline.evaluation.nearest import flat, nearest
from pipeline.evaluation.neighbors import run_neighbors
from pipeline.evaluation.walks import images_of
from pipeline.networks import Generator
from pipeline.snapshots import sample


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hash of fewer samples after fewer steps: rough, but minutes faster."""
    monkeypatch.setattr(memorization, "HASHED", 512)
    monkeypatch.setattr(memorization, "HASH_STEPS", 60)
    monkeypatch.setattr(memorization, "WALKS", 6)


def test_nearest_is_what_a_loop_finds() -> None:
    draw = np.random.default_rng(0)
    queries, references = draw.normal(size=(30, 5)).astype(np.float32), draw.normal(size=(70, 5)).astype(np.float32)
    index, distance = nearest(queries, references)
    table = np.sqrt(np.square(queries[:, None] - references[None]).mean(2))
    np.testing.assert_array_equal(index, table.argmin(1))
    np.testing.assert_allclose(distance, table.min(1), rtol=1e-3)
    index, distance = nearest(references, references, skip_self=True)
    assert (index != np.arange(70)).all()
    assert distance.min() > 0


def test_distance_curves_are_those_of_the_whole_set_at_every_size() -> None:
    generator = legible_generator()
    queries = {"seen": flat(planted(20, seed=2)[0])}
    curves = distance_curves(generator, queries, [100, 256, 300], seed=3)
    samples = np.concatenate([pixels for _, pixels in GeneratedImages(generator, 300, 3).blocks()])
    for size, value in zip([100, 256, 300], curves["seen"], strict=True):
        np.testing.assert_allclose(value, nearest(queries["seen"], flat(samples[:size]))[1].mean(), rtol=1e-4)
    assert curves["seen"] == sorted(curves["seen"], reverse=True)


def test_codes_are_compared_bit_by_bit() -> None:
    draw = np.random.default_rng(0)
    a, b = (draw.integers(0, 256, (n, 16), dtype=np.uint8) for n in (9, 31))
    bits = np.unpackbits(a[:, None] ^ b[None], axis=2).sum(2)
    np.testing.assert_array_equal(nearest_code(a, b), bits.min(1))
    assert (nearest_code(b, b) == 0).all()
    assert (nearest_code(b, b, skip_self=True) > 0).all()


def test_a_generator_that_repeats_its_training_set_collides_and_another_does_not() -> None:
    known, _ = planted(512, seed=6)
    honest = collisions(known, legible_generator(), seed=0)
    assert honest["samples_that_collide"] < 0.3
    generator = legible_generator()
    repeated = np.concatenate([pixels for _, pixels in GeneratedImages(generator, 512, 0).blocks()])
    assert collisions(repeated, generator, seed=0)["samples_that_collide"] == 1


def test_both_commands_write_numbers_and_pictures(run: Path, labelled: Path, tmp_path: Path) -> None:
    near = run_neighbors(tmp_path, ckpt=str(run), data=str(labelled), count=14, limit=None, seed=0)
    assert 0 < near["closest"] <= near["distance"]
    numbers = run_memorization(
        tmp_path, ckpt=str(run), data=str(labelled), held_out=str(labelled), most=100, limit=200, seed=0
    )
    # Held out here are the very same images: a fair measure must not tell them apart.
    assert numbers["distance_training_100"] == numbers["distance_held-out_100"]
    assert numbers["walk_unevenness"] >= 1
    for name in ("neighbors", "memorization"):
        written = json.loads((tmp_path / f"{name}.json").read_text())
        assert written["summary"]
        assert all((tmp_path / picture["file"]).is_file() for picture in written["pictures"])


def test_generated_images_are_the_trainers_and_the_same_at_every_pass() -> None:
    from pipeline.networks import initialise
    from pipeline.randomness import Purpose

    generator = Generator(NETWORK).eval()
    initialise(generator, 0, lane=1)
    images = GeneratedImages(generator, 300, seed=5)
    passes = [np.concatenate([pixels for _, pixels in images.blocks()]) for _ in range(2)]
    np.testing.assert_array_equal(passes[0], passes[1])
    np.testing.assert_array_equal(passes[0], sample(generator, 5, Purpose.EVALUATE, 0, 300))
    shares = [dict(images.blocks(rank, 2)) for rank in range(2)]
    joined = np.concatenate([(shares[0] | shares[1])[block] for block in range(3)])
    np.testing.assert_array_equal(joined, passes[0])
    assert images_of(generator, np.zeros((1, NETWORK.latent_dim), np.float32)).dtype == np.uint8
