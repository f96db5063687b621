"""A network and a loss that are each one file and one line in a table do everything that the paper's do."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import warm_start
from support import train_command

from export.builders.onnx_model import export_onnx
from export.samplers.open import open_sampler
from pipeline.checkpoints.reference import load_discriminator, load_generator
from pipeline.common.randomness import Purpose
from pipeline.evaluation.paper.features import run_features
from pipeline.evaluation.paper.forget import run_forget
from pipeline.model import residual
from pipeline.model.latents import latents
from pipeline.model.sampling import images_of

SETTINGS = ("network.architecture=residual", "recipe.loss=hinge", "schedule.evaluate_samples=64")
EVERY = ("schedule.log_every_images=64", "schedule.checkpoint_every_images=64", "schedule.evaluate_every_images=128")


def train(data: Path, out: Path, images: int) -> None:
    done = warm_start.run(
        train_command(data, out, *SETTINGS, *EVERY, f"schedule.total_images={images}"),
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def run(faces32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped half-way and resumed."""
    out = tmp_path_factory.mktemp("residual") / "run"
    train(faces32, out, 128)
    train(faces32, out, 256)
    return out


def test_it_trains_and_resumes_as_if_it_had_not_stopped(run: Path, faces32: Path, tmp_path: Path) -> None:
    train(faces32, tmp_path / "run", 256)
    states = [json.loads((path / f"checkpoints/{256:012d}/state.json").read_text()) for path in (run, tmp_path / "run")]
    weights = [{name: hash_ for name, hash_ in state["files"].items() if "metrics" not in name} for state in states]
    assert weights[0] == weights[1]
    assert states[0]["config"]["network"]["architecture"] == "residual"
    assert states[0]["config"]["recipe"]["loss"] == "hinge"
    assert isinstance(load_generator(str(run)).generator, residual.Generator)
    assert isinstance(load_discriminator(str(run)).discriminator, residual.Discriminator)


def test_it_is_exported_and_sampled(run: Path, tmp_path: Path) -> None:
    generator = load_generator(f"{run}@last")
    card = export_onnx(f"{run}@last", tmp_path, max_batch=16, parity_images=48)
    assert card.network.architecture == "residual"
    assert card.parity
    z = latents(0, Purpose.SAMPLE, 0, 16, generator.config.latent_dim, generator.config.latent_distribution)
    expected = images_of(generator.generator, z)
    for reference in (str(tmp_path / "model.onnx"), f"{run}@last"):
        with open_sampler(reference, batch=16) as sampler:
            assert np.abs(sampler.sample(z).astype(int) - expected).max() <= 1


def test_features_and_forget_look_into_it(run: Path, faces32: Path, tmp_path: Path) -> None:
    selectivity = run_features(tmp_path, ckpt=str(run), data=str(faces32), layer=2, units=2, images_each=2, seed=0)
    assert all(np.isfinite(value) for value in selectivity.values())
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("index,left,top,right,bottom\n" + "".join(f"{index},8,8,24,24\n" for index in range(12)))
    numbers = run_forget(
        tmp_path,
        ckpt=str(run),
        boxes=boxes,
        attribute=None,
        region=None,
        classifier_file=None,
        data=None,
        samples=16,
        strength=1.0,
        layer=1,
        seed=0,
    )
    maps = load_generator(str(run)).generator.feature_maps(torch.zeros(1, 8))
    assert numbers["maps"] == maps.shape[1]
    assert 0 < numbers["dropped"] <= maps.shape[1]
