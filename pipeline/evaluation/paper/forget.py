"""`dcgan-eval forget`: drop the feature maps of G that draw an object, and measure what is left (Figure 6).

As in section 6.3.1 of the paper, a logistic regression learns from maps of G which positions lie inside boxes around
the object. Every map with a positive weight is then dropped everywhere. The paper takes "the second highest convolution
layer", and drops 200 maps: more than the 128 that the last convolution reads, so its maps are the 256 before those.
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
from pipeline.common.imaging import Pixels
from pipeline.common.randomness import Purpose, permutation
from pipeline.evaluation import charts, inputs
from pipeline.evaluation.classifier import Classifier
from pipeline.evaluation.classifier_training import get_classifier
from pipeline.evaluation.confidence import wilson
from pipeline.evaluation.device import device
from pipeline.evaluation.options import NUMBERED_SAMPLES
from pipeline.evaluation.paper.sample_pool import images_with_progress
from pipeline.evaluation.paper.walks import Z, draw
from pipeline.evaluation.results import Result
from pipeline.model.networks import Generator
from pipeline.model.sampling import BLOCK, to_uint8

MEASURED = 1_024
"""Fresh samples on which the effect is measured."""
SHOWN = 12
"""Samples in the picture."""
CONFIDENT = 0.9
"""A sample has the object when its probability is above this."""
OUTSIDE_EACH = 3
"""Positions outside the boxes for each one inside, drawn at random from the same samples."""
FEWEST = 8
"""Samples with boxes that are needed."""


@dataclass(frozen=True)
class Box:
    """The place of the object in sample `index` of the analyses' sequence; pixels, right and bottom excluded."""

    index: int
    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class Detector:
    """Tells which images show an attribute."""

    classifier: Classifier
    attribute: str

    def probability(self, images: Pixels) -> NDArray[np.float32]:
        """Return the probability (N,) that each of the images uint8 (N, H, W, C) shows the attribute."""
        return self.classifier.predict(images)[self.attribute]


def run_forget(
    out: Path,
    *,
    ckpt: str,
    boxes: Path | None,
    attribute: str | None,
    region: tuple[int, int, int, int] | None,
    classifier_file: str | None,
    data: str | None,
    samples: int,
    strength: float,
    layer: int,
    seed: int,
    label: str | None = None,
) -> dict[str, float]:
    """Write forget.json and a picture of samples with and without the maps, and return the numbers.

    All samples of a conditional generator are of the class `label`.
    """
    loaded, subject = inputs.generator(ckpt, label)
    generator, shape = loaded.generator, loaded.config.image_shape
    settings: dict[str, Any] = {
        "boxes": str(boxes) if boxes else None,
        "attribute": attribute,
        "region": region,
        "samples": samples,
        "strength": strength,
        "layer": layer,
        "seed": seed,
    }
    if layer > (there := len(generator.activation_layers)):
        raise UsageError(f"--layer {layer}: the generator has maps of layers 1 to {there}, counted from the image")
    if region is not None and (max(region[::2]) > shape[1] or max(region[1::2]) > shape[0]):
        raise UsageError(f"--region {','.join(map(str, region))}: not inside an image of {shape[1]}x{shape[0]} pixels")
    if boxes is None and (attribute is None or region is None):
        raise UsageError(
            "the place of the object is missing: give --boxes FILE, or --attribute NAME with "
            "--region LEFT,TOP,RIGHT,BOTTOM"
        )
    drawn = [] if boxes is None else read_boxes(boxes, shape[1], shape[0])
    detector = None
    if attribute is not None:
        detector = _detector(attribute, get_classifier(classifier_file, data, out, attributes=[attribute]))
    result = Result("forget", out, subject, settings=settings)
    if boxes is None and detector is not None and region is not None:
        images = images_with_progress(generator, draw(loaded.config, seed, 0, samples), "looking for the object")
        drawn = [Box(int(index), *region) for index in np.flatnonzero(detector.probability(images) > CONFIDENT)]
    with_boxes = len({box.index for box in drawn})
    if with_boxes < FEWEST:
        raise DataError(
            f"boxes in only {with_boxes} samples: too few to tell the object's maps from others; expected {FEWEST}"
        )

    weights, accuracy = object_maps(generator, drawn, seed, layer)
    dropped = np.flatnonzero(weights > 0)
    if len(dropped) == 0:
        raise DataError("no feature map is more active inside the boxes than outside: there is none to drop")
    control = permutation(len(weights), seed, Purpose.ANALYSIS, lane=9 << 32)[: len(dropped)]
    fresh = draw(loaded.config, seed, max(samples, max(box.index for box in drawn) + 1), MEASURED)
    before = images_with_progress(generator, fresh, "samples")
    after = without_maps(generator, dropped, fresh, strength, layer)
    other = without_maps(generator, control, fresh, strength, layer)

    numbers = {"maps": float(len(weights)), "dropped": float(len(dropped)), "accuracy": accuracy}
    shown = np.arange(SHOWN)
    summary = (
        f"From the {len(weights)} feature maps of layer {layer}, counted from the image, a logistic regression tells "
        f"positions inside {len(drawn)} boxes from positions outside with an accuracy of {accuracy:.1%}. The "
        f"{len(dropped)} maps with positive weights were dropped."
    )
    table: list[list[str]] = []
    if detector is not None:
        shares, had = _shares(detector, before, after, other)
        numbers |= shares
        shown = np.flatnonzero(had)[:SHOWN]
        rates = [_with_interval(shares[f"share_{name}"], MEASURED) for name in ("before", "after", "control")]
        summary += (
            f" Of {MEASURED:,} fresh samples, the classifier sees {attribute} in {rates[0]} before, in {rates[1]} "
            f"without the maps, and in {rates[2]} without as many random ones. Of the {int(had.sum())} that had it, "
            f"{_with_interval(shares['kept'], int(had.sum()))} keep it, and {shares['kept_control']:.0%} without "
            "random maps."
        )
        table = [
            ["", f"samples with {attribute}", "of those that had it"],
            ["before", rates[0], ""],
            [f"without the {len(dropped)} maps of the object", rates[1], f"{shares['kept']:.0%}"],
            [f"without {len(dropped)} random maps", rates[2], f"{shares['kept_control']:.0%}"],
        ]
    groups = [
        ("samples", before[shown]),
        (f"without the {len(dropped)} maps of the object", after[shown]),
        (f"without {len(dropped)} random maps", other[shown]),
    ]
    result.picture(charts.sheet(groups, SHOWN), "Samples with and without the object's feature maps")
    result.write(dict(numbers), summary=summary, table=table)
    return numbers


