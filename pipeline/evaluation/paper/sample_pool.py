"""The sample pool: samples with their z and the classifier's predictions, from which exemplars are chosen."""

from dataclasses import dataclass

import numpy as np

from pipeline.common.imaging import Pixels
from pipeline.common.progress import Progress
from pipeline.evaluation.classifier import Classifier, Predictions
from pipeline.evaluation.paper.walks import Z, draw
from pipeline.model.networks import Generator
from pipeline.model.sampling import images_of

POOL_SIZE = 2_048
"""Samples from which exemplars are chosen."""
CHUNK = 256
"""Images between two updates of the progress."""


@dataclass(frozen=True)
class SamplePool:
    """Samples (N, H, W, C) with their z (N, latent_dim) and the classifier's predictions, if there is one."""

    z: Z
    images: Pixels
    predictions: Predictions


def make_sample_pool(generator: Generator, classifier: Classifier | None, count: int, seed: int) -> SamplePool:
    """Draw the first `count` samples of the analyses' sequence and predict their attributes."""
    z = draw(generator.config, seed, 0, count)
    images = images_with_progress(generator, z, "sampling")
    return SamplePool(z, images, classifier.predict(images) if classifier else {})


def images_with_progress(generator: Generator, z: Z, what: str, *label: Z) -> Pixels:
    """Return the images of z (N, latent_dim), uint8 (N, H, W, C), and show the progress under the name `what`.

    A generator that reads a label needs it too, (N, label_dim).
    """
    parts = []
    with Progress(what, len(z)) as progress:
        for start in range(0, len(z), CHUNK):
            parts.append(images_of(generator, *(values[start : start + CHUNK] for values in (z, *label))))
            progress.advance(len(parts[-1]))
    return np.concatenate(parts)
