"""Nearest neighbours by brute force: exact, and fast enough for what is looked at."""

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.evaluation.images import Images, Pixels
from pipeline.progress import Progress

Rows = NDArray[np.float32]


def nearest(queries: Rows, references: Rows, *, skip_self: bool = False) -> tuple[NDArray[np.int64], Rows]:
    """Return the index and distance (root mean square) of each query's nearest reference.

    With `skip_self`, queries and references are the same rows and a row is not its own neighbour.
    """
    q, r = torch.from_numpy(queries), torch.from_numpy(references)
    indices, distances = [], []
    for start in range(0, len(q), 256):
        part = torch.cdist(q[start : start + 256], r)
        if skip_self:
            part[torch.arange(len(part)), torch.arange(start, start + len(part))] = torch.inf
        distance, index = part.min(1)
        indices.append(index)
        distances.append(distance)
    scale = np.sqrt(queries.shape[1])
    return np.asarray(torch.cat(indices).numpy()), np.asarray(torch.cat(distances).numpy() / scale, np.float32)


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
