"""The judge: a small network that reads attributes off an image, trained on a labeled data set."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.common.errors import DataError, UsageError
from pipeline.common.progress import Progress
from pipeline.common.randomness import Purpose, permutation, raw_bits
from pipeline.common.storage import Store, write_atomic
from pipeline.data.dataset import Dataset, open_dataset
from pipeline.data.labeled import Labeled, load_labeled
from pipeline.evaluation.images import Pixels
from pipeline.evaluation.inputs import device
from pipeline.evaluation.results import Result
from pipeline.model.sampling import to_float

FILE_NAME = "classifier.safetensors"
KIND = "attributes"
WIDTH = 24
EPOCHS = 12
BATCH = 64
SHIFT = 4
"""Training images are moved by up to so many pixels and their contrast and brightness varied by a tenth."""
HELD_OUT = 0.2


@dataclass(frozen=True)
class Head:
    """One attribute that the classifier reads."""

    name: str
    kind: str
    """`bool` (a probability) or `float` (a value)."""
    mean: float
    """Of the training labels: the base rate, or the center of the values."""
    deviation: float
    score: float = float("nan")
    """On held-out images: accuracy of a bool, R squared of a float."""


class AttributeNet(nn.Module):
    """Images (N, channels, size, size) float in [-1, 1] -> one number a head (N, heads), logits or standardized."""

    def __init__(self, channels: int, size: int, heads: int) -> None:
        super().__init__()
        widths = [(channels, WIDTH, 2), (WIDTH, 2 * WIDTH, 2), (2 * WIDTH, 4 * WIDTH, 2), (4 * WIDTH, 4 * WIDTH, 1)]
        if size >= 64:
            widths.append((4 * WIDTH, 8 * WIDTH, 2))
        layers: list[nn.Module] = []
        for inputs, outputs, stride in widths:
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.heads = nn.Sequential(nn.Dropout(0.3), nn.Linear(widths[-1][1] * 16, heads))

    def forward(self, images: Tensor) -> Tensor:
        read: Tensor = self.heads(self.trunk(images))
        return read


class Classifier:
    """A trained AttributeNet and what its outputs mean."""

    def __init__(self, network: AttributeNet, heads: list[Head], shape: tuple[int, int, int], data: str) -> None:
        self.network = network.to(device()).eval().requires_grad_(False)
        self.heads = {head.name: head for head in heads}
        self.shape = shape
        self.data = data
        """Fingerprint of the data set that it learned from."""

    def read(self, images: Pixels) -> dict[str, NDArray[np.float32]]:
        """Return a probability for every bool and a value for every float attribute of uint8 NHWC images."""
        if images.shape[1:] != self.shape:
            raise UsageError(f"the classifier reads images of shape {self.shape}, these are {images.shape[1:]}")
        outputs = [self.network(to_network(images[start : start + 256])) for start in range(0, len(images), 256)]
        raw = torch.cat(outputs).cpu() if outputs else torch.zeros(0, len(self.heads))
        result = {}
        for index, head in enumerate(self.heads.values()):
            column = raw[:, index]
            values = torch.sigmoid(column) if head.kind == "bool" else column * head.deviation + head.mean
            result[head.name] = values.numpy()
        return result

    def head(self, name: str) -> Head:
        """Return what is known of an attribute. Raises UsageError that names those there are."""
        if name not in self.heads:
            raise UsageError(f"attribute {name!r}: the classifier does not read it; it reads {', '.join(self.heads)}")
        return self.heads[name]

    def features(self, images: Pixels) -> NDArray[np.float32]:
        """Return the trunk's features (N, F) of uint8 NHWC images."""
        parts = [self.network.trunk(to_network(images[start : start + 256])) for start in range(0, len(images), 256)]
        return np.asarray(torch.cat(parts).cpu().numpy(), np.float32)

    def save(self, path: Path) -> None:
        """Write the weights with everything needed to read them again."""
        from safetensors.torch import save

        from pipeline.checkpoints.weights import METADATA_KEY

        state = {name: tensor.cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        heads = [asdict(head) for head in self.heads.values()]
        card = {"kind": KIND, "heads": heads, "shape": self.shape, "data": self.data}
        write_atomic(path, save(state, {METADATA_KEY: json.dumps(card)}))


def to_network(images: Pixels) -> Tensor:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [-1, 1], on the device."""
    return to_float(torch.from_numpy(np.ascontiguousarray(images)).to(device()))


def load_classifier(reference: str) -> Classifier:
    """Return a saved classifier. Raises DataError when the file is something else."""
    from pipeline.checkpoints.weights import deserialize

    folder, _, name = reference.rpartition("/")
    store = Store(folder or ("/" if reference.startswith("/") else "."))
    tensors, card = deserialize(store.read(name), store.path(name))
    if card.get("kind") != KIND:
        raise DataError(f"{reference}: not an attribute classifier; make one with `dcgan-eval classifier`")
    height, width, channels = card["shape"]
    network = AttributeNet(channels, width, len(card["heads"]))
    try:
        network.load_state_dict(tensors)
    except RuntimeError:
        raise DataError(f"{reference}: of another version; make it again with `dcgan-eval classifier`") from None
    return Classifier(network, [Head(**head) for head in card["heads"]], (height, width, channels), card["data"])


def get_classifier(reference: str | None, data: str | None, out: Path) -> Classifier:
    """Return the one that `--classifier` names, else the one in OUT, else a new one trained on `--data`."""
    if reference is not None:
        return load_classifier(reference)
    kept = out / FILE_NAME
    dataset = open_dataset(data) if data is not None else None
    if kept.exists():
        classifier = load_classifier(str(kept))
        if dataset is None or dataset.fingerprint() == classifier.data:
            return classifier
    if dataset is None:
        raise UsageError("no judge: name a labeled --data set to train one on, or --classifier FILE")
    return make_classifier(dataset, out, seed=0)


def make_classifier(dataset: Dataset, out: Path, *, seed: int, epochs: int = EPOCHS) -> Classifier:
    """Train a classifier on all bool and float labels of a data set; write it and its scores into `out`."""
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
    spoken = ", ".join(f"{head.name} {head.score:.3f}" for head in bools)
    result.write(
        {head.name: head.score for head in heads},
        summary=f"Accuracy on {len(test.images):,} held-out images: {spoken}." if bools else "",
        table=[["attribute", "measure", "held out", "always the commoner answer", "images that have it"], *rows],
    )
    return classifier


def train_classifier(labeled: Labeled, *, seed: int, epochs: int = EPOCHS) -> Classifier:
    """Return a classifier of every bool and float label; where an image lacks one, nothing is learned from it.

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
        raise DataError("the data set has no bool or float label that varies: nothing for a classifier to learn")
    if len(labeled.images) < 2 * BATCH:
        raise DataError(f"{len(labeled.images)} labeled images are too few to learn from: expected {2 * BATCH}")
    height, width, channels = labeled.images.shape[1:]
    torch.manual_seed(seed)
    network = AttributeNet(channels, width, len(heads)).to(device())
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    targets = np.stack([_target(labeled, head) for head in heads], 1)
    is_bool = torch.tensor([head.kind == "bool" for head in heads], device=device())

    steps_an_epoch = len(labeled.images) // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs * steps_an_epoch)
    with Progress("training the classifier", epochs * steps_an_epoch * BATCH) as progress:
        for epoch in range(epochs):
            order = permutation(len(labeled.images), seed, Purpose.ANALYSIS, lane=epoch)
            for step in range(steps_an_epoch):
                rows = order[step * BATCH : (step + 1) * BATCH]
                images = _varied(to_network(labeled.images[rows]), seed, epoch * steps_an_epoch + step)
                wanted = torch.from_numpy(targets[rows]).to(device())
                known = wanted.isfinite()
                wanted = torch.where(known, wanted, 0)  # before the loss: its gradient would be NaN as well
                read = network(images)
                errors = torch.where(
                    is_bool,
                    F.binary_cross_entropy_with_logits(read, wanted.clamp(0, 1), reduction="none"),
                    0.5 * F.mse_loss(read, wanted, reduction="none"),
                )
                optimizer.zero_grad()
                (errors * known).mean(0).sum().div(len(heads)).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                progress.advance(BATCH)
    return Classifier(network, heads, (height, width, channels), labeled.description.get("fingerprint", ""))


def _numbers(labeled: Labeled, name: str) -> NDArray[np.float64]:
    """Return a bool or float column as numbers; what an image lacks is NaN."""
    return np.asarray(labeled.columns[name], np.float64)


def _target(labeled: Labeled, head: Head) -> NDArray[np.float32]:
    values = _numbers(labeled, head.name)
    return np.asarray(values if head.kind == "bool" else (values - head.mean) / head.deviation, np.float32)


def _varied(images: Tensor, seed: int, step: int) -> Tensor:
    """Move, brighten and stretch a batch a little, as a function of (seed, step)."""
    words = raw_bits(seed, Purpose.ANALYSIS, step, 2, lane=1 << 32)
    top, left = (int(word % np.uint64(2 * SHIFT + 1)) for word in words)
    size = images.shape[2:]
    padded = F.pad(images, (SHIFT, SHIFT, SHIFT, SHIFT), mode="replicate")
    moved = padded[:, :, top : top + size[0], left : left + size[1]]
    noise = torch.randn(2, len(images), 1, 1, 1, device=images.device) * 0.1
    return (moved * (1 + noise[0]) + noise[1]).contiguous(memory_format=torch.channels_last)


def _scored(classifier: Classifier, test: Labeled) -> list[Head]:
    """Return the heads with their scores on held-out images."""
    read = classifier.read(test.images)
    scored = []
    for head in classifier.heads.values():
        truth, guess = _numbers(test, head.name), read[head.name].astype(np.float64)
        known = np.isfinite(truth)
        if not known.any():
            raise DataError(f"label {head.name}: none of {len(truth):,} held-out images has it, so nothing judges it")
        truth, guess = truth[known], guess[known]
        if head.kind == "bool":
            score = float(((guess > 0.5) == (truth > 0.5)).mean())
        else:
            score = 1 - float(((guess - truth) ** 2).mean() / max(truth.var(), 1e-12))
        scored.append(Head(head.name, head.kind, head.mean, head.deviation, score))
    return scored


def _baseline(head: Head) -> float | str:
    return round(max(head.mean, 1 - head.mean), 3) if head.kind == "bool" else 0.0
