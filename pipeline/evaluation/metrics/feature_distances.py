"""Fréchet and kernel distance, Inception score, precision and recall, of features that are already extracted.

torchmetrics computes the kernel distance; the others are computed here, in float64 where digits would be lost.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.common.errors import UsageError

NEIGHBORS = 3
"""A point is inside a manifold when it is within the distance of some point of it to that point's third neighbor."""
DENSITY_NEIGHBORS = 5
"""The same for density and coverage; the number that their authors recommend."""
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1_000
IS_SPLITS = 10
IS_SMALLEST_SPLIT = 10
"""Images of a split; the score of a single image is 1, whatever it shows."""
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

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.total + other.total, self.outer + other.outer, self.count + other.count)

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


def extrapolate(counts: Sequence[int], distances: Sequence[float]) -> float:
    """Return the Fréchet distance that infinitely many samples would have, from those of growing numbers of them.

    The bias falls with 1/N, so it is the intercept of a line through the distances over 1/N (Chong and Forsyth 2020,
    "Effectively Unbiased FID and Inception Score"). At least two.
    """
    _, intercept = np.polyfit([1 / count for count in counts], distances, 1)
    return float(intercept)


def inception_score(probabilities: NDArray[np.float32], splits: int = IS_SPLITS) -> tuple[float, float]:
    """Return mean and population deviation over splits of exp(E KL(p(y|x) | p(y))) (Salimans et al. 2016).

    `probabilities` (N, classes). The splits are consecutive, hold all images, and differ by one at most.
    Raises UsageError for fewer than IS_SMALLEST_SPLIT images a split.
    """
    require_enough(len(probabilities), splits)
    scores = []
    for part in np.array_split(probabilities.astype(np.float64), splits):
        known = np.maximum(part, np.finfo(np.float64).tiny)  # 0 log 0 = 0
        marginal = np.maximum(part.mean(0), np.finfo(np.float64).tiny)
        scores.append(np.exp((part * (np.log(known) - np.log(marginal))).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def require_enough(images: int, splits: int = IS_SPLITS) -> None:
    """Raise UsageError when an Inception score of so few images would say nothing."""
    if images < splits * IS_SMALLEST_SPLIT:
        raise UsageError(
            f"an Inception score of {images} images says nothing: expected at least {splits * IS_SMALLEST_SPLIT} "
            f"({splits} splits); 50,000 are customary (--count)"
        )


@dataclass(frozen=True)
class Overlap:
    """How the features of samples and of real images overlap."""

    precision: float
    """Share of the samples inside the manifold of the real images (Kynkäänniemi et al. 2019)."""
    recall: float
    """Share of the real images inside the manifold of the samples."""
    density: float
    """Mean number of real images' spheres that hold a sample, over the number of neighbors (Naeem et al. 2020)."""
    coverage: float
    """Share of the real images whose sphere holds a sample."""


def overlap(reals: NDArray[np.float32], fakes: NDArray[np.float32]) -> Overlap:
    """Return precision, recall, density and coverage of features (N, F). Raises UsageError for too few of them."""
    for name, features in (("real images", reals), ("samples", fakes)):
        if len(features) <= DENSITY_NEIGHBORS:
            raise UsageError(f"precision and recall of {len(features)} {name}: expected more than {DENSITY_NEIGHBORS}")
    # Distances do not change, and float32 keeps its digits for what differs.
    center = reals.mean(0, dtype=np.float64)
    a, b = (torch.from_numpy((rows - center).astype(np.float32)) for rows in (reals, fakes))
    radii_a, radii_b = _radii(a), _radii(b)
    inside = [_inside(part, a, radii_a[NEIGHBORS]) for part in _pieces(b)]
    held = [_inside(part, b, radii_b[NEIGHBORS]) for part in _pieces(a)]
    spheres = [_inside(part, a, radii_a[DENSITY_NEIGHBORS]) for part in _pieces(b)]
    return Overlap(
        precision=_share([part.any(1) for part in inside]),
        recall=_share([part.any(1) for part in held]),
        density=sum(float(part.sum(dtype=torch.float64)) for part in spheres) / (DENSITY_NEIGHBORS * len(b)),
        coverage=float(torch.stack([part.any(0) for part in spheres]).any(0).double().mean()),
    )


def _radii(rows: Tensor) -> dict[int, Tensor]:
    """Return the distances of every row to its nearest neighbors, by which neighbor."""
    nearest = [torch.cdist(part, rows).topk(DENSITY_NEIGHBORS + 1, largest=False).values for part in _pieces(rows)]
    return {k: torch.cat(nearest)[:, k] for k in (NEIGHBORS, DENSITY_NEIGHBORS)}  # the nearest is the row itself


def _inside(points: Tensor, centers: Tensor, radii: Tensor) -> Tensor:
    """Return whether each of the points is in each of the spheres, (points, centers)."""
    return torch.cdist(points, centers) <= radii


def _share(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).double().mean())


def _pieces(rows: Tensor) -> list[Tensor]:
    return [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
