"""The judge reads what is there, not what is not, and comes back from its file as it was."""

import json
from pathlib import Path

import numpy as np
import pytest
from planted import planted, write_planted
from typer.testing import CliRunner

from pipeline.common.errors import DataError, UsageError
from pipeline.data.dataset import open_dataset
from pipeline.data.labeled import load_labeled
from pipeline.evaluation.classifier import Classifier, get_classifier, load_classifier, make_classifier
from pipeline.evaluation.cli import app


def test_it_reads_what_the_pictures_show_and_no_more(judge: Classifier) -> None:
    scores = {name: head.score for name, head in judge.heads.items()}
    assert scores["bright"] > 0.98
    assert scores["disc"] > 0.9
    assert scores["place"] > 0.9
    assert scores["coin"] < 0.65  # nothing in a picture tells how a coin fell
    assert "kind" not in scores  # text is not read
    images, columns = planted(200, seed=9)
    read = judge.read(images)
    assert ((read["bright"] > 0.5) == np.array(columns["bright"])).mean() > 0.98
    assert np.corrcoef(read["place"], np.array(columns["place"], float))[0, 1] > 0.95
    assert judge.features(images).shape[0] == 200


def test_it_learns_from_labels_with_gaps(gappy: Path, tmp_path: Path) -> None:
    heads = make_classifier(open_dataset(gappy), tmp_path, seed=0, epochs=8).heads
    assert set(heads) == {"bright", "disc", "place", "coin"}
    assert heads["bright"].score > 0.95
    assert heads["place"].score > 0.6
    table = json.loads((tmp_path / "classifier.json").read_text())["table"]
    assert {row[0]: row[-1] for row in table[1:]} == {"bright": 420, "disc": 420, "place": 420, "coin": 480}


def test_a_label_that_no_held_out_image_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_planted(tmp_path / "data", 320)
    labeled = load_labeled(open_dataset(data))
    labeled.columns["bright"] = labeled.columns["bright"].astype(object)
    labeled.columns["bright"][-64:] = None
    monkeypatch.setattr("pipeline.evaluation.classifier.load_labeled", lambda _: labeled)
    with pytest.raises(DataError, match="label bright: none of 64 held-out images has it"):
        make_classifier(open_dataset(data), tmp_path, seed=0, epochs=1)


def test_a_saved_classifier_reads_the_same(judge: Classifier, judge_file: Path) -> None:
    images, _ = planted(8, seed=3)
    again = load_classifier(str(judge_file))
    for name, values in judge.read(images).items():
        np.testing.assert_array_equal(values, again.read(images)[name])
    assert [head.score for head in again.heads.values()] == [head.score for head in judge.heads.values()]


def test_the_one_in_out_is_reused_unless_the_data_is_another(
    judge_file: Path, labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "classifier.safetensors").write_bytes(judge_file.read_bytes())
    assert get_classifier(None, str(labeled), tmp_path).data == load_classifier(str(judge_file)).data
    other = write_planted(tmp_path / "other", 160, seed=5)
    monkeypatch.setattr("pipeline.evaluation.classifier.EPOCHS", 1)
    assert get_classifier(None, str(other), tmp_path).data != load_classifier(str(judge_file)).data


def test_bad_input_is_named(labeled: Path, judge: Classifier, run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no labels"):
        make_classifier(open_dataset(write_planted(tmp_path / "plain", 64, labels=False)), tmp_path, seed=0)
    with pytest.raises(DataError, match="too few to learn from"):
        make_classifier(open_dataset(write_planted(tmp_path / "few", 100)), tmp_path, seed=0)
    with pytest.raises(DataError, match="not an attribute classifier"):
        load_classifier(str(next(run.rglob("generator.safetensors"))))
    with pytest.raises(UsageError, match="name a labeled --data"):
        get_classifier(None, None, tmp_path)
    with pytest.raises(UsageError, match="it reads bright, disc, place, coin"):
        judge.head("hat")
    with pytest.raises(UsageError, match="reads images of shape"):
        judge.read(np.zeros((1, 64, 64, 3), np.uint8))


def test_the_command_states_the_accuracy(labeled: Path, tmp_path: Path) -> None:
    outcome = CliRunner().invoke(
        app, ["classifier", "--data", str(labeled), "--out", str(tmp_path), "--epochs", "1"], catch_exceptions=False
    )
    assert outcome.exit_code == 0
    assert "bright" in outcome.output
    assert (tmp_path / "classifier.json").is_file()
