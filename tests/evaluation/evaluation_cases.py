"""What several tests of the evaluation need: the outcome of a command, and images that nobody holds."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.images import BLOCK, num_blocks


@dataclass(frozen=True)
class Outcome:
    """What a user sees of a command."""

    code: int
    out: str
    err: str


class Unheld:
    """A set of pictures that are made when they are read: whoever holds all of them shows in memory."""

    def __init__(self, count: int, size: int = 32) -> None:
        self.count = count
        self.shape = (size, size, 3)

    def blocks(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        for block in range(rank, num_blocks(self.count), world_size):
            number = min(BLOCK, self.count - block * BLOCK)
            yield block, np.random.default_rng(block).integers(0, 256, (number, *self.shape), np.uint8)
