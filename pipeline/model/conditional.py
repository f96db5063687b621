"""The networks of dcgan.py, conditioned on a label: `network.label`.

`concat`: the label beside the input of every layer of G and D, as the authors' MNIST code has it. `projection`: class-
conditional BatchNorm in G, and in D the inner product of the label's embedding with the last maps, summed over their
pixels (Miyato and Koyama 2018, equation 3 and section 4).
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipeline.common.errors import ConfigConflict
from pipeline.model import dcgan, networks
from pipeline.model.spectral import SpectralLinear

if TYPE_CHECKING:
    from pipeline.config import NetworkConfig


class LabelLayer(nn.Module):
    """A layer that reads the label (N, label_dim) beside its maps (N, channels, h, w)."""


class AppendLabel(LabelLayer):
    """Add a map of one value for each value of the label."""

    def forward(self, maps: Tensor, label: Tensor) -> Tensor:
        values = label[:, :, None, None].to(maps.dtype)
        return torch.cat([maps, values.expand(-1, -1, *maps.shape[2:])], 1)


class ScaleByLabel(LabelLayer):
    """After a BatchNorm: multiply each map by 1 + a number of the label, and add one.

    With one label of many classes this gives each class a scale and shift of its own, as class-conditional BatchNorm
    has. A layer of its own, so that the BatchNorm before it is folded into its convolution.
    """

    def __init__(self, channels: int, label_dim: int) -> None:
        super().__init__()
        self.scale = nn.Linear(label_dim, channels, bias=False)
        self.shift = nn.Linear(label_dim, channels, bias=False)

    def forward(self, maps: Tensor, label: Tensor) -> Tensor:
        scale, shift = self.scale(label)[:, :, None, None], self.shift(label)[:, :, None, None]
        scaled: Tensor = maps * (1 + scale) + shift
        return scaled


class LabelSequential(nn.Sequential):
    """Layers one after another, of which each `LabelLayer` gets the label too."""

    def forward(self, maps: Tensor, label: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            maps = layer(maps, label) if isinstance(layer, LabelLayer) else layer(maps)
        return maps


class Generator(networks.Generator):
    """z (N, latent_dim), label (N, label_dim) float -> images (N, channels, size, size) float in [-1, 1]."""

    def __init__(self, config: "NetworkConfig") -> None:
        super().__init__(config)
        _refuse_other_architectures(config)
        layers = dcgan.Generator(config).layers
        concat = config.conditioning == "concat"
        self.layers = _appended(layers, config.label_dim) if concat else _scaled(layers, config.label_dim)

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        images: Tensor = self.layers(z[:, :, None, None], label)
        return images

    @property
    def last_activation(self) -> nn.Module:
        return self.activation_layers[0]

    @property
    def activation_layers(self) -> list[nn.Module]:
        return [layer for layer in reversed(list(self.layers)) if isinstance(layer, nn.ReLU)]


class OfClass(networks.Generator):
    """A conditional generator whose images are all of one class: z (N, latent_dim) alone -> images."""

    def __init__(self, generator: networks.Generator, label: Tensor) -> None:
        """`label` (label_dim) is the class, as the generator reads it."""
        super().__init__(generator.config.model_copy(update={"label": (), "classes": (), "class_images": ()}))
        self.generator = generator
        self.label = nn.Buffer(label)

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.generator(z, self.label.expand(len(z), -1))
        return images

    @property
    def last_activation(self) -> nn.Module:
        return self.generator.last_activation

    @property
    def activation_layers(self) -> list[nn.Module]:
        return self.generator.activation_layers


class Discriminator(networks.Discriminator):
    """Images (N, channels, size, size) in [-1, 1], label (N, label_dim) float -> logits (N,), positive for real."""

    def __init__(self, config: "NetworkConfig") -> None:
        super().__init__(config)
        _refuse_other_architectures(config)
        plain = dcgan.Discriminator(config)
        self._widths = plain.activation_widths
        self.layers, self.head = plain.layers, plain.head
        self.embed = None
        if config.conditioning == "concat":
            head = plain.head if isinstance(plain.head, nn.Sequential) else [plain.head]
            self.layers = _appended(plain.layers, config.label_dim)
            self.head = _appended(head, config.label_dim)
        else:
            linear = SpectralLinear if config.discriminator_norm == "spectral" else nn.Linear
            self.embed = linear(config.label_dim, self._widths[-1], bias=False)

    def forward(self, images: Tensor, label: Tensor) -> Tensor:
        if self.embed is None:
            logits: Tensor = self.head(self.layers(images, label), label)  # (N, 1, 1, 1)
            return logits.flatten()
        maps = self.layers(images)
        projected = (self.embed(label) * maps.sum((2, 3))).sum(1)
        logits = projected + self.head(maps).flatten()
        return logits

    @property
    def activation_widths(self) -> list[int]:
        return self._widths

    def activations(self, images: Tensor) -> Iterator[Tensor]:
        if self.embed is None:
            raise ConfigConflict(
                "network.conditioning=concat: this discriminator's features need a label beside the images; only those "
                "of network.conditioning=projection depend on the images alone"
            )
        maps = images
        for layer in self.layers:
            maps = layer(maps)
            if isinstance(layer, nn.LeakyReLU):
                yield maps


def _appended(layers: Iterable[nn.Module], label_dim: int) -> LabelSequential:
    """Return `layers` with the label beside the input of each convolution."""
    widened: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            widened.append(AppendLabel())
            _widen(layer, label_dim)
        widened.append(layer)
    return LabelSequential(*widened)


def _scaled(layers: Iterable[nn.Module], label_dim: int) -> LabelSequential:
    """Return `layers` with a `ScaleByLabel` after each BatchNorm."""
    scaled: list[nn.Module] = []
    for layer in layers:
        scaled.append(layer)
        if isinstance(layer, nn.BatchNorm2d):
            scaled.append(ScaleByLabel(layer.num_features, label_dim))
    return LabelSequential(*scaled)


def _widen(convolution: nn.Conv2d | nn.ConvTranspose2d, channels: int) -> None:
    """Give a convolution more input channels, in place."""
    shape = list(convolution.weight.shape)
    shape[0 if isinstance(convolution, nn.ConvTranspose2d) else 1] += channels
    convolution.in_channels += channels
    convolution.weight = nn.Parameter(convolution.weight.new_empty(shape))
    convolution.reset_parameters()


def _refuse_other_architectures(config: "NetworkConfig") -> None:
    """Raise ConfigConflict for networks that are not built here."""
    if config.architecture != "dcgan":
        raise ConfigConflict(
            f"network.architecture={config.architecture}: only dcgan can be conditioned on a label; leave "
            "network.label out, or set network.architecture=dcgan"
        )
