"""Every command of dcgan-eval from its entry point: it ends well, or in one line that says what to do."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from evaluation_cases import Outcome
from picture_files import make_picture
from PIL import Image, ImageSequence

from pipeline.common.imaging import save_png
from pipeline.evaluation.cli import app
from pipeline.evaluation.paper import arithmetic, features, forget, memorization, turn
from pipeline.evaluation.paper.probing import probe

COMMANDS = {
    "swd": "swd --ckpt {run} --data {data} --count 65 --patches 8 --directions 8",
    "ms-ssim": "ms-ssim --ckpt {run} --data {data} --count 65",
    "labels": "labels --samples {data} --data {data} --label kind --epochs 1 --count 20",
    "fid": "fid --ckpt {run} --data {data} --count 65",
    "kid": "kid --ckpt {run} --data {data} --count 65",
    "is": "is --ckpt {run} --count 129 --extractor {classifier}",
    "precision-recall": "precision-recall --ckpt {run} --data {data} --count 65",
    "classifier": "classifier --data {data} --epochs 1",
    "probe": "probe --ckpt {run} --data {data} --label kind --labels 20 --draws 2",
    "nearest-class": "nearest-class --samples {data} --data {data} --label kind --count 90 --limit 100",
    "interpolate": "interpolate --ckpt {run} --rows 2 --steps 3",
    "walk": "walk --ckpt {legible} --rows 1 --columns 4 --stops 2 --steps 3",
    "progress": "progress {graded} --format gif",
    "arithmetic": "arithmetic --ckpt {legible} --expression '#3,7,9 - #1,2,4 + #5,6,8'",
    "turn": "turn --ckpt {legible} --classifier {classifier} --attribute bright --rows 2 --steps 3 --extreme 8",
    "neighbors": "neighbors --ckpt {run} --data {data} --count 13 --limit 200",
    "memorization": "memorization --ckpt {run} --data {data} --held-out {data} --most 150",
    "features": "features --ckpt {run} --data {data} --units 2 --images-each 2",
    "forget": "forget --ckpt {legible} --attribute bright --region 8,8,24,24 --classifier {classifier} --samples 64",
}
MEASURES = (
    "swd",
    "ms-ssim",
    "labels",
    "fid",
    "kid",
    "is",
    "precision-recall",
    "nearest-class",
    "neighbors",
    "memorization",
)
"""Commands whose result has a protocol."""
BY_ATTRIBUTE = "arithmetic --ckpt {legible} --classifier {classifier} --trials 2 --expression"
FORGET = "forget --ckpt {legible} --attribute bright --classifier {classifier} --samples 64 --region"
PROBE = "probe --ckpt {run} --data {data} --label"

Evaluate = Callable[..., Outcome]


@pytest.fixture
def line(
    run: Path,
    legible_run: Path,
    labeled: Path,
    gappy: Path,
    conditional_runs: dict[str, Path],
    classifier_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], list[str]]:
    """Turn a command line into its arguments, with results in tmp_path; what takes minutes is made short."""
    for module, name, value in (
        (arithmetic, "POOL_SIZE", 128),
        (turn, "POOL_SIZE", 128),
        (turn, "MEASURED", 16),
        (forget, "MEASURED", 64),
        (probe, "CS", (1e-3,)),
        (probe, "TUNING_DRAWS", 1),
        (features, "ASCENT_STEPS", 2),
        (memorization, "HASHED", 64),
        (memorization, "HASH_STEPS", 5),
        (memorization, "WALKS", 2),
        (memorization, "SIZES", (100, 1000)),
    ):
        monkeypatch.setattr(module, name, value)

    def split(text: str) -> list[str]:
        import shlex

        graded = tmp_path / "graded"
        for step in range(3):
            (graded / "samples").mkdir(parents=True, exist_ok=True)
            save_png(graded / f"samples/{step:09d}.png", make_picture(step, 32, 32))
        places = {
            "graded": graded,
            "run": run,
            "legible": legible_run,
            "data": labeled,
            "gappy": gappy,
            "classifier": classifier_file,
            **conditional_runs,
        }
        return [*shlex.split(text.format(**places, tmp=tmp_path)), "--out", str(tmp_path)]

    return split


def test_no_command_is_left_out() -> None:
    assert {*COMMANDS, "report"} == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_with_its_numbers_and_pictures(
    name: str, evaluate: Evaluate, line: Callable[[str], list[str]], tmp_path: Path
) -> None:
    done = evaluate(*line(COMMANDS[name]))
    assert done.code == 0, done.err
    file = tmp_path / f"{name.replace('ms-ssim', 'ms_ssim')}.json"
    assert f"written: {file}" in done.out
    assert ("measured with: " in done.out) is (name != "progress"), "of an animation there is nothing to say"
    written = json.loads(file.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert name in ("classifier", "precision-recall") or written["pictures"]
    if name in MEASURES:
        assert written["protocol"]["samples"] in ("as the generator makes them", "as the data set stores them")
        assert f"samples {written['protocol']['samples']}" in done.out
    assert all((tmp_path / picture["file"]).stat().st_size > 500 for picture in written["pictures"])


@pytest.mark.parametrize("name", [*MEASURES, "probe"])
def test_help_states_the_protocol(name: str, evaluate: Evaluate) -> None:
    done = evaluate(name, "--help")
    assert done.code == 0
    assert "Protocol: " in done.out


@pytest.mark.parametrize(
    "command",
    [
        f"{BY_ATTRIBUTE} 'bright - !bright + bright'",  # 1 - 0 + 1: nothing to count
        f"{BY_ATTRIBUTE} '#3,7,9 - bright + #5,6,8'",
        "arithmetic --ckpt {legible} --sheet 12",
        "ms-ssim --samples {data}",
        "fid --ckpt {run} --data {data} --count 65 --resize 16",
        "features --ckpt {run} --data {data} --layer 1 --units 20 --images-each 1",
        "swd --samples {data} --data {data} --count 2 --patches 1 --directions 1",
    ],
)
def test_less_common_ways_end_well_too(command: str, evaluate: Evaluate, line: Callable[[str], list[str]]) -> None:
    done = evaluate(*line(command))
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("arithmetic --ckpt {legible} --expression '#99999999999'", "there is no sample #99999999999; expected"),
        ("arithmetic --ckpt {legible} --expression '#4096'", "0 to 4095"),
        ("arithmetic --ckpt {legible} --expression '#1 - bright'", "no classifier: give --classifier FILE"),
        ("arithmetic --ckpt {legible} --sheet 0", "'--sheet'"),
        ("swd --ckpt {run} --data {data} --patches 0", "'--patches'"),
        ("swd --ckpt {run} --data {data} --directions 0", "'--directions'"),
        ("swd --ckpt {run} --data {data} --count 1", "--count 1: expected at least 2"),
        ("fid --ckpt {run} --data {data} --resize 0", "'--resize'"),
        ("fid --ckpt {run} --data {data} --resize 8", "images of 8 pixels; expected at least 16"),
        ("neighbors --ckpt {run} --data {data} --limit 0", "'--limit'"),
        ("neighbors --ckpt {run} --data {data} --limit 1", "too few to measure"),
        ("memorization --ckpt {run} --data {data} --limit 0", "'--limit'"),
        (f"{PROBE} bright --limit 0", "'--limit'"),
        (f"{PROBE} bright --labels 0", "'--labels'"),
        (
            f"{PROBE} bright --labels 6000",
            "but only 139 are True among the 308 images to draw from; expected at most 278",
        ),
        ("probe --ckpt {run} --data {gappy} --label hat", "no such label"),
        ("walk --ckpt {run} --stops 100 --steps 100", "10000 frames; expected at most 600"),
        ("progress {run}", "samples: 0 grids; expected at least 2"),
        ("features --ckpt {run} --data {data} --layer 4", "layers 1 to 3"),
        (f"{FORGET} 0,0,32,32", "the boxes cover whole images"),
        (f"{FORGET} 8,8,240,24", "--region 8,8,240,24: not inside an image of 32x32 pixels"),
        (f"{FORGET} 8,8,8,24", "left must be below right"),
        (
            "turn --ckpt {projection} --classifier {classifier} --attribute bright",
            "is conditioned on bright, disc, and this command makes images of z alone; choose their class, such as "
            "--label 'none'",
        ),
        ("turn --ckpt {projection} --classifier {classifier} --label hat", "no such class of bright, disc; it has"),
        ("arithmetic --ckpt {legible} --sheet 12 --label disc", "is not conditioned on a label; leave it out"),
        ("walk --ckpt {legible} --label disc", "is not conditioned on a label; leave it out"),
        ("walk --ckpt {projection} --label disc,hat", "--label 'hat': the model has no such class"),
        ("neighbors --ckpt {concat} --data {data}", "features need a label beside the images"),
        ("features --ckpt {concat} --data {data}", "features need a label beside the images"),
        (f"{PROBE.replace('run', 'concat')} bright", "features need a label beside the images"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    command: str, message: str, evaluate: Evaluate, line: Callable[[str], list[str]]
) -> None:
    done = evaluate(*line(command))
    assert done.code in (2, 65, 78)
    assert message in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    "command",
    [
        "arithmetic --ckpt {projection} --expression '#3,7,9 - #1,2,4 + #5,6,8' --label disc",
        "arithmetic --ckpt {projection} --sheet 12 --label none",
        "turn --ckpt {concat} --classifier {classifier} --attribute bright --rows 2 --steps 3 --extreme 8 --label none",
        "forget --ckpt {of_class} --attribute bright --region 8,8,24,24 --classifier {classifier} --samples 64"
        " --label bright+disc",
        "neighbors --ckpt {projection} --data {data} --count 13 --limit 200",
        "memorization --ckpt {concat} --data {data} --most 150",
        "features --ckpt {projection} --data {data} --units 2 --images-each 2",
        "probe --ckpt {projection} --data {data} --label kind --labels 20 --draws 2",
    ],
)
def test_conditional_networks_are_analyzed_too(
    command: str, evaluate: Evaluate, line: Callable[[str], list[str]], tmp_path: Path
) -> None:
    done = evaluate(*line(command))
    assert done.code == 0, done.err
    written = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    (result,) = [
        content for content in written if content.get("command") in (command.split(maxsplit=1)[0], "contact_sheet")
    ]
    assert result["subject"]["network"]["label"] == ["bright", "disc"]
    if "--label" in command and "probe" not in command:
        assert command.endswith(f"--label {result['subject']['label']}")
        said = f"All samples are of the class {result['subject']['label']}."
        assert result["summary"].endswith(said) or result["command"] == "contact_sheet"


def test_each_walk_of_a_conditional_generator_keeps_its_class(
    evaluate: Evaluate, line: Callable[[str], list[str]], tmp_path: Path
) -> None:
    command = "walk --ckpt {of_class} --rows 1 --columns 3 --stops 2 --steps 2 --scale 1"
    for named, classes in ((" --label none,bright", ["none", "bright"]), ("", ["none", "disc", "bright"])):
        assert evaluate(*line(command + named)).code == 0
        written = json.loads((tmp_path / "walk.json").read_text())
        assert written["settings"]["classes"] == classes
        assert f"in turn of {', '.join(classes)}" in written["summary"]
        with Image.open(tmp_path / "walk.webp") as image:
            frames = [np.asarray(frame.convert("L"), float) for frame in ImageSequence.Iterator(image)]
        middles = [[frame[16, 34 * column + 16] for column in range(3)] for frame in frames]
        assert np.ptp(middles, axis=0).max() < 12, "the label alone decides, and it stays"
        gray = {"none": 128, "disc": 250, "bright": 205}
        assert middles[0] == pytest.approx([gray[name] for name in (classes * 2)[:3]], abs=12)


@pytest.mark.parametrize("label", ["bright", "kind"])
def test_a_probe_leaves_out_images_without_the_label_and_says_how_many(
    label: str, evaluate: Evaluate, line: Callable[[str], list[str]], tmp_path: Path
) -> None:
    done = evaluate(*line(f"probe --ckpt {{run}} --data {{gappy}} --label {label} --labels 60 --draws 2"))
    assert done.code == 0, done.err
    assert "images without the label  60\n" in done.out
    written = json.loads((tmp_path / "probe.json").read_text())
    assert written["settings"]["images_without_label"] == 60
    assert written["settings"]["training_images"] + written["settings"]["test_images"] == 480 - 60
    assert "60 images without this label were left out" in written["summary"]


def test_memorization_measures_the_number_that_was_asked_for(
    evaluate: Evaluate, line: Callable[[str], list[str]], tmp_path: Path
) -> None:
    assert evaluate(*line("memorization --ckpt {run} --data {data} --most 150")).code == 0
    written = json.loads((tmp_path / "memorization.json").read_text())
    assert written["settings"]["samples"] == [100, 150]
    assert written["results"]["distance_training_150"] <= written["results"]["distance_training_100"]


def test_features_are_of_the_last_convolution_unless_another_is_named(
    evaluate: Evaluate, line: Callable[[str], list[str]], tmp_path: Path
) -> None:
    assert evaluate(*line(COMMANDS["features"])).code == 0
    written = json.loads((tmp_path / "features.json").read_text())
    assert written["settings"]["layer"] == 3
    assert "of the 32 units in layer 3 of the discriminator" in written["summary"]
