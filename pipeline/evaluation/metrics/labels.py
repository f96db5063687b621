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
from pipeline.config import NetworkConfig
from pipeline.evaluation import charts
from pipeline.evaluation.classifier import BATCH, AttributeNet
from pipeline.evaluation.classifier_training import HELD_OUT, fit
from pipeline.evaluation.confidence import wilson
from pipeline.evaluation.device import device, to_network
from pipeline.evaluation.images import ArrayImages
from pipeline.evaluation.metrics.class_samples import Places, load_reals, open_class_samples
from pipeline.evaluation.metrics.swd import SMALLEST_LEVEL, Sampling, distances, project
from pipeline.evaluation.results import Result
from pipeline.model.labels import label_values
from pipeline.model.sampling import GRID_CLASSES, GRID_COLUMNS

FEWEST = 32
"""Images that the SWD of a class needs at least, of each set that it compares."""


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
) -> dict[str, float]:
    """Write labels.json and its pictures, and return the numbers. `count` samples of each class are measured.

    Raises UsageError for samples without labels and networks without `network.label`, DataError when `data` lacks one
    of the classes.
    """
    subject = open_class_samples(ckpt, samples, label)
    names, titles = subject.network.classes, subject.network.class_titles
    reals, truth = load_reals(data, subject)
    settings = {"samples_of_each_class": count, "seed": seed, "epochs": epochs, "held_out": HELD_OUT}
    result = Result("labels", out, subject.description, reals.description, settings)

    held_out = max(1, int(len(truth) * HELD_OUT))
    learn, test = reals.split(held_out)
    judge = _Judge(subject.network, learn.images, truth[:-held_out], seed=seed, epochs=epochs)
    on_reals = judge.predict(test.images)
    shown = _largest(truth, len(names))
    tally = _Tally(subject.network)
    rows, swd = [], dict[int, tuple[float, float, int]]()
    with Progress("samples of each class", len(names) * count) as progress:
        for place in range(len(names)):
            pixels = subject.of_class(place, count, seed)
            tally.add(place, judge.predict(pixels), on_reals[truth[-held_out:] == place])
            if place in shown:
                rows.append((f"{titles[place]}: {tally.share(place):.0%}", pixels[:GRID_COLUMNS]))
                if measured := _class_swd(pixels, reals.images[truth == place], seed):
                    swd[place] = measured
            progress.advance(count)
    numbers = tally.numbers()
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
            "swd_by_class": {
                titles[place]: {"swd": ours, "real_against_real": theirs, "images": number}
                for place, (ours, theirs, number) in swd.items()
            },
        },
        summary=f"A classifier takes {numbers['agreement']:.1%} of the samples for what they were made to be, and "
        f"{numbers['agreement, real images']:.1%} of {held_out:,} real images that it has not learned from.",
        table=_table(tally, titles, swd),
        note="Classes count alike. SWD of a class compares equally many samples, and other real images of the class, "
        "with the same half of the class's real images; it depends on their number.",
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


def _class_swd(fakes: Pixels, reals: Pixels, seed: int) -> tuple[float, float, int] | None:
    """Return the SWD of samples, and of one half of the real images, to the other half, and how many each set has.

    None for images too few or too small.
    """
    number = min(len(fakes), len(reals) // 2)
    if number < FEWEST or fakes.shape[1] < SMALLEST_LEVEL:
        return None
    halves = reals[::2][:number], reals[1::2][:number]
    target, other, ours = (
        project(ArrayImages(images), Sampling(seed), real=real, device=device())
        for images, real in ((halves[0], True), (halves[1], False), (fakes[:number], False))
    )
    return distances(target, ours)["swd"], distances(target, other)["swd"], number


def _table(tally: _Tally, titles: Sequence[str], swd: dict[int, tuple[float, float, int]]) -> list[list[Any]]:
    rows: list[list[Any]] = [["class", "samples", "agreement", "of real images", "SWD", "of real images", "images"]]
    for place, title in enumerate(titles):
        row, measured = tally.row(place), swd.get(place)
        real = row["agreement_real"]
        distance = [round(measured[0], 1), round(measured[1], 1), measured[2]] if measured else ["", "", ""]
        shares = [f"{tally.share(place):.1%}", "" if real is None else f"{real:.1%}"]
        rows.append([title, row["samples"], *shares, *distance])
    return rows
