"""dcgan-eval nearest-class: the class of the nearest sample, counted exactly, at growing numbers of samples."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from evaluation_cases import Outcome

from pipeline.checkpoints.weights import serialize
from pipeline.config import NetworkConfig
from pipeline.evaluation.metrics.class_samples import open_class_samples
from pipeline.evaluation.paper import nearest_class
from pipeline.evaluation.paper.nearest_class import NearestClass
from pipeline.model.labels import label_values
from pipeline.model.networks import build_generator, initialize

Evaluate = Callable[..., Outcome]


def test_errors_are_those_of_brute_force_however_the_samples_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest_class, "SIZES", (3, 40, 1000))
    draw = np.random.default_rng(0)
    tests, samples = (draw.integers(0, 256, (count, 8, 8, 1), np.uint8) for count in (50, 130))
    truth, places = draw.integers(0, 4, 50), draw.integers(0, 4, 130)
    distance = np.square(tests[:, None].astype(float) - samples[None]).sum((2, 3, 4))
    expected = {count: float((places[distance[:, :count].argmin(1)] != truth).mean()) for count in (3, 40, 130)}
    for block in (1, 37, 130):
        found = NearestClass(tests, truth)
        starts = range(0, 130, block)
        blocks = ((samples[start : start + block], places[start : start + block]) for start in starts)
        found.compare(blocks, 130, "samples")
        assert found.errors == pytest.approx(expected)
        assert list(found.errors) == [3, 40, 130]
        nearest = distance.argmin(1)
        assert np.array_equal(found.wrong, places[nearest] != truth)
        assert np.array_equal(found.nearest_images, samples[nearest])


def test_samples_that_show_their_class_classify_real_images_and_others_do_not(
    evaluate: Evaluate, labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest_class, "SIZES", (100,))
    errors = {}
    for label in ("bright", "coin"):
        options = ["--samples", labeled, "--data", labeled, "--label", label, "--count", 300, "--out", tmp_path / label]
        done = evaluate("nearest-class", *options)
        assert done.code == 0, done.err
        written = json.loads((tmp_path / label / "nearest-class.json").read_text())
        errors[label] = written["results"]
        assert written["settings"]["test_images"] == 96, "the last fifth, which the samples do not reach"
        assert written["settings"]["training_images"] == 384
        assert [row[0] for row in written["table"][1:]] == [f"not {label}", label]
        assert {"error": 0.0298} in [entry["values"] for entry in written["published"]]
    assert errors["bright"]["error"] == errors["bright"]["error_real"] == 0
    assert 0.3 < errors["coin"]["error"] < 0.7
    assert errors["coin"]["interval"][0] < errors["coin"]["error"] < errors["coin"]["interval"][1]
    assert list(errors["coin"]["by_number_of_samples"]) == ["100", "300"]
    assert list(errors["coin"]["by_number_of_real_images"]) == ["100", "384"]


def test_a_checkpoint_of_several_labels_makes_its_samples_of_each_class_in_turn(
    evaluate: Evaluate, labeled: Path, tmp_path: Path
) -> None:
    classes = {"label": ["bright", "disc"], "classes": ["00", "01", "10", "11"], "class_images": [1, 1, 1, 1]}
    config = NetworkConfig.model_validate({"image_size": 32, "width": 4, "latent_dim": 6, **classes})
    generator = build_generator(config)
    initialize(generator, 0, lane=0)
    ckpt = tmp_path / "g.safetensors"
    ckpt.write_bytes(serialize(generator.eval(), config, "ema", 0))
    samples = open_class_samples(str(ckpt), None, [])
    images, places = (np.concatenate(parts) for parts in zip(*samples.blocks(150, 0), strict=True))
    assert places.tolist() == [index % 4 for index in range(150)]
    assert np.array_equal(images[5], next(samples.blocks(6, 0))[0][5]), "whatever the number of samples"
    assert label_values(config, places[:2]).tolist() == [[0, 0], [0, 1]]
    done = evaluate("nearest-class", "--ckpt", ckpt, "--data", labeled, "--test-data", labeled, "--count", 60,
                    "--out", tmp_path)  # fmt: skip
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "nearest-class.json").read_text())["results"]
    assert results["error_real"] == 0, "the test images are among the training images"
    assert results["error"] > 0.3, "it has learned nothing yet"
    assert {*results["by_class"]} == {"none", "disc", "bright", "bright+disc"}


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--samples {data}", 2, "name what they were made to show: --label NAME"),
        ("--samples {data} --label hat", 2, "--label hat: "),
        ("", 2, "give either --ckpt (a checkpoint) or --samples (images), and not both"),
        ("--samples {data} --label kind --limit 1", 2, "1 held-out images of 1"),
    ],
)
def test_what_cannot_be_classified_is_one_line(
    evaluate: Evaluate, labeled: Path, tmp_path: Path, options: str, code: int, message: str
) -> None:
    done = evaluate("nearest-class", *options.format(data=labeled).split(), "--data", labeled, "--out", tmp_path / "x")
    assert done.code == code, done.err
    assert message in done.err
    assert done.err.count("\n") == 1
