"""Residual networks (after Gulrajani et al. 2017, appendix C): `network.architecture=residual`. Not the paper's.

BatchNorm stays in both networks, so that the recipe of the paper holds: no gradient penalty, no spectral norm.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from pipeline.common.errors import ConfigConflict
from pipeline.model import networks
from pipeline.model.batchnorm import BatchNorm2d
from pipeline.model.dcgan import make_head, stage_widths

if TYPE_CHECKING:
    from pipeline.config import NetworkConfig


class UpBlock(nn.Module):
    """Maps (N, inputs, h, w) -> (N, outputs, 2h, 2w): two 3x3 convolutions beside a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            BatchNorm2d(inputs),
            nn.ReLU(inplace=True),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )
        # The order commutes: convolving before enlarging gives the same values for a quarter of the work.
        self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.Upsample(scale_factor=2))

    def forward(self, maps: Tensor) -> Tensor:
        summed: Tensor = self.main(maps) + self.skip(maps)
        return summed


class DownBlock(nn.Module):
    """Maps (N, inputs, 2h, 2w) -> (N, outputs, h, w): two 3x3 convolutions beside a 1x1 convolution, then LeakyReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            BatchNorm2d(outputs),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            BatchNorm2d(outputs),
            nn.AvgPool2d(2),
        )
        self.skip = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(inputs, outputs, 1, bias=False))
        self.activation = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, maps: Tensor) -> Tensor:
        activated: Tensor = self.activation(self.main(maps) + self.skip(maps))
        return activated


class Generator(networks.Generator):
    """z (N, latent_dim) float -> images (N, channels, height, width) float in [-1, 1]."""

    def __init__(self, config: "NetworkConfig") -> None:
        super().__init__(config)
        _refuse_options_of_dcgan(config)
        widths = stage_widths(config)
        self.project = nn.ConvTranspose2d(
            config.latent_dim, widths[0], config.stages[1:], bias=False
        )  # (N, widths[0], h, w)
        self.blocks = nn.Sequential(*map(UpBlock, widths, [*widths[1:], widths[-1]]))  # (N, widths[-1], H, W)
        self.normalize = nn.Sequential(BatchNorm2d(widths[-1]), nn.ReLU(inplace=True))
        self.to_image = nn.Sequential(nn.Conv2d(widths[-1], config.channels, 3, padding=1, bias=False), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        maps = self.blocks(self.project(z[:, :, None, None]))
        images: Tensor = self.to_image(self.normalize(maps))
        return images

    @property
    def last_activation(self) -> nn.Module:
        return self.normalize

    @property
    def activation_layers(self) -> list[nn.Module]:
        return [self.normalize, *[*self.blocks][-2::-1]]


class Discriminator(networks.Discriminator):
    """Images (N, channels, height, width) float in [-1, 1] -> logits (N,), positive for real."""

    def __init__(self, config: "NetworkConfig") -> None:
        super().__init__(config)
        _refuse_options_of_dcgan(config)
        widths = self.activation_widths
        self.blocks = nn.Sequential(*map(DownBlock, [config.channels, *widths], widths))  # (N, widths[-1], h, w)
        self.head = make_head(config, widths[-1])

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(images))  # (N, 1, 1, 1)
        return logits.flatten()

    @property
    def activation_widths(self) -> list[int]:
        return stage_widths(self.config)[::-1]

    def activations(self, images: Tensor) -> Iterator[Tensor]:
        maps = images
        for block in self.blocks:
            maps = block(maps)
            yield maps

    @property
    def stages(self) -> list[list[nn.Module]]:
        return [[block] for block in self.blocks]


def _refuse_options_of_dcgan(config: "NetworkConfig") -> None:
    """Raise ConfigConflict for a setting that these networks would ignore."""
    for name in ("kernel_size", "upsampling", "bias", "first_batchnorm", "discriminator_norm"):
        if getattr(config, name) != type(config).model_fields[name].default:
            raise ConfigConflict(
                f"network.{name}={getattr(config, name)}: the residual networks have 3x3 kernels without biases, "
                "repeat pixels, and have BatchNorm of each channel in both; "
                f"leave network.{name} out, or set network.architecture=dcgan"
            )
