"""`dcgan-eval swd` and `ms-ssim` as users start them."""

import json
from pathlib import Path
from typing import Any

import pytest
from planted import write_planted
from support import write_dataset
from typer.testing import CliRunner

from pipeline.common.errors import UsageError
from pipeline.data.dataset import open_dataset
from pipeline.data.labeled import load_labeled
from pipeline.evaluation.cli import app
from pipeline.evaluation.images import ArrayImages
from pipeline.evaluation.metrics.swd import Sampling, distances, project
from pipeline.evaluation.published import why_not_comparable, why_not_comparable_ms_ssim

FEW = ["--patches", "16", "--directions", "16"]


def test_samples_equal_to_the_data_score_as_low_as_data_against_data(labeled: Path, tmp_path: Path) -> None:
    out = str(tmp_path)
    done = CliRunner().invoke(
        app, ["swd", "--samples", str(labeled), "--data", str(labeled), "--out", out, *FEW], catch_exceptions=False
    )
    assert done.exit_code == 0
    written = json.loads((tmp_path / "swd.json").read_text())
    floor = written["results"]["real_against_real"]
    assert written["results"]["swd"] < floor["swd"] * 1.5
    assert written["settings"]["images"] == 480
    assert written["published"] == []  # figures are for 64 pixels, these are 32
    assert (tmp_path / "swd.png").stat().st_size > 5000


def test_published_numbers_stand_beside_their_own_pyramid_alone(tmp_path: Path) -> None:
    data = str(write_dataset(tmp_path / "data", images=32, size=64))
    for pyramid, beside in (("pggan", 0), ("mmagic", 2)):
        options = ["--samples", data, "--data", data, "--out", str(tmp_path / "out"), "--pyramid", pyramid, *FEW]
        assert CliRunner().invoke(app, ["swd", *options], catch_exceptions=False).exit_code == 0
        written = json.loads((tmp_path / "out" / "swd.json").read_text())
        assert len(written["published"]) == beside
        assert (written["protocol"]["pyramid"], written["protocol"]["comparable"]) == (pyramid, False)
        assert written["note"].startswith("Not comparable with published numbers: ")
    theirs: dict[str, Any] = {
        "pyramid": "mmagic",
        "patches": 128,
        "directions": 512,
        "size": (64, 64),
        "images": 16_384,
    }
    assert why_not_comparable(**theirs) == ""
    others = {"pyramid": "pggan", "patches": 127, "directions": 511, "size": (32, 32), "images": 5_000}
    assert all(why_not_comparable(**theirs | {name: value}) for name, value in others.items())


def test_ms_ssim_is_comparable_only_at_the_size_and_number_that_were_published() -> None:
    assert why_not_comparable_ms_ssim((64, 64), 10_000) == ""
    assert why_not_comparable_ms_ssim((64, 64), 200) == "200 images, where published numbers have 10,000"
    assert why_not_comparable_ms_ssim((32, 32), 10_000) == "published numbers are of 64x64 pixels"


def test_halves_are_compared_with_as_many_samples(labeled: Path, tmp_path: Path) -> None:
    fresh = write_planted(tmp_path / "fresh", 480, seed=1)  # what a perfect generator would give
    real, fake = (load_labeled(open_dataset(folder)).images for folder in (labeled, fresh))
    sampling = Sampling(patches=16, directions=16)
    for count, samples, number in ((480, fresh, 240), (161, fresh, 80), (480, write_planted(tmp_path / "few", 90), 90)):
        options = ["--data", str(labeled), "--out", str(tmp_path), "--count", str(count), *FEW]
        done = CliRunner().invoke(app, ["swd", "--samples", str(samples), *options], catch_exceptions=False)
        assert f"swd of {number} samples to {number} real images" in done.output
        results = json.loads((tmp_path / "swd.json").read_text())["results"]
        assert results["real_against_real_images"] == number
        if samples == fresh:
            half = project(ArrayImages(real[:count:2][:number]), sampling, real=True)
            for key, images in (("samples_against_half", fake[:number]), ("real_against_real", real[1:count:2])):
                assert results[key] == distances(half, project(ArrayImages(images), sampling, real=False))


def test_an_untrained_generator_is_far_from_the_data_and_repeats_itself(
    run: Path, labeled: Path, tmp_path: Path
) -> None:
    both = ["--ckpt", str(run), "--data", str(labeled), "--out", str(tmp_path), "--count", "256"]
    assert CliRunner().invoke(app, ["swd", *both, *FEW], catch_exceptions=False).exit_code == 0
    assert CliRunner().invoke(app, ["ms-ssim", *both], catch_exceptions=False).exit_code == 0
    results = {name: json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in ("swd", "ms_ssim")}
    assert results["swd"]["swd"] > 3 * results["swd"]["real_against_real"]["swd"]
    assert results["ms_ssim"]["ms_ssim"] > results["ms_ssim"]["ms_ssim_real"]


def test_what_to_evaluate_must_be_said_once_and_fit_the_data(run: Path, labeled: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    out = ["--out", str(tmp_path)]
    for arguments in ([], ["--ckpt", str(run), "--samples", str(labeled)]):
        failed = runner.invoke(app, ["swd", "--data", str(labeled), *arguments, *out])
        assert isinstance(failed.exception, UsageError)
        assert "either --ckpt" in str(failed.exception)
    failed = runner.invoke(app, ["swd", "--ckpt", str(run), "--data", str(labeled), "--count", "1", *out])
    assert "expected at least 2" in str(failed.exception)


@pytest.mark.parametrize("labels", [False])
def test_unlabelled_data_will_do(tmp_path: Path, labels: bool) -> None:
    data = write_planted(tmp_path / "data", 64, labels=labels)
    arguments = ["ms-ssim", "--samples", str(data), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
