"""`dcgan-eval turn`: a direction from averages at the extremes of an attribute (section 6.3.2, Figure 8)."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UsageError
from pipeline.evaluation import charts, inputs
from pipeline.evaluation.classifier_training import get_classifier
from pipeline.evaluation.paper.sample_pool import POOL_SIZE, images_with_progress, make_sample_pool
from pipeline.evaluation.paper.walks import draw
from pipeline.evaluation.results import Result

MEASURED = 256
"""Samples that are turned to measure how reliable the direction is; fewer are shown."""


def run_turn(
    out: Path,
    *,
    ckpt: str,
    attribute: str,
    classifier_file: str | None,
    data: str | None,
    rows: int,
    steps: int,
    extreme: int,
    seed: int,
    label: str | None = None,
) -> dict[str, float]:
    """Write turn.json, a picture like Figure 8 and a curve; return how monotonic the turn is.

    All samples of a conditional generator are of the class `label`.
    """
    loaded, subject = inputs.generator(ckpt, label)
    if 2 * extreme > POOL_SIZE:
        raise UsageError(f"--extreme {extreme}: expected at most half of the {POOL_SIZE} samples")
    classifier = get_classifier(classifier_file, data, out, attributes=[attribute])
    head = classifier.head(attribute)
    settings = {
        "attribute": attribute,
        "rows": rows,
        "steps": steps,
        "extreme": extreme,
        "pool": POOL_SIZE,
        "seed": seed,
    }
    result = Result("turn", out, subject, settings=settings)
    pool = make_sample_pool(loaded.generator, classifier, POOL_SIZE, seed)
    order = np.argsort(pool.predictions[attribute])
    vector = pool.z[order[-extreme:]].mean(0) - pool.z[order[:extreme]].mean(0)
    vector *= np.linalg.norm(pool.z, axis=1).mean() / np.linalg.norm(vector)  # scaled to the length of a random z

    places = np.linspace(-0.5, 0.5, steps, dtype=np.float32)
    fresh = draw(loaded.config, seed, POOL_SIZE, max(rows, MEASURED))  # other samples than those behind the vector
    turned = fresh[:, None] + places[None, :, None] * vector  # (samples, steps, dim)
    images = images_with_progress(loaded.generator, turned.reshape(-1, turned.shape[-1]), "turning")
    predicted = classifier.predict(images)[attribute].reshape(len(fresh), steps)
    rises = np.diff(predicted, axis=1) > 0
    numbers = {
        "steps_that_rise": float(rises.mean()),
        "samples_that_always_rise": float(rises.all(1).mean()),
        "rank_correlation": float(np.mean([_spearman(row) for row in predicted])),
        "from": float(predicted[:, 0].mean()),
        "to": float(predicted[:, -1].mean()),
        "range_of_samples": float(pool.predictions[attribute].std()),
    }
    shown = images.reshape(len(fresh), steps, *images.shape[1:])[:rows]
    caption = f"{attribute}: from one extreme to the other, one sample a row"
    result.picture(charts.sheet([(caption, shown.reshape(-1, *images.shape[1:]))], steps), caption)
    chart, area = charts.axes()
    area.plot(places, predicted[:40].T, color=charts.COLORS[1], linewidth=0.7, alpha=0.6)
    area.plot(places, predicted.mean(0), color=charts.COLORS[0], linewidth=2.5, label="mean of all samples")
    area.set_xlabel("step along the vector, in lengths of a random z")
    area.set_ylabel(f"{attribute}, predicted by the classifier")
    area.legend(frameon=False)
    result.chart(chart, f"{attribute} along the vector: 40 samples and the mean", "-curve")
    measure = "accuracy" if head.kind == "bool" else "R²"
    result.write(
        dict(numbers),
        summary=(
            f"The vector points from the average z of the {extreme} samples with the least {attribute} to that of the "
            f"{extreme} samples with the most. Added to {len(fresh)} other samples in {steps} steps, it changes "
            f"{attribute} from {numbers['from']:.2f} to {numbers['to']:.2f} on average. {attribute} rises at "
            f"{numbers['steps_that_rise']:.0%} of all steps, and at every step for "
            f"{numbers['samples_that_always_rise']:.0%} of the samples (mean rank correlation "
            f"{numbers['rank_correlation']:.2f}). The classifier has {measure} {head.score:.2f} on held-out images."
        ),
    )
    return numbers


def _spearman(values: NDArray[np.float32]) -> float:
    """Return the rank correlation of `values` with their position."""
    ranks = np.argsort(np.argsort(values))
    return float(np.corrcoef(ranks, np.arange(len(values)))[0, 1])
