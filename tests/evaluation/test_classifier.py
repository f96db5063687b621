"""The attribute classifier predicts what images show and nothing else, and its file holds all of it."""

import json
from pathlib import Path

import numpy as np
import pytest
from planted import planted, write_planted
from typer.testing import CliRunner

from pipeline.common.errors import DataError, UsageError
from pipeline.data.labeled import load_labeled
from pipeline.evaluation.classifier import Classifier, load_classifier
from pipeline.evaluation.classifier_training import get_classifier, make_classifier
from pipeline.evaluation.cli import app


def test_it_predicts_what_the_pictures_show_and_no_more(classifier: Classifier) -> None:
    scores = {name: head.score for name, head in classifier.heads.items()}
    assert scores["bright"] > 0.98
    assert scores["disc"] > 0.9
    assert scores["place"] > 0.9
    assert scores["coin"] < 0.65  # nothing in a picture tells how a coin fell
    assert "kind" not in scores  # text is not predicted
    images, columns = planted(200, seed=9)
    predictions = classifier.predict(images)
    assert ((predictions["bright"] > 0.5) == np.array(columns["bright"])).mean() > 0.98
    assert np.corrcoef(predictions["place"], np.array(columns["place"], float))[0, 1] > 0.95
    assert classifier.features(images).shape[0] == 200


def test_it_learns_from_labels_with_gaps(gappy: Path, tmp_path: Path) -> None:
    heads = make_classifier(str(gappy), tmp_path, seed=0, epochs=8).heads
    assert set(heads) == {"bright", "disc", "place", "coin"}
    assert heads["bright"].score > 0.95
    assert heads["place"].score > 0.6
    table = json.loads((tmp_path / "classifier.json").read_text())["table"]
    assert {row[0]: row[-1] for row in table[1:]} == {"bright": 420, "disc": 420, "place": 420, "coin": 480}


def test_a_label_that_no_held_out_image_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_planted(tmp_path / "data", 320)
    labeled = load_labeled(str(data))
    labeled.columns["bright"] = labeled.columns["bright"].astype(object)
    labeled.columns["bright"][-64:] = None
    monkeypatch.setattr("pipeline.evaluation.classifier_training.load_labeled", lambda _: labeled)
    with pytest.raises(DataError, match="label bright: none of 64 held-out images has it"):
        make_classifier(str(data), tmp_path, seed=0, epochs=1)


def test_a_saved_classifier_predicts_the_same(classifier: Classifier, classifier_file: Path) -> None:
    images, _ = planted(8, seed=3)
    again = load_classifier(str(classifier_file))
    for name, values in classifier.predict(images).items():
        np.testing.assert_array_equal(values, again.predict(images)[name])
    assert [head.score for head in again.heads.values()] == [head.score for head in classifier.heads.values()]


def test_the_one_in_out_is_reused_unless_the_data_is_another(
    classifier_file: Path, labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "classifier.safetensors").write_bytes(classifier_file.read_bytes())
    assert get_classifier(None, str(labeled), tmp_path).data == load_classifier(str(classifier_file)).data
    other = write_planted(tmp_path / "other", 160, seed=5)
    monkeypatch.setattr("pipeline.evaluation.classifier_training.EPOCHS", 1)
    assert get_classifier(None, str(other), tmp_path).data != load_classifier(str(classifier_file)).data


def test_bad_input_is_named(labeled: Path, classifier: Classifier, run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no labels"):
        make_classifier(str(write_planted(tmp_path / "plain", 64, labels=False)), tmp_path, seed=0)
    with pytest.raises(DataError, match="too few to train on"):
        make_classifier(str(write_planted(tmp_path / "few", 100)), tmp_path, seed=0)
    with pytest.raises(DataError, match="not an attribute classifier"):
        load_classifier(str(next(run.rglob("generator.safetensors"))))
    with pytest.raises(UsageError, match="no classifier: give --classifier FILE"):
        get_classifier(None, None, tmp_path)
    with pytest.raises(UsageError, match="it predicts bright, disc, place, coin"):
        classifier.head("hat")
    with pytest.raises(UsageError, match="expects images of shape"):
        classifier.predict(np.zeros((1, 64, 64, 3), np.uint8))


def test_the_command_states_the_accuracy(labeled: Path, tmp_path: Path) -> None:
    outcome = CliRunner().invoke(
        app, ["classifier", "--data", str(labeled), "--out", str(tmp_path), "--epochs", "1"], catch_exceptions=False
    )
    assert outcome.exit_code == 0
    assert "bright" in outcome.output
    assert (tmp_path / "classifier.json").is_file()
