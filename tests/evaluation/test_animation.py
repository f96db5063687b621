"""Moving pictures hold the frames that they were made of, and come back to where they began."""

import io
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from pipeline.common.errors import UnavailableError
from pipeline.evaluation.animation import Format, animate, closed_walk, run_walk
from pipeline.evaluation.report.verdict import discriminator_wins, verdict


@pytest.mark.parametrize("format", ["webp", "gif"])
def test_every_frame_is_there_for_its_time(format: Format) -> None:
    frames = [np.full((16, 24, 3), value, np.uint8) for value in (0, 120, 250)]
    image = Image.open(io.BytesIO(animate(frames, format, [0.1, 0.1, 0.5])))
    assert (image.n_frames, image.info["loop"]) == (3, 0)  # type: ignore[attr-defined]
    seen = [
        (np.asarray(frame.convert("RGB")).mean(), frame.info["duration"]) for frame in ImageSequence.Iterator(image)
    ]
    assert [duration for _, duration in seen] == [100, 100, 500]
    assert np.allclose([mean for mean, _ in seen], [0, 120, 250], atol=4)


@pytest.mark.skipif(find_spec("av") is None, reason="make test-explore installs PyAV")
@pytest.mark.parametrize("channels", [1, 3])
def test_a_film_has_every_frame_for_its_time_and_even_sides(channels: int) -> None:
    import av

    frames = [np.full((31, 45, channels), value, np.uint8) for value in (0, 120, 250)]
    with av.open(io.BytesIO(animate(frames, "mp4", [0.1, 0.1, 0.5]))) as film:
        seen = [
            (float(frame.pts * frame.time_base), frame.to_ndarray(format="rgb24")) for frame in film.decode(video=0)
        ]
    assert [round(time, 3) for time, _ in seen] == [0, 0.1, 0.2, 0.7]
    assert {frame.shape for _, frame in seen} == {(32, 46, 3)}
    assert np.allclose([frame.mean() for _, frame in seen], [0, 120, 250, 250], atol=4)


def test_a_film_without_pyav_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UnavailableError, match=r"dcgan-pipeline\[mp4\]"):
        run_walk(
            tmp_path / "out",
            ckpt=str(tmp_path / "nothing"),
            format="mp4",
            rows=1,
            columns=1,
            stops=2,
            steps=2,
            frames_per_second=12,
            scale=1,
            seed=0,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_walk_passes_all_its_stops_and_is_closed() -> None:
    stops = np.random.default_rng(0).uniform(-1, 1, (3, 20)).astype(np.float32)
    way = closed_walk(stops, 4)
    assert way.shape == (12, 20)
    assert np.allclose(way[::4], stops, atol=1e-6)
    steps = np.linalg.norm(np.roll(way, -1, axis=0) - way, axis=1)
    assert steps.max() < 1.5 * steps.min() + 0.5  # the last step leads back to the first image


def test_the_report_says_how_good_the_samples_are_and_how_it_knows() -> None:
    swd = {"samples_against_half": {"swd": 15.0}, "real_against_real": {"swd": 5.0}, "real_against_real_images": 2500}
    distances = {"distance_training_1000": 30.0, "distance_held-out_1000": 31.5}
    told = verdict([], {"swd": {"results": swd}, "memorization": {"results": distances}})
    assert "3.0 times as far from 2,500 real images as other real images are (15.0 against 5.0)" in told
    assert "The nearest of 1,000 samples is +5.0% farther from held-out images" in told
    assert "SWD × 1000 was 12.0 at its best, after 20 images" in verdict([{"images": 20, "swd": 12.0}], {})
    assert verdict([], {}) == ""


def test_a_discriminator_that_wins_for_long_is_told_with_what_to_try() -> None:
    balanced = [{"images": step, "d_real": 0.7, "d_fake": 0.3} for step in range(10)]
    won = [{"images": step, "d_real": 0.94, "d_fake": 0.06} for step in range(10, 20)]
    told = discriminator_wins([*balanced, *won])
    assert "0.94 for real images and 0.06 for samples" in told
    assert "recipe.learning_rate_g" in told
    assert not discriminator_wins([*won, *balanced])
    assert not discriminator_wins(won[:8])
