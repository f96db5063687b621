"""The real images nearest to samples, beside two controls: real images among themselves, and copies that were planted.

An image that was moved, mirrored or brightened can be far from its original in pixels, and in some features: "nearest
neighbors in pixel or feature space are trivially fooled" (section 6 of the paper, after Theis et al. 2015). The planted
copies say which of these a search sees.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pipeline.common.imaging import Pixels
from pipeline.data.dedup.hash_recall import brighter, shifted
from pipeline.evaluation.images import Images, WithProgress
from pipeline.evaluation.nearest.feature_space import DISTANCE, FeatureSpace, cosine_distances
from pipeline.evaluation.nearest.nearest import Nearest, Rows, flat

REAL_QUERIES = 1_000
"""Real images whose distance to their nearest other real image gives the scale."""
PLANTED = 200
"""Real images of which copies are planted."""
COPIES: dict[str, Callable[[Pixels], Pixels]] = {
    "shifted by 2 pixels": lambda images: shifted(images, 2, 2),
    "mirrored": lambda images: images[:, :, ::-1],
    "20 % brighter": lambda images: brighter(images, 1.2),
}
PIXELS, FEATURES = "pixels", "the extractor's features"


class Search:
    """The real images nearest to samples in one space, as real images are given piece by piece."""

    def __init__(
        self, rows: Callable[[Pixels], Rows], samples: Pixels, reals: Pixels | None = None, *, planted: bool = False
    ) -> None:
        """`rows` leads into the space. With `reals`, the first real images, also what is nearest to other real images;
        with `planted` also what is nearest to copies of them.
        """
        self.rows = rows
        self.samples = Nearest(rows(samples))
        self.pictures = np.zeros_like(samples)
        """The nearest real image of each sample so far."""
        self.reals = None if reals is None else Nearest(rows(reals[:REAL_QUERIES]), skip_self=True)
        self._copies: dict[str, Nearest] = {}
        if planted and reals is not None:
            self._copies = {name: Nearest(rows(make(reals[:PLANTED]))) for name, make in COPIES.items()}

    def update(self, block: Pixels) -> None:
        """Compare with the next real images."""
        references, first = self.rows(block), self.samples.seen
        nearer = self.samples.update(references)
        self.pictures[nearer] = block[self.samples.index[nearer] - first]
        for search in (*self._copies.values(), *([] if self.reals is None else [self.reals])):
            search.update(references)

    def found(self) -> dict[str, float]:
        """Return, of each kind of planted copy, the share whose nearest real image is its original."""
        return {name: float((s.index == np.arange(len(s.index))).mean()) for name, s in self._copies.items()}


def spaces(samples: Pixels, reals: Pixels, features: FeatureSpace | None) -> dict[str, Search]:
    """Return a search by pixels and, with an extractor, one by its features; with one, both have planted copies."""
    by_pixels = Search(flat, samples, reals, planted=features is not None)
    return {PIXELS: by_pixels} | ({FEATURES: Search(features.rows, samples, reals, planted=True)} if features else {})


def look(searches: Mapping[str, Search], reals: Images, what: str) -> None:
    """Compare with all real images, in pieces; show the progress under the name `what`."""
    for _, block in WithProgress(reals, what).blocks():
        for search in searches.values():
            search.update(block)


def pixel_numbers(searches: Mapping[str, Search]) -> dict[str, float]:
    """Return the distances in pixels, in gray levels."""
    search = searches[PIXELS]
    assert search.reals is not None
    return {
        "distance": float(search.samples.distance.mean()),
        "closest": float(search.samples.distance.min()),
        "real_to_real": float(search.reals.distance.mean()),
        "real_to_real_closest": float(search.reals.distance.min()),
    }


def feature_numbers(searches: Mapping[str, Search]) -> dict[str, float]:
    """Return the distances in the extractor's features, and which planted copies pixels and features find."""
    search = searches[FEATURES]
    assert search.reals is not None
    numbers: dict[str, float] = {}
    for name, nearest in (("feature_distance", search.samples), ("feature_real_to_real", search.reals)):
        distances = cosine_distances(nearest)
        numbers |= {name: float(distances.mean()), f"{name}_closest": float(distances.min())}
    for by, place in (("pixels", PIXELS), ("features", FEATURES)):
        numbers |= {f"copies_found_by_{by}, {name}": share for name, share in searches[place].found().items()}
    return numbers


def feature_summary(numbers: Mapping[str, float], count: int) -> str:
    """Return these numbers in words."""
    copies = ", ".join(
        f"{name} {numbers[f'copies_found_by_features, {name}']:.0%} "
        f"({numbers[f'copies_found_by_pixels, {name}']:.0%} by pixels)"
        for name in COPIES
    )
    return (
        f"By the extractor's features (cosine distance), {count:,} samples are on average "
        f"{numbers['feature_distance']:.2g} from their nearest real image, the closest "
        f"{numbers['feature_distance_closest']:.2g}; real images are {numbers['feature_real_to_real']:.2g} from their "
        f"nearest other real image, the closest {numbers['feature_real_to_real_closest']:.2g}. Of copies planted among "
        f"the samples, features find the original of: {copies}."
    )


def protocol(searches: Mapping[str, Search], reals: Images) -> dict[str, Any]:
    """Return what a protocol says of such a search among `reals`."""
    pixels = searches[PIXELS]
    assert pixels.reals is not None
    told = {
        "images": len(pixels.samples.index),
        "images_real": reals.count,
        "real_to_real": f"{len(pixels.reals.index):,} of the real images",
        "distance": "root mean square difference of pixels, in gray levels",
    }
    if FEATURES in searches:
        copied = min(PLANTED, len(pixels.reals.index))
        told |= {"feature_distance": DISTANCE, "planted_copies": f"{copied:,} each: {', '.join(COPIES)}"}
    return told
