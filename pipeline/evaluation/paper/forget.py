"""`dcgan-eval forget`: drop the feature maps of G that draw an object, and look what is left (Figure 6).

The paper: on the second-highest convolution's maps, a logistic regression learns which positions lie inside
boxes drawn around the object; every map with a positive weight is dropped everywhere.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.common.errors import DataError, UsageError
from pipeline.common.randomness import Purpose, permutation
from pipeline.evaluation import charts, inputs
from pipeline.evaluation.classifier import get_classifier
from pipeline.evaluation.confidence import wilson
from pipeline.evaluation.images import Pixels
from pipeline.evaluation.inputs import device
from pipeline.evaluation.options import NUMBERED_SAMPLES
from pipeline.evaluation.paper.sample_pool import images_chunked
from pipeline.evaluation.paper.walks import Z, draw
from pipeline.evaluation.results import Result
from pipeline.model.networks import Generator
from pipeline.model.sampling import BLOCK, to_uint8

MEASURED = 1_024
"""Fresh samples on which the dropout is judged."""
OUTSIDE_EACH = 3
"""Positions outside the boxes for each one inside, drawn at random from the same samples."""
FEWEST = 8
"""Samples with boxes."""


@dataclass(frozen=True)
class Box:
    """Where the object is in sample `index` of the analyses' sequence; pixels, right and bottom excluded."""

    index: int
    left: int
    top: int
    right: int
    bottom: int


def run_forget(
    out: Path,
    *,
    ckpt: str,
    boxes: Path | None,
    attribute: str | None,
    region: tuple[int, int, int, int] | None,
    classifier: str | None,
    data: str | None,
    samples: int,
    strength: float,
    seed: int,
) -> dict[str, float]:
    """Write forget.json and a picture of samples with and without the maps, and return the numbers."""
    loaded, subject = inputs.generator(ckpt)
    settings: dict[str, Any] = {
        "boxes": str(boxes) if boxes else None,
        "attribute": attribute,
        "region": region,
        "samples": samples,
        "strength": strength,
        "seed": seed,
    }
    judge = get_classifier(classifier, data, out) if attribute is not None else None
    if judge is not None and attribute is not None and judge.head(attribute).kind != "bool":
        raise UsageError(f"--attribute {attribute}: is a number; expected something that is there or not")
    size = loaded.config.image_size
    if region is not None and max(region) > size:
        raise UsageError(f"--region {','.join(map(str, region))}: not inside an image of {size}x{size} pixels")
    result = Result("forget", out, subject, settings=settings)
    if boxes is not None:
        drawn = read_boxes(boxes, size)
    elif judge is not None and attribute is not None and region is not None:
        images = images_chunked(loaded.generator, draw(loaded.config, seed, 0, samples), "looking for the object")
        drawn = [Box(int(i), *region) for i in np.flatnonzero(judge.read(images)[attribute] > 0.9)]
    else:
        raise UsageError(
            "where is the object? Give --boxes FILE, or --attribute NAME with --region LEFT,TOP,RIGHT,BOTTOM"
        )
    with_boxes = len({box.index for box in drawn})
    if with_boxes < FEWEST:
        raise DataError(
            f"boxes in only {with_boxes} samples: too few to tell the object's maps from others; expected {FEWEST}"
        )

    weights, accuracy = object_maps(loaded.generator, drawn, seed)
    dropped = np.flatnonzero(weights > 0)
    if len(dropped) == 0:
        raise DataError("no feature map is more active inside the boxes than outside: nothing to drop")
    rng = permutation(len(weights), seed, Purpose.ANALYSIS, lane=9 << 32)
    control = rng[: len(dropped)]
    start = max(samples, max(box.index for box in drawn) + 1)
    fresh = draw(loaded.config, seed, start, MEASURED)
    before = images_chunked(loaded.generator, fresh, "samples")
    after = without_maps(loaded.generator, dropped, fresh, strength)
    other = without_maps(loaded.generator, control, fresh, strength)

    numbers = {"maps": float(len(weights)), "dropped": float(len(dropped)), "accuracy": accuracy}
    shown = np.arange(12)
    summary = (
        f"A logistic regression tells positions inside {len(drawn)} boxes from others with an accuracy of "
        f"{accuracy:.1%} by the {len(weights)} maps of G's second-highest convolution; {len(dropped)} of them have "
        "positive weights and were dropped."
    )
    if judge is not None and attribute is not None:
        there = {name: judge.read(x)[attribute] > 0.5 for name, x in
                 (("before", before), ("after", after), ("control", other))}  # fmt: skip
        numbers |= {f"share_{name}": float(found.mean()) for name, found in there.items()}
        had = there["before"]
        if not had.any():
            raise DataError(f"none of {MEASURED:,} fresh samples shows {attribute}: what is left cannot be measured")
        kept = float(there["after"][had].mean())
        low, high = wilson(kept, int(had.sum()))
        numbers |= {"kept": kept, "kept_control": float(there["control"][had].mean())}
        shown = np.flatnonzero(had)[:12]
        summary += (
            f" Of {int(had.sum())} fresh samples with {attribute}, {kept:.0%} still have it (95 % interval {low:.0%} "
            f"to {high:.0%}); when as many maps are dropped at random, {numbers['kept_control']:.0%} do."
        )
    groups = [
        ("samples", before[shown]),
        (f"without the {len(dropped)} maps of the object", after[shown]),
        (f"without {len(dropped)} random maps", other[shown]),
    ]
    result.picture(charts.sheet(groups, 12), "Samples with and without the object's feature maps")
    result.write(dict(numbers), summary=summary)
    return numbers


