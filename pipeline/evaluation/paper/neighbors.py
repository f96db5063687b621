"""`dcgan-eval neighbors`: samples and their nearest real images, by pixels, by D's features and by an extractor's."""

from pathlib import Path

from pipeline.common.randomness import Purpose
from pipeline.evaluation import charts, inputs
from pipeline.evaluation.metrics.extractors import Extractor
from pipeline.evaluation.nearest import copies
from pipeline.evaluation.nearest.feature_space import FeatureSpace
from pipeline.evaluation.nearest.nearest import gather
from pipeline.evaluation.paper.discriminator_features import features, measure_batchnorm
from pipeline.evaluation.results import Result
from pipeline.model.sampling import sample

BATCHNORM_IMAGES = 4_096
"""Real images over which D's BatchNorm statistics are measured."""


def run_neighbors(
    out: Path, *, ckpt: str, data: str, count: int, limit: int | None, seed: int, extractor: Extractor | None = None
) -> dict[str, float]:
    """Write neighbors.json and pictures of samples above their nearest real images; return distances in gray levels.

    With an extractor also cosine distances of its features, and which planted copies these and pixels find.
    """
    loaded, subject = inputs.any_generator(ckpt)
    loaded_d, _ = inputs.discriminator(ckpt)
    shape = inputs.shape_of(loaded.config)
    reals, description = inputs.reals(data, limit, shape)
    fakes = sample(loaded.generator, seed, Purpose.ANALYSIS, 0, count)
    some = gather(inputs.reals(data, min(reals.count, BATCHNORM_IMAGES), shape)[0], "reading real images")
    network = measure_batchnorm(loaded_d.discriminator, some)
    result = Result("neighbors", out, subject, description, {"samples": count, "seed": seed})
    searches = copies.spaces(fakes, some, None if extractor is None else FeatureSpace(extractor, some))
    by_discriminator = copies.Search(lambda images: features(network, images), fakes)
    looked = {copies.PIXELS: searches[copies.PIXELS], "the discriminator's features": by_discriminator, **searches}
    copies.look(looked, reals, "looking for neighbors")
    across = 12
    for page, start in enumerate(range(0, min(count, 36), across)):
        rows = slice(start, start + across)
        groups = [
            ("samples", fakes[rows]),
            *((f"nearest real image by {name}", search.pictures[rows]) for name, search in looked.items()),
        ]
        result.picture(charts.sheet(groups, across), "Samples, and under each its nearest real images", f"-{page + 1}")
    numbers = copies.pixel_numbers(searches)
    summary = (
        f"{count} samples are on average {numbers['distance']:.1f} gray levels (root mean square) from the nearest "
        f"of {reals.count:,} real images; the closest is {numbers['closest']:.1f} away. Real images are "
        f"{numbers['real_to_real']:.1f} from their nearest other real image, the closest "
        f"{numbers['real_to_real_closest']:.1f}. A copy would be near 0."
    )
    if extractor is not None:
        numbers |= copies.feature_numbers(searches)
        summary += f" {copies.feature_summary(numbers, count)}"
    result.protocol = {
        **inputs.preparations(subject, description),
        **({} if extractor is None else extractor.protocol()),
        **copies.protocol(searches, reals),
    }
    result.write(dict(numbers), summary=summary)
    return numbers
