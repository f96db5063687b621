"""Features find copies that pixels miss, distances are scikit-learn's, and results say which copies are seen."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_cases import Outcome, Unheld
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from pipeline.common.imaging import Pixels, save_png
from pipeline.evaluation.images import BLOCK, ArrayImages
from pipeline.evaluation.metrics.extractors import FallbackExtractor, load_extractor
from pipeline.evaluation.nearest import copies
from pipeline.evaluation.nearest.copies import COPIES, FEATURES, PIXELS, feature_numbers, look, spaces
from pipeline.evaluation.nearest.feature_space import FeatureSpace, cosine_distances
from pipeline.evaluation.nearest.nearest import flat
from pipeline.evaluation.paper import memorization


class Spectrum(nn.Module):
    """The strengths of spatial frequencies, without signs: nearly alike for a shifted, mirrored or brighter image."""

    def forward(self, images: Tensor) -> Tensor:
        gray = images.mean(1)
        strength = torch.fft.fft2(gray - gray.mean((1, 2), keepdim=True)).abs()
        mirrored = torch.roll(torch.flip(strength, [2]), 1, 2)
        rows: Tensor = (strength + mirrored).flatten(1)
        return rows


def textures(count: int, seed: int) -> Pixels:
    """Faint noise on grounds of any gray: what lies nearest in pixels is an image of the same gray."""
    draw = np.random.default_rng(seed)
    ground = draw.uniform(100, 140, (count, 1, 1, 1))
    return np.asarray((ground + draw.normal(0, 8, (count, 32, 32, 3))).clip(0, 255), np.uint8)


@pytest.fixture(scope="module")
def spectrum(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("extractor") / "spectrum.pt"
    torch.jit.script(Spectrum()).save(str(path))  # type: ignore[no-untyped-call]
    return path


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_nearest_in_features_and_not_in_pixels(name: str, spectrum: Path) -> None:
    reals, others = textures(300, seed=1), textures(40, seed=2)
    originals = np.arange(200, 240)  # not in the first block
    samples = np.concatenate([COPIES[name](reals[originals]), others])
    searches = spaces(samples, reals, FeatureSpace(load_extractor(str(spectrum)), reals))
    look(searches, ArrayImages(reals), "looking")
    by_pixels, by_features = searches[PIXELS].samples, searches[FEATURES].samples
    np.testing.assert_array_equal(by_features.index[:40], originals)
    assert (by_pixels.index[:40] == originals).mean() < 0.2
    np.testing.assert_array_equal(searches[FEATURES].pictures[:40], reals[originals])
    distances = cosine_distances(by_features)
    assert distances[:40].max() < distances[40:].min()  # what is no copy is farther than any copy
    numbers = feature_numbers(searches)
    assert numbers[f"copies_found_by_features, {name}"] > 0.95
    assert numbers[f"copies_found_by_pixels, {name}"] < 0.2


@pytest.mark.parametrize("piece", [7, 100, 300])
def test_distances_and_neighbors_are_those_of_scikit_learn(piece: int, make_scenes: Callable[..., Pixels]) -> None:
    reals, samples, extractor = make_scenes(300, seed=3, size=32), make_scenes(50, seed=4, size=32), FallbackExtractor()
    searches = spaces(samples, reals, FeatureSpace(extractor, reals[:90]))
    for start in range(0, 300, piece):
        for search in searches.values():
            search.update(reals[start : start + piece])
    a, b = (extractor.extract(images).features.astype(np.float64) for images in (samples, reals))
    for by, metric, queries, references in (
        (FEATURES, "cosine", a, b),
        (PIXELS, "euclidean", flat(samples).astype(np.float64), flat(reals).astype(np.float64)),
    ):
        theirs = NearestNeighbors(metric=metric, algorithm="brute").fit(references)
        search = searches[by]
        assert search.reals is not None
        for ours, rows, place in ((search.samples, queries, 0), (search.reals, references, 1)):  # 0 is the row itself
            distance, index = (found[:, place] for found in theirs.kneighbors(rows, place + 1))
            np.testing.assert_array_equal(ours.index, index)
            found = cosine_distances(ours) if by == FEATURES else ours.distance * np.sqrt(references.shape[1])
            np.testing.assert_allclose(found, distance, rtol=2e-3)


def test_both_commands_tell_by_features_too(
    run: Path,
    spectrum: Path,
    tmp_path: Path,
    evaluate: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("HASHED", 64), ("HASH_STEPS", 2), ("WALKS", 2), ("COMPARED", 70)):
        monkeypatch.setattr(memorization, name, value)
    (tmp_path / "reals").mkdir()
    for index, image in enumerate(textures(150, seed=5)):
        save_png(tmp_path / f"reals/{index}.png", image)
    options = ["--ckpt", run, "--data", tmp_path / "reals", "--extractor", spectrum, "--out", tmp_path]
    for name, more in (("neighbors", ["--count", 13]), ("memorization", ["--most", 100])):
        done = evaluate(name, *options, *more)
        assert done.code == 0, done.err
        written = json.loads((tmp_path / f"{name}.json").read_text())
        results, protocol = written["results"], written["protocol"]
        for kind in COPIES:
            assert results[f"copies_found_by_features, {kind}"] > 0.9
            assert results[f"copies_found_by_pixels, {kind}"] < 0.3
        assert 0 < results["feature_real_to_real_closest"] <= results["feature_real_to_real"]
        assert protocol["extractor"] == "spectrum.pt"
        assert len(protocol["extractor_sha256"]) == 64
        assert protocol["feature_distance"] == "cosine, of the extractor's features"
        assert protocol["real_images"] == "150 pictures of 32x32 pixels, as they are"
        assert protocol["images_real"] == 150
        assert "By the extractor's features (cosine distance)" in written["summary"]
        assert all((tmp_path / picture["file"]).stat().st_size > 500 for picture in written["pictures"])
        assert name == "neighbors" or (tmp_path / "memorization-closest.png").is_file()


def test_options_of_an_extractor_need_one(
    run: Path, labeled: Path, tmp_path: Path, evaluate: Callable[..., Outcome]
) -> None:
    for name in ("neighbors", "memorization"):
        done = evaluate(name, "--ckpt", run, "--data", labeled, "--resize", 32, "--out", tmp_path)
        assert done.code == 2
        assert done.err.count("\n") == 1
        assert "--extractor-sha256 and --resize are of an --extractor, and none is named" in done.err


def test_memory_does_not_grow_with_the_training_set(
    monkeypatch: pytest.MonkeyPatch, peak_bytes: Callable[[Callable[[], object]], int]
) -> None:
    monkeypatch.setattr(copies, "REAL_QUERIES", 50)
    monkeypatch.setattr(copies, "PLANTED", 20)
    some = next(iter(Unheld(BLOCK).blocks()))[1]
    space = FeatureSpace(FallbackExtractor(), some)

    def peak(images: int) -> int:
        return peak_bytes(lambda: look(spaces(some[:12], some, space), Unheld(images), "looking"))

    peak(256)
    assert peak(2_560) < peak(256) + 1_000_000  # the further images are 7 MB, their features 4 MB
