"""`dcgan-eval memorization`: whether the generator repeats its training images (sections 3, 4.1.1 and 6.1)."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.common.imaging import Pixels
from pipeline.common.progress import Progress
from pipeline.common.randomness import Purpose
from pipeline.data.dedup.hash_recall import SAMPLE, measure
from pipeline.data.dedup.semantic_hash import THRESHOLD_IMAGES, SemanticHash
from pipeline.evaluation import charts, inputs
from pipeline.evaluation.confidence import wilson
from pipeline.evaluation.images import GeneratedImages, Images, WithProgress, first
from pipeline.evaluation.metrics.extractors import Extractor
from pipeline.evaluation.nearest import copies
from pipeline.evaluation.nearest.feature_space import FeatureSpace
from pipeline.evaluation.nearest.nearest import Nearest, Rows, flat, gather
from pipeline.evaluation.paper.walks import spherical, unevenness
from pipeline.evaluation.results import Result
from pipeline.model.labels import generator_inputs
from pipeline.model.networks import Generator
from pipeline.model.sampling import images_of

SIZES = (1_000, 10_000, 100_000)
"""Numbers of samples at which distances are measured; the authors' log for faces has the same."""
REAL_QUERIES = 1_000
"""Real images whose distance to the nearest sample is measured."""
COMPARED = 1_000
"""Samples whose nearest training image is looked for by an extractor's features."""
SHOWN = 12
"""Samples that the picture shows: those closest to a training image."""
WALKS, WALK_STEPS = 64, 33
HASHED = 4_096
"""Samples, and training images, whose semantic hash is looked for among the training images."""
HASH_STEPS = 1_000
"""Training steps of the semantic hash."""

LARGEST_RADIUS = 8
"""Bits in which the code of a near copy may differ from its original's, at most."""
FALSE_ALARMS = 0.01
"""Share of pairs of training images that only look alike which the radius may take for copies."""


def run_memorization(
    out: Path,
    *,
    ckpt: str,
    data: str,
    held_out: str | None,
    most: int,
    limit: int | None,
    seed: int,
    extractor: Extractor | None = None,
) -> dict[str, Any]:
    """Write memorization.json with its pictures, and return the numbers.

    Three questions: are training images nearer to the samples than held-out images are, do samples have the semantic
    hash of a training image, and do walks in latent space jump? With an extractor a fourth: are samples nearer to
    training images than these are to each other, by its features?
    """
    loaded, subject = inputs.any_generator(ckpt)
    shape = inputs.shape_of(loaded.config)
    trained, description = inputs.reals(data, limit, shape)
    sizes = [*(size for size in SIZES if size < most), most]
    settings: dict[str, Any] = {"samples": sizes, "held_out": held_out, "seed": seed, "walks": WALKS}
    result = Result("memorization", out, subject, description, settings)
    numbers: dict[str, Any] = {}

    locations = {"training": data} | ({"held-out": held_out} if held_out else {})
    queries = {
        name: flat(gather(inputs.reals(location, min(limit or REAL_QUERIES, REAL_QUERIES), shape)[0], f"{name} images"))
        for name, location in locations.items()
    }
    curves = distance_curves(loaded.generator, queries, sizes, seed)
    for name, curve in curves.items():
        numbers |= {f"distance_{name}_{size}": value for size, value in zip(sizes, curve, strict=True)}
    if len(sizes) > 1:
        result.chart(_curve_chart(curves, sizes), "Distance from real images to their nearest sample")
    if held_out:
        near, far = numbers[f"distance_training_{most}"], numbers[f"distance_held-out_{most}"]
        distances = (
            f"The nearest of {most:,} samples is {near:.2f} gray levels from a training image and {far:.2f} from a "
            f"held-out one ({far / near - 1:+.1%}). A generator that memorizes is much nearer to its training images."
        )
    else:
        distances = "Distances say little without --held-out images; build the data with a split (--val-fraction)."

    evenness = walk_unevenness(loaded.generator, seed)
    numbers |= {"walk_unevenness": float(np.mean(evenness)), "walk_unevenness_largest": float(np.max(evenness))}
    walk = walk_of(loaded.generator, seed, int(np.argmax(evenness)), 17)
    result.picture(charts.sheet([("the least even of all walks", walk)], 17, 1), "The least even walk", "-walk")
    walks = (
        f"The largest step of a walk between random z is {numbers['walk_unevenness']:.2f} times its mean step "
        f"({numbers['walk_unevenness_largest']:.2f} in the least even of {WALKS} walks). Memorized images would make "
        "walks jump."
    )

    collided = collisions(trained, loaded.generator, seed)
    numbers |= collided
    low, high = wilson(collided["samples_that_collide"], HASHED)
    hashes = (
        f"{collided['samples_that_collide']:.2%} of {HASHED:,} samples have the semantic hash of a training image "
        f"(95 % interval {low:.2%} to {high:.2%}); {collided['reals_that_collide']:.2%} of the training images have "
        f"the hash of another training image. The nearest hash is {collided['bits_from_samples']:.1f} bits away on "
        f"average, for training images {collided['bits_between_reals']:.1f}. Within {collided['radius']} bits of a "
        f"training image are {collided['samples_within_radius']:.2%} of the samples and "
        f"{collided['reals_within_radius']:.2%} of the training images. That radius finds "
        f"{collided['planted_copies_found']:.0%} of near copies planted in the training set (shifted by a pixel, 2 % "
        f"brighter or darker, JPEG at 90 to 50), equal codes {collided['planted_copies_equal']:.0%}."
    )
    result.protocol = {
        **inputs.preparations(subject, description),
        "images": most,
        "images_real": trained.count,
        "distance": "root mean square difference of pixels, in gray levels",
        "queries": f"at most {REAL_QUERIES:,} real images of each set",
        "hash": f"128 bits, learned from at most {THRESHOLD_IMAGES:,} training images; of {HASHED:,} samples",
        "walks": WALKS,
    }
    summary = f"{distances} {walks} {hashes}"
    if extractor is not None:
        some = gather(inputs.reals(data, min(trained.count, REAL_QUERIES), shape)[0], "training images")
        found = _by_features(result, trained, some, loaded.generator, extractor, seed)
        numbers |= found
        summary += f" {copies.feature_summary(found, COMPARED)}"
    result.write(numbers, summary=summary)
    return numbers


