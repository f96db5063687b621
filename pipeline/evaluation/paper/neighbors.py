"""`dcgan-eval neighbors`: samples and their nearest real images, by pixels and by the discriminator's features."""

from pathlib import Path

import numpy as np

from pipeline.common.randomness import Purpose
from pipeline.evaluation import charts, inputs
from pipeline.evaluation.images import WithProgress
from pipeline.evaluation.paper.discriminator_features import features, measure_batchnorm
from pipeline.evaluation.paper.nearest import Nearest, flat, gather
from pipeline.evaluation.results import Result
from pipeline.model.sampling import sample

BATCHNORM_IMAGES = 4_096
"""Real images over which D's BatchNorm statistics are measured."""
REAL_QUERIES = 1_000
"""Real images whose distance to their nearest other real image gives the scale."""


def run_neighbors(out: Path, *, ckpt: str, data: str, count: int, limit: int | None, seed: int) -> dict[str, float]:
    """Write neighbors.json and pictures of samples above their nearest real images; return distances in gray levels."""
    loaded, subject = inputs.any_generator(ckpt)
    loaded_d, _ = inputs.discriminator(ckpt)
    shape = inputs.shape_of(loaded.config)
    reals, description = inputs.reals(data, limit, shape)
    fakes = sample(loaded.generator, seed, Purpose.ANALYSIS, 0, count)
    some = gather(inputs.reals(data, min(reals.count, BATCHNORM_IMAGES), shape)[0], "reading real images")
    network = measure_batchnorm(loaded_d.discriminator, some)
    settings = {"samples": count, "seed": seed}
    result = Result("neighbors", out, subject, description, settings)
    by_pixels, by_features = Nearest(flat(fakes)), Nearest(features(network, fakes))
    between_reals = Nearest(flat(some[:REAL_QUERIES]), skip_self=True)
    found = {name: np.zeros_like(fakes) for name in ("pixels", "the discriminator's features")}
    for _, block in WithProgress(reals, "looking for neighbors").blocks():
        between_reals.update(flat(block))
        searches = (by_pixels, flat(block)), (by_features, features(network, block))
        for pictures, (search, references) in zip(found.values(), searches, strict=True):
            first = search.seen
            nearer = search.update(references)
            pictures[nearer] = block[search.index[nearer] - first]
    across = 12
    for page, start in enumerate(range(0, min(count, 36), across)):
        rows = slice(start, start + across)
        groups = [
            ("samples", fakes[rows]),
            *((f"nearest real image by {name}", pictures[rows]) for name, pictures in found.items()),
        ]
        result.picture(charts.sheet(groups, across), "Samples, and under each its nearest real images", f"-{page + 1}")
    numbers = {
        "distance": float(by_pixels.distance.mean()),
        "closest": float(by_pixels.distance.min()),
        "real_to_real": float(between_reals.distance.mean()),
        "real_to_real_closest": float(between_reals.distance.min()),
    }
    result.write(
        dict(numbers),
        summary=(
            f"{count} samples are on average {numbers['distance']:.1f} gray levels (root mean square) from the nearest "
            f"of {reals.count:,} real images; the closest is {numbers['closest']:.1f} away. Real images are "
            f"{numbers['real_to_real']:.1f} from their nearest other real image, the closest "
            f"{numbers['real_to_real_closest']:.1f}. A copy would be near 0."
        ),
    )
    return numbers
