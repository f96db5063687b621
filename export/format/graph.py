"""The generator as it is deployed: BatchNorm folded into the convolutions, the precision fixed, the output uint8."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from export.format.card import ComputePrecision, Output
from pipeline.model.networks import Generator


def to_uint8(images: Tensor) -> Tensor:
    """Images (N, C, H, W) float in [-1, 1] -> (N, H, W, C) uint8: x*127.5+128, cut off, truncated.

    Permuted first and cast last: TensorRT takes uint8 as a network's output only.
    """
    scaled = images.float().permute(0, 2, 3, 1) * 127.5 + 128.0
    return scaled.clamp(0.0, 255.0).to(torch.uint8)


def fold_batchnorm(generator: Generator) -> nn.Sequential:
    """Return the generator's layers with each BatchNorm folded into the convolution before it, in float32.

    Done here rather than by each backend, so that all of them compare the same weights.
    """
    assert not generator.training, "fold the statistics of a generator in eval mode"
    folded: list[nn.Module] = []
    for layer in copy.deepcopy(generator.layers).float():
        if isinstance(layer, nn.BatchNorm2d):
            before = folded.pop()
            assert isinstance(before, nn.Conv2d | nn.ConvTranspose2d)
            # The two calls differ for the type checker only: the function is generic over one type.
            transposed = isinstance(before, nn.ConvTranspose2d)
            folded.append(fuse_conv_bn_eval(before, layer, transpose=transposed))
        else:
            folded.append(layer)
    return nn.Sequential(*folded)


class DeployedGenerator(nn.Module):
    """z (N, latent_dim) float32 -> images: uint8 (N, H, W, C), or float32 (N, C, H, W) in [-1, 1]."""

    def __init__(self, generator: Generator, *, precision: ComputePrecision = "fp32", output: Output = "uint8") -> None:
        super().__init__()
        self.layers = fold_batchnorm(generator)
        self.dtype = torch.float16 if precision == "fp16" else torch.float32
        self.output = output
        self.layers.to(self.dtype)
        self.eval().requires_grad_(False)

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.layers(z.to(self.dtype)[:, :, None, None])
        return to_uint8(images) if self.output == "uint8" else images.float()
