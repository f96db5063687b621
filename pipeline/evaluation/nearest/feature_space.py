"""Images as directions of their features, which are compared by cosine distance: 1 - the cosine of their angle.

The length of a feature vector grows with an image's contrast and brightness, and Euclidean distance counts that; its
direction does so less. Bai et al. 2021 ("On Training Sample Memorization") compare samples with training images so.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.common.imaging import Pixels
from pipeline.evaluation.images import BLOCK
from pipeline.evaluation.metrics.extractors import Extractor
from pipeline.evaluation.nearest.nearest import Nearest, Rows

DISTANCE = "cosine, of the extractor's features"


class FeatureSpace:
    """The directions of an extractor's features, as rows whose Euclidean distance has the order of the cosine's."""

    def __init__(self, extractor: Extractor, some: Pixels) -> None:
        """`some` are real images (N, H, W, C); the mean of their directions is the origin."""
        self._extractor = extractor
        self._origin = np.zeros((), np.float32)
        # Distances do not change, and float32 keeps its digits for what differs.
        self._origin = self.rows(some).mean(0, dtype=np.float64).astype(np.float32)

    def rows(self, images: Pixels) -> Rows:
        """Images uint8 (N, H, W, C) -> float32 (N, F): unit vectors, seen from the origin."""
        starts = range(0, len(images), BLOCK)
        features = [self._extractor.extract(images[start : start + BLOCK]).features for start in starts]
        found = np.concatenate(features).astype(np.float64)
        lengths = np.maximum(np.linalg.norm(found, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        return np.asarray(found / lengths - self._origin, np.float32)


def cosine_distances(search: Nearest) -> NDArray[np.float64]:
    """Return the cosine distance (N,) of each query to its nearest reference, of a search among such rows."""
    return np.asarray(search.distance.astype(np.float64) ** 2 * search.width / 2)
