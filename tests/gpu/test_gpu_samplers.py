"""On an NVIDIA GPU: every backend makes PyTorch's images, in order, the same bytes each time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gpu_cases import Weights

from export.builders.onnx_model import export_onnx
from export.format.card import ComputePrecision
from export.samplers.base import Sampler
from export.samplers.open import CHECKPOINT_BACKENDS, open_sampler
from pipeline.common.errors import UnavailableError
from pipeline.common.machine import versions
from pipeline.common.randomness import Purpose
from pipeline.model.latents import latents

BATCHES = (1, 7, 256)


def reference(weights: Weights, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return z and the images of the generator on the CPU in float32."""
    z = latents(5, Purpose.SAMPLE, 0, count, 100)
    with torch.no_grad():
        floats = weights.generator(torch.from_numpy(z)).numpy()
    return z, np.clip(floats.transpose(0, 2, 3, 1) * 127.5 + 128, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def model(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    export_onnx(str(weights.path), folder, parity_images=256)
    return folder / "model.onnx"


def check(sampler: Sampler, weights: Weights) -> None:
    """Compare with the CPU over three blocks and a part: what is in flight must neither mix nor overwrite."""
    z, pixels = reference(weights, 3 * sampler.batch + max(1, sampler.batch // 2))
    images = sampler.sample(z)
    assert np.abs(images.astype(int) - pixels).max() <= 1, sampler.provider
    assert np.array_equal(images, sampler.sample(z)), "the same bytes the second time"
    seconds = sampler.time_launches(5)
    assert all(0 < value < 60 for value in seconds)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("backend", CHECKPOINT_BACKENDS)
def test_pytorch(weights: Weights, backend: str, precision: ComputePrecision, batch: int) -> None:
    with open_sampler(str(weights.path), backend=backend, batch=batch, precision=precision) as sampler:
        assert sampler.device == torch.cuda.get_device_name()
        check(sampler, weights)


def test_auto_is_a_cuda_graph(weights: Weights) -> None:
    with open_sampler(str(weights.path)) as sampler:
        assert (sampler.backend, sampler.batch) == ("cuda-graphs", 256)


@pytest.mark.parametrize("batch", BATCHES)
def test_a_cuda_graph_makes_the_bytes_of_its_launches(weights: Weights, batch: int) -> None:
    z = latents(5, Purpose.SAMPLE, 0, batch, 100)
    images = []
    for backend in ("channels_last", "cuda-graphs"):
        with open_sampler(str(weights.path), backend=backend, batch=batch) as sampler:
            images.append(sampler.sample(z))
    assert np.array_equal(images[0], images[1])


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("backend", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_onnx_runtime(weights: Weights, model: Path, backend: str, batch: int) -> None:
    installed = versions("tensorrt").get("tensorrt", "10")
    if backend == "onnxruntime-tensorrt" and installed.split(".")[0] != "10":
        pytest.skip(f"not possible: ONNX Runtime's provider is linked with TensorRT 10, installed is {installed}")
    try:
        sampler = open_sampler(str(model), backend=backend, batch=batch)
    except UnavailableError as error:
        pytest.skip(str(error))
    with sampler:
        assert sampler.provider in ("CUDAExecutionProvider", "TensorrtExecutionProvider")
        images = sampler.sample(reference(weights, 2 * batch)[0])
        assert np.abs(images.astype(int) - reference(weights, 2 * batch)[1]).max() <= 1


def test_float32_is_not_tf32(weights: Weights) -> None:
    """TF32 is off by a thousandth, which a pixel's gray level hardly shows: the share of the pixels does."""
    z, pixels = reference(weights, 256)
    for backend in CHECKPOINT_BACKENDS:
        with open_sampler(str(weights.path), backend=backend) as sampler:
            assert (sampler.sample(z) != pixels).mean() < 0.005, backend
    assert torch.backends.cudnn.allow_tf32 is False, "and others may still ask for it"


def test_too_little_memory_is_one_line(weights: Weights) -> None:
    with pytest.raises(UnavailableError, match="too little free memory"):
        open_sampler(str(weights.path), batch=1 << 22)


def test_ranges_join(weights: Weights) -> None:
    with open_sampler(str(weights.path), batch=32) as sampler:
        whole = np.concatenate([images for _, images in sampler.sample_range(1, 3, 200)])
        cut = np.concatenate(
            [images for start in range(3, 203, 40) for _, images in sampler.sample_range(1, start, 40)]
        )
    assert np.array_equal(whole, cut)
