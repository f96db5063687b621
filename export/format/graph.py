"""The generator as it is exported: BatchNorm folded into the convolutions, a fixed precision, uint8 output."""

import torch
from torch import Tensor, nn

from export.format.card import ComputePrecision, Output
from pipeline.config import NetworkConfig
from pipeline.model.networks import Generator
from pipeline.model.sampling import to_uint8


class DeployedGenerator(nn.Module):
    """z (N, latent_dim) float32 -> images: uint8 (N, H, W, C), or float32 (N, C, H, W) in [-1, 1]."""

    def __init__(self, generator: Generator, *, precision: ComputePrecision = "fp32", output: Output = "uint8") -> None:
        super().__init__()
        self.generator = generator.folded()
        self.dtype = torch.float16 if precision == "fp16" else torch.float32
        self.output = output
        self.generator.to(self.dtype)
        self.eval().requires_grad_(False)

    def forward(self, z: Tensor) -> Tensor:
        return self._made(z)

    def _made(self, *inputs: Tensor) -> Tensor:
        images: Tensor = self.generator(*(values.to(self.dtype) for values in inputs))
        return to_uint8(images) if self.output == "uint8" else images.float()


class DeployedConditional(DeployedGenerator):
    """z (N, latent_dim) float32, label -> images: the label int64 (N,), or float32 (N, labels) of several labels."""

    def forward(self, z: Tensor, label: Tensor) -> Tensor:  # type: ignore[override]
        config = self.generator.config
        return self._made(z, label if len(config.label) > 1 else one_hot(config, label))


def columns(network: NetworkConfig, rows: Tensor) -> dict[str, Tensor]:
    """Return views of rows (N, row_dim) by the names of a graph's inputs: z, and label (N,), or (N, labels)."""
    if not network.label:
        return {"z": rows}
    label = rows[:, network.latent_dim :]
    return {"z": rows[:, : network.latent_dim], "label": label if len(network.label) > 1 else label[:, 0]}


def tensors(network: NetworkConfig, rows: Tensor) -> tuple[Tensor, ...]:
    """Return rows as the generator takes them: (z,), or (z, label (N, label_dim))."""
    z, *label = columns(network, rows).values()
    return (z, *(values if values.ndim > 1 else one_hot(network, values) for values in label))


def one_hot(network: NetworkConfig, classes: Tensor) -> Tensor:
    """Return classes (N,) as float32 (N, classes). By comparison: every runtime has it, and it asks nothing of them."""
    numbers = torch.arange(len(network.classes), device=classes.device, dtype=classes.dtype)
    return (classes[:, None] == numbers).float()
