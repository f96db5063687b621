"""The roofline of a device, measured beside the benchmark, and what one image costs at least."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from export.format.card import Precision
from export.format.graph import tensors
from export.format.rows import rows_at
from pipeline.common.randomness import Purpose
from pipeline.model.networks import Generator

CPU_MATRIX, GPU_MATRIX = 2048, 8192
CPU_COPY_BYTES, GPU_COPY_BYTES = 1 << 28, 1 << 30


@dataclass(frozen=True)
class ImageCost:
    """The least arithmetic and memory traffic of one image."""

    flops_per_image: int
    """A multiplication with its addition counts as two."""
    values_per_image: int
    """Values of the feature maps, each written once and read once."""
    weights: int
    """Values of the weights, read once a block."""

    def bytes_per_image(self, batch: int, value_bytes: int = 4) -> float:
        """Return the least memory traffic of an image in a block of `batch`, caches aside."""
        return value_bytes * (2 * self.values_per_image + self.weights / batch)


def cost_of(generator: Generator) -> ImageCost:
    """Count what one image of `generator` costs, with BatchNorm folded."""
    folded = generator.folded()
    values = 0

    def count(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal values
        values += output.numel()

    for module in folded.modules():
        # Activations are fused into the layer before by every good backend.
        if not list(module.children()) and not isinstance(module, nn.ReLU | nn.LeakyReLU | nn.Tanh):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        folded(*tensors(generator.config, torch.from_numpy(rows_at(generator.config, 0, Purpose.BENCHMARK, 0, 1))))
    return ImageCost(counter.get_total_flops(), values, sum(weight.numel() for weight in folded.parameters()))


@dataclass(frozen=True)
class Roofline:
    """The peak rates of a device in one precision."""

    flops_per_second: float
    """Measured with a large square matrix product in that precision."""
    copy_bytes_per_second: float
    """Bytes read and written, measured with a copy too large for the caches."""


Rooflines = dict[tuple[str, Precision], Roofline]
"""By device (cpu or cuda) and precision of the arithmetic."""


def measure(device: str, precision: Precision) -> Roofline:
    """Measure the roofline of `device` (cpu or cuda) in `precision`; each rate is the best of several tries."""
    return Roofline(matrix_flops_per_second(device, precision), copy_bytes_per_second(device))


def matrix_flops_per_second(device: str, precision: Precision) -> float:
    """Return the FLOP/s of a large square matrix product.

    On the CPU this is the better of two libraries. PyTorch multiplies matrices with MKL, which reaches half its speed
    on processors that are not Intel's; it convolves with oneDNN, and a 1x1 convolution is the same product.
    """
    size = CPU_MATRIX if device == "cpu" else GPU_MATRIX
    dtype = torch.float16 if precision == "fp16" else torch.float32
    left, right = (torch.ones((size, size), dtype=dtype, device=device) for _ in range(2))
    result = torch.empty_like(left)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        seconds = _seconds(lambda: torch.mm(left, right, out=result), device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    if device == "cpu":
        pixels, weight = left[None, :, :, None].transpose(1, 2), right[:, :, None, None]
        with torch.inference_mode():
            seconds = min(seconds, _seconds(lambda: functional.conv2d(pixels, weight), device))
    return 2.0 * size**3 / seconds


def copy_bytes_per_second(device: str) -> float:
    """Return the bytes read and written a second by a copy too large for the caches."""
    size = CPU_COPY_BYTES if device == "cpu" else GPU_COPY_BYTES
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2.0 * size / _seconds(lambda: target.copy_(source), device)


def _seconds(action: Callable[[], object], device: str, repeats: int = 4) -> float:
    """Return the shortest time of `repeats` runs of `action`, after one run to warm up: a roofline is the best rate."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        began = time.perf_counter()
        action()
        _wait(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
