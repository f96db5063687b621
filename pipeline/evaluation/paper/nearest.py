"""Nearest neighbors by brute force: exact, and fast enough for what is looked at."""

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.common.errors import UsageError
from pipeline.common.progress import Progress
from pipeline.evaluation.images import Images, Pixels

Rows = NDArray[np.float32]


class Nearest:
    """Each query's nearest reference so far. References come in pieces, so that memory does not grow with them."""

    def __init__(self, queries: Rows, *, skip_self: bool = False) -> None:
        """With `skip_self` the queries are the first references, and a row is not its own neighbor."""
        self.index = np.full(len(queries), -1)
        """Of the nearest reference, counted over all pieces."""
        self.distance: Rows = np.full(len(queries), np.inf, np.float32)
        """To it: the root mean square of the difference."""
        self.seen = 0
        """References so far."""
        self._queries, self._skip_self = queries, skip_self

    def update(self, references: Rows) -> NDArray[np.int64]:
        """Take in the next references; return the queries that have found a nearer one among them."""
        if not len(references):
            return np.zeros(0, np.int64)
        between = torch.cdist(torch.from_numpy(self._queries), torch.from_numpy(references))
        if self._skip_self:
            own = np.arange(self.seen, min(self.seen + len(references), len(between)))
            between[own, own - self.seen] = torch.inf
        distance, index = (values.numpy() for values in between.min(1))
        distance = distance / np.float32(np.sqrt(self._queries.shape[1]))
        nearer = np.flatnonzero(distance < self.distance)
        self.index[nearer], self.distance[nearer] = self.seen + index[nearer], distance[nearer]
        self.seen += len(references)
        return nearer


def gather(images: Images, what: str) -> Pixels:
    """Return a set whole, in memory."""
    parts = []
    with Progress(what, images.count) as progress:
        for _, pixels in images.blocks():
            parts.append(pixels)
            progress.advance(len(pixels))
    if not parts:
        raise UsageError("no images to compare with")
    return np.concatenate(parts)


def flat(images: Pixels) -> Rows:
    """uint8 (N, H, W, C) -> float32 (N, H*W*C)."""
    return images.reshape(len(images), -1).astype(np.float32)
