"""z to images to bytes: how every sample of a PyTorch generator is made."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.common.imaging import PIXEL_OFFSET, PIXEL_SCALE, Pixels
from pipeline.common.randomness import Purpose
from pipeline.model.labels import generator_inputs, label_values
from pipeline.model.latents import latents

if TYPE_CHECKING:
    from pipeline.model.networks import Generator

BLOCK = 64
"""Images that the generator makes at once."""
GRID_CLASSES, GRID_COLUMNS = 16, 8
"""Rows and columns of the grid of a conditional generator."""


def to_uint8(images: Tensor) -> Tensor:
    """Images (N, C, H, W) float in [-1, 1] -> (N, H, W, C) uint8: x * 127.5 + 128, clamped, truncated.

    Permuted first and cast last: TensorRT takes uint8 as a network's output only.
    """
    scaled = images.float().permute(0, 2, 3, 1) * PIXEL_SCALE + PIXEL_OFFSET
    return scaled.clamp(0.0, 255.0).to(torch.uint8)


def to_float(
    pixels: Tensor, dtype: torch.dtype = torch.float32, memory_format: torch.memory_format = torch.channels_last
) -> Tensor:
    """Pixels (N, H, W, C) uint8 -> images (N, C, H, W) in [-1, 1], on the same device."""
    images = pixels.permute(0, 3, 1, 2).to(dtype).div_(PIXEL_SCALE).sub_(1.0)
    return images.contiguous(memory_format=memory_format)


@torch.no_grad()
def images_of(generator: "Generator", z: NDArray[np.float32], *label: NDArray[np.float32]) -> Pixels:
    """Return the images of z (N, latent_dim) by a generator in eval mode: uint8 (N, height, width, channels).

    One that reads a label needs it too, (N, label_dim).
    """
    device = next(generator.parameters()).device
    images = [torch.empty(0, *generator.config.image_shape, dtype=torch.uint8)]
    for start in range(0, len(z), BLOCK):
        blocks = [np.ascontiguousarray(values[start : start + BLOCK], np.float32) for values in (z, *label)]
        images.append(to_uint8(generator(*(torch.from_numpy(block).to(device) for block in blocks))).cpu())
    return torch.cat(images).numpy()


def sample(generator: "Generator", seed: int, purpose: Purpose, start: int, count: int) -> Pixels:
    """Return samples `start` to `start + count` of an eval-mode generator, uint8 (count, height, width, channels).

    Their labels are drawn as in training.
    """
    return images_of(generator, *generator_inputs(generator.config, seed, purpose, start, count))


def class_grid(generator: "Generator", seed: int) -> list[tuple[str, Pixels]]:
    """Return rows of (class, samples of it) of an eval-mode generator, which share their z from row to row.

    Of more than GRID_CLASSES classes, those with the most training images.
    """
    config = generator.config
    order = np.argsort(-np.asarray(config.class_images, np.int64), kind="stable")
    shown = np.sort(order[:GRID_CLASSES])
    z = latents(seed, Purpose.GRID, 0, GRID_COLUMNS, config.latent_dim, config.latent_distribution)
    labels = label_values(config, np.repeat(shown, GRID_COLUMNS))
    images = images_of(generator, np.tile(z, (len(shown), 1)), labels)
    rows = np.split(images, len(shown))
    return [(config.class_titles[index], row) for index, row in zip(shown.tolist(), rows, strict=True)]
