"""`dcgan-eval probe`: a linear SVM on D's features, raw pixels and an untrained D, and the control (section 5)."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UsageError
from pipeline.common.imaging import PIXEL_SCALE, Pixels
from pipeline.common.progress import Progress
from pipeline.common.randomness import Purpose, permutation
from pipeline.config import NetworkConfig
from pipeline.data.labeled import Labeled, load_labeled
from pipeline.evaluation import charts, inputs, published
from pipeline.evaluation.confidence import interval_of_mean, wilson
from pipeline.evaluation.paper.discriminator_features import (
    POOLED,
    features,
    measure_batchnorm,
    random_discriminator,
)
from pipeline.evaluation.paper.probing.linear_svm import balanced_draw, choose_c, fit
from pipeline.evaluation.paper.probing.supervised import Split, Trial, best_of, search, trials_file
from pipeline.evaluation.results import Result

CS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Values of C among which the best on the validation split is chosen."""
TUNING_DRAWS = 10
VALIDATION = 0.2
"""Share of the training images that C is chosen on."""
CONTROL = "supervised CNN"

Features = NDArray[np.float32]


@dataclass(frozen=True)
class Score:
    """Accuracy on the test images, with its 95 % interval."""

    accuracy: float
    low: float
    high: float
    c: float | None
    """Of the SVM; None of the control, which has none."""


@dataclass(frozen=True)
class Protocol:
    """How many labels are drawn, and how often."""

    labels: int | None
    """Class-balanced labels of a draw, or None for all labels, once."""
    draws: int = 100
    seed: int = 0
    control: int = 0
    """Trainings of a supervised CNN of D's architecture, each with settings of its own, whose best is shown too."""