def _by_features(
    result: Result, trained: Images, some: Pixels, generator: Generator, extractor: Extractor, seed: int
) -> dict[str, float]:
    """Add the training images nearest to samples by an extractor's features; return the numbers. `some` are the first.

    The picture shows the samples that are closest to a training image.
    """
    samples = gather(GeneratedImages(generator, COMPARED, seed), "samples to compare")
    searches = copies.spaces(samples, some, FeatureSpace(extractor, some))
    copies.look(searches, trained, "looking for neighbors")
    closest = np.argsort(searches[copies.FEATURES].samples.distance, kind="stable")[:SHOWN]
    rows = [(f"nearest training image by {name}", search.pictures[closest]) for name, search in searches.items()]
    sheet = charts.sheet([("samples", samples[closest]), *reversed(rows)], SHOWN)
    result.picture(sheet, "The samples closest to a training image by the extractor's features", "-closest")
    told = copies.protocol(searches, trained)
    result.protocol |= {
        **extractor.protocol(),
        **{name: told[name] for name in ("feature_distance", "real_to_real", "planted_copies")},
        "feature_images": COMPARED,
    }
    return copies.feature_numbers(searches)


def _curve_chart(curves: dict[str, list[float]], sizes: list[int]) -> Figure:
    chart, area = charts.axes(6)
    for name, curve in curves.items():
        area.plot(sizes, curve, marker="o", label=f"{name} images")
    area.set_xscale("log")
    area.set_xlabel("samples")
    area.set_ylabel("mean distance to the nearest sample")
    area.legend(frameon=False)
    return chart