def object_maps(generator: Generator, boxes: Sequence[Box], seed: int) -> tuple[NDArray[np.float64], float]:
    """Return the logistic regression's weight of every map, and its accuracy on a fifth of the samples held out.

    Raises DataError when the boxes leave nothing outside.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    config = generator.config
    rows: list[NDArray[np.float32]] = []
    inside: list[NDArray[np.bool_]] = []
    group: list[NDArray[np.int64]] = []
    for number, index in enumerate(dict.fromkeys(box.index for box in boxes)):
        maps = generator.feature_maps(torch.from_numpy(draw(config, seed, index, 1)).to(device()))[0]
        shrink = config.image_size // maps.shape[1]
        mask = np.zeros(maps.shape[1:], bool)
        for box in boxes:  # what is outside of one may be inside another
            if box.index == index:
                mask[box.top // shrink : -(-box.bottom // shrink), box.left // shrink : -(-box.right // shrink)] = True
        order = permutation(int((~mask).sum()), seed, Purpose.ANALYSIS, lane=(10 << 32) + number)
        outside = np.flatnonzero(~mask.ravel())[order[: OUTSIDE_EACH * int(mask.sum())]]
        chosen = np.concatenate([np.flatnonzero(mask.ravel()), outside])
        rows.append(np.asarray(maps.flatten(1).T.cpu().numpy())[chosen])
        inside.append(mask.ravel()[chosen])
        group.append(np.full(len(chosen), number))
    x, y, numbers = np.concatenate(rows), np.concatenate(inside), np.concatenate(group)
    held = numbers % 5 == 4
    if y[~held].all():
        raise DataError("the boxes cover whole images: nothing is outside to compare with; draw them around the object")
    scaler = StandardScaler().fit(x[~held])
    model = LogisticRegression(C=0.1, max_iter=500, class_weight="balanced")
    model.fit(scaler.transform(x[~held]), y[~held])
    accuracy = float(model.score(scaler.transform(x[held]), y[held])) if held.any() else float("nan")
    return np.asarray(model.coef_[0]), accuracy


@torch.no_grad()
def without_maps(generator: Generator, dropped: NDArray[np.int64], z: Z, strength: float = 1.0) -> Pixels:
    """Return the images of z with the maps `dropped` scaled by 1 - strength, everywhere."""
    rows = torch.from_numpy(np.ascontiguousarray(dropped)).to(device())
    images = [
        to_uint8(generator.without_maps(torch.from_numpy(z[start : start + BLOCK]).to(device()), rows, strength)).cpu()
        for start in range(0, len(z), BLOCK)
    ]
    return np.asarray(torch.cat(images).numpy())


def read_boxes(path: Path, size: int) -> list[Box]:
    """Read `index,left,top,right,bottom` lines, with a heading. Raises DataError that names the line."""
    boxes = []
    try:
        with path.open(newline="") as file:
            for number, row in enumerate(csv.DictReader(file), start=2):
                try:
                    box = Box(*(int(row[key]) for key in ("index", "left", "top", "right", "bottom")))
                except (KeyError, TypeError, ValueError):
                    raise DataError(
                        f"{path}: line {number}: expected the columns index,left,top,right,bottom"
                    ) from None
                if not 0 <= box.index < NUMBERED_SAMPLES:
                    raise DataError(
                        f"{path}: line {number}: there is no sample {box.index}; expected 0 to {NUMBERED_SAMPLES - 1}"
                    )
                if not (0 <= box.left < box.right <= size and 0 <= box.top < box.bottom <= size):
                    raise DataError(f"{path}: line {number}: the box is not inside an image of {size}x{size} pixels")
                boxes.append(box)
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file; expected CSV") from None
    return boxes