def run_probe(
    out: Path, *, ckpt: str, data: str, label: str, test_data: str | None, limit: int | None, protocol: Protocol
) -> dict[str, float]:
    """Write probe.json and probe.png, and return the accuracies."""
    loaded, subject = inputs.discriminator(ckpt)
    everything = load_labeled(inputs.data_set(data, inputs.shape_of(loaded.config)), limit)
    whole = everything.having(label)
    without = len(everything.images) - len(whole.images)
    if test_data:
        learn, tested = whole, load_labeled(inputs.data_set(test_data, inputs.shape_of(loaded.config)))
        test = tested.having(label)
        without += len(tested.images) - len(test.images)
    else:
        learn, test = whole.split(max(1, len(whole.images) // 5))
    for labeled in (learn, test):
        inputs.check_fits(loaded.config, labeled.images.shape[1:])
    truth, truth_test = _classes(learn, label), _classes(test, label)
    next(_draws(truth[_parts(truth)[1]], protocol, 1, lane=0))  # refuses too few labels before any features are made
    settings = {
        "label": label,
        **asdict(protocol),
        "training_images": len(truth),
        "test_images": len(truth_test),
        "images_without_label": without,
    }
    result = Result("probe", out, subject, whole.description, settings)
    split = f"chosen on {VALIDATION:.0%} of the training images"
    result.protocol = {
        "features": f"all layers of D, max-pooled to {POOLED}x{POOLED}; BatchNorm measured anew, frozen",
        "svm": f"L2, one against the rest; C {split}" + (f", over {TUNING_DRAWS} draws" if protocol.labels else ""),
        "accuracy": f"mean of {protocol.draws} draws, 95 % interval of the mean" if protocol.labels else "of one fit",
    } | ({"control": f"the best of {protocol.control} trials, {split}"} if protocol.control else {})

    trained = measure_batchnorm(loaded.discriminator, learn.images)
    untrained = measure_batchnorm(random_discriminator(loaded.config, protocol.seed), learn.images)
    scores: dict[str, Score] = {}
    for name, network in (("discriminator", trained), ("untrained discriminator", untrained), ("raw pixels", None)):
        x, x_test = (_pixels(s.images) if network is None else features(network, s.images) for s in (learn, test))
        scores[name] = probe(x, truth, x_test, truth_test, protocol, name)
    trials = _control(out, loaded.config, learn, truth, test, truth_test, protocol) if protocol.control else []
    if trials:
        scores[CONTROL] = _score(best_of(trials), len(truth_test))
    majority = max(np.unique(truth_test, return_counts=True)[1]) / len(truth_test)

    chart = charts.bars(
        [label], {name: [s.accuracy] for name, s in scores.items()} | {"majority": [majority]}, "accuracy"
    )
    result.chart(chart, f"Accuracy of a linear SVM for '{label}'")
    best, pixels, chance = scores["discriminator"], scores["raw pixels"], scores["untrained discriminator"]
    draws = f"{protocol.labels:,} labels ({protocol.draws} draws)" if protocol.labels else f"{len(truth):,} labels"
    result.write(
        {name: asdict(score) for name, score in scores.items()}
        | {"majority": majority}
        | ({"trials": [trial.model_dump() for trial in trials]} if trials else {}),
        summary=(
            f"A linear SVM on the discriminator's features, trained with {draws}, predicts '{label}' correctly for "
            f"{best.accuracy:.1%} of the test images (95 % interval {best.low:.1%} to {best.high:.1%}). On raw pixels "
            f"it is {pixels.accuracy:.1%}, on an untrained discriminator {chance.accuracy:.1%}; "
            f"the most common class alone is {majority:.1%}."
            + (f" A supervised CNN of the same architecture reaches {scores[CONTROL].accuracy:.1%}." if trials else "")
            + (f" {without:,} images without this label were left out." if without else "")
        ),
        table=[
            ["features", "accuracy", "95 % interval", "C"],
            *(
                [n, f"{s.accuracy:.3f}", f"{s.low:.3f} to {s.high:.3f}", "" if s.c is None else f"{s.c:g}"]
                for n, s in scores.items()
            ),
            ["most common class", f"{majority:.3f}", "", ""],
        ],
        published=[asdict(entry) for entry in published.PROBE],
    )
    numbers = {name: score.accuracy for name, score in scores.items()} | {"majority": float(majority)}
    return numbers | ({"images without the label": without} if without else {})


def probe(
    x: Features,
    truth: NDArray[Any],
    x_test: Features,
    truth_test: NDArray[Any],
    protocol: Protocol,
    what: str = "probe",
) -> Score:
    """Choose C on a validation split, then fit and test: once with all labels, or over many draws of a few labels.

    Features (N, F), labels (N,). The interval is that of the mean over the draws, as in the paper, or Wilson's for a
    single fit.
    """
    held, rest = _parts(truth)
    draws = list(_draws(truth[rest], protocol, TUNING_DRAWS if protocol.labels else 1, lane=0))
    total = len(draws) + (protocol.draws if protocol.labels else 1)
    with Progress(f"probing: {what}", total, "fits") as progress:
        tuned = np.zeros(len(CS))
        for rows in draws:
            svms = fit(x[rest][rows], truth[rest][rows], CS)
            tuned += [svm.accuracy(x[held], truth[held]) for svm in svms]
            progress.advance(1)
        c = choose_c(list(zip(CS, tuned.tolist(), strict=True)))
        if protocol.labels is None:
            accuracy = fit(x, truth, [c])[0].accuracy(x_test, truth_test)
            progress.advance(1)
            return Score(accuracy, *wilson(accuracy, len(truth_test)), c)
        accuracies = []
        for rows in _draws(truth[rest], protocol, protocol.draws, lane=1):
            accuracies.append(fit(x[rest][rows], truth[rest][rows], [c])[0].accuracy(x_test, truth_test))
            progress.advance(1)
    return Score(float(np.mean(accuracies)), *interval_of_mean(accuracies), c)


def _control(
    out: Path,
    config: NetworkConfig,
    learn: Labeled,
    truth: NDArray[Any],
    test: Labeled,
    truth_test: NDArray[Any],
    protocol: Protocol,
) -> list[Trial]:
    """Return the control's trials. It learns from the SVM's first draw, and its settings are chosen as C is."""
    held, rest = _parts(truth)
    names = np.unique(np.concatenate([truth, truth_test]))
    classes, classes_test = np.searchsorted(names, truth), np.searchsorted(names, truth_test)
    rows = next(_draws(truth[rest], protocol, 1, lane=1))
    asked = asdict(protocol) | {"draws": 1, "control": None}  # more trials go on where fewer ended
    sources = [learn.description["fingerprint"], test.description["fingerprint"], len(truth), len(truth_test)]
    key = json.dumps([asked, sources, config.model_dump(mode="json")])
    return search(
        config,
        Split(learn.images[rest][rows], classes[rest][rows]),
        Split(learn.images[held], classes[held]),
        Split(test.images, classes_test),
        protocol.control,
        protocol.seed,
        out / trials_file(key),
        key,
    )


def _score(trial: Trial, images: int) -> Score:
    return Score(trial.test, *wilson(trial.test, images), None)


def _parts(truth: NDArray[Any]) -> tuple[slice, slice]:
    """Return the rows that C is chosen on, and the rows that the SVM is fitted to."""
    validation = max(1, int(len(truth) * VALIDATION))
    return slice(0, validation), slice(validation, None)


def _draws(truth: NDArray[Any], protocol: Protocol, count: int, *, lane: int) -> Iterator[NDArray[np.int64]]:
    for draw in range(count):
        order = permutation(len(truth), protocol.seed, Purpose.ANALYSIS, lane=(2 + lane << 32) + draw)
        yield order if protocol.labels is None else balanced_draw(truth, protocol.labels, order)


def _classes(labeled: Labeled, label: str) -> NDArray[Any]:
    values = labeled.label(label)
    if labeled.types[label] == "float":
        raise UsageError(f"--label {label}: it holds numbers; a probe needs classes (bool, int or str)")
    if len(np.unique(values)) < 2:
        raise UsageError(f"--label {label}: every image has the value {values[0]!s}; a probe needs two classes")
    return values


def _pixels(images: Pixels) -> Features:
    return (images.reshape(len(images), -1) / np.float32(PIXEL_SCALE) - 1).astype(np.float32)
