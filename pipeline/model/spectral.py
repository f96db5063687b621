"""Layers whose weights are divided by their largest singular value: `network.discriminator_norm=spectral`.

Miyato et al. 2018, Spectral Normalization for Generative Adversarial Networks, section 2 and algorithm 1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FIRST_ITERATIONS = 15
"""Of the power method on initial weights, as many as PyTorch's `spectral_norm` begins with; then one for an update."""


class Spectral(nn.Module):
    """A layer that uses W / sigma in place of its weight W, whose rows are its outputs.

    sigma = |W^T u| is W's largest singular value when `u` is its left singular vector. The paper writes u^T W v with v
    of unit length in the direction of W^T u, which is the same number with the same gradient: so u is all that an
    update leaves for the next. Not `torch.nn.utils.parametrizations.spectral_norm`, which iterates in each forward
    pass: then u would depend on the passes and micro-batches of an update, and change with the pass of another network.
    """

    weight: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        outputs = len(self.weight)
        self.u = nn.Buffer(torch.full((outputs,), outputs**-0.5))
        """The estimate of W's left singular vector, (outputs,), of unit length."""

    def normalized(self) -> Tensor:
        """Return W / sigma. Its gradient also counts what W does to sigma; u is a constant."""
        # In the precision of the weights, also where the passes have another: 8 bits of sigma would be too few.
        with torch.autocast("cuda" if self.weight.is_cuda else "cpu", enabled=False):
            sigma: Tensor = torch.linalg.vector_norm(torch.mv(self.weight.flatten(1).T, self.u))
            return self.weight / sigma

    @torch.no_grad()
    def iterate(self) -> None:
        """Do one iteration of the power method, in place."""
        matrix = self.weight.flatten(1)
        self.u.copy_(F.normalize(torch.mv(matrix, F.normalize(torch.mv(matrix.T, self.u), dim=0)), dim=0))

    @torch.no_grad()
    def begin(self, generator: torch.Generator) -> None:
        """Estimate u anew, from noise that `generator` draws, for weights that are new."""
        self.u.normal_(generator=generator)
        for _ in range(FIRST_ITERATIONS):
            self.iterate()


class SpectralConv2d(Spectral, nn.Conv2d):
    """A convolution whose weight (outputs, inputs, h, w), as a matrix of `outputs` rows, has a norm of 1."""

    def forward(self, maps: Tensor) -> Tensor:
        convolved: Tensor = self._conv_forward(maps, self.normalized(), self.bias)
        return convolved


class SpectralLinear(Spectral, nn.Linear):
    """A linear layer whose weight (outputs, inputs) has a norm of 1."""

    def forward(self, values: Tensor) -> Tensor:
        return F.linear(values, self.normalized(), self.bias)
