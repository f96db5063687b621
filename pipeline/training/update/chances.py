"""The random numbers of an update beyond z, from position: what flips and augments each image."""

from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.common.randomness import Purpose
from pipeline.model.latents import latents
from pipeline.training.update.augment import VALUES

if TYPE_CHECKING:
    from pipeline.config import RecipeConfig


class Use(IntEnum):
    """For which pass through D an image is augmented. Each has numbers of its own. Never renumber."""

    REAL = 0
    FAKE = 1
    FAKE_OF_GENERATOR = 2
    REAL_OF_GENERATOR = 3


def values_of(recipe: "RecipeConfig") -> dict[Purpose, int]:
    """Return how many random numbers an image needs for each purpose, in the order of their columns."""
    wanted = {Purpose.FLIP: int(recipe.flips), Purpose.AUGMENT: len(Use) * VALUES if recipe.augment else 0}
    return {purpose: values for purpose, values in wanted.items() if values}


def draw_chances(recipe: "RecipeConfig", position: int, rank: int, world_size: int) -> NDArray[np.float32]:
    """Return the numbers of this rank's images in the update at `position`: float32 (batch / world_size, values).

    They are uniform in [-1, 1]. Those of image i of a run are a pure function of (seed, purpose, i).
    """
    rows = slice(rank, None, world_size)
    wanted = values_of(recipe).items()
    drawn = [latents(recipe.seed, purpose, position, recipe.batch, values, rows=rows) for purpose, values in wanted]
    return np.concatenate(drawn, axis=1)


def flip(pixels: Tensor, chances: Tensor) -> Tensor:
    """Return pixels (N, H, W, C) of which those with a chance (N,) below 0 are mirrored, left to right."""
    return torch.where((chances < 0)[:, None, None, None], pixels.flip(2), pixels)
