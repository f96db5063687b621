"""`dcgan-eval arithmetic`: averaged exemplars added and subtracted in latent space (section 6.3.2, Figure 7)."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import DataError
from pipeline.common.imaging import Pixels
from pipeline.common.randomness import Purpose, permutation
from pipeline.evaluation import charts, inputs
from pipeline.evaluation.classifier_training import get_classifier
from pipeline.evaluation.confidence import wilson
from pipeline.evaluation.paper.attributes import Concept, check_known, in_words, outcome, parse, shows
from pipeline.evaluation.paper.sample_pool import POOL_SIZE, SamplePool, images_with_progress, make_sample_pool
from pipeline.evaluation.paper.walks import NOISE, Z
from pipeline.evaluation.results import Result
from pipeline.model.networks import Generator
from pipeline.model.sampling import images_of

EXEMPLARS = 3
"""Exemplars averaged for each concept."""
SHOWN_TRIALS = 4
GAP = 40
"""Pixels between the two halves of a picture."""


def write_contact_sheet(out: Path, *, ckpt: str, count: int, seed: int, label: str | None = None) -> Path:
    """Write a sheet of numbered samples, from which a person picks exemplars for `--expression '#3,7,9 ...'`."""
    loaded, subject = inputs.generator(ckpt, label)
    images = make_sample_pool(loaded.generator, None, count, seed).images
    result = Result("contact_sheet", out, subject, settings={"seed": seed, "count": count})
    rows = [(f"#{start} to #{min(start + 9, count - 1)}", images[start : start + 10]) for start in range(0, count, 10)]
    result.picture(charts.sheet(rows, 10), "Samples by index")
    return result.write({"count": count})


def run_arithmetic(
    out: Path,
    *,
    ckpt: str,
    expression: str,
    classifier_file: str | None,
    data: str | None,
    trials: int,
    seed: int,
    label: str | None = None,
) -> dict[str, float]:
    """Write arithmetic.json and pictures like Figure 7; return how often the result shows the wanted attributes.

    All samples of a conditional generator are of the class `label`.
    """
    concepts = parse(expression)
    loaded, subject = inputs.generator(ckpt, label)
    by_index = all(concept.indices for concept in concepts)
    unneeded = by_index and classifier_file is None and data is None
    named = [name for concept in concepts for name, _ in concept.wanted]
    classifier = None if unneeded else get_classifier(classifier_file, data, out, attributes=named)
    if classifier is not None:
        check_known(concepts, classifier)
    settings = {"expression": expression, "trials": 1 if by_index else trials, "exemplars": EXEMPLARS, "seed": seed}
    result = Result("arithmetic", out, subject, settings=settings)
    highest = max((index for concept in concepts for index in concept.indices), default=0)
    pool = make_sample_pool(loaded.generator, classifier, max(POOL_SIZE, highest + 1), seed)

    picks = [_pick(concepts, pool, trial, seed) for trial in range(1 if by_index else trials)]
    means = np.stack([[pool.z[rows].mean(0) for rows in pick] for pick in picks])  # (trials, concepts, dim)
    signs = np.array([concept.sign for concept in concepts], np.float32)
    results = np.einsum("c,tcd->td", signs, means)
    images = images_with_progress(loaded.generator, results, "adding exemplars")
    numbers: dict[str, float] = {}
    summary = f"{expression}: the sum of averaged exemplars."
    wanted = outcome(concepts)
    if classifier is not None and wanted:
        hits = shows(classifier.predict(images), wanted)
        low, high = wilson(float(hits.mean()), len(hits))
        last = images_of(loaded.generator, means[:, -1])
        numbers = {
            "share": float(hits.mean()),
            "low": low,
            "high": high,
            "base_rate": float(shows(pool.predictions, wanted).mean()),
            "last_term_alone": float(shows(classifier.predict(last), wanted).mean()),
            "in_pixel_space": float(shows(classifier.predict(_in_pixels(concepts, picks, pool)), wanted).mean()),
        }
        scores = ", ".join(f"{name} {classifier.head(name).score:.3f}" for name in wanted)
        summary = (
            f"'{expression}' should give: {in_words(wanted)}. Of {trials} draws of {EXEMPLARS} exemplars a concept, "
            f"{numbers['share']:.0%} do (95 % interval {low:.0%} to {high:.0%}), against "
            f"{numbers['base_rate']:.0%} of all samples, {numbers['last_term_alone']:.0%} for the last term alone and "
            f"{numbers['in_pixel_space']:.0%} for the same sum of pixels. The accuracy of the classifier on held-out "
            f"real images: {scores}."
        )
    for trial in range(min(SHOWN_TRIALS if not by_index else 1, len(picks))):
        sheet = _figure_7(loaded.generator, concepts, picks[trial], pool, means[trial], results[trial], seed + trial)
        caption = (
            f"{expression}. Left: one column for each term, with its exemplars and, last, the average of their z. "
            f"Right: the sum of the averages in the middle of its neighborhood (z moved by up to ±{NOISE}), and below "
            "it the same sum of pixels."
        )
        result.picture(sheet, caption if trial == 0 else "Another draw of exemplars.", f"-{trial + 1}")
    result.write(dict(numbers), summary=summary, table=_table(numbers))
    return numbers


def _table(numbers: dict[str, float]) -> list[list[Any]]:
    named = {
        "share": "the sum of averaged z",
        "base_rate": "any sample",
        "last_term_alone": "the last term's average alone",
        "in_pixel_space": "the same sum of pixels",
    }
    rows = [[text, f"{numbers[key]:.3f}"] for key, text in named.items() if key in numbers]
    return [["image", "share with the wanted attributes"], *rows] if rows else []


def _pick(concepts: list[Concept], pool: SamplePool, trial: int, seed: int) -> list[NDArray[np.int64]]:
    """Return the rows of the pool that are each concept's exemplars in one trial; no row is used twice."""
    order = permutation(len(pool.z), seed, Purpose.ANALYSIS, lane=(8 << 32) + trial)
    used: set[int] = set()
    picked = []
    for concept in concepts:
        if concept.indices:
            rows = np.array(concept.indices)
        else:
            fitting = [row for row in order[concept.matches(pool.predictions)[order]].tolist() if row not in used]
            if len(fitting) < EXEMPLARS:
                raise DataError(
                    f"--expression: {len(fitting)} of {len(pool.z)} samples show {concept.text!r} with confidence, "
                    f"expected at least {EXEMPLARS}; use a checkpoint that was trained longer, or a more common concept"
                )
            rows = np.array(fitting[:EXEMPLARS])
        used.update(rows.tolist())
        picked.append(rows)
    return picked


