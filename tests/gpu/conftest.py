"""Everything in this folder needs an NVIDIA GPU, its driver and a CUDA build of PyTorch: `make gpu-check`."""

from pathlib import Path

import pytest
import torch
from gpu_cases import Weights

from export.format.driver import driver_version
from pipeline.checkpoints.weights import serialize
from pipeline.config import NetworkConfig
from pipeline.model.networks import build_generator, initialize


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run, and say which hardware is missing."""
    reason = None
    if driver_version() is None:
        reason = "needs an NVIDIA GPU and its driver"
    elif not torch.cuda.is_available():
        reason = f"needs a CUDA build of PyTorch for the driver's CUDA {driver_version()}; this is {torch.__version__}"
    if reason is None:
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """Width 64, 64x64, with measured BatchNorm statistics and full contrast."""
    config = NetworkConfig(width=64)
    generator = build_generator(config)
    initialize(generator, 0, lane=0)
    with torch.no_grad():
        for _ in range(20):
            images = generator(torch.rand(64, config.latent_dim) * 2 - 1)
        last = [layer for layer in generator.modules() if isinstance(layer, torch.nn.ConvTranspose2d)][-1]
        last.weight *= 0.7 / images.std()
    path = tmp_path_factory.mktemp("weights") / "generator.safetensors"
    path.write_bytes(serialize(generator.eval(), config, "raw", 0))
    return Weights(generator, path)