def distance_curves(
    generator: Generator, queries: dict[str, Rows], sizes: list[int], seed: int
) -> dict[str, list[float]]:
    """Return, for each set of real images, the mean distance to the nearest of the first `size` samples."""
    best = {name: Nearest(rows) for name, rows in queries.items()}
    curves: dict[str, list[float]] = {name: [] for name in queries}
    seen = 0
    with Progress("distance to samples", sizes[-1]) as progress:
        for _, pixels in GeneratedImages(generator, sizes[-1], seed).blocks():
            rows, start = flat(pixels), 0
            for edge in [size for size in sizes if seen < size <= seen + len(rows)] + [seen + len(rows)]:
                piece = rows[start : edge - seen]
                start = edge - seen
                for name in queries:
                    best[name].update(piece)
                    if edge in sizes and len(curves[name]) < len(sizes) and sizes[len(curves[name])] == edge:
                        curves[name].append(float(best[name].distance.mean()))
            seen += len(rows)
            progress.advance(len(rows))
    return curves


def walk_unevenness(generator: Generator, seed: int) -> list[float]:
    """Return the unevenness of walks between pairs of random z."""
    with Progress("walking", WALKS, "walks") as progress:
        found = []
        for walk in range(WALKS):
            found.append(unevenness(walk_of(generator, seed, walk, WALK_STEPS)))
            progress.advance(1)
    return found


def walk_of(generator: Generator, seed: int, walk: int, steps: int) -> Pixels:
    """Return the images (steps, H, W, C) of a walk between two random z, of the first one's label if there is one."""
    ends, *label = generator_inputs(generator.config, seed, Purpose.ANALYSIS, 2 * walk, 2)
    return images_of(generator, spherical(ends[0], ends[1], steps), *(values[:1].repeat(steps, 0) for values in label))


def collisions(known: Images, generator: Generator, seed: int) -> dict[str, float]:
    """Return how often samples have, or nearly have, the 128-bit hash of a training image; training images likewise.

    The hash is learned from the first 16,384 images at most (their order is random). Memory holds those, and 16 bytes
    of every image.
    """
    hasher = SemanticHash(seed=seed, steps=HASH_STEPS)
    some = np.concatenate(list(first((block for _, block in known.blocks()), THRESHOLD_IMAGES)))
    with Progress("learning the semantic hash", hasher.steps, "steps") as progress:
        hasher.fit(some, progress=progress)
    radius, found, equal = calibrate(hasher, some[:SAMPLE])
    codes = np.concatenate([hasher.codes(block) for _, block in WithProgress(known, "hashing").blocks()])
    sampled = [hasher.codes(pixels) for _, pixels in GeneratedImages(generator, HASHED, seed).blocks()]
    bits = nearest_code(np.concatenate(sampled), codes)
    own = nearest_code(codes[:HASHED], codes, skip_self=True)
    return {
        "samples_that_collide": float((bits == 0).mean()),
        "reals_that_collide": float((own == 0).mean()),
        "bits_from_samples": float(bits.mean()),
        "bits_between_reals": float(own.mean()),
        "radius": radius,
        "samples_within_radius": float((bits <= radius).mean()),
        "reals_within_radius": float((own <= radius).mean()),
        "planted_copies_found": found,
        "planted_copies_equal": equal,
    }


def calibrate(hasher: SemanticHash, images: Pixels) -> tuple[int, float, float]:
    """Return the radius in bits for near copies, and the shares of planted ones that it and equal codes find.

    The planted copies are imperfect ones of `images`. The radius is the largest, up to LARGEST_RADIUS, that takes at
    most FALSE_ALARMS of the pairs that only look alike for copies; 0 when none does.
    """
    measured = measure(hasher, images)
    alarms = measured["false_alarms"]["hard pairs"]
    radius = max((r for r in range(LARGEST_RADIUS + 1) if alarms[r] <= FALSE_ALARMS), default=0)
    recall = np.mean([values for name, values in measured["recall"].items() if name != "exact copy"], axis=0)
    return radius, float(recall[radius]), float(recall[0])


def nearest_code(
    queries: NDArray[np.uint8], references: NDArray[np.uint8], *, skip_self: bool = False
) -> NDArray[np.int64]:
    """Return the bits (N,) between each code (N, 16) and the nearest of `references` (M, 16), both uint8.

    With `skip_self` the queries are the first references, and no code is its own neighbor.
    """
    a, b = queries.view(np.uint64), references.view(np.uint64)
    nearest_bits = np.empty(len(a), np.int64)
    for row, code in enumerate(a):
        distance = np.bitwise_count(b ^ code).sum(1)
        if skip_self:
            distance[row] = 128
        nearest_bits[row] = distance.min()
    return nearest_bits
