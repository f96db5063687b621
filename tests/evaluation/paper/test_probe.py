"""The probe finds what is planted and nothing in labels that mean nothing; its machine is liblinear's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import NETWORK, planted, write_planted
from sklearn.svm import LinearSVC
from torch import nn

from pipeline.common.errors import DataError, UsageError
from pipeline.config import load_config
from pipeline.data.dataset import open_dataset
from pipeline.data.labeled import load_labeled
from pipeline.evaluation.confidence import interval_of_mean, wilson
from pipeline.evaluation.device import to_network
from pipeline.evaluation.paper.discriminator_features import (
    features,
    measure_batchnorm,
    random_discriminator,
)
from pipeline.evaluation.paper.probing import supervised
from pipeline.evaluation.paper.probing.linear_svm import balanced_draw, choose_c, fit
from pipeline.evaluation.paper.probing.probe import Protocol, probe, run_probe
from pipeline.model.networks import build_discriminator


@pytest.mark.parametrize(("rows", "columns", "classes"), [(60, 300, 2), (60, 300, 3), (200, 20, 4)])
def test_the_machine_is_liblinears(rows: int, columns: int, classes: int) -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(rows + 100, columns)).astype(np.float32)
    y = (x @ draw.normal(size=(columns, classes)) + draw.normal(size=(rows + 100, classes))).argmax(1)
    for c, machine in zip((1e-3, 1e-1), fit(x[:rows], y[:rows], (1e-3, 1e-1)), strict=True):
        liblinear = LinearSVC(C=c, tol=1e-7, max_iter=100_000).fit(x[:rows], y[:rows])
        expected = liblinear.decision_function(x[rows:]).reshape(100, -1)
        np.testing.assert_allclose(machine.decision(x[rows:]), expected, atol=2e-3)
        assert machine.accuracy(x[rows:], y[rows:]) == pytest.approx(liblinear.score(x[rows:], y[rows:]), abs=0.02)


def test_the_machine_takes_rows_of_fewer_dimensions_than_there_are_rows() -> None:
    draw = np.random.default_rng(0)
    x = draw.uniform(-1, 1, (60, 12)).astype(np.float32).repeat(64, 1)  # as the pixels of coarse pictures are
    y = np.arange(60) % 2
    (machine,) = fit(x, y, (1e-3,))
    expected = LinearSVC(C=1e-3, tol=1e-9, dual=False, max_iter=10_000).fit(x, y).decision_function(x)
    np.testing.assert_allclose(machine.decision(x)[:, 0], expected, atol=2e-3)


def test_features_are_every_activation_pooled_to_four_by_four() -> None:
    network = random_discriminator(NETWORK, 0).eval()
    images, _ = planted(3, seed=1)
    rows = features(network, images)
    assert rows.shape == (3, 16 * sum(network.activation_widths))
    with torch.no_grad():
        finest, *_, coarsest = network.activations(to_network(images))
        logits = network.get_submodule("head")(coarsest).flatten()
        torch.testing.assert_close(logits, network(to_network(images)))
    assert finest.shape[1:] == (8, 16, 16)
    np.testing.assert_allclose(rows[:, :16], finest[:, 0].unfold(1, 4, 4).unfold(2, 4, 4).amax((3, 4)).flatten(1))
    np.testing.assert_allclose(rows[:, -16:], coarsest[:, -1].flatten(1))


def test_the_preset_for_table_1_has_the_papers_number_of_features() -> None:
    config = load_config("imagenet32").network
    assert 16 * sum(build_discriminator(config).activation_widths) == 28_672


def test_batchnorm_is_estimated_anew_and_frozen() -> None:
    network = random_discriminator(NETWORK, 0)
    images, _ = planted(256, seed=1)
    norm = next(module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    seen: list[torch.Tensor] = []
    hook = norm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    measure_batchnorm(network, images)
    hook.remove()
    assert not network.training
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
    kept = norm.running_mean.clone() if norm.running_mean is not None else None
    features(network, images)
    torch.testing.assert_close(norm.running_mean, kept)


def test_it_recovers_what_is_planted_and_finds_nothing_in_shuffled_labels() -> None:
    draw = np.random.default_rng(0)
    truth = draw.random(500) < 0.5
    x = draw.normal(size=(500, 80)).astype(np.float32)
    x[:, :10] += 2.0 * truth[:, None]
    planted_score = probe(x[:300], truth[:300], x[300:], truth[300:], Protocol(100, draws=8))
    assert planted_score.accuracy > 0.85
    assert planted_score.low < planted_score.accuracy < planted_score.high
    found = []
    for _ in range(6):
        shuffled = draw.permutation(truth)
        found.append(probe(x[:300], shuffled[:300], x[300:], shuffled[300:], Protocol(None)).accuracy)
    assert np.mean(found) == pytest.approx(0.5, abs=0.045)  # three deviations of the mean of 6 x 200 coins


def test_the_command_compares_d_with_pixels_an_untrained_d_and_a_supervised_cnn(
    run: Path, labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"ckpt": str(run), "data": str(labeled), "test_data": None, "limit": None}
    numbers = run_probe(tmp_path, label="bright", protocol=Protocol(60, draws=2), **options)  # type: ignore[arg-type]
    assert set(numbers) == {"discriminator", "untrained discriminator", "raw pixels", "majority"}
    assert numbers["raw pixels"] > 0.95 > numbers["majority"]
    assert (tmp_path / "probe.png").is_file()
    monkeypatch.setattr(supervised, "STEPS", 50)
    numbers = run_probe(tmp_path, label="bright", protocol=Protocol(None, control=2), **options)  # type: ignore[arg-type]
    assert numbers["supervised CNN"] > 0.9
    stored = json.loads((tmp_path / "probe.json").read_text())
    assert len(stored["results"]["trials"]) == 2
    assert stored["settings"]["control"] == 2
    assert stored["protocol"]["control"] == "the best of 2 trials, chosen on 20% of the training images"
    numbers = run_probe(tmp_path, label="coin", protocol=Protocol(None), **options)  # type: ignore[arg-type]
    assert numbers["discriminator"] < 0.68


def test_draws_are_balanced_and_differ() -> None:
    labels = np.array([0] * 90 + [1] * 10)
    order = np.random.default_rng(0).permutation(100)
    rows = balanced_draw(labels, 11, order)
    assert sorted(np.bincount(labels[rows])) == [5, 6]
    assert len(set(rows.tolist())) == 11


def test_a_draw_that_cannot_be_balanced_is_refused() -> None:
    labels = np.array(["a"] * 90 + ["b"] * 10)
    order = np.arange(100)
    assert len(balanced_draw(labels, 20, order)) == 20
    assert len(balanced_draw(labels, 21, order)) == 21  # the odd one is an "a"
    with pytest.raises(UsageError, match=r"takes 11 of each of the 2 classes, but only 10 are b .* at most 20"):
        balanced_draw(labels, 22, order)
    with pytest.raises(UsageError, match="fewer than the 2 classes"):
        balanced_draw(labels, 1, order)


def test_images_without_a_label_are_left_out_of_that_label_only(gappy: Path, tmp_path: Path) -> None:
    data = load_labeled(open_dataset(gappy))
    for name, kind in (("bright", bool), ("place", np.float64), ("kind", np.str_)):
        kept = data.having(name)
        assert len(kept.images) == len(kept.label(name)) == 480 - 60
        assert np.issubdtype(kept.label(name).dtype, kind)
    assert data.having("coin") is data
    with pytest.raises(UsageError, match="none of 480 images has it"):
        load_labeled(open_dataset(write_planted(tmp_path / "empty", gaps=1))).having("kind")


def test_small_helpers() -> None:
    assert choose_c([(1.0, 0.8), (0.1, 0.9), (0.01, 0.9)]) == 0.01
    low, high = wilson(0.5, 100)
    assert [low, high] == pytest.approx([0.4038, 0.5962], abs=1e-3)
    assert wilson(1.0, 20)[1] == pytest.approx(1)
    low, high = interval_of_mean([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2)
    assert interval_of_mean([4.0]) == (4.0, 4.0)


def test_bad_input_is_named(run: Path, labeled: Path, tmp_path: Path) -> None:
    data = load_labeled(open_dataset(labeled))
    with pytest.raises(UsageError, match="it has: bright, disc"):
        data.label("hat")
    options = {"ckpt": str(run), "test_data": None, "protocol": Protocol(None)}
    with pytest.raises(UsageError, match="a probe needs classes"):
        run_probe(tmp_path, data=str(labeled), label="place", limit=None, **options)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no tars and no pictures in it"):
        run_probe(tmp_path, data=str(tmp_path), label="bright", limit=None, **options)  # type: ignore[arg-type]
