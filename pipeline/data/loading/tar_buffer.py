"""The shards of an indexed data set. They are others' tars, perhaps of gigabytes: no slot holds one in memory."""

from io import FileIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import describe_os_error
from pipeline.data.dataset import Dataset
from pipeline.data.loading.slots import Images, SlotBuffer
from pipeline.data.loading.tar_files import Tars

MOST_OPEN = 256
"""Tars open at once: a process may open 1,024 files, and has others."""


class TarBuffer(SlotBuffer):
    """Tars as open files: an image is read from its tar when a batch needs it. Remote tars lie in the shard cache."""

    rows_kept = False

    def __init__(self, dataset: Dataset, slots: int, cache_dir: Path | None) -> None:
        super().__init__(len(dataset.shards), min(slots, MOST_OPEN))
        self._tars = Tars(dataset, cache_dir)
        self._files: list[FileIO | None] = [None] * self.slots
        assert dataset.index is not None
        self.nbytes = dataset.index.bytes

    def bases(self, shards: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the file descriptors of loaded `shards`."""
        handles = np.array([-1 if file is None else file.fileno() for file in self._files], np.int64)
        return handles[self._slot_of[shards]]

    def copy(self, shards: NDArray[np.int64], rows: NDArray[np.int64], bases: NDArray[np.int64], out: Images) -> None:
        try:
            for shard, row, handle, image in zip(shards.tolist(), rows.tolist(), bases.tolist(), out, strict=True):
                self._tars.decode(shard, row, handle, image)
        except OSError as error:
            raise describe_os_error(error) from error

    def _load(self, shard: int, slot: int) -> None:
        if (old := self._files[slot]) is not None:
            self._files[slot] = None
            old.close()
        self._files[slot] = self._tars.open(shard)


class ResidentTars(SlotBuffer):
    """All images of an indexed data set in memory, decoded once."""

    rows_kept = True

    def __init__(self, dataset: Dataset, cache_dir: Path | None) -> None:
        super().__init__(len(dataset.shards), len(dataset.shards))
        self._tars = Tars(dataset, cache_dir)
        self._starts = np.asarray(dataset.shard_starts, np.int64)
        self._images = np.empty((dataset.images, *dataset.image_shape), np.uint8)
        self.nbytes = self._images.nbytes

    def bases(self, shards: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the index of the first image of each of `shards`."""
        return self._starts[shards]

    def copy(self, shards: NDArray[np.int64], rows: NDArray[np.int64], bases: NDArray[np.int64], out: Images) -> None:
        np.take(self._images, bases + rows, axis=0, out=out, mode="clip")

    def _load(self, shard: int, slot: int) -> None:
        start = int(self._starts[shard])
        with self._tars.open(shard) as file:
            for row in range(self._tars.dataset.shards[shard].images):
                self._tars.decode(shard, row, file.fileno(), self._images[start + row])
