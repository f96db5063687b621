"""`dcgan-eval neighbors`: beside each sample its nearest real images, for everybody to see."""

from pathlib import Path

import numpy as np

from pipeline.evaluation import charts, inputs
from pipeline.evaluation.images import Watched
from pipeline.evaluation.paper.discriminator_features import features, reestimate_batchnorm
from pipeline.evaluation.paper.nearest import Nearest, flat, gather
from pipeline.evaluation.paper.walks import draw
from pipeline.evaluation.results import Result
from pipeline.model.sampling import images_of

BATCHNORM_IMAGES = 4_096
REAL_QUERIES = 1_000
"""Real images whose nearest other one is looked for, as a scale."""


def run_neighbors(out: Path, *, ckpt: str, data: str, count: int, limit: int | None, seed: int) -> dict[str, float]:
    """Write neighbors.json and a picture: samples, and under each its nearest real image by pixels and by features."""
    loaded, subject = inputs.generator(ckpt)
    judge, _ = inputs.discriminator(ckpt)
    reals, description = inputs.reals(data, limit)
    z = draw(loaded.config, seed, 0, count)
    fakes = images_of(loaded.generator, z)
    some = gather(inputs.reals(data, min(reals.count, BATCHNORM_IMAGES))[0], "reading real images")
    network = reestimate_batchnorm(judge.discriminator, some)
    settings = {"samples": count, "seed": seed}
    result = Result("neighbors", out, subject, description, settings)
    by_pixels, by_features = Nearest(flat(fakes)), Nearest(features(network, fakes))
    between_reals = Nearest(flat(some[:REAL_QUERIES]), skip_self=True)
    found = {name: np.zeros_like(fakes) for name in ("pixels", "the discriminator's features")}
    for _, block in Watched(reals, "looking for neighbors").blocks():
        between_reals.update(flat(block))
        seen_by = (by_pixels, flat(block)), (by_features, features(network, block))
        for pictures, (search, references) in zip(found.values(), seen_by, strict=True):
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
            f"{count} samples lie {numbers['distance']:.1f} gray levels (root mean square) from their nearest of "
            f"{reals.count:,} real images, the closest {numbers['closest']:.1f}. Real images lie "
            f"{numbers['real_to_real']:.1f} from their nearest other real image, the closest "
            f"{numbers['real_to_real_closest']:.1f}. A copy would lie near 0."
        ),
    )
    return numbers
