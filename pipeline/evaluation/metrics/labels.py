"""`dcgan-eval labels`: whether the samples of each class show it, by a classifier that has seen real images only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.common.imaging import Pixels
from pipeline.common.progress import Progress
from pipeline.common.ranks import ALONE
from pipeline.config import NetworkConfig
from pipeline.evaluation import charts, inputs
from pipeline.evaluation.classifier import BATCH, AttributeNet
from pipeline.evaluation.classifier_training import HELD_OUT, fit
from pipeline.evaluation.confidence import wilson
from pipeline.evaluation.device import device, to_network
from pipeline.evaluation.images import ArrayImages
from pipeline.evaluation.metrics.class_samples import Places, load_reals, open_class_samples
from pipeline.evaluation.metrics.extractors import Extractor
from pipeline.evaluation.metrics.feature_distances import Moments, frechet_distance
from pipeline.evaluation.metrics.feature_extraction import extract_features
from pipeline.evaluation.metrics.pyramids import SMALLEST_LEVEL
from pipeline.evaluation.metrics.swd import Sampling, distances, project
from pipeline.evaluation.results import Result
from pipeline.model.labels import label_values
from pipeline.model.sampling import GRID_CLASSES, GRID_COLUMNS

FEWEST = 32
"""Images that the distance of a class needs at least, of each set that it compares."""

Distances = dict[str, tuple[float, float]]
"""By metric, the distance of samples, and that of other real images, to the same real images."""


def measure_labels(
    out: Path,
    *,
    ckpt: str | None,
    samples: str | None,
    data: str,
    label: Sequence[str],
    count: int,
    seed: int,
    epochs: int,
    extractor: Extractor | None = None,
) -> dict[str, float]:
    """Write labels.json and its pictures, and return the numbers. `count` samples of each class are measured.

    With an extractor, also by the Fréchet distance of each class. Raises UsageError for samples without labels and
    networks without `network.label`, DataError when `data` lacks one of the classes.
    """
    subject = open_class_samples(ckpt, samples, label)
    names, titles = subject.network.classes, subject.network.class_titles
    reals, truth = load_reals(data, subject)
    settings: dict[str, Any] = {"samples_of_each_class": count, "seed": seed, "epochs": epochs, "held_out": HELD_OUT}
    if extractor is not None:
        settings |= {"extractor": extractor.name, "extractor_sha256": extractor.sha256, "resize": extractor.resize}
    result = Result("labels", out, subject.description, reals.description, settings)

    held_out = max(1, int(len(truth) * HELD_OUT))
    learn, test = reals.split(held_out)
    judge = _Judge(subject.network, learn.images, truth[:-held_out], seed=seed, epochs=epochs)
    on_reals = judge.predict(test.images)
    shown = _largest(truth, len(names))
    tally = _Tally(subject.network)
    rows, measured = [], dict[int, tuple[Distances, int]]()
    with Progress("samples of each class", len(names) * count) as progress:
        for place in range(len(names)):
            pixels = subject.of_class(place, count, seed)
            tally.add(place, judge.predict(pixels), on_reals[truth[-held_out:] == place])
            if place in shown:
                rows.append((f"{titles[place]}: {tally.share(place):.0%}", pixels[:GRID_COLUMNS]))
                measured[place] = _distances(pixels, reals.images[truth == place], seed, extractor)
            progress.advance(count)
    numbers = tally.numbers()
    result.protocol = {
        **inputs.preparations(subject.description, reals.description),
        "samples_of_each_class": count,
        "classifier": f"{epochs} passes over {len(learn.images):,} of the real images",
        "held_out_real_images": held_out,
        "swd": "pggan, 128 patches, 512 directions, of equally many images",
        **({} if extractor is None else extractor.protocol()),
        "comparable": False,
        "why_not": "the classifier is of this command",
    }
    result.picture(charts.sheet(rows, GRID_COLUMNS), "Samples of each class, and how many the classifier takes for it")
    places = sorted(shown)
    result.chart(
        charts.bars(
            [titles[place] for place in places],
            {
                "samples": [100 * tally.share(place) for place in places],
                "real images": [100 * tally.real_share(place) for place in places],
            },
            "classified as wanted, %",
        ),
        "Samples that the classifier takes for their class, and real images that it has not learned from",
        "_by_class",
    )
    result.write(
        {
            **numbers,
            "by_class": {titles[place]: tally.row(place) for place in range(len(names))},
            **_by_metric(titles, measured),
        },
        summary=f"A classifier takes {numbers['agreement']:.1%} of the samples for what they were made to be, and "
        f"{numbers['agreement, real images']:.1%} of {held_out:,} real images that it has not learned from.",
        table=_table(tally, titles, measured),
        note="Classes count alike. A distance of a class compares equally many samples, and other real images of the "
        "class, with the same half of the class's real images; it depends on their number.",
    )
    return numbers


class _Judge:
    """A classifier of the classes, or of several labels that are true or false, trained on real images."""

    def __init__(self, network: NetworkConfig, images: Pixels, places: Places, *, seed: int, epochs: int) -> None:
        self._several = len(network.label) > 1
        self._values = label_values(network, np.arange(len(network.classes)))
        _, width, channels = images.shape[1:]
        torch.manual_seed(seed)
        self._network = AttributeNet(channels, width, network.label_dim).to(device())
        targets = torch.from_numpy(self._values[places] if self._several else places)

        def loss(outputs: Tensor, rows: NDArray[np.int64]) -> Tensor:
            wanted = targets[rows].to(device())
            if self._several:
                return F.binary_cross_entropy_with_logits(outputs, wanted)
            return F.cross_entropy(outputs, wanted)

        fit(self._network, images, loss, seed=seed, epochs=epochs)
        self._network.eval().requires_grad_(False)

    def predict(self, images: Pixels) -> NDArray[np.int64]:
        """Return what is seen: the number of a class (N, 1), or of each label 0 or 1 (N, labels)."""
        starts = range(0, len(images), BATCH)
        outputs = [self._network(to_network(images[start : start + BATCH])).cpu() for start in starts]
        raw = torch.cat(outputs)
        seen: NDArray[np.int64] = ((raw > 0).long() if self._several else raw.argmax(1, keepdim=True)).numpy()
        return seen


class _Tally:
    """How much of what was wanted the classifier has seen, by class."""

    def __init__(self, network: NetworkConfig) -> None:
        self._label = network.label
        self._wanted = np.arange(len(network.classes))[:, None]
        if len(network.label) > 1:
            self._wanted = label_values(network, np.arange(len(network.classes))).astype(np.int64)
        self._right: dict[int, NDArray[np.bool_]] = {}
        self._right_of_reals: dict[int, NDArray[np.bool_]] = {}

    def add(self, place: int, seen: NDArray[np.int64], seen_of_reals: NDArray[np.int64]) -> None:
        """Take what was seen in the samples of a class, and in real images of it; there may be none of these."""
        self._right[place] = seen == self._wanted[place]
        self._right_of_reals[place] = seen_of_reals == self._wanted[place]

    def share(self, place: int) -> float:
        """Return the share of the samples of a class that are taken for it."""
        return float(self._right[place].all(1).mean())

    def real_share(self, place: int) -> float:
        """Return the same of real images; NaN without any."""
        right = self._right_of_reals[place]
        return float(right.all(1).mean()) if len(right) else float("nan")

    def row(self, place: int) -> dict[str, float | int | list[float] | None]:
        """Return the numbers of a class."""
        images, reals = len(self._right[place]), len(self._right_of_reals[place])
        return {
            "samples": images,
            "agreement": self.share(place),
            "interval": list(wilson(self.share(place), images)),
            "real_images": reals,
            "agreement_real": self.real_share(place) if reals else None,
        }

    def numbers(self) -> dict[str, float]:
        """Return the means over the classes: of all labels together and, of several, of each."""
        numbers = {
            "agreement": float(np.mean([self.share(place) for place in self._right])),
            "agreement, real images": float(np.nanmean([self.real_share(place) for place in self._right])),
        }
        for column, name in enumerate(self._label if len(self._label) > 1 else ()):
            for suffix, sets in (("", self._right), (", real images", self._right_of_reals)):
                means = [right[:, column].mean() for right in sets.values() if len(right)]
                numbers[f"{name}{suffix}"] = float(np.mean(means))
        return numbers


def _largest(truth: Places, classes: int) -> set[int]:
    """Return the classes that pictures show and SWD compares: the GRID_CLASSES with the most real images."""
    order = np.argsort(-np.bincount(truth, minlength=classes), kind="stable")
    return {*order[:GRID_CLASSES].tolist()}


def _distances(fakes: Pixels, reals: Pixels, seed: int, extractor: Extractor | None) -> tuple[Distances, int]:
    """Return the distances of samples, and of one half of the real images, to the other half; and images of each set.

    No distance of images too few; no SWD of images too small.
    """
    number = min(len(fakes), len(reals) // 2)
    if number < FEWEST:
        return {}, number
    target, other, ours = (ArrayImages(images[:number]) for images in (reals[::2], reals[1::2], fakes))
    found: Distances = {}
    if fakes.shape[1] >= SMALLEST_LEVEL:
        near, *far = (
            project(images, Sampling(seed), real=images is target, device=device()) for images in (target, ours, other)
        )
        found["swd"] = distances(near, far[0])["swd"], distances(near, far[1])["swd"]
    if extractor is not None:
        near_moments, *moments = (
            Moments.of(extract_features(images, extractor, ALONE, None).features) for images in (target, ours, other)
        )
        found["fid"] = frechet_distance(near_moments, moments[0]), frechet_distance(near_moments, moments[1])
    return found, number


def _metrics(measured: dict[int, tuple[Distances, int]]) -> list[str]:
    """Return the metrics that at least one class has, in their order."""
    return [name for name in ("swd", "fid") if any(name in found for found, _ in measured.values())]


def _by_metric(titles: Sequence[str], measured: dict[int, tuple[Distances, int]]) -> dict[str, Any]:
    """Return `swd_by_class`, and with an extractor `fid_by_class`."""
    return {
        f"{name}_by_class": {
            titles[place]: {name: found[name][0], "real_against_real": found[name][1], "images": number}
            for place, (found, number) in measured.items()
            if name in found
        }
        for name in ("swd", "fid")
        if name == "swd" or name in _metrics(measured)
    }


def _table(tally: _Tally, titles: Sequence[str], measured: dict[int, tuple[Distances, int]]) -> list[list[Any]]:
    metrics = _metrics(measured)
    headings = [heading for name in metrics for heading in (name.upper(), "of real images")]
    rows: list[list[Any]] = [["class", "samples", "agreement", "of real images", *headings, "images"]]
    for place, title in enumerate(titles):
        row, (found, number) = tally.row(place), measured.get(place, ({}, 0))
        real = row["agreement_real"]
        values = [value for name in metrics for value in found.get(name, (None, None))]
        shown = ["" if value is None else float(f"{value:.3g}") for value in values]
        shares = [f"{tally.share(place):.1%}", "" if real is None else f"{real:.1%}"]
        rows.append([title, row["samples"], *shares, *shown, number if found else ""])
    return rows
