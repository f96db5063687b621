"""The generator as it is exported: BatchNorm folded into the convolutions, a fixed precision, uint8 output."""

import torch
from torch import Tensor, nn

from export.format.card import ComputePrecision, Output
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
        images: Tensor = self.generator(z.to(self.dtype))
        return to_uint8(images) if self.output == "uint8" else images.float()
