"""Samples with their z and what the classifier reads in them: where exemplars come from."""

from dataclasses import dataclass

import numpy as np

from pipeline.common.progress import Progress
from pipeline.evaluation.classifier import Classifier
from pipeline.evaluation.images import Pixels
from pipeline.evaluation.paper.attributes import Read
from pipeline.evaluation.paper.walks import Z, draw
from pipeline.model.networks import Generator
from pipeline.model.sampling import images_of

POOL = 2_048
"""Samples among which exemplars are looked for."""
CHUNK = 256


@dataclass(frozen=True)
class Pool:
    """Samples from which exemplars are taken, and what the classifier reads in them."""

    z: Z
    images: Pixels
    read: Read


def make_pool(generator: Generator, classifier: Classifier | None, count: int, seed: int) -> Pool:
    """Draw `count` samples and read their attributes."""
    z = draw(generator.config, seed, 0, count)
    images = images_chunked(generator, z, "sampling")
    return Pool(z, images, classifier.read(images) if classifier else {})


def images_chunked(generator: Generator, z: Z, what: str) -> Pixels:
    """Return the images of many z, showing how far it is."""
    parts = []
    with Progress(what, len(z)) as progress:
        for start in range(0, len(z), CHUNK):
            parts.append(images_of(generator, z[start : start + CHUNK]))
            progress.advance(len(parts[-1]))
    return np.concatenate(parts)