def _with_interval(share: float, count: int) -> str:
    """Return a share of `count` samples, with its 95 % interval, in words."""
    low, high = wilson(share, count)
    return f"{share:.0%} ({low:.0%} to {high:.0%})"


def _detector(attribute: str, classifier: Classifier) -> Detector:
    """Raise UsageError unless the attribute is a bool that the classifier predicts."""
    if classifier.head(attribute).kind != "bool":
        raise UsageError(f"--attribute {attribute}: is a number; expected a yes-or-no attribute")
    return Detector(classifier, attribute)


def _shares(
    detector: Detector, before: Pixels, after: Pixels, control: Pixels
) -> tuple[dict[str, float], NDArray[np.bool_]]:
    """Return how many samples show the attribute, how many of those keep it, and which show it at first."""
    shows = {
        name: detector.probability(images) > 0.5
        for name, images in (("before", before), ("after", after), ("control", control))
    }
    had = shows["before"]
    if not had.any():
        raise DataError(f"none of {len(had):,} fresh samples shows {detector.attribute}: nothing to measure")
    shares = {f"share_{name}": float(found.mean()) for name, found in shows.items()}
    kept = {"kept": float(shows["after"][had].mean()), "kept_control": float(shows["control"][had].mean())}
    return shares | kept, had


def object_maps(
    generator: Generator, boxes: Sequence[Box], seed: int, layer: int = 1
) -> tuple[NDArray[np.float64], float]:
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
        maps = generator.feature_maps(torch.from_numpy(draw(config, seed, index, 1)).to(device()), layer)[0]
        pixels = config.image_shape[0] // maps.shape[1]
        mask = np.zeros(maps.shape[1:], bool)
        for box in boxes:  # a position outside one box may be inside another
            if box.index == index:
                mask[box.top // pixels : -(-box.bottom // pixels), box.left // pixels : -(-box.right // pixels)] = True
        order = permutation(int((~mask).sum()), seed, Purpose.ANALYSIS, lane=(10 << 32) + number)
        outside = np.flatnonzero(~mask.ravel())[order[: OUTSIDE_EACH * int(mask.sum())]]
        chosen = np.concatenate([np.flatnonzero(mask.ravel()), outside])
        rows.append(np.asarray(maps.flatten(1).T.cpu().numpy())[chosen])
        inside.append(mask.ravel()[chosen])
        group.append(np.full(len(chosen), number))
    x, y, numbers = np.concatenate(rows), np.concatenate(inside), np.concatenate(group)
    held = numbers % 5 == 4
    if y[~held].all():
        raise DataError("the boxes cover whole images, so no position is outside; draw them around the object")
    scaler = StandardScaler().fit(x[~held])
    model = LogisticRegression(C=0.1, max_iter=500, class_weight="balanced")
    model.fit(scaler.transform(x[~held]), y[~held])
    accuracy = float(model.score(scaler.transform(x[held]), y[held])) if held.any() else float("nan")
    return np.asarray(model.coef_[0]), accuracy


@torch.no_grad()
def without_maps(
    generator: Generator, dropped: NDArray[np.int64], z: Z, strength: float = 1.0, layer: int = 1
) -> Pixels:
    """Return the images of z (N, latent_dim) with the maps `dropped` scaled by 1 - strength: uint8 (N, H, W, C)."""
    rows = torch.from_numpy(np.ascontiguousarray(dropped)).to(device())
    blocks = (torch.from_numpy(z[start : start + BLOCK]).to(device()) for start in range(0, len(z), BLOCK))
    images = [to_uint8(generator.without_maps(block, rows, strength, layer)).cpu() for block in blocks]
    return np.asarray(torch.cat(images).numpy())


def read_boxes(path: Path, width: int, height: int) -> list[Box]:
    """Read a CSV with the columns index,left,top,right,bottom. Raises DataError that names the line."""
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
                if not (0 <= box.left < box.right <= width and 0 <= box.top < box.bottom <= height):
                    raise DataError(f"{path}: line {number}: the box is not inside an image of {width}x{height} pixels")
                boxes.append(box)
    except (UnicodeDecodeError, csv.Error):
        raise DataError(f"{path}: not a text file; expected CSV") from None
    return boxes
