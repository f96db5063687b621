"""Images to be judged: uint8 NHWC blocks that can be read again and again, the same each time."""

import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pipeline.data.dataset import Dataset
    from pipeline.model.networks import Generator

BLOCK = 128
"""Images handled at once. Fixed, because sums are made block by block: results do not depend on who made them."""

Pixels = NDArray[np.uint8]


class Images(Protocol):
    """A set of equally large images, read in blocks of BLOCK (the last may be shorter)."""

    @property
    def count(self) -> int:
        """Images in the set."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""

    def blocks(self, rank: int = 0, size: int = 1) -> Iterator[tuple[int, Pixels]]:
        """Yield (b, uint8 (n, height, width, channels)) for the blocks b = rank mod size, the same at every call."""


class ArrayImages:
    """Images that are held in memory."""

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

    def blocks(self, rank: int = 0, size: int = 1) -> Iterator[tuple[int, Pixels]]:
        for block in range(rank, num_blocks(self.count), size):
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
    """The first `limit` images of a data set (its order is random), read from its shards at every pass."""

    def __init__(self, dataset: "Dataset", limit: int | None = None) -> None:
        self.dataset = dataset
        self.count = dataset.images if limit is None else min(limit, dataset.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.dataset.image_size, self.dataset.image_size, self.dataset.channels

    def blocks(self, rank: int = 0, size: int = 1) -> Iterator[tuple[int, Pixels]]:
        from pipeline.data.shard_reader import iterate

        whole = first(rebatch(iterate(self.dataset)), self.count)
        return ((block, pixels) for block, pixels in enumerate(whole) if block % size == rank)


class GeneratedImages:
    """Samples `0` to `count` of a generator, made once and kept in a temporary file: memory stays flat."""

    def __init__(self, generator: "Generator", count: int, seed: int) -> None:
        config = generator.config
        self.count = count
        self.seed = seed
        self.shape = (config.image_size, config.image_size, config.channels)
        self._generator = generator
        self._kept: dict[tuple[int, int], IO[bytes]] = {}

    def blocks(self, rank: int = 0, size: int = 1) -> Iterator[tuple[int, Pixels]]:
        from pipeline.common.randomness import Purpose
        from pipeline.model.sampling import sample

        kept = self._kept.get((rank, size))
        file = kept or tempfile.TemporaryFile(prefix="dcgan-eval-")  # noqa: SIM115  lives as long as this object
        file.seek(0)
        for block in range(rank, num_blocks(self.count), size):
            number = min(BLOCK, self.count - block * BLOCK)
            if kept is None:
                pixels = sample(self._generator, self.seed, Purpose.EVALUATE, block * BLOCK, number)
                file.write(pixels.tobytes())
            else:
                data = file.read(number * int(np.prod(self.shape)))
                pixels = np.frombuffer(data, np.uint8).reshape(number, *self.shape)
            yield block, pixels
        self._kept[rank, size] = file


class Watched:
    """Images that show how far each pass over them is."""

    def __init__(self, images: Images, what: str) -> None:
        self.images = images
        self.what = what
        self.count = images.count
        self.shape = images.shape

    def blocks(self, rank: int = 0, size: int = 1) -> Iterator[tuple[int, Pixels]]:
        from pipeline.common.progress import Progress

        with Progress(self.what, -(-self.count // size)) as progress:
            for block, pixels in self.images.blocks(rank, size):
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
