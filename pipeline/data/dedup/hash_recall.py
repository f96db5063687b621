"""Measures a hash: recall on planted copies, and false alarms on pairs of images that only look alike."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipeline.common.imaging import Pixels, decode, encode
from pipeline.data.dedup.hamming import distances
from pipeline.data.dedup.semantic_hash import SemanticHash, shrink

RADII = tuple(range(17))
SAMPLE = 1000
"""Images that are copied."""


def shifted(images: Pixels, down: int, right: int) -> Pixels:
    """Move images (N, H, W, C) by so many pixels; the edge that they leave repeats its last pixels."""
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (down, 0), (right, 0), (0, 0)), mode="edge")
    return np.asarray(padded[:, :height, :width])


def brighter(images: Pixels, factor: float) -> Pixels:
    """Multiply the values of uint8 images."""
    return np.asarray(np.clip(images * np.float32(factor) + 0.5, 0, 255), np.uint8)


def _jpeg(images: Pixels, quality: int) -> Pixels:
    return np.stack([decode(encode(image, "jpg", quality), image.shape[-1]) for image in images])


COPIES: dict[str, Callable[[Pixels], Pixels]] = {
    "exact copy": lambda images: images,
    "JPEG quality 90": lambda images: _jpeg(images, 90),
    "JPEG quality 75": lambda images: _jpeg(images, 75),
    "JPEG quality 50": lambda images: _jpeg(images, 50),
    "shift by 1 pixel, x": lambda images: shifted(images, 0, 1),
    "shift by 1 pixel, y": lambda images: shifted(images, 1, 0),
    "brightness +2 %": lambda images: brighter(images, 1.02),
    "brightness -2 %": lambda images: brighter(images, 0.98),
}


def measure(semantic_hash: SemanticHash, images: Pixels) -> dict[str, dict[str, list[float]]]:
    """Return {"recall": {copy: …}, "false_alarms": {…}, "precision": {…}}, each a list over RADII.

    Recall is the share of planted copies within a radius of their original. A hard pair is an image and the other
    one nearest to it in pixels (32×32); their share within a radius is the rate of false alarms, if no two of the
    given images are duplicates to begin with. Precision supposes one hard pair for each planted copy.
    """
    images = images[:SAMPLE]
    codes = semantic_hash.codes(images)
    nearest = _nearest_in_pixels(images)
    false_alarms = _by_radius(distances(codes, codes[nearest]))
    recall = {name: _by_radius(distances(codes, semantic_hash.codes(make(images)))) for name, make in COPIES.items()}
    every = np.mean(list(recall.values()), axis=0)
    precision = [
        float(hit / (hit + miss)) if hit + miss else 1.0 for hit, miss in zip(every, false_alarms, strict=True)
    ]
    return {"recall": recall, "false_alarms": {"hard pairs": false_alarms}, "precision": {"all": precision}}


def _by_radius(apart: NDArray[np.int64]) -> list[float]:
    return [round(float((apart <= radius).mean()), 4) for radius in RADII]


def _nearest_in_pixels(images: Pixels) -> NDArray[np.int64]:
    """Return for each image which other one has the smallest squared distance."""
    flat = shrink(images).reshape(len(images), -1).astype(np.float32)
    lengths = np.square(flat).sum(1)
    apart = lengths[:, None] + lengths[None] - 2 * flat @ flat.T
    np.fill_diagonal(apart, np.inf)
    return np.asarray(apart.argmin(1))
