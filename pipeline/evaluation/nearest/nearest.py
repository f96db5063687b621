"""Nearest neighbors by brute force: exact, in pieces, so that memory does not grow with the set."""

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.common.errors import UsageError
from pipeline.common.imaging import Pixels
from pipeline.evaluation.images import Images, WithProgress

Rows = NDArray[np.float32]


class Nearest:
    """The nearest reference of each query (N, F) so far; references are given piece by piece."""

    def __init__(self, queries: Rows, *, skip_self: bool = False) -> None:
        """With `skip_self` the first references are the queries themselves, and no row is its own neighbor."""
        self.index = np.full(len(queries), -1)
        """Index of the nearest reference, counted over all pieces."""
        self.distance: Rows = np.full(len(queries), np.inf, np.float32)
        """Root mean square difference to it."""
        self.seen = 0
        """Number of references so far."""
        self.width = queries.shape[1]
        """Numbers of a row."""
        self._queries, self._skip_self = queries, skip_self

    def update(self, references: Rows) -> NDArray[np.int64]:
        """Compare with the next references (M, F); return the queries that have a nearer one among them."""
        if not len(references):
            return np.zeros(0, np.int64)
        between = torch.cdist(torch.from_numpy(self._queries), torch.from_numpy(references))
        if self._skip_self:
            own = np.arange(self.seen, min(self.seen + len(references), len(between)))
            between[own, own - self.seen] = torch.inf
        distance, index = (values.numpy() for values in between.min(1))
        distance = distance / np.float32(np.sqrt(self.width))
        nearer = np.flatnonzero(distance < self.distance)
        self.index[nearer], self.distance[nearer] = self.seen + index[nearer], distance[nearer]
        self.seen += len(references)
        return nearer


def gather(images: Images, what: str) -> Pixels:
    """Return a whole set, in memory; show the progress under the name `what`."""
    parts = [pixels for _, pixels in WithProgress(images, what).blocks()]
    if not parts:
        raise UsageError("no images to compare with")
    return np.concatenate(parts)


def flat(images: Pixels) -> Rows:
    """uint8 (N, H, W, C) -> float32 (N, H*W*C)."""
    return images.reshape(len(images), -1).astype(np.float32)
