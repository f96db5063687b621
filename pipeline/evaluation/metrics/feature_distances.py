"""`dcgan-eval fid`, `kid`, `is` and `precision-recall`: distances between sets of features.

torchmetrics does the arithmetic of the first three. Every process extracts features of its own blocks of
images, and all of them get the sum (moments) or the whole (features): nobody waits while one process works.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.common.errors import DataError, UsageError
from pipeline.common.ranks import Ranks
from pipeline.common.storage import sha256_bytes, write_atomic
from pipeline.evaluation.images import BLOCK, Images, Watched, num_blocks
from pipeline.evaluation.metrics.extractors import Extractor

if TYPE_CHECKING:
    pass

NEIGHBORS = 3
"""Precision and recall: a point counts as covered when it is no farther from another than that one's third nearest."""
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1_000
IS_SPLITS = 10


@dataclass
class Moments:
    """Sum, sum of outer products and number of feature vectors, float64: they add up over blocks and processes."""

    total: NDArray[np.float64]
    outer: NDArray[np.float64]
    count: int

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


def read_moments(images: Images, extractor: Extractor, ranks: Ranks, what: str) -> Moments:
    """Return the moments of a set's features, each rank reading its own blocks."""
    total: NDArray[np.float64] | None = None
    outer: NDArray[np.float64] | None = None
    for _, features, _ in _blocks(images, extractor, ranks, what):
        block = features.astype(np.float64)
        total = block.sum(0) if total is None else total + block.sum(0)
        outer = block.T @ block if outer is None else outer + block.T @ block
    width = int(ranks.sum(np.array([0.0 if total is None else len(total)]))[0]) // _working(images, ranks)
    if total is None or outer is None:  # fewer blocks than ranks
        total, outer = np.zeros(width), np.zeros((width, width))
    return Moments(ranks.sum(total), ranks.sum(outer), images.count)


def read_features(
    images: Images, extractor: Extractor, ranks: Ranks, what: str | None
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Return a set's features (N, F), and class probabilities where there are any, whole on every rank.

    Shows how far it is under the name `what`; None shows nothing.
    """
    found = list(_blocks(images, extractor, ranks, what))
    features = [(block, values) for block, values, _ in found]
    probabilities = [(block, values) for block, _, values in found if values is not None]
    joined = []
    for parts in (features, probabilities):
        width = int(ranks.sum(np.array([float(parts[0][1].shape[1]) if parts else 0.0]))[0]) // _working(images, ranks)
        whole = np.zeros((images.count, width))
        for block, part in parts:
            whole[block * BLOCK : block * BLOCK + len(part)] = part
        joined.append(ranks.sum(whole).astype(np.float32) if width else None)
    assert joined[0] is not None
    return joined[0], joined[1]


def _working(images: Images, ranks: Ranks) -> int:
    """Return how many ranks have a block at all."""
    return min(ranks.world_size, num_blocks(images.count))


def _blocks(
    images: Images, extractor: Extractor, ranks: Ranks, what: str | None
) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.float32] | None]]:
    """Yield (block, features, probabilities or None) of this rank's blocks."""
    watched = images if what is None else Watched(images, what)
    for block, pixels in watched.blocks(ranks.rank, ranks.world_size):
        read = extractor.read(pixels)
        yield block, read.features, read.probabilities


class _Identity(nn.Module):
    """Stands where torchmetrics expects an extractor: it gets features and returns them."""

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
        warnings.simplefilter("ignore")  # that features are kept in memory
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
        warnings.simplefilter("ignore")  # that features are kept in memory
        metric = InceptionScore(_Identity(probabilities.shape[1]), splits=IS_SPLITS)
    metric.update(torch.from_numpy(np.log(np.maximum(probabilities, 1e-30))))  # it applies a softmax
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def precision_recall(reals: NDArray[np.float32], fakes: NDArray[np.float32]) -> tuple[float, float]:
    """Return the share of samples inside the data's manifold, and of data inside the samples' (Kynkäänniemi 2019)."""
    for name, features in (("real images", reals), ("samples", fakes)):
        if len(features) <= NEIGHBORS:
            raise UsageError(f"precision and recall of {len(features)} {name}: expected more than {NEIGHBORS}")
    return _covered(fakes, reals), _covered(reals, fakes)


def _covered(points: NDArray[np.float32], manifold: NDArray[np.float32]) -> float:
    """Return the share of `points` within the radius of some point of `manifold`: its third nearest neighbor."""
    a, b = (torch.from_numpy(x) for x in (points, manifold))
    radii = torch.cat([torch.cdist(part, b).kthvalue(NEIGHBORS + 1).values for part in _pieces(b)])
    inside = [(torch.cdist(part, b) <= radii).any(1) for part in _pieces(a)]
    return float(torch.cat(inside).float().mean())


def _pieces(rows: Tensor) -> list[Tensor]:
    return [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]


def cached(path: Path | None, key: dict[str, Any], make: Callable[[], dict[str, NDArray[Any]]]) -> dict[str, Any]:
    """Return the arrays kept in `path` for `key`, or make and keep them. Without a path nothing is kept.

    The file's name ends in a hash of the key, so statistics of another data set, extractor or resize never serve.
    """
    if path is None:
        return make()
    import io
    import json

    digest = sha256_bytes(json.dumps(key, sort_keys=True).encode())[:16]
    file = path / f"reference-{digest}.npz"
    if file.exists():
        try:
            with np.load(file, allow_pickle=False) as kept:
                return {name: kept[name] for name in kept.files}
        except (ValueError, OSError, KeyError, EOFError, BadZipFile) as error:
            raise DataError(f"{file}: damaged ({error}); delete it and run the command again") from None
    arrays = make()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomic(file, buffer.getvalue())
    return arrays
