"""`dcgan-eval nearest-class`: real images classified by their nearest sample (the paper's supplement, Table 3)."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.common.imaging import Pixels
from pipeline.common.progress import Progress
from pipeline.data.labeled import Labeled
from pipeline.evaluation import charts, inputs, published
from pipeline.evaluation.confidence import wilson
from pipeline.evaluation.device import opaque
from pipeline.evaluation.images import BLOCK
from pipeline.evaluation.metrics.class_samples import ClassSamples, Places, load_reals, open_class_samples
from pipeline.evaluation.nearest.nearest import Nearest, flat
from pipeline.evaluation.results import Result

SIZES = (1_000, 10_000, 100_000, 1_000_000)
"""Numbers of samples at which the error is measured, besides the last."""
TEST_SHARE = 5
"""Of real images without --test-data, every so many are the test images: the last."""
SHOWN = 12
"""Test images of a row of the picture."""

Blocks = Iterable[tuple[Pixels, Places]]


class NearestClass:
    """The class of the nearest reference of each test image, as references are given piece by piece."""

    def __init__(self, tests: Pixels, truth: Places) -> None:
        self.nearest_images = np.zeros_like(tests)
        self.errors: dict[int, float] = {}
        """Share of the test images that are classified wrongly, by the number of references."""
        self.wrong: NDArray[np.bool_] = np.ones(len(tests), np.bool_)
        self._truth, self._classes = truth, np.full(len(tests), -1)
        self._search = Nearest(flat(opaque(tests)))

    def compare(self, blocks: Blocks, count: int, what: str) -> None:
        """Compare with at most `count` references; show the progress under the name `what`."""
        sizes = {*(size for size in SIZES if size < count), count}
        with Progress(what, count) as progress:
            for images, places in blocks:
                edges = [size for size in sorted(sizes) if 0 < size - self._search.seen < len(images)]
                cuts = [edge - self._search.seen for edge in edges]
                for part, classes in zip(np.split(images, cuts), np.split(places, cuts), strict=True):
                    self._update(part, classes)
                    if self._search.seen in sizes:
                        self.errors[self._search.seen] = float(self.wrong.mean())
                progress.advance(len(images))
        self.errors[self._search.seen] = float(self.wrong.mean())  # of fewer files than `count`

    def _update(self, images: Pixels, places: Places) -> None:
        first = self._search.seen
        nearer = self._search.update(flat(opaque(images)))
        found = self._search.index[nearer] - first
        self._classes[nearer], self.nearest_images[nearer] = places[found], images[found]
        self.wrong = self._classes != self._truth


def run_nearest_class(
    out: Path,
    *,
    ckpt: str | None,
    samples: str | None,
    data: str,
    test_data: str | None,
    label: Sequence[str],
    count: int,
    limit: int | None,
    seed: int,
) -> dict[str, float]:
    """Write nearest-class.json and its pictures, and return the numbers.

    Raises UsageError for samples without labels and networks without `network.label`, DataError when `data` or
    `test_data` lacks one of the classes.
    """
    subject = open_class_samples(ckpt, samples, label)
    reals, places = load_reals(data, subject, limit)
    learn, known, test, truth = _split(subject, reals, places, test_data)
    settings = {
        "samples": count,
        "seed": seed,
        "test_data": test_data,
        "training_images": len(known),
        "test_images": len(truth),
        "distance": "Euclidean, of pixels",
    }
    result = Result("nearest-class", out, subject.description, reals.description, settings)
    result.protocol = {
        **inputs.preparations(subject.description, reals.description),
        "images": count,
        "training_images": len(known),
        "test_images": len(truth),
        "distance": "Euclidean, of pixels",
    }
    by_samples, by_reals = (NearestClass(test.images, truth) for _ in range(2))
    starts = range(0, len(known), BLOCK)
    blocks = ((learn.images[start : start + BLOCK], known[start : start + BLOCK]) for start in starts)
    by_reals.compare(blocks, len(known), "nearest real images")
    by_samples.compare(subject.blocks(count, seed), count, "nearest samples")

    (used, error), (used_reals, real_error) = list(by_samples.errors.items())[-1], list(by_reals.errors.items())[-1]
    low, high = wilson(error, len(truth))
    common = float(1 - np.bincount(truth).max() / len(truth))
    result.picture(_picture(test, by_samples), "Test images, and under each its nearest sample")
    if len(by_samples.errors) > 1:
        curves = {"samples": by_samples.errors, "real images": by_reals.errors}
        result.chart(_chart(curves), "Error by the number of samples, and of real images", "_by_number")
    titles = subject.network.class_titles
    present = [place for place in range(len(titles)) if (truth == place).any()]
    by_class = {
        titles[place]: {
            "test_images": int((truth == place).sum()),
            "error": float(by_samples.wrong[truth == place].mean()),
            "error_real": float(by_reals.wrong[truth == place].mean()),
        }
        for place in present
    }
    result.write(
        {
            "error": error,
            "interval": [low, high],
            "error_real": real_error,
            "most_common_class": common,
            "by_number_of_samples": {str(number): value for number, value in by_samples.errors.items()},
            "by_number_of_real_images": {str(number): value for number, value in by_reals.errors.items()},
            "by_class": by_class,
        },
        summary=f"The nearest of {used:,} samples has another class than {error:.2%} of {len(truth):,} real test "
        f"images (95 % interval {low:.2%} to {high:.2%}); the nearest of {used_reals:,} real training images, than "
        f"{real_error:.2%}. Always the most common class would be wrong for {common:.1%}.",
        table=[
            ["class", "test images", "error by samples", "by real images"],
            *([t, r["test_images"], f"{r['error']:.1%}", f"{r['error_real']:.1%}"] for t, r in by_class.items()),
        ],
        published=[asdict(entry) for entry in published.NEAREST_CLASS],
        note="Published of MNIST by a DCGAN (Radford et al. 2015, table 3): 2.98 % by 50,000 samples, 1.48 % by "
        "10 million; by real training images 3.1 %.",
    )
    return {"error": error, "error, real images": real_error, "error, most common class": common}


def _split(
    samples: ClassSamples, reals: Labeled, places: Places, test_data: str | None
) -> tuple[Labeled, Places, Labeled, Places]:
    """Return training images and their classes, and test images and theirs."""
    if test_data is None:
        held_out = max(1, len(places) // TEST_SHARE)
        learn, test = reals.split(held_out)
        return learn, places[:-held_out], test, places[-held_out:]
    test, truth = load_reals(test_data, samples, option="--test-data")
    return reals, places, test, truth


def _picture(test: Labeled, found: NearestClass) -> Pixels:
    rows: list[tuple[str, Pixels]] = []
    for name, chosen in (("rightly", ~found.wrong), ("wrongly", found.wrong)):
        shown = np.flatnonzero(chosen)[:SHOWN]
        if len(shown):
            rows += [(f"{chosen.sum():,} classified {name}, some of them", test.images[shown])]
            rows += [("their nearest samples", found.nearest_images[shown])]
    return charts.sheet(rows, SHOWN)


def _chart(curves: dict[str, dict[int, float]]) -> Figure:
    chart, area = charts.axes(6)
    for name, errors in curves.items():
        area.plot(list(errors), [100 * error for error in errors.values()], marker="o", label=name)
    area.set_xscale("log")
    area.set_xlabel("samples, or real images, to compare with")
    area.set_ylabel("classified wrongly, %")
    area.set_ylim(0, 115 * max(0.01, *(max(errors.values()) for errors in curves.values())))
    area.legend(frameon=False)
    return chart
