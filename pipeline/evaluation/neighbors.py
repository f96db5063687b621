"""`dcgan-eval neighbors`: beside each sample its nearest real images, for everybody to see."""

from pathlib import Path

from pipeline.evaluation import charts, subjects
from pipeline.evaluation.discriminator_features import features, reestimate_batchnorm
from pipeline.evaluation.nearest import flat, gather, nearest
from pipeline.evaluation.results import Result
from pipeline.evaluation.walks import draw, images_of


def run_neighbors(out: Path, *, ckpt: str, data: str, count: int, limit: int | None, seed: int) -> dict[str, float]:
    """Write neighbors.json and a picture: samples, and under each its nearest real image by pixels and by features."""
    loaded, subject = subjects.generator(ckpt)
    judge, _ = subjects.discriminator(ckpt)
    reals, description = subjects.reals(data, limit)
    z = draw(loaded.config, seed, 0, count)
    fakes = images_of(loaded.generator, z)
    real_images = gather(reals, "reading real images")
    network = reestimate_batchnorm(judge.discriminator, real_images[:4096])
    settings = {"samples": count, "seed": seed}
    result = Result("neighbors", out, subject, description, settings)
    by_pixels, pixel_distance = nearest(flat(fakes), flat(real_images))
    by_features, _ = nearest(features(network, fakes), features(network, real_images))
    _, between_reals = nearest(flat(real_images[:1000]), flat(real_images), skip_self=True)
    across = 12
    for page, start in enumerate(range(0, min(count, 36), across)):
        rows = slice(start, start + across)
        groups = [
            ("samples", fakes[rows]),
            ("nearest real image by pixels", real_images[by_pixels[rows]]),
            ("nearest real image by the discriminator's features", real_images[by_features[rows]]),
        ]
        result.picture(charts.sheet(groups, across), "Samples, and under each its nearest real images", f"-{page + 1}")
    numbers = {
        "distance": float(pixel_distance.mean()),
        "closest": float(pixel_distance.min()),
        "real_to_real": float(between_reals.mean()),
        "real_to_real_closest": float(between_reals.min()),
    }
    result.write(
        dict(numbers),
        summary=(
            f"{count} samples lie {numbers['distance']:.1f} grey levels (root mean square) from their nearest of "
            f"{len(real_images):,} real images, the closest {numbers['closest']:.1f}. Real images lie "
            f"{numbers['real_to_real']:.1f} from their nearest other real image, the closest "
            f"{numbers['real_to_real_closest']:.1f}. A copy would lie near 0."
        ),
    )
    return numbers
