"""Sets of images to evaluate: uint8 NHWC blocks that can be read repeatedly and are the same at every pass."""

import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, Protocol

import numpy as np

from pipeline.common.imaging import Pixels
from pipeline.common.progress import Progress
from pipeline.common.randomness import Purpose
from pipeline.data.dataset import Dataset
from pipeline.model.networks import Generator
from pipeline.model.sampling import sample

BLOCK = 128
"""Images of a block. Fixed, because sums are made block by block: so a result does not depend on the ranks."""


class Images(Protocol):
    """A set of images of one size, read in blocks of BLOCK (the last may be shorter)."""

    @property
    def count(self) -> int:
        """Images in the set."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""

    def blocks(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, Pixels]]:
        """Yield (b, uint8 (n, height, width, channels)) of every block b with b % world_size == rank, at every call."""


class ArrayImages:
    """A set in memory: uint8 (N, H, W, C)."""

    def __init__(self, images: Pixels) -> None:
        assert images.dtype == np.uint8
        assert images.ndim == 4
        self.images = images

    @property
    def count(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def blocks(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, Pixels]]:
        for block in range(rank, num_blocks(self.count), world_size):
            yield block, self.images[block * BLOCK : (block + 1) * BLOCK]


def num_blocks(count: int) -> int:
    """Return how many blocks `count` images make."""
    return -(-count // BLOCK)


def rebatch(batches: Iterable[Pixels], size: int = BLOCK) -> Iterator[Pixels]:
    """Cut or join consecutive batches into blocks of exactly `size` images; the last may be shorter."""
    held: list[Pixels] = []
    have = 0
    for batch in batches:
        rest = batch
        while have + len(rest) >= size:
            cut = size - have
            yield np.concatenate([*held, rest[:cut]]) if held else rest[:cut]
            held, have, rest = [], 0, rest[cut:]
        if len(rest):
            held.append(rest)
            have += len(rest)
    if held:
        yield np.concatenate(held)


class ShardImages:
    """`limit` images of a data set, read at every pass: those that `iterate` takes, the same always."""

    def __init__(self, dataset: "Dataset", limit: int | None = None) -> None:
        self.dataset = dataset
        self.count = dataset.images if limit is None else min(limit, dataset.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.dataset.image_shape

    def blocks(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, Pixels]]:
        from pipeline.data.shard_reader import iterate

        whole = rebatch(iterate(self.dataset, limit=self.count))
        return ((block, pixels) for block, pixels in enumerate(whole) if block % world_size == rank)


class GeneratedImages:
    """Samples 0 to `count` - 1 of a generator, made once and kept in a temporary file, so that memory stays flat."""

    def __init__(self, generator: Generator, count: int, seed: int) -> None:
        config = generator.config
        self.count = count
        self.seed = seed
        self.shape = config.image_shape
        self._generator = generator
        self._kept: dict[tuple[int, int], IO[bytes]] = {}

    def blocks(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, Pixels]]:
        kept = self._kept.get((rank, world_size))
        file = kept or tempfile.TemporaryFile(prefix="dcgan-eval-")  # noqa: SIM115  lives as long as this object
        file.seek(0)
        for block in range(rank, num_blocks(self.count), world_size):
            number = min(BLOCK, self.count - block * BLOCK)
            if kept is None:
                pixels = sample(self._generator, self.seed, Purpose.EVALUATE, block * BLOCK, number)
                file.write(pixels.tobytes())
            else:
                data = file.read(number * int(np.prod(self.shape)))
                pixels = np.frombuffer(data, np.uint8).reshape(number, *self.shape)
            yield block, pixels
        self._kept[rank, world_size] = file


class Subset:
    """Every `step`-th image of a set from `offset` on, `count` of them."""

    def __init__(self, images: Images, offset: int, step: int, count: int) -> None:
        assert BLOCK % step == 0  # so that every block begins at the same place
        assert offset + (count - 1) * step < images.count
        self.images = images
        self.offset = offset
        self.step = step
        self.count = count
        self.shape = images.shape

    def blocks(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, Pixels]]:
        chosen = rebatch(pixels[self.offset :: self.step] for _, pixels in self.images.blocks())
        return ((block, pixels) for block, pixels in enumerate(first(chosen, self.count)) if block % world_size == rank)


class WithProgress:
    """A set that shows the progress of each pass over it, under the name `what`."""

    def __init__(self, images: Images, what: str) -> None:
        self.images = images
        self.what = what
        self.count = images.count
        self.shape = images.shape

    def blocks(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, Pixels]]:
        with Progress(self.what, -(-self.count // world_size)) as progress:
            for block, pixels in self.images.blocks(rank, world_size):
                yield block, pixels
                progress.advance(len(pixels))


def first(blocks: Iterable[Pixels], count: int) -> Iterator[Pixels]:
    """Yield the first `count` images of `blocks`."""
    left = count
    for block in blocks:
        if left <= 0:
            return
        yield block[:left]
        left -= len(block)
