"""Walks, arithmetic and turns, on a generator whose z can be read off its images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import NETWORK, legible_generator, write_legible_conditional
from typer.testing import CliRunner

from pipeline.common.errors import DataError, UsageError
from pipeline.common.imaging import decode
from pipeline.evaluation.cli import app
from pipeline.evaluation.paper.arithmetic import run_arithmetic, write_contact_sheet
from pipeline.evaluation.paper.attributes import outcome, parse
from pipeline.evaluation.paper.interpolate import run_interpolate
from pipeline.evaluation.paper.turn import run_turn
from pipeline.evaluation.paper.walks import draw, spherical, straight, unevenness
from pipeline.model.sampling import images_of


@pytest.fixture
def options(legible_run: Path, classifier_file: Path) -> dict[str, Any]:
    """What `run_arithmetic` and `run_turn` have in common."""
    return {"ckpt": str(legible_run), "classifier_file": str(classifier_file), "data": None, "seed": 0}


def test_the_legible_generator_is_legible() -> None:
    z = np.zeros((3, NETWORK.latent_dim), np.float32)
    z[0, 0], z[1, 0], z[2, 1] = 1, -1, 1
    bright, dark, square = images_of(legible_generator(), z).astype(float)
    assert bright[8:-8, 8:-8].mean() > 190
    assert dark[8:-8, 8:-8].mean() < 70
    assert square[14:18, 14:18].mean() > 200
    assert square[0].mean() == pytest.approx(128, abs=1)


def test_both_kinds_of_walk_begin_and_end_where_they_should_and_spheres_keep_their_distance() -> None:
    a, b = draw(NETWORK, 0, 0, 2)
    for path in (straight, spherical):
        walk = path(a, b, 9)
        np.testing.assert_allclose(walk[[0, -1]], [a, b], atol=1e-5)
        steps = np.linalg.norm(np.diff(walk, axis=0), axis=1)
        assert steps.max() / steps.min() < 1.6
    lengths = np.linalg.norm(spherical(a, b, 9), axis=1)
    assert lengths.min() >= min(lengths[0], lengths[-1]) - 1e-4
    assert np.linalg.norm(straight(a, b, 9), axis=1).min() < lengths.min()
    np.testing.assert_allclose(spherical(a, a, 3), [a, a, a], atol=1e-6)


def test_a_jump_is_uneven_and_an_even_walk_is_not() -> None:
    ramp = np.linspace(0, 200, 9)[:, None, None, None] * np.ones((1, 8, 8, 3))
    assert unevenness(ramp.astype(np.uint8)) == pytest.approx(1, abs=0.05)
    jump = np.where(np.arange(9)[:, None, None, None] < 4, 0, 200) * np.ones((1, 8, 8, 3))
    assert unevenness(jump.astype(np.uint8)) == pytest.approx(8)


def test_expressions_are_read_and_tell_their_outcome() -> None:
    terms = parse("male & eyeglasses - male & !eyeglasses + !male & !eyeglasses")
    assert [term.sign for term in terms] == [1, -1, 1]
    assert outcome(terms) == {"male": False, "eyeglasses": True}
    assert outcome(parse("male & eyeglasses - male + !male")) == {"male": False}  # glasses unknown in two terms
    assert outcome(parse("a - !a & b + a")) == {}  # 1 - 0 + 1 is no attribute
    indexed = parse("#3,7,9 - #1 , 2 + #5")
    assert [term.indices for term in indexed] == [(3, 7, 9), (1, 2), (5,)]


@pytest.mark.parametrize("bad", ["", "male +", "male && old", "- male", "male - #", "#1.5", "a | b"])
def test_unreadable_expressions_are_refused_with_an_example(bad: str) -> None:
    with pytest.raises(UsageError, match="expected such as"):
        parse(bad)


def test_arithmetic_does_what_z_says(options: dict[str, Any], tmp_path: Path) -> None:
    numbers = run_arithmetic(tmp_path, expression="bright - !bright + !bright", trials=40, **options)
    assert numbers["share"] > 0.9
    assert 0.3 < numbers["base_rate"] < 0.85
    assert numbers["last_term_alone"] < 0.2
    assert numbers["low"] < numbers["share"] <= numbers["high"]
    written = json.loads((tmp_path / "arithmetic.json").read_text())
    assert written["results"] == numbers
    assert "should give: bright" in written["summary"]
    assert all((tmp_path / picture["file"]).stat().st_size > 1000 for picture in written["pictures"])


def test_exemplars_by_index_need_no_classifier(legible_run: Path, tmp_path: Path) -> None:
    sheet = write_contact_sheet(tmp_path, ckpt=str(legible_run), count=24, seed=0)
    assert sheet.with_suffix(".png").is_file()
    expression = "#1,2,3 - #4,5,6 + #7,8,9"
    run_arithmetic(
        tmp_path, ckpt=str(legible_run), expression=expression, classifier_file=None, data=None, trials=5, seed=0
    )
    written = json.loads((tmp_path / "arithmetic.json").read_text())
    assert len(written["pictures"]) == 1
    assert written["results"] == {}


def test_concepts_that_no_sample_shows_are_named(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it predicts bright"):
        run_arithmetic(tmp_path, expression="hat - !hat + hat", trials=2, **options)
    with pytest.raises(UsageError, match="is a number"):
        run_arithmetic(tmp_path, expression="place - !place + place", trials=2, **options)
    with pytest.raises(DataError, match="samples show 'bright & !bright' with confidence"):
        run_arithmetic(tmp_path, expression="bright & !bright + bright", trials=2, **options)


def test_a_turn_along_what_z_says_rises_at_every_step(options: dict[str, Any], tmp_path: Path) -> None:
    numbers = run_turn(tmp_path, attribute="bright", rows=4, steps=7, extreme=32, **options)
    assert numbers["rank_correlation"] > 0.95
    assert numbers["to"] - numbers["from"] > 0.5
    assert (tmp_path / "turn-curve.png").is_file()


def test_interpolate_writes_walks_of_nine(legible_run: Path, tmp_path: Path) -> None:
    evenness = run_interpolate(tmp_path, ckpt=str(legible_run), rows=3, steps=9, seed=0)
    assert all(1 <= value < 3 for value in evenness.values())
    written = json.loads((tmp_path / "interpolate.json").read_text())
    assert [picture["file"] for picture in written["pictures"]] == [
        "interpolate-straight.png",
        "interpolate-spherical.png",
    ]


def test_a_conditional_generator_walks_within_a_class_and_between_classes(tmp_path: Path) -> None:
    ckpt = write_legible_conditional(tmp_path / "g.safetensors")
    evenness = run_interpolate(tmp_path, ckpt=str(ckpt), rows=3, steps=5, seed=0, label="none,bright+disc")
    assert evenness["labels"] < 2, "a jump would be 4"
    written = json.loads((tmp_path / "interpolate.json").read_text())
    assert written["settings"]["classes"] == ["none", "bright+disc"]
    assert [picture["file"] for picture in written["pictures"]][2] == "interpolate-labels.png"
    sheets = [decode((tmp_path / f"interpolate-{name}.png").read_bytes(), 3) for name in ("straight", "labels")]
    # The last row of each: five images of twice their 32 pixels, each behind two pixels of margin.
    within, between = (sheet[-50:-10, 2:].mean((0, 2)).reshape(5, -1)[:, 10:-10].mean(1) for sheet in sheets)
    assert np.ptp(within) < 1, "the label alone decides, and it stays"
    assert (np.diff(between) > 10).all(), "from dark to bright"
    run_interpolate(tmp_path, ckpt=str(ckpt), rows=1, steps=2, seed=0)
    assert json.loads((tmp_path / "interpolate.json").read_text())["settings"]["classes"][1] == "disc"


def test_classes_to_walk_between_that_are_not_there_are_one_line(legible_run: Path, tmp_path: Path) -> None:
    ckpt = write_legible_conditional(tmp_path / "g.safetensors")
    for file, label, words in (
        (ckpt, "none,hat", "--label 'hat': the model has no such class of bright, disc"),
        (legible_run, "7", "is not conditioned on a label; leave it out"),
    ):
        with pytest.raises(UsageError, match=words) as refused:
            run_interpolate(tmp_path / "x", ckpt=str(file), rows=1, steps=3, seed=0, label=label)
        assert "\n" not in str(refused.value)
        assert not (tmp_path / "x").exists()


def test_results_of_a_run_go_into_the_run_and_others_need_a_folder(legible_run: Path, tmp_path: Path) -> None:
    weights = str(next(legible_run.rglob("generator_ema.safetensors")))
    runner = CliRunner()
    failed = runner.invoke(app, ["interpolate", "--ckpt", weights])
    assert isinstance(failed.exception, UsageError)
    assert "--out is missing" in str(failed.exception)
    done = runner.invoke(app, ["interpolate", "--ckpt", weights, "--out", str(tmp_path), "--rows", "1"])
    assert done.exit_code == 0, done.output
