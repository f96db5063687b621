"""Guided backpropagation follows its rule, ascent climbs, and the object's maps are those that draw it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import NETWORK, legible_generator, planted

from pipeline.common.errors import DataError, UsageError
from pipeline.config import NetworkConfig
from pipeline.evaluation.device import to_network
from pipeline.evaluation.paper.discriminator_features import measure_batchnorm, random_discriminator
from pipeline.evaluation.paper.features import (
    ascend,
    guided_backpropagation,
    most_selective,
    peak_responses,
    run_features,
)
from pipeline.evaluation.paper.forget import Box, object_maps, read_boxes, run_forget, without_maps
from pipeline.evaluation.paper.walks import draw
from pipeline.model import dcgan
from pipeline.model.networks import Discriminator, build_generator
from pipeline.model.sampling import images_of


@pytest.fixture(scope="module")
def network() -> Discriminator:
    return measure_batchnorm(random_discriminator(NETWORK, 0), planted(256, seed=1)[0])


def test_guided_backpropagation_shows_only_what_feeds_the_unit(network: Discriminator) -> None:
    images, _ = planted(2, seed=0)
    shown = guided_backpropagation(network, images, layer=1, unit=3).astype(int) - 128
    with torch.no_grad():
        first = next(iter(network.activations(to_network(images))))[:, 3]
    for picture, maps in zip(shown, first, strict=True):
        row, column = divmod(int(maps.argmax()), maps.shape[1])
        rows, columns = np.nonzero(np.abs(picture).max(-1) > 1)
        assert abs(rows - 2 * row).max() <= 3  # a 4x4 filter with stride 2 sees no further
        assert abs(columns - 2 * column).max() <= 3
        assert np.abs(picture).max() == pytest.approx(127, abs=1)


def test_ascent_excites_the_unit_more_than_any_real_image(network: Discriminator) -> None:
    images, _ = planted(64, seed=0)

    def mean_response(pixels: np.ndarray) -> float:
        with torch.no_grad():
            return float(list(network.activations(to_network(pixels)))[1][:, 5].mean((1, 2)).max())

    assert mean_response(ascend(network, 2, 5, (32, 32, 3), seed=0)) > mean_response(images)


def test_the_strongest_units_are_those_that_single_images_out() -> None:
    draw_ = np.random.default_rng(0)
    peaks = draw_.normal(size=(200, 6)).astype(np.float32)
    peaks[:8, 4] += 30
    units, strength = most_selective(peaks, 2)
    assert units[0] == 4
    assert strength[0] > 4 > strength[1]


def test_features_writes_trained_beside_random(run: Path, labeled: Path, tmp_path: Path) -> None:
    run_features(tmp_path, ckpt=str(run), data=str(labeled), layer=2, units=3, images_each=4, seed=0)
    written = json.loads((tmp_path / "features.json").read_text())
    assert len(written["pictures"]) == 4
    with pytest.raises(UsageError, match="layers 1 to 3"):
        run_features(tmp_path, ckpt=str(run), data=str(labeled), layer=4, units=3, images_each=4, seed=0)
    assert peak_responses(random_discriminator(NETWORK, 0).eval(), planted(5, seed=0)[0], 1).shape == (5, 8)


def squares() -> list[int]:
    """Samples of the legible generator that show a square clearly."""
    return np.flatnonzero(draw(NETWORK, 0, 0, 200)[:, 1] > 0.3).tolist()


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_the_map_that_draws_the_object_is_found_and_dropped(layer: int) -> None:
    generator = legible_generator()
    weights, accuracy = object_maps(generator, [Box(i, 8, 8, 24, 24) for i in squares()], seed=0, layer=layer)
    assert len(weights) == (8, 16, 32)[layer - 1]
    assert weights.argmax() == 2
    assert accuracy > 0.75, "of a square whose edges the kernels blur"
    z = np.zeros((2, NETWORK.latent_dim), np.float32)
    z[0, 1], z[1, 0] = 1, 1
    before, after = images_of(generator, z), without_maps(generator, np.array([2]), z, layer=layer)
    assert before[0, 14:18, 14:18].mean() > 200
    np.testing.assert_array_equal(after[0], np.full_like(after[0], 128))  # the square is gone
    np.testing.assert_array_equal(after[1], before[1])  # and nothing else
    np.testing.assert_array_equal(images_of(generator, z), before)  # nor for good
    half = without_maps(generator, np.array([2]), z, strength=0.5, layer=layer)
    assert 128 < half[0, 15, 15, 0] < before[0, 15, 15, 0]


def test_the_papers_layer_has_more_maps_than_the_200_that_it_drops() -> None:
    """Section 6.3.1; and maps are read, and dropped, right there: what follows is computed from the others."""
    generator = build_generator(NetworkConfig(latent_dim=4)).eval()
    z = torch.randn(2, 4)
    last, second = generator.feature_maps(z, 1), generator.feature_maps(z, 2)
    assert (last.shape[1:], second.shape[1:]) == ((128, 32, 32), (256, 16, 16))
    assert isinstance(generator, dcgan.Generator)
    second[:, :200] = 0
    expected = generator.layers[-5:](second)
    found = generator.without_maps(z, torch.arange(200), layer=2)
    torch.testing.assert_close(found, expected)


def test_what_is_outside_one_box_and_inside_another_is_inside() -> None:
    generator = legible_generator()
    whole = [Box(i, 8, 8, 24, 24) for i in squares()]
    left, right = ([Box(i, a, 8, b, 24) for i in squares()] for a, b in ((8, 16), (16, 24)))
    expected, accuracy = object_maps(generator, whole, seed=0)
    weights, again = object_maps(generator, [*left, *right], seed=0)
    np.testing.assert_array_equal(weights, expected)
    assert again == accuracy


def test_forget_takes_boxes_from_a_file(legible_run: Path, tmp_path: Path) -> None:
    boxes = tmp_path / "boxes.csv"
    lines = [f"{index},8,8,24,24" for index in squares()]
    boxes.write_text("\n".join(["index,left,top,right,bottom", *lines]))
    options = {"ckpt": str(legible_run), "attribute": None, "region": None, "classifier_file": None, "data": None}
    numbers = run_forget(tmp_path, boxes=boxes, samples=16, strength=1.0, layer=2, seed=0, **options)  # type: ignore[arg-type]
    assert numbers["dropped"] >= 1
    assert (tmp_path / "forget.png").is_file()
    for text, message in (
        ("index,left\n1,2", "line 2: expected the columns"),
        ("index,left,top,right,bottom\n1,8,8,24,99", "line 2: the box is not inside"),
        ("index,left,top,right,bottom\n4096,8,8,24,24", "line 2: there is no sample 4096; expected 0 to 4095"),
        ("\n".join(["index,left,top,right,bottom", *lines[:3] * 9]), "boxes in only 3 samples"),
    ):
        boxes.write_text(text)
        with pytest.raises(DataError, match=message):
            run_forget(tmp_path, boxes=boxes, samples=16, strength=1.0, layer=2, seed=0, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--layer 4: the generator has maps of layers 1 to 3, counted from the image"):
        run_forget(tmp_path, boxes=boxes, samples=16, strength=1.0, layer=4, seed=0, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the place of the object is missing"):
        run_forget(tmp_path, boxes=None, samples=16, strength=1.0, layer=2, seed=0, **options)  # type: ignore[arg-type]


def test_forget_finds_the_object_by_attribute_and_measures_what_is_left(
    legible_run: Path, classifier_file: Path, tmp_path: Path
) -> None:
    numbers = run_forget(
        tmp_path,
        ckpt=str(legible_run),
        boxes=None,
        attribute="bright",
        region=(8, 8, 24, 24),
        classifier_file=str(classifier_file),
        data=None,
        samples=64,
        strength=1.0,
        layer=2,
        seed=0,
    )
    assert 0 <= numbers["kept"] <= 1
    written = json.loads((tmp_path / "forget.json").read_text())
    assert f"sees bright in {numbers['share_before']:.0%} (" in written["summary"]
    assert [len(row) for row in written["table"]] == [3] * 4
    assert written["settings"]["layer"] == 2


def test_object_boxes_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "boxes.csv"
    path.write_text("index,left,top,right,bottom\n3,0,1,4,5\n7,2,2,9,9\n")
    assert read_boxes(path, 32, 32) == [Box(3, 0, 1, 4, 5), Box(7, 2, 2, 9, 9)]
