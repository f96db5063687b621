"""Fixtures: a small generator whose samples differ, and our commands as real processes."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy import generate
from pipeline.checkpoints.weights import serialize
from pipeline.config import NetworkConfig
from pipeline.model.networks import build_generator, initialize

BIN = Path(sys.executable).parent


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Write a 32-pixel generator of a given seed as safetensors and return its path."""
    folder = tmp_path_factory.mktemp("models")

    def make(seed: int) -> Path:
        config = NetworkConfig(width=8, image_size=32)
        generator = build_generator(config)
        initialize(generator, seed, lane=0)
        for module in generator.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            generator(torch.rand(64, config.latent_dim) * 2 - 1)  # BatchNorm statistics
            layers: Any = generator.layers
            layers[-2].weight *= 20  # contrast: at first all images are nearly gray
        path = folder / f"{seed}.safetensors"
        path.write_bytes(serialize(generator.eval(), config, "ema", 0))
        return path

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[[int], Path]) -> str:
    """A generator's path."""
    return str(make_model(0))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Run dcgan-generate in this process (torch takes seconds to load) and return (output, errors)."""

    def run(*arguments: object, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["dcgan-generate", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            generate.main()
        out, error = capsys.readouterr()
        assert (end.value.code or 0) == code, error
        return out, error

    return run


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start one of our commands: start("dcgan-generate", "--count", 3, env={...})."""
    processes = []

    def run(command: str, *arguments: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(BIN / command), *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()
