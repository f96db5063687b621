"""What every generator and discriminator offers, whatever it is built of, and how one is built by its name."""

import copy
import itertools
from abc import abstractmethod
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.common.errors import ConfigConflict
from pipeline.common.randomness import Purpose, raw_bits
from pipeline.config import CONDITIONAL, NETWORKS
from pipeline.model.spectral import Spectral

if TYPE_CHECKING:
    from pipeline.config import NetworkConfig


class Generator(nn.Module):
    """z (N, latent_dim) float -> images (N, channels, height, width) float in [-1, 1]."""

    def __init__(self, config: "NetworkConfig") -> None:
        super().__init__()
        self.config = config

    @property
    @abstractmethod
    def last_activation(self) -> nn.Module:
        """The module whose output, (N, maps, h, w), the last convolution reads."""

    @property
    def activation_layers(self) -> list[nn.Module]:
        """The modules whose outputs are maps (N, maps, h, w) that a convolution reads, those of the image's first."""
        return [self.last_activation]

    def folded(self) -> "Generator":
        """Return a float32 copy in which each BatchNorm that follows a convolution is folded into it.

        Done here rather than by each backend, so that all of them run the same weights.
        """
        assert not self.training, "fold the statistics of a generator in eval mode"
        folded = copy.deepcopy(self).float()
        for module in list(folded.modules()):
            if isinstance(module, nn.Sequential):
                _fold_sequence(module)
        return folded

    @torch.no_grad()
    def feature_maps(self, z: Tensor, layer: int = 1) -> Tensor:
        """Return the maps (N, maps, h, w) of z (N, latent_dim) that the last convolution reads, or an earlier one.

        `layer` counts `activation_layers` from the image, 1 and so on.
        """
        seen: list[Tensor] = []
        handle = self.activation_layers[layer - 1].register_forward_hook(
            lambda _, __, output: seen.append(output.clone())
        )
        try:
            self(z)
        finally:
            handle.remove()
        return seen[0]

    @torch.no_grad()
    def without_maps(self, z: Tensor, dropped: Tensor, strength: float = 1.0, layer: int = 1) -> Tensor:
        """Return the images of z with the feature maps of the indices `dropped` scaled by 1 - strength, everywhere.

        The maps are those of `feature_maps(z, layer)`.
        """

        def drop(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[:, dropped] *= 1 - strength
            return output

        handle = self.activation_layers[layer - 1].register_forward_hook(drop)
        try:
            images: Tensor = self(z)
        finally:
            handle.remove()
        return images


class Discriminator(nn.Module):
    """Images (N, channels, height, width) float in [-1, 1] -> logits (N,), positive for real."""

    def __init__(self, config: "NetworkConfig") -> None:
        super().__init__()
        self.config = config

    @property
    @abstractmethod
    def activation_widths(self) -> list[int]:
        """Channels of each of `activations`."""

    @abstractmethod
    def activations(self, images: Tensor) -> Iterator[Tensor]:
        """Yield each stage's maps (N, channels, h, w) after their nonlinearity, the finest first."""

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The modules of each of `activations`. Raises ConfigConflict for a network that does not name them."""
        raise ConfigConflict(f"network.architecture={self.config.architecture}: does not say what its stages are")

    def freeze(self, count: int) -> None:
        """Let the weights of the first `count` stages, from the image on, stay as they are. Raises ConfigConflict."""
        stages = self.stages if count else []
        if count > len(stages):
            raise ConfigConflict(
                f"recipe.freeze_d={count}: the discriminator has {len(stages)} stages; expected 0 to {len(stages)}"
            )
        for module in itertools.chain(*stages[:count]):
            module.requires_grad_(False)


def build_generator(config: "NetworkConfig") -> Generator:
    """Return the generator that `config.architecture` names, with PyTorch's initial weights."""
    network = import_module(CONDITIONAL if config.label else NETWORKS[config.architecture]).Generator(config)
    assert isinstance(network, Generator)
    return network


def build_discriminator(config: "NetworkConfig") -> Discriminator:
    """Return the discriminator that `config.architecture` names, with PyTorch's initial weights."""
    network = import_module(CONDITIONAL if config.label else NETWORKS[config.architecture]).Discriminator(config)
    assert isinstance(network, Discriminator)
    return network


def initialize(network: nn.Module, seed: int, *, lane: int) -> None:
    """Draw the paper's initial weights in place: convolutions and embeddings N(0, 0.02), BN scale N(1, 0.02), shifts 0.

    Spectral normalization begins anew with them. A pure function of (seed, lane); give G and D different lanes.
    """
    word = int(raw_bits(seed, Purpose.INITIALIZE, 0, 1, lane=lane)[0] >> 1)
    generator = torch.Generator().manual_seed(word)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.02, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02, generator=generator)
            nn.init.zeros_(module.bias)
        if isinstance(module, Spectral):
            module.begin(generator)


def _fold_sequence(layers: nn.Sequential) -> None:
    """Fold each BatchNorm of a sequence into the convolution right before it, in place."""
    folded: list[nn.Module] = []
    for layer in layers:
        before = folded[-1] if folded else None
        if isinstance(layer, nn.BatchNorm2d) and isinstance(before, nn.Conv2d | nn.ConvTranspose2d):
            folded[-1] = fuse_conv_bn_eval(before, layer, transpose=isinstance(before, nn.ConvTranspose2d))
        else:
            folded.append(layer)
    for name in [name for name, _ in layers.named_children()]:
        delattr(layers, name)
    layers.extend(folded)
