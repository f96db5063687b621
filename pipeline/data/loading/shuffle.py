"""The shuffle: which image is number i of a run, by arithmetic alone. Reads no shard.

See docs/architecture.md, contract 3.

Image i of a run belongs to stream s = i mod S, at offset o = i div S. Epoch e = o div L, with L = floor(N / S),
orders the N images anew. Stream s reads the positions s*L to (s+1)*L of that order; the last N - S*L positions
are not read. An order is a permutation of the shards, cut into blocks of k (`recipe.mix_shards`; the last may have
fewer), and a permutation of the images inside each block. So a stream draws from k shards at once.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.common.division import batch_refusal, ranks_refusal
from pipeline.common.errors import ConfigConflict
from pipeline.common.randomness import Purpose, permutation
from pipeline.data.dataset import Dataset

Indices = NDArray[np.int64]


class Visit(NamedTuple):
    """From `offset` on, `stream` reads images of the block of `shards`."""

    offset: int
    stream: int
    shards: tuple[int, ...]


class _Epoch(NamedTuple):
    """An epoch's order: its shards, the position at which each begins, and the positions at which the blocks begin.

    Both lists of positions have the total at the end.
    """

    shards: Indices
    shard_positions: Indices
    block_positions: Indices


class Shuffle:
    """The order of a run's images, for shards of `shard_images` images each. There are at least `streams` images.

    `mix` is the number of shards whose images are shuffled together.
    """

    def __init__(
        self, shard_images: Sequence[int] | NDArray[np.integer[Any]], *, seed: int, streams: int, mix: int = 1
    ) -> None:
        self.sizes = np.asarray(shard_images, np.int64)
        self.shard_starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.seed = seed
        self.streams = streams
        self.mix = mix
        self.images = int(self.sizes.sum())
        self.range_images = self.images // streams
        assert self.range_images > 0, "check_division comes first"
        # A batch may span two epochs, so two are in use; a stream is in one block, or between two.
        self._epoch = lru_cache(maxsize=4)(self._order_shards)
        self._inside = lru_cache(maxsize=4 * streams)(self._order_images)

    def _order_shards(self, epoch: int) -> _Epoch:
        shards = self._permutation(len(self.sizes), Purpose.SHARD_ORDER, epoch)
        positions = np.concatenate([[0], np.cumsum(self.sizes[shards])])
        return _Epoch(shards, positions, np.append(positions[: -1 : self.mix], positions[-1]))

    def _order_images(self, epoch: int, first_shard: int, images: int) -> Indices:
        """Return the order of the `images` of the block that begins with `first_shard`."""
        # Epochs and shards both stay far below 2^32, so that no two pairs share a lane.
        return self._permutation(images, Purpose.IMAGE_ORDER, (epoch << 32) | first_shard)

    def _permutation(self, count: int, purpose: Purpose, lane: int) -> Indices:
        return permutation(count, self.seed, purpose, lane=lane)

    def locate(self, images: Indices) -> tuple[Indices, Indices]:
        """Return the shard of each image of the run, and its row inside that shard; int64, shaped like `images`."""
        stream, offset = images % self.streams, images // self.streams
        epochs, within = offset // self.range_images, offset % self.range_images
        position = stream * self.range_images + within
        shards, rows = np.empty_like(position), np.empty_like(position)
        for epoch in np.unique(epochs).tolist():
            here = np.flatnonzero(epochs == epoch)
            order, starts, _ = self._epoch(epoch)
            unmixed = self._unmix(epoch, position[here])
            rank = np.searchsorted(starts, unmixed, side="right") - 1
            shards[here], rows[here] = order[rank], unmixed - starts[rank]
        return shards, rows

    def _unmix(self, epoch: int, position: Indices) -> Indices:
        """Return the images at `position` of an epoch's order as positions in its shards, one after another."""
        order, _, starts = self._epoch(epoch)
        blocks = np.searchsorted(starts, position, side="right") - 1
        unmixed = np.empty_like(position)
        for block in np.unique(blocks).tolist():
            inside, start = blocks == block, int(starts[block])
            permuted = self._inside(epoch, int(order[block * self.mix]), int(starts[block + 1]) - start)
            unmixed[inside] = start + permuted[position[inside] - start]
        return unmixed

    def ids(self, images: Indices) -> Indices:
        """Return the index of each image of the run in the data set's own order, int64."""
        shards, rows = self.locate(images)
        return self.shard_starts[shards] + rows

    def comes_back(self, offset: int, end: int) -> bool:
        """Whether what a stream reads at `offset` can be read again, in the next epoch, by a run up to offset `end`."""
        return (offset // self.range_images + 1) * self.range_images < end

    def visits(self, stream: int, offset: int) -> Iterator[Visit]:
        """Yield, endlessly, each block that `stream` enters from `offset` on, with the offset where it enters."""
        while True:
            epoch, within = divmod(offset, self.range_images)
            order, _, starts = self._epoch(epoch)
            position, end = stream * self.range_images + within, (stream + 1) * self.range_images
            block = int(np.searchsorted(starts, position, side="right")) - 1
            while position < end:
                yield Visit(offset, stream, tuple(order[block * self.mix : (block + 1) * self.mix].tolist()))
                block += 1
                offset, position = offset + int(starts[block]) - position, int(starts[block])
            offset = (epoch + 1) * self.range_images


class InOrder(Shuffle):
    """The data set's own order, as one stream: for whoever reads all of it."""

    def __init__(self, shard_images: Sequence[int] | NDArray[np.integer[Any]]) -> None:
        super().__init__(shard_images, seed=0, streams=1)

    def _permutation(self, count: int, purpose: Purpose, lane: int) -> Indices:
        return np.arange(count)

    def comes_back(self, offset: int, end: int) -> bool:
        """Always: the other ranks of this machine and the next start of the run read the same shards."""
        return True


def image_ids(dataset: Dataset, seed: int, streams: int, start: int, count: int, *, mix: int = 1) -> Indices:
    """Return the data-set indices of images `start` to `start + count` of a run, int64: contract 3 as a function."""
    check_division(streams, streams, 1, dataset.images)
    shuffle = Shuffle(dataset.shards.images, seed=seed, streams=streams, mix=mix)
    return shuffle.ids(np.arange(start, start + count, dtype=np.int64))


def check_division(batch: int, streams: int, world_size: int, images: int) -> None:
    """Raise ConfigConflict, with the nearest numbers that work, unless all of them divide."""
    if refusal := batch_refusal(batch, streams):
        raise ConfigConflict(refusal)
    if images < streams:
        near = max(count for count in range(1, images + 1) if batch % count == 0)
        raise ConfigConflict(
            f"recipe.streams={streams} is more than the {images} images of the data set; "
            f"the most that work for recipe.batch={batch}: {near}"
        )
    if refusal := ranks_refusal(world_size, streams):
        raise ConfigConflict(refusal)
