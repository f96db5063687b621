"""Small generators whose samples differ, and what the export tests pass around."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from export.format.card import Card, Engine
from pipeline.checkpoints.weights import serialize
from pipeline.common.randomness import Purpose
from pipeline.config import NetworkConfig
from pipeline.model.latents import latents
from pipeline.model.networks import Generator, build_generator, initialize

Cli = Callable[..., tuple[int, str, str]]


def make_generator(config: NetworkConfig, seed: int = 0) -> Generator:
    """Return a generator in eval mode with measured BatchNorm statistics and full contrast.

    Freshly initialized ones make nearly gray images, in which every backend would agree.
    """
    generator = build_generator(config)
    initialize(generator, seed, lane=0)
    norms = [module for module in generator.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        images = generator(torch.from_numpy(latents(seed, Purpose.BATCHNORM, 0, 64, config.latent_dim)))
        last = [name for name, _ in generator.named_parameters() if name.endswith(".weight")][-1]
        generator.get_parameter(last).mul_(0.7 / images.std())
    return generator.eval()


def write_checkpoint(folder: Path, config: NetworkConfig, seed: int = 0) -> Path:
    """Write a generator's .safetensors and return its path."""
    path = folder / f"generator-{seed}.safetensors"
    path.write_bytes(serialize(make_generator(config, seed), config, "ema", 1000 + seed))
    return path


@dataclass(frozen=True)
class Export:
    """An exported file and what it was made from."""

    checkpoint: Path
    model: Path
    card: Card
    generator: Generator


HOPPER = Engine(
    runtime="tensorrt",
    version="10.13.3.9",
    gpu="NVIDIA H200",
    compute_capability="9.0",
    driver="13.0",
    system="Linux-x86_64",
    profiles=[[1, 1, 1], [1, 64, 256]],
    optimization_level=3,
    onnx="model.onnx",
    onnx_sha256="0" * 64,
)
"""What a plan of another machine is tied to."""

SMALL = NetworkConfig(width=8, image_size=32)
MAX_BATCH = 16
