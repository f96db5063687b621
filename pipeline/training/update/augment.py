"""DiffAugment (Zhao et al. 2020): the same kinds of random, differentiable change for what is real and what is fake."""

import torch
from torch import Tensor
from torch.nn.functional import pad

VALUES = 7
"""Random numbers that one image needs for one pass through D, whatever the kinds."""
TRANSLATION = 1 / 8
"""The farthest shift, as a share of the size."""
CUTOUT = 1 / 2
"""The side of the square that is cut out, as a share of the size."""


def augment(images: Tensor, chances: Tensor, kinds: str) -> Tensor:
    """Return images (N, C, H, W) in [-1, 1], changed by the `kinds`, a comma-separated list; "" changes nothing.

    chances (N, VALUES) are in [-1, 1]. Constants and ranges are those of the authors' code. The result can be
    differentiated twice by the images, and is computed by a fixed list of operations of the device.
    """
    wanted = kinds.split(",")
    if "color" in wanted:
        images = _color(images, chances[:, :3])
    if "translation" in wanted:
        images = _translate(images, chances[:, 3:5])
    if "cutout" in wanted:
        images = _cut_out(images, chances[:, 5:7])
    return images


def _color(images: Tensor, chances: Tensor) -> Tensor:
    """Add up to 1/2; scale the distance to gray by 0 to 2, and that to the image's mean by 1/2 to 3/2."""
    brightness, saturation, contrast = chances[:, :, None, None, None].unbind(1)
    images = images + brightness / 2
    gray = images.mean(1, keepdim=True)
    images = (images - gray) * (saturation + 1) + gray
    level = images.mean((1, 2, 3), keepdim=True)
    return (images - level) * (contrast / 2 + 1) + level


def _translate(images: Tensor, chances: Tensor) -> Tensor:
    """Shift by whole pixels, up or down and left or right; what comes in is 0."""
    size = images.shape[-1]
    farthest = int(size * TRANSLATION + 0.5)
    places = torch.arange(size, device=images.device)
    rows, columns = (_choose(chances, 2 * farthest + 1)[:, :, None] + places).unbind(1)  # in the padded image
    index = torch.arange(len(images), device=images.device)
    padded = pad(images, [farthest] * 4).permute(0, 2, 3, 1)
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cut_out(images: Tensor, chances: Tensor) -> Tensor:
    """Set a square to 0, whose middle is anywhere in the image."""
    size = images.shape[-1]
    side = int(size * CUTOUT + 0.5)
    first = _choose(chances, size + 1 - side % 2) - side // 2
    distance = torch.arange(size, device=images.device) - first[:, :, None]
    rows, columns = ((distance >= 0) & (distance < side)).unbind(1)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def _choose(chances: Tensor, count: int) -> Tensor:
    """Return integers in [0, count), equally likely, from numbers that are uniform in [-1, 1]."""
    return ((chances + 1) * (count / 2)).long().clamp(max=count - 1)
