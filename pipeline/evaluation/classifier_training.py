"""How the attribute classifier is trained on a labeled data set, scored on held-out images, and kept for reuse."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.common.errors import DataError, UsageError
from pipeline.common.imaging import Pixels
from pipeline.common.progress import Progress
from pipeline.common.randomness import Purpose, permutation, raw_bits
from pipeline.data.dataset import Dataset
from pipeline.data.labeled import Labeled, load_labeled
from pipeline.evaluation.classifier import FILE_NAME, AttributeNet, Classifier, Head, load_classifier
from pipeline.evaluation.device import device, to_network
from pipeline.evaluation.inputs import data_set
from pipeline.evaluation.results import Result

EPOCHS = 12
BATCH = 64
SHIFT = 4
"""Training images are shifted by up to so many pixels."""
JITTER = 0.1
"""Deviation of the random changes to their contrast and brightness."""
HELD_OUT = 0.2
"""Share of the images that the classifier is scored on, not trained on."""

Loss = Callable[[Tensor, NDArray[np.int64]], Tensor]
"""Outputs of a batch (BATCH, heads) and the numbers of its images (BATCH,) -> a scalar."""


def get_classifier(reference: str | None, data: str | None, out: Path, *, attributes: Iterable[str] = ()) -> Classifier:
    """Return the classifier that `--classifier` names, else the one in `out`, else a new one trained on `data`.

    One in `out` that was trained on another data set is trained anew. Raises UsageError before the training when the
    data set has no label for one of `attributes`.
    """
    if reference is not None:
        return load_classifier(reference)
    kept = out / FILE_NAME
    dataset = data_set(data) if data is not None else None
    if kept.exists():
        classifier = load_classifier(str(kept))
        if dataset is None or dataset.fingerprint() == classifier.data:
            return classifier
    if dataset is None:
        raise UsageError("no classifier: give --classifier FILE, or a labeled --data set to train one on")
    learned = [name for name, kind in dataset.labels.items() if kind in ("bool", "float")]
    for name in attributes:
        if name not in learned:
            raise UsageError(
                f"attribute {name!r}: a classifier trained on {dataset.location} would not predict it; it would "
                f"predict {', '.join(learned) or 'nothing'}"
            )
    return make_classifier(dataset, out, seed=0)


def make_classifier(dataset: Dataset, out: Path, *, seed: int, epochs: int = EPOCHS) -> Classifier:
    """Train a classifier on every bool and float label of a data set; write it and its scores into `out`."""
    labeled = load_labeled(dataset)
    learn, test = labeled.split(max(1, int(len(labeled.images) * HELD_OUT)))
    settings = {"epochs": epochs, "seed": seed, "training_images": len(learn.images), "held_out": len(test.images)}
    result = Result("classifier", out, {"kind": "attribute classifier"}, labeled.description, settings)
    classifier = train_classifier(learn, seed=seed, epochs=epochs)
    classifier.heads = {head.name: head for head in _scored(classifier, test)}
    classifier.save(out / FILE_NAME)
    heads = classifier.heads.values()
    rows = [
        [
            head.name,
            "accuracy" if head.kind == "bool" else "R²",
            round(head.score, 3),
            _baseline(head),
            int(np.isfinite(_numbers(labeled, head.name)).sum()),
        ]
        for head in heads
    ]
    bools = [head for head in heads if head.kind == "bool"]
    scores = ", ".join(f"{head.name} {head.score:.3f}" for head in bools)
    result.write(
        {head.name: head.score for head in heads},
        summary=f"Accuracy on {len(test.images):,} held-out images: {scores}." if bools else "",
        table=[["attribute", "measure", "held out", "baseline", "labeled images"], *rows],
    )
    return classifier


def train_classifier(labeled: Labeled, *, seed: int, epochs: int = EPOCHS) -> Classifier:
    """Return a classifier of every bool and float label. An image without a label adds nothing to that label's loss.

    Raises DataError when there are no such labels, or too few images.
    """
    heads = []
    for name, kind in labeled.types.items():
        if kind in ("bool", "float"):
            values = _numbers(labeled, name)
            present = values[np.isfinite(values)]
            if len(present) and present.std() > 0:
                heads.append(Head(name, kind, float(present.mean()), float(present.std())))
    if not heads:
        raise DataError("the data set has no bool or float label that varies, so there is nothing to learn")
    height, width, channels = labeled.images.shape[1:]
    torch.manual_seed(seed)
    network = AttributeNet(channels, min(height, width), len(heads)).to(device())
    targets = np.stack([_target(labeled, head) for head in heads], 1)
    is_bool = torch.tensor([head.kind == "bool" for head in heads], device=device())

    def loss(outputs: Tensor, rows: NDArray[np.int64]) -> Tensor:
        wanted = torch.from_numpy(targets[rows]).to(device())
        known = wanted.isfinite()
        wanted = torch.where(known, wanted, 0)  # before the loss: its gradient would be NaN as well
        errors = torch.where(
            is_bool,
            F.binary_cross_entropy_with_logits(outputs, wanted.clamp(0, 1), reduction="none"),
            0.5 * F.mse_loss(outputs, wanted, reduction="none"),
        )
        return (errors * known).mean(0).sum().div(len(heads))

    fit(network, labeled.images, loss, seed=seed, epochs=epochs)
    return Classifier(network, heads, (height, width, channels), labeled.description.get("fingerprint", ""))


def fit(network: AttributeNet, images: Pixels, loss: Loss, *, seed: int, epochs: int) -> None:
    """Train a classifier on images uint8 (N, H, W, C). Raises DataError when they are too few."""
    if len(images) < 2 * BATCH:
        raise DataError(f"{len(images)} labeled images are too few to train on: expected {2 * BATCH}")
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps_per_epoch = len(images) // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs * steps_per_epoch)
    with Progress("training the classifier", epochs * steps_per_epoch * BATCH) as progress:
        for epoch in range(epochs):
            order = permutation(len(images), seed, Purpose.ANALYSIS, lane=epoch)
            for step in range(steps_per_epoch):
                rows = order[step * BATCH : (step + 1) * BATCH]
                batch = _augmented(to_network(images[rows]), seed, epoch * steps_per_epoch + step)
                outputs = network(batch)
                optimizer.zero_grad()
                loss(outputs, rows).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                progress.advance(BATCH)


def _numbers(labeled: Labeled, name: str) -> NDArray[np.float64]:
    """Return a bool or float column as numbers; NaN where an image lacks the label."""
    return np.asarray(labeled.columns[name], np.float64)


def _target(labeled: Labeled, head: Head) -> NDArray[np.float32]:
    values = _numbers(labeled, head.name)
    return np.asarray(values if head.kind == "bool" else (values - head.mean) / head.deviation, np.float32)


def _augmented(images: Tensor, seed: int, step: int) -> Tensor:
    """Shift a batch and change its contrast and brightness a little, as a function of (seed, step)."""
    words = raw_bits(seed, Purpose.ANALYSIS, step, 2, lane=1 << 32)
    top, left = (int(word % np.uint64(2 * SHIFT + 1)) for word in words)
    size = images.shape[2:]
    padded = F.pad(images, (SHIFT, SHIFT, SHIFT, SHIFT), mode="replicate")
    moved = padded[:, :, top : top + size[0], left : left + size[1]]
    noise = torch.randn(2, len(images), 1, 1, 1, device=images.device) * JITTER
    return (moved * (1 + noise[0]) + noise[1]).contiguous(memory_format=torch.channels_last)


def _scored(classifier: Classifier, test: Labeled) -> list[Head]:
    """Return the heads with their scores on held-out images."""
    predictions = classifier.predict(test.images)
    scored = []
    for head in classifier.heads.values():
        truth, guess = _numbers(test, head.name), predictions[head.name].astype(np.float64)
        known = np.isfinite(truth)
        if not known.any():
            raise DataError(f"label {head.name}: none of {len(truth):,} held-out images has it, so it cannot be scored")
        truth, guess = truth[known], guess[known]
        if head.kind == "bool":
            score = float(((guess > 0.5) == (truth > 0.5)).mean())
        else:
            score = 1 - float(((guess - truth) ** 2).mean() / max(truth.var(), 1e-12))
        scored.append(replace(head, score=score))
    return scored


def _baseline(head: Head) -> float:
    """Return the score of always predicting the most common value (bool) or the mean (float)."""
    return round(max(head.mean, 1 - head.mean), 3) if head.kind == "bool" else 0.0
