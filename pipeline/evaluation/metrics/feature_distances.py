"""Fréchet and kernel distance, Inception score, precision and recall, of features that are already extracted.

torchmetrics computes the kernel distance and the Inception score; the Fréchet distance is computed here in float64.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.common.errors import UsageError

NEIGHBORS = 3
"""A point is inside a manifold when it is within the distance of some point of it to that point's third neighbor."""
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1_000
IS_SPLITS = 10
ROWS = 128
"""Features whose distances to all others are held at once."""


@dataclass
class Moments:
    """Sum, sum of outer products and number of feature vectors, float64: they add up over blocks and ranks."""

    total: NDArray[np.float64]
    outer: NDArray[np.float64]
    count: int

    @classmethod
    def of(cls, features: NDArray[np.float32]) -> "Moments":
        """Return the moments of features (N, F)."""
        rows = features.astype(np.float64)
        return cls(rows.sum(0), rows.T @ rows, len(rows))

    @property
    def mean(self) -> NDArray[np.float64]:
        return np.asarray(self.total / self.count)

    @property
    def covariance(self) -> NDArray[np.float64]:
        return np.asarray((self.outer - self.count * np.outer(self.mean, self.mean)) / (self.count - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return |μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½) (Heusel et al. 2017), in float64.

    The trace of the root is the sum of the roots of the eigenvalues of Σa^½ Σb Σa^½, which is symmetric: no
    complex numbers appear, however near to singular the matrices are.
    """
    for moments in (a, b):
        if moments.count < 2:
            raise UsageError(f"a Fréchet distance of {moments.count} images has no covariance: expected at least 2")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ b.covariance @ root)
    trace = 2 * np.sqrt(np.maximum(inner, 0)).sum()
    distance = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - trace
    return float(distance)


class _Identity(nn.Module):
    """The extractor that torchmetrics expects, for features that are already extracted."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def kernel_distance(a: NDArray[np.float32], b: NDArray[np.float32], seed: int) -> tuple[float, float]:
    """Return mean and deviation of the polynomial MMD² over random subsets (Binkowski et al. 2018)."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(KID_SUBSET_SIZE, len(a), len(b))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics warns that it keeps features in memory
        metric = KernelInceptionDistance(_Identity(a.shape[1]), subsets=KID_SUBSETS, subset_size=size)
    metric.update(torch.from_numpy(a), real=True)
    metric.update(torch.from_numpy(b), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def inception_score(probabilities: NDArray[np.float32], seed: int) -> tuple[float, float]:
    """Return mean and deviation over splits of exp(E KL(p(y|x) | p(y))) (Salimans et al. 2016)."""
    from torchmetrics.image.inception import InceptionScore

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics warns that it keeps features in memory
        metric = InceptionScore(_Identity(probabilities.shape[1]), splits=IS_SPLITS)
    metric.update(torch.from_numpy(np.log(np.maximum(probabilities, 1e-30))))  # torchmetrics applies a softmax
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def precision_recall(reals: NDArray[np.float32], fakes: NDArray[np.float32]) -> tuple[float, float]:
    """Return the share of samples inside the manifold of the data, and of data inside that of the samples.

    Features (N, F). After Kynkäänniemi et al. 2019.
    """
    for name, features in (("real images", reals), ("samples", fakes)):
        if len(features) <= NEIGHBORS:
            raise UsageError(f"precision and recall of {len(features)} {name}: expected more than {NEIGHBORS}")
    return _covered(fakes, reals), _covered(reals, fakes)


def _covered(points: NDArray[np.float32], manifold: NDArray[np.float32]) -> float:
    """Return the share of `points` within the radius of some point of `manifold`: its third neighbor's distance."""
    a, b = (torch.from_numpy(x) for x in (points, manifold))
    radii = torch.cat([torch.cdist(part, b).kthvalue(NEIGHBORS + 1).values for part in _pieces(b)])
    inside = [(torch.cdist(part, b) <= radii).any(1) for part in _pieces(a)]
    return float(torch.cat(inside).float().mean())


def _pieces(rows: Tensor) -> list[Tensor]:
    return [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
