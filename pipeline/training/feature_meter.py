"""FID and KID during training, by an extractor, over all ranks."""

from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import DataError, UnavailableError
from pipeline.common.imaging import Pixels
from pipeline.common.ranks import Ranks
from pipeline.evaluation.images import ArrayImages
from pipeline.evaluation.metrics.extractors import load_extractor
from pipeline.evaluation.metrics.feature_distances import Moments, frechet_distance, kernel_distance
from pipeline.evaluation.metrics.feature_extraction import extract_features


class FeatureMeter:
    """Compares samples with real images whose features are read once. Every process calls it with the same images."""

    def __init__(self, extractor: str, sha256: str | None, seed: int, ranks: Ranks) -> None:
        """`extractor` and `sha256` as `load_extractor` takes them; raises what that raises."""
        if find_spec("torchmetrics") is None:
            raise UnavailableError("schedule.extractor: needs the package torchmetrics; install the extra `eval`")
        self._extractor = load_extractor(extractor, sha256)
        self._ranks = ranks
        self._seed = seed
        self._reals: NDArray[np.float32] | None = None

    def see_reals(self, images: Pixels) -> None:
        """Read the features of the real images, uint8 (N, H, W, C)."""
        self._reals = self._read(images)

    def measure(self, fakes: Pixels) -> dict[str, float]:
        """Return {"fid", "kid_x1000"} of uint8 (N, H, W, C) samples, the same on every process."""
        assert self._reals is not None, "see_reals comes first"
        features = self._read(fakes)
        distance = frechet_distance(Moments.of(self._reals), Moments.of(features))
        kernel, _ = kernel_distance(self._reals, features, self._seed)
        if not np.isfinite([distance, kernel]).all():
            raise DataError(f"schedule.extractor: {self._extractor.name} gives features that are not finite")
        return {"fid": distance, "kid_x1000": 1e3 * kernel}

    def _read(self, images: Pixels) -> NDArray[np.float32]:
        return extract_features(ArrayImages(images), self._extractor, self._ranks, None).features
