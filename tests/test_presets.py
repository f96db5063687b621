"""What the presets compute does not change: updates of both networks and exported files, against stored values.

Rounding differs between processors (their vector units sum in other orders), so the updates are made in float64, where
it stays below the tolerance, and the bytes that are compared are those of a file whose weights need no such sum.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from accelerate import Accelerator

from export.builders.onnx_model import build
from pipeline.checkpoints.reference import LoadedGenerator
from pipeline.common.randomness import Purpose
from pipeline.config import load_config
from pipeline.model.latents import latents
from pipeline.model.networks import build_discriminator, build_generator, initialize
from pipeline.training.step import AdversarialStep

PRESETS = ("paper64", "tutorial64", "faces")
MOST_SLOW = [preset if preset == "tutorial64" else pytest.param(preset, marks=pytest.mark.slow) for preset in PRESETS]
"""All of them; the updates of one are quick enough for every change, and the nights make those of the others."""
NARROW = ("network.width=4", "recipe.batch=8", "recipe.streams=8")
UPDATES = 50
GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("presets_golden.json").read_text())


@pytest.fixture
def in_float64() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def marks(weights: dict[str, torch.Tensor]) -> list[float]:
    """Return three numbers that change when any of the weights does: sums of them, of their squares, and weighted."""
    flat = torch.cat([value.double().flatten() for _, value in sorted(weights.items()) if value.is_floating_point()])
    weighted = flat * torch.linspace(-1, 1, len(flat), dtype=torch.float64)
    return [float(flat.sum()), float(flat.square().sum()), float(weighted.sum())]


def updates(preset: str) -> dict[str, list[float]]:
    """Return the marks of both networks and the average after UPDATES updates in the default dtype."""
    config = load_config(preset, overrides=[*NARROW])
    step = AdversarialStep(config, Accelerator(cpu=True))
    batch, size = config.recipe.batch, config.network.image_size
    draw = np.random.Generator(np.random.Philox(1))
    for update in range(UPDATES):
        coarse = draw.integers(0, 256, (batch, 8, 8, 3), np.uint8)
        reals = coarse.repeat(size // 8, 1).repeat(size // 8, 2)
        network = config.network
        start = update * batch
        z = latents(0, Purpose.TRAIN, start, batch, network.latent_dim, network.latent_distribution)
        step.update(reals, z, start)
    networks = {"generator": step.generator, "discriminator": step.discriminator, "average": step.ema.generator}
    return {name: marks(network.state_dict()) for name, network in networks.items()}


def initial(preset: str) -> dict[str, list[float]]:
    """Return the marks of both networks before the first update, in float32, at the preset's own width."""
    config, found = load_config(preset).network, {}
    for lane, network in enumerate((build_generator(config), build_discriminator(config))):
        initialize(network, 0, lane=lane)
        found["gd"[lane]] = marks(network.state_dict())
    return found


def file_of(preset: str) -> str:
    """Return the SHA-256 of the ONNX file of a generator whose weights are exact, without the exporter's version."""
    config = load_config(preset, overrides=[*NARROW]).network
    generator = build_generator(config)
    with torch.no_grad():
        for lane, (name, value) in enumerate(sorted(generator.state_dict().items())):
            if value.is_floating_point():
                drawn = latents(lane, Purpose.BENCHMARK, 0, 1, value.numel())[0].reshape(value.shape) / 16
                value.copy_(torch.from_numpy(drawn) + (1.0 if "running_var" in name else 0.0))
    loaded = LoadedGenerator(generator.eval(), config, "g.safetensors", "0" * 64, None, "raw")
    model = onnx.load_from_string(build(loaded, "fp32", "uint8", 256))
    model.ClearField("producer_version")
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("preset", MOST_SLOW)
def test_fifty_updates_end_where_they_did(preset: str) -> None:
    for name, found in updates(preset).items():
        assert found == pytest.approx(GOLDEN[preset]["updates"][name], rel=1e-7, abs=1e-7), name


@pytest.mark.parametrize("preset", PRESETS)
def test_a_run_begins_with_the_weights_that_it_did(preset: str) -> None:
    for name, found in initial(preset).items():
        assert found == pytest.approx(GOLDEN[preset]["initial"][name], rel=1e-5, abs=1e-3), name


@pytest.mark.parametrize("preset", PRESETS)
def test_the_exported_file_is_byte_for_byte_what_it_was(preset: str) -> None:
    assert file_of(preset) == GOLDEN[preset]["onnx_sha256"]
