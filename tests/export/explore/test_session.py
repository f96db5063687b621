"""What `dcgan-export explore` shows: a pure function of model, seed and choice, whose z make the same pixels again."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from export_cases import Cli, Export
from PIL import Image

from export.explore.session import COLUMNS, GAP, NEIGHBORS, ROWS, Session
from export.samplers.open import open_sampler
from pipeline.common.errors import UsageError
from pipeline.common.randomness import Purpose
from pipeline.evaluation.paper.walks import spherical


def test_the_grid_is_what_dcgan_generate_makes_of_the_seed(exported: Export) -> None:
    with open_sampler(str(exported.model), batch=16) as sampler:
        session = Session(sampler)
        shown = session.grid(3, 16)
        expected = np.concatenate([images for _, images in sampler.sample_range(3, 16, ROWS * COLUMNS, Purpose.SAMPLE)])
        assert np.array_equal(shown.images, expected)
        assert np.array_equal(sampler.sample(np.load(io.BytesIO(shown.npy()))), shown.images)
        half = session.grid(3, 16, truncation=0.5)
        assert np.array_equal(half.z, shown.z / 2)
        with pytest.raises(UsageError, match="not conditioned on a label"):
            session.grid(3, 16, label="smiling")


def test_a_walk_goes_from_one_sample_to_the_other_and_back(exported: Export, tmp_path: Path) -> None:
    with open_sampler(str(exported.model), batch=16) as sampler:
        session = Session(sampler)
        grid = session.grid(0, 0)
        shown = session.walk([grid.z[3], grid.z[9]], 5)
    assert np.allclose(shown.z, spherical(grid.z[3], grid.z[9], 5))
    assert np.allclose(shown.z[[0, -1]], grid.z[[3, 9]], atol=1e-6)
    strip, latents, animation = shown.write(tmp_path)
    with Image.open(strip) as picture:
        assert picture.size == (5 * 32 + 4 * GAP, 32)
    assert np.array_equal(np.load(latents), shown.z)
    with Image.open(animation) as moving:
        assert moving.n_frames == 8  # type: ignore[attr-defined]  # there, and the three between on the way back


def test_a_sum_averages_each_term_and_has_its_neighbors(exported: Export) -> None:
    with open_sampler(str(exported.model), batch=16) as sampler:
        session = Session(sampler)
        rows = list(session.grid(0, 0).z)
        shown = session.sum(rows[:3], rows[3:6], rows[6:8])
        alone = session.sum([], [], rows[6:8])
    z = np.array(rows, np.float64)
    expected = z[:3].mean(0) - z[3:6].mean(0) + z[6:8].mean(0)
    assert np.allclose(shown.z[0], expected, atol=1e-6)
    assert np.allclose(alone.z[0], z[6:8].mean(0), atol=1e-6)
    around = np.abs(shown.z[1:] - expected)
    assert len(around) == NEIGHBORS
    assert 0 < around.min() <= around.max() <= 0.25 + 1e-6


def test_without_gradio_one_line_names_the_extra(exported: Export, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, errors = cli("explore", "--model", exported.model)
    assert code == 69
    assert errors.count("\n") == 1
    assert "pip install 'dcgan-pipeline[explore]'" in errors
