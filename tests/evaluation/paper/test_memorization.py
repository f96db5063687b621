"""Nearest neighbors are the nearest, curves fall, collisions are found, and the commands write what they found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_cases import Unheld
from planted import legible_generator, planted

from pipeline.data.dataset import open_dataset
from pipeline.data.dedup.semantic_hash import SemanticHash
from pipeline.data.labeled import load_labeled
from pipeline.evaluation import charts, inputs
from pipeline.evaluation.images import ArrayImages, GeneratedImages
from pipeline.evaluation.nearest import copies
from pipeline.evaluation.nearest.nearest import Nearest, flat
from pipeline.evaluation.paper import memorization, neighbors
from pipeline.evaluation.paper.memorization import (
    calibrate,
    collisions,
    distance_curves,
    nearest_code,
    run_memorization,
)
from pipeline.evaluation.paper.neighbors import run_neighbors


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hash of fewer samples after fewer steps: rough, but minutes faster."""
    monkeypatch.setattr(memorization, "HASHED", 512)
    monkeypatch.setattr(memorization, "HASH_STEPS", 60)
    monkeypatch.setattr(memorization, "WALKS", 6)


@pytest.mark.parametrize("piece", [1, 7, 64, 70])
def test_nearest_is_what_a_loop_over_the_whole_set_finds(piece: int) -> None:
    draw = np.random.default_rng(0)
    queries, references = draw.normal(size=(30, 5)).astype(np.float32), draw.normal(size=(70, 5)).astype(np.float32)
    for wanted, skip_self in ((queries, False), (references[:40], True)):
        search = Nearest(wanted, skip_self=skip_self)
        for start in range(0, 70, piece):
            nearer = search.update(references[start : start + piece])
            assert (search.index[nearer] >= start).all()
        table = np.sqrt(np.square(wanted[:, None] - references[None]).mean(2))
        if skip_self:
            table[np.arange(40), np.arange(40)] = np.inf
        np.testing.assert_array_equal(search.index, table.argmin(1))
        np.testing.assert_allclose(search.distance, table.min(1), rtol=1e-3)


def test_memory_does_not_grow_with_the_training_set(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peak_bytes: Callable[[Callable[[], object]], int]
) -> None:
    monkeypatch.setattr(memorization, "REAL_QUERIES", 50)
    monkeypatch.setattr(copies, "REAL_QUERIES", 50)
    monkeypatch.setattr(neighbors, "BATCHNORM_IMAGES", 128)
    monkeypatch.setattr(memorization, "THRESHOLD_IMAGES", 128)
    monkeypatch.setattr(memorization, "HASHED", 64)
    monkeypatch.setattr(memorization, "HASH_STEPS", 2)

    def peak(command: Callable[..., object], images: int, **options: int) -> int:
        def reals(_: str, count: int | None, *_shape: object) -> tuple[Unheld, dict[str, object]]:
            return Unheld(min(count or images, images)), {}

        monkeypatch.setattr(inputs, "reals", reals)
        return peak_bytes(lambda: command(tmp_path, ckpt=str(run), data="", limit=None, seed=0, **options))

    for command, options in ((run_neighbors, {"count": 12}), (run_memorization, {"held_out": None, "most": 100})):
        peak(command, 256, **options)  # what is imported once
        few, many = (peak(command, images, **options) for images in (256, 2_560))
        assert many < few + 1_000_000  # the further images are 7 MB, 28 MB as floats


def test_neighbors_are_shown_from_wherever_in_the_set_they_are(
    run: Path, labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[dict[str, np.ndarray]] = []

    def sheet(groups: Any, _: object) -> np.ndarray:
        shown.append(dict(groups))
        return np.zeros((1, 1, 3), np.uint8)

    monkeypatch.setattr(charts, "sheet", sheet)
    run_neighbors(tmp_path, ckpt=str(run), data=str(labeled), count=12, limit=None, seed=0)
    reals = load_labeled(open_dataset(labeled)).images
    samples = flat(shown[0]["samples"])
    table = np.square(samples[:, None] - flat(reals)[None]).mean(2)
    assert table.argmin(1).max() >= 128  # not all of them in the first block
    np.testing.assert_array_equal(shown[0]["nearest real image by pixels"], reals[table.argmin(1)])


def test_distance_curves_are_those_of_the_whole_set_at_every_size() -> None:
    generator = legible_generator()
    queries = {"seen": flat(planted(20, seed=2)[0])}
    curves = distance_curves(generator, queries, [100, 256, 300], seed=3)
    samples = np.concatenate([pixels for _, pixels in GeneratedImages(generator, 300, 3).blocks()])
    for size, value in zip([100, 256, 300], curves["seen"], strict=True):
        search = Nearest(queries["seen"])
        search.update(flat(samples[:size]))
        np.testing.assert_allclose(value, search.distance.mean(), rtol=1e-4)
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
    honest = collisions(ArrayImages(known), legible_generator(), seed=0)
    assert honest["samples_that_collide"] < 0.3
    generator = legible_generator()
    repeated = np.concatenate([pixels for _, pixels in GeneratedImages(generator, 512, 0).blocks()])
    assert collisions(ArrayImages(repeated), generator, seed=0)["samples_that_collide"] == 1


def test_both_commands_write_numbers_and_pictures(run: Path, labeled: Path, tmp_path: Path) -> None:
    near = run_neighbors(tmp_path, ckpt=str(run), data=str(labeled), count=14, limit=None, seed=0)
    assert 0 < near["closest"] <= near["distance"]
    numbers = run_memorization(
        tmp_path, ckpt=str(run), data=str(labeled), held_out=str(labeled), most=100, limit=200, seed=0
    )
    # Held out here are the very same images: a fair measure must not tell them apart.
    assert numbers["distance_training_100"] == numbers["distance_held-out_100"]
    assert numbers["walk_unevenness"] >= 1
    for name in ("neighbors", "memorization"):
        written = json.loads((tmp_path / f"{name}.json").read_text())
        assert written["summary"]
        assert all((tmp_path / picture["file"]).is_file() for picture in written["pictures"])


def test_a_radius_sees_planted_near_copies_that_equal_codes_miss(
    monkeypatch: pytest.MonkeyPatch, make_scenes: Callable[..., Any]
) -> None:
    images = make_scenes(300, seed=5, size=32)
    hasher = SemanticHash(seed=0, steps=60)
    hasher.fit(images)
    radius, found, equal = calibrate(hasher, images)
    assert 0 < radius <= 8
    assert found > equal
    copies = np.clip(images.astype(np.float32) * 1.02 + 0.5, 0, 255).astype(np.uint8)
    bits = nearest_code(hasher.codes(copies), hasher.codes(images))
    assert (bits <= radius).mean() > (bits == 0).mean()
    monkeypatch.setattr(memorization, "FALSE_ALARMS", -1)
    assert calibrate(hasher, images)[0] == 0
