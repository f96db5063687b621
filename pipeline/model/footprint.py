"""What networks cost, found without computing anything: parameters, operations, and the memory of an update."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.config import NetworkConfig
from pipeline.model.dcgan import stage_widths
from pipeline.model.networks import build_discriminator, build_generator
from pipeline.model.spectral import Spectral

VALUE_BYTES = 4
"""Of a weight, and of a value of a feature map in float32."""


class Cost(NamedTuple):
    """What one network costs."""

    parameters: int
    operations: int
    """Additions and multiplications of the convolutions and linear layers for one image, forward."""
    kept_bytes: int
    """Feature maps in float32 that the backward pass of one image needs."""


class Footprint(NamedTuple):
    """What the networks of a run cost."""

    generator: Cost
    discriminator: Cost

    @property
    def state_bytes(self) -> int:
        """Weights, gradients, both moments of Adam, and the average of G: what memory holds whatever the batch."""
        return VALUE_BYTES * (5 * self.generator.parameters + 4 * self.discriminator.parameters)

    def update_operations(self, *, alternate: bool = False) -> int:
        """Of one image in one update: G forward and backward; D so on real and fake, and for G without its weights.

        A backward pass costs two forward ones, or one where only the gradient of the input is wanted. Updates in turn
        are half of one for both networks, and G's fakes for D: the mean of the two.
        """
        generator, discriminator = self.generator.operations, self.discriminator.operations
        return 2 * generator + 4 * discriminator if alternate else 3 * generator + 8 * discriminator

    def image_bytes(self, *, apart: bool = False) -> int:
        """Return the memory that one image of a micro-batch takes at least, in float32.

        G's maps are kept while D is updated on real and fake, unless the updates are `apart`: micro-batches are
        accumulated, and G is run again, or the networks are updated in turn.
        """
        generator, discriminator = self.generator.kept_bytes, self.discriminator.kept_bytes
        if apart:
            return max(2 * discriminator, generator + discriminator)
        return generator + 2 * discriminator

    def update_bytes(self, images: int, *, apart: bool = False, value_bytes: int = VALUE_BYTES) -> int:
        """Return the memory that an update of a process's micro-batch takes at least. Maps have `value_bytes`."""
        return self.state_bytes + images * self.image_bytes(apart=apart) * value_bytes // VALUE_BYTES


def at_most(config: NetworkConfig, images: int) -> int:
    """Return more bytes than an update of `images` images takes, without the second that `footprint` may take."""
    height, width, _ = config.image_shape
    return (
        (16 << 20) + 3000 * max(stage_widths(config)) ** 2 + images * 32 * VALUE_BYTES * height * width * config.width
    )


def footprint(config: NetworkConfig) -> Footprint:
    """Return what the networks of `config` cost. What a label adds is left out: its classes may not be known yet."""
    config = NetworkConfig.model_validate(
        config.model_dump(exclude={"label", "conditioning", "classes", "class_images"})
    )
    height, width, channels = config.image_shape
    with torch.device("meta"):
        z, images = torch.empty(1, config.latent_dim), torch.empty(1, channels, height, width)
        return Footprint(_cost(build_generator(config), z), _cost(build_discriminator(config), images))


def _cost(network: nn.Module, example: Tensor) -> Cost:
    """Return what a network that is on the device `meta` costs for one example of its input."""
    operations: list[int] = []
    kept: dict[int, Any] = {}  # storages, which are one where layers work in place
    weights = {weight.untyped_storage()._cdata for weight in (*network.parameters(), *network.buffers())}

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        positions = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
        operations.append(2 * positions.numel() * math.prod(layer.weight.shape[1:]))

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(example)  # alive until the storages are counted
    assert isinstance(output, Tensor)
    parameters = sum(weight.numel() for weight in network.parameters())
    # A normalized weight is kept too, but once for all images.
    once = sum(layer.weight.nbytes for layer in network.modules() if isinstance(layer, Spectral))
    return Cost(parameters, sum(operations), sum(storage.nbytes() for storage in kept.values()) - once)


def in_words(config: NetworkConfig, images: int, *, alternate: bool = False) -> list[str]:
    """Return lines that say what the networks of `config` cost, with updates of `images` images in one process."""
    found = footprint(config)
    height, width, channels = config.image_shape
    lines = [f"The networks for images of {width}x{height}x{channels}:"]
    for name, cost in (("generator", found.generator), ("discriminator", found.discriminator)):
        lines.append(f"{name}: {cost.parameters:,} parameters, {cost.operations / 1e9:.3g} GFLOP an image")
    operations, image = found.update_operations(alternate=alternate), found.image_bytes(apart=alternate)
    lines.append(
        f"an update of {images:,} images: {images * operations / 1e12:.3g} TFLOP, and in float32 at least "
        f"{found.update_bytes(images, apart=alternate) / 1e9:.3g} GB ({found.state_bytes / 1e9:.2g} GB for weights, "
        f"gradients, moments and the average, {image / 1e6:.3g} MB an image)"
    )
    return lines