def _in_pixels(concepts: list[Concept], picks: list[list[NDArray[np.int64]]], pool: SamplePool) -> Pixels:
    """Return the same sums of the exemplars' pixels, which the paper shows to fail: uint8 (trials, H, W, C)."""
    results = []
    for pick in picks:
        terms = [c.sign * pool.images[rows].astype(np.float32).mean(0) for c, rows in zip(concepts, pick, strict=True)]
        results.append(np.sum(terms, 0).clip(0, 255).astype(np.uint8))
    return np.stack(results)


def _figure_7(
    generator: Generator,
    concepts: list[Concept],
    pick: list[NDArray[np.int64]],
    pool: SamplePool,
    means: Z,
    total: Z,
    seed: int,
) -> Pixels:
    """Return one trial as the paper draws it: a column for each term, and the sum in the middle of its neighborhood."""
    averaged = images_of(generator, means)
    tall = max(len(rows) for rows in pick)
    left = np.full((tall + 1, len(pick), *pool.images.shape[1:]), 255, np.uint8)
    for column, (rows, mean) in enumerate(zip(pick, averaged, strict=True)):
        left[: len(rows), column] = pool.images[rows]
        left[tall, column] = mean
    noise = np.random.default_rng(seed).uniform(-NOISE, NOISE, (9, len(total))).astype(np.float32)
    noise[4] = 0  # the result itself is in the middle
    around = images_of(generator, total[None] + noise)
    ghost = _in_pixels(concepts, [pick], pool)
    right = np.concatenate([around, np.full_like(around[:1], 255), ghost])
    terms = charts.sheet([("", left.reshape(-1, *ghost.shape[1:]))], len(pick))
    outcomes = charts.sheet([("", right)], 3)
    height, width = max(len(terms), len(outcomes)), terms.shape[1] + GAP + outcomes.shape[1]
    sheet = np.full((height, width, 3), 255, np.uint8)
    sheet[: len(terms), : terms.shape[1]] = terms
    sheet[: len(outcomes), -outcomes.shape[1] :] = outcomes
    return sheet
