"""The interface of every sampler: z in, uint8 images out, in blocks of one fixed size."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from export.format.rows import Labels, label_width, rows_at, with_labels
from pipeline.common.errors import UsageError
from pipeline.common.randomness import Purpose
from pipeline.config import NetworkConfig

BATCH_ON_CPU = 64
BATCH_ON_GPU = 256


class Sampler(ABC):
    """A generator ready to run.

    The device always sees blocks of exactly `batch` rows of z; the last one is padded. `sample_range` keeps image i
    in row i mod `batch` of its block. So the same model, backend, device and batch size give the same bytes, however
    a range of images is cut.
    """

    backend: str
    """Name of the backend."""
    device: str
    """`cpu`, or the name of the GPU."""
    provider: str
    """What runs the graph inside the backend, for example CPUExecutionProvider."""
    chosen_because = ""
    """Why `auto` took this backend, where a table of speeds decided."""
    works_ahead = False
    """Whether `stream` keeps several blocks in flight."""

    def __init__(self, network: NetworkConfig, batch: int, model_sha256: str) -> None:
        self.batch = batch
        self.model_sha256 = model_sha256
        self.image_size = network.image_size
        self.image_shape = network.image_shape
        self.latent_dim = network.latent_dim
        self.latent_distribution = network.latent_distribution
        self.network = network
        self.row_dim = network.latent_dim + label_width(network)
        """Values in a row of the blocks of `stream`: those of z, and of a label behind it."""

    @abstractmethod
    def _run(self, rows: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return the images uint8 (batch, H, W, C) of exactly `batch` rows (row_dim), an array of their own."""

    def stream(self, blocks: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.uint8]]:
        """Yield the images of each block of at most `batch` rows (row_dim), in arrays that the caller may keep.

        A GPU works ahead of the consumer, so that copies and arithmetic overlap.
        """
        for z in blocks:
            yield self._run(self._pad(z))[: len(z)]

    def sample(self, z: NDArray[np.float32], labels: Labels | None = None) -> NDArray[np.uint8]:
        """Return uint8 images (N, H, W, C) of z float32 (N, latent_dim), for any N.

        A conditional model needs labels: a name for all, such as `7` or `male+eyeglasses`, or for each row of z a name,
        the number of its class, or the values of several labels (N, labels).
        """
        rows = with_labels(self.network, z, labels)
        starts = range(0, len(rows), self.batch)
        images = list(self.stream(rows[start : start + self.batch] for start in starts))
        return np.concatenate(images) if images else np.empty((0, *self.image_shape), np.uint8)

    def sample_range(
        self, seed: int, start: int, count: int, purpose: Purpose = Purpose.SAMPLE
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yield (index of the first image, images) over [start, start + count), one block at a time.

        Image i is always row i mod `batch` of block i // `batch`, whatever the range. A conditional model's labels are
        drawn as in training.
        """
        if count <= 0:
            return
        blocks = range(start // self.batch, (start + count - 1) // self.batch + 1)
        rows = (rows_at(self.network, seed, purpose, block * self.batch, self.batch) for block in blocks)
        for block, images in zip(blocks, self.stream(rows), strict=True):
            first = block * self.batch
            low, high = max(start - first, 0), min(start + count - first, self.batch)
            yield first + low, images[low:high]

    def time_launches(self, count: int) -> list[float]:
        """Return `count` times that the device took for a block, in seconds, without copies; none on the CPU."""
        return []

    def close(self) -> None:  # noqa: B027  most backends have nothing to close
        """Free the device memory and threads that the sampler holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _pad(self, z: NDArray[np.float32]) -> NDArray[np.float32]:
        if z.ndim != 2 or z.shape[1] != self.row_dim or len(z) > self.batch:
            raise UsageError(f"z of shape {z.shape}: expected at most {self.batch} rows of {self.row_dim} values")
        block = np.zeros((self.batch, self.row_dim), np.float32)
        block[: len(z)] = z
        return block
