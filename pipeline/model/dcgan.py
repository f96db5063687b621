"""The paper's networks (Radford et al. 2015, section 3) for 16 to 512 pixels: `network.architecture=dcgan`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from pipeline.model import networks
from pipeline.model.batchnorm import BatchNorm2d
from pipeline.model.spectral import SpectralConv2d

if TYPE_CHECKING:
    from pipeline.config import NetworkConfig


LARGE = 6
"""Doublings from which on the widths are capped: 256 pixels have 6 from the paper's 4x4."""
CAP = 8
"""The most channels of a map of such networks, in multiples of `network.width`: the paper's 1024 at its width."""


def stage_widths(config: "NetworkConfig") -> list[int]:
    """Return the channels of the feature maps, smallest map first: 64 px, width 128 is 1024-512-256-128."""
    doublings = config.stages.doublings
    multiples = [1 << stage for stage in reversed(range(doublings))]
    return [config.width * (multiple if doublings < LARGE else min(multiple, CAP)) for multiple in multiples]


def make_head(config: "NetworkConfig", inputs: int, *, bias: bool = False) -> nn.Module:
    """Return D's last layer, maps (N, inputs, h, w) -> (N, 1, 1, 1): one h x w convolution, or average pooling."""
    convolution = SpectralConv2d if config.discriminator_norm == "spectral" else nn.Conv2d
    if config.head == "convolution":
        return convolution(inputs, 1, config.stages[1:], bias=bias)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), convolution(inputs, 1, 1))


def _first_maps(config: "NetworkConfig", outputs: int) -> Iterator[nn.Module]:
    """Make normalized maps (N, outputs, h, w) of z (N, latent_dim, 1, 1)."""
    height, width = config.stages[1:]
    if config.first_batchnorm == "channel":
        yield nn.ConvTranspose2d(config.latent_dim, outputs, (height, width), bias=False)
        yield BatchNorm2d(outputs)
        return
    units = outputs * height * width
    yield nn.ConvTranspose2d(config.latent_dim, units, 1, bias=False)  # the same weights, each pixel a channel
    yield BatchNorm2d(units)
    yield nn.Flatten()
    yield nn.Unflatten(1, (outputs, height, width))


class Generator(networks.Generator):
    """z (N, latent_dim) float -> images (N, channels, height, width) float in [-1, 1]."""

    def __init__(self, config: "NetworkConfig") -> None:
        super().__init__(config)
        widths = stage_widths(config)
        layers = [*_first_maps(config, widths[0]), nn.ReLU(inplace=True)]
        for inputs, outputs in zip(widths, widths[1:], strict=False):
            layers += [*self._upsample(inputs, outputs), BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        layers += [*self._upsample(widths[-1], config.channels, bias=config.bias), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def _upsample(self, inputs: int, outputs: int, *, bias: bool = False) -> Iterator[nn.Module]:
        """Double the size: a fractionally strided convolution, or bilinear resizing and a convolution."""
        kernel = self.config.kernel_size
        if self.config.upsampling == "transposed":
            odd = kernel % 2  # 5x5 needs one row of output padding to double exactly
            yield nn.ConvTranspose2d(inputs, outputs, kernel, 2, (kernel - 1) // 2, odd, bias=bias)
        else:
            yield nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
            same = kernel - 1 if kernel % 2 == 0 else kernel  # only an odd kernel keeps the size: 4 means 3x3
            yield nn.Conv2d(inputs, outputs, same, padding=same // 2, bias=bias)

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.layers(z[:, :, None, None])
        return images

    @property
    def last_activation(self) -> nn.Module:
        return self.activation_layers[0]

    @property
    def activation_layers(self) -> list[nn.Module]:
        return [layer for layer in reversed(list(self.layers)) if isinstance(layer, nn.ReLU)]


class Discriminator(networks.Discriminator):
    """Images (N, channels, height, width) float in [-1, 1] -> logits (N,), positive for real."""

    def __init__(self, config: "NetworkConfig") -> None:
        super().__init__(config)
        widths = stage_widths(config)[::-1]
        kernel = config.kernel_size
        spectral = config.discriminator_norm == "spectral"

        def halve(inputs: int, outputs: int, *, bias: bool) -> nn.Conv2d:
            convolution = SpectralConv2d if spectral else nn.Conv2d
            return convolution(inputs, outputs, kernel, 2, (kernel - 1) // 2, bias=bias)

        layers: list[nn.Module] = [halve(config.channels, widths[0], bias=config.bias), nn.LeakyReLU(0.2, inplace=True)]
        for inputs, outputs in zip(widths, widths[1:], strict=False):
            # BatchNorm would scale each map by its own deviation, and undo the bound. What is left of it is its shift.
            norm = [] if spectral else [BatchNorm2d(outputs)]
            layers += [halve(inputs, outputs, bias=spectral), *norm, nn.LeakyReLU(0.2, inplace=True)]
        self.layers = nn.Sequential(*layers)  # (N, widths[-1], h, w)
        self.head = make_head(config, widths[-1], bias=config.bias)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(images))  # (N, 1, 1, 1)
        return logits.flatten()

    @property
    def activation_widths(self) -> list[int]:
        return stage_widths(self.config)[::-1]

    def activations(self, images: Tensor) -> Iterator[Tensor]:
        maps = images
        for layer in self.layers:
            maps = layer(maps)
            if isinstance(layer, nn.LeakyReLU):
                yield maps

    @property
    def stages(self) -> list[list[nn.Module]]:
        stages: list[list[nn.Module]] = []
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                stages.append([])
            stages[-1].append(layer)
        return stages
