"""`dcgan-eval arithmetic`: averaged exemplars added and subtracted in latent space (section 6.3.2, Figure 7)."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import DataError
from pipeline.common.randomness import Purpose, permutation
from pipeline.evaluation import charts, inputs
from pipeline.evaluation.classifier import get_classifier
from pipeline.evaluation.confidence import wilson
from pipeline.evaluation.images import Pixels
from pipeline.evaluation.paper.attributes import Concept, check_known, in_words, outcome, parse, shows
from pipeline.evaluation.paper.sample_pool import POOL, Pool, images_chunked, make_pool
from pipeline.evaluation.paper.walks import Z
from pipeline.evaluation.results import Result
from pipeline.model.networks import Generator
from pipeline.model.sampling import images_of

NOISE = 0.25
"""The paper shows the neighborhood of a result by uniform noise of so much on every value of z."""
EXEMPLARS = 3
SHOWN_TRIALS = 4
GAP = 40


def write_contact_sheet(out: Path, *, ckpt: str, count: int, seed: int) -> Path:
    """Write a sheet of numbered samples from which a person picks exemplars for `--expression '#3,7,9 ...'`."""
    loaded, subject = inputs.generator(ckpt)
    images = make_pool(loaded.generator, None, count, seed).images
    result = Result("contact_sheet", out, subject, settings={"seed": seed, "count": count})
    rows = [(f"#{start} to #{min(start + 9, count - 1)}", images[start : start + 10]) for start in range(0, count, 10)]
    result.picture(charts.sheet(rows, 10), "Samples by index")
    return result.write({"count": count})


def run_arithmetic(
    out: Path, *, ckpt: str, expression: str, classifier: str | None, data: str | None, trials: int, seed: int
) -> dict[str, float]:
    """Write arithmetic.json and a picture in the manner of Figure 7, and return how often it gives what it should."""
    concepts = parse(expression)
    loaded, subject = inputs.generator(ckpt)
    by_index = all(concept.indices for concept in concepts)
    judge = None if by_index and classifier is None and data is None else get_classifier(classifier, data, out)
    if judge is not None:
        check_known(concepts, judge)
    settings = {"expression": expression, "trials": 1 if by_index else trials, "exemplars": EXEMPLARS, "seed": seed}
    result = Result("arithmetic", out, subject, settings=settings)
    highest = max((index for concept in concepts for index in concept.indices), default=0)
    pool = make_pool(loaded.generator, judge, max(POOL, highest + 1), seed)

    picks = [_pick(concepts, pool, trial, seed) for trial in range(1 if by_index else trials)]
    means = np.stack([[pool.z[rows].mean(0) for rows in pick] for pick in picks])  # (trials, concepts, dim)
    signs = np.array([concept.sign for concept in concepts], np.float32)
    results = np.einsum("c,tcd->td", signs, means)
    images = images_chunked(loaded.generator, results, "adding up")
    numbers: dict[str, float] = {}
    summary = f"{expression}: averaged exemplars, added up."
    wanted = outcome(concepts)
    if judge is not None and wanted:
        hits = shows(judge.read(images), wanted)
        low, high = wilson(float(hits.mean()), len(hits))
        last = images_of(loaded.generator, means[:, -1])
        numbers = {
            "share": float(hits.mean()),
            "low": low,
            "high": high,
            "base_rate": float(shows(pool.read, wanted).mean()),
            "last_term_alone": float(shows(judge.read(last), wanted).mean()),
            "in_pixel_space": float(shows(judge.read(_in_pixels(concepts, picks, pool)), wanted).mean()),
        }
        judged = ", ".join(f"{name} {judge.head(name).score:.3f}" for name in wanted)
        summary = (
            f"'{expression}' should give: {in_words(wanted)}. Over {trials} draws of {EXEMPLARS} exemplars a concept "
            f"it does in {numbers['share']:.0%} (95 % interval {low:.0%} to {high:.0%}), against "
            f"{numbers['base_rate']:.0%} of all samples, {numbers['last_term_alone']:.0%} for the last term alone and "
            f"{numbers['in_pixel_space']:.0%} for the same sum of pixels. Judged by a classifier with an accuracy "
            f"of {judged} on held-out real images."
        )
    for trial in range(min(SHOWN_TRIALS if not by_index else 1, len(picks))):
        sheet = _figure_7(loaded.generator, concepts, picks[trial], pool, means[trial], results[trial], seed + trial)
        caption = (
            f"{expression}. On the left a column a term: exemplars and, last, the average of their z. On the right the "
            f"sum of the averages amid its neighborhood (z moved by up to ±{NOISE}); below it the same sum of pixels."
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


def _pick(concepts: list[Concept], pool: Pool, trial: int, seed: int) -> list[NDArray[np.int64]]:
    """Return the rows of the pool that serve as each concept's exemplars in one trial; no row serves twice."""
    order = permutation(len(pool.z), seed, Purpose.ANALYSIS, lane=(8 << 32) + trial)
    used: set[int] = set()
    picked = []
    for concept in concepts:
        if concept.indices:
            rows = np.array(concept.indices)
        else:
            fitting = [row for row in order[concept.matches(pool.read)[order]].tolist() if row not in used]
            if len(fitting) < EXEMPLARS:
                raise DataError(
                    f"--expression: only {len(fitting)} of {len(pool.z)} samples show {concept.text!r} with confidence "
                    f"and {EXEMPLARS} are needed; a longer trained checkpoint or a commoner concept may do"
                )
            rows = np.array(fitting[:EXEMPLARS])
        used.update(rows.tolist())
        picked.append(rows)
    return picked


def _in_pixels(concepts: list[Concept], picks: list[list[NDArray[np.int64]]], pool: Pool) -> Pixels:
    """Return what the same arithmetic gives on the exemplars' pixels, which the paper shows to fail."""
    results = []
    for pick in picks:
        terms = [c.sign * pool.images[rows].astype(np.float32).mean(0) for c, rows in zip(concepts, pick, strict=True)]
        results.append(np.sum(terms, 0).clip(0, 255).astype(np.uint8))
    return np.stack(results)


def _figure_7(
    generator: Generator,
    concepts: list[Concept],
    pick: list[NDArray[np.int64]],
    pool: Pool,
    means: Z,
    total: Z,
    seed: int,
) -> Pixels:
    """Return one trial as the paper draws it: exemplars and their mean by column, the sum amid its neighborhood."""
    averaged = images_of(generator, means)
    tall = max(len(rows) for rows in pick)
    left = np.full((tall + 1, len(pick), *pool.images.shape[1:]), 255, np.uint8)
    for column, (rows, mean) in enumerate(zip(pick, averaged, strict=True)):
        left[: len(rows), column] = pool.images[rows]
        left[tall, column] = mean
    noise = np.random.default_rng(seed).uniform(-NOISE, NOISE, (9, len(total))).astype(np.float32)
    noise[4] = 0  # the result itself stands in the middle
    around = images_of(generator, total[None] + noise)
    ghost = _in_pixels(concepts, [pick], pool)
    right = np.concatenate([around, np.full_like(around[:1], 255), ghost])
    blocks = [charts.sheet([("", block)], width) for block, width in ((left.reshape(-1, *ghost.shape[1:]), len(pick)),
                                                                      (right, 3))]  # fmt: skip
    sheet = np.full((max(b.shape[0] for b in blocks), sum(b.shape[1] for b in blocks) + GAP, 3), 255, np.uint8)
    sheet[: blocks[0].shape[0], : blocks[0].shape[1]] = blocks[0]
    sheet[: blocks[1].shape[0], -blocks[1].shape[1] :] = blocks[1]
    return sheet
