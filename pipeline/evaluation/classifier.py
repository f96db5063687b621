"""The attribute classifier: a small network that predicts the labels of an image, and its file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError
from safetensors.torch import save
from torch import Tensor, nn

from pipeline.checkpoints.weights import METADATA_KEY, deserialize
from pipeline.common.errors import DataError, UsageError
from pipeline.common.imaging import Pixels
from pipeline.common.shapes.size import Channels
from pipeline.common.storage import locate, write_atomic
from pipeline.evaluation.device import device, to_network

FILE_NAME = "classifier.safetensors"
KIND = "attributes"
WIDTH = 24
BATCH = 256

Predictions = dict[str, NDArray[np.float32]]
"""Of each attribute, a value for every image (N,): the probability of a bool, the value of a float."""


@dataclass(frozen=True)
class Head:
    """One attribute that the classifier predicts."""

    name: str
    kind: str
    """`bool` (a probability) or `float` (a value)."""
    mean: float
    """Of the training labels: the base rate, or the center of the values."""
    deviation: float
    score: float = float("nan")
    """On held-out images: accuracy of a bool, R squared of a float."""


class AttributeNet(nn.Module):
    """Images (N, channels, height, width) float in [-1, 1] -> one number a head (N, heads), logits or standardized."""

    def __init__(self, channels: int, size: int, heads: int) -> None:
        """`size` is the shorter side of the images."""
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
        outputs: Tensor = self.heads(self.trunk(images))
        return outputs


class Classifier:
    """A trained AttributeNet and the meaning of its outputs."""

    def __init__(self, network: AttributeNet, heads: list[Head], shape: tuple[int, int, int], data: str) -> None:
        self.network = network.to(device()).eval().requires_grad_(False)
        self.heads = {head.name: head for head in heads}
        self.shape = shape
        self.data = data
        """Fingerprint of the data set that it was trained on."""

    def predict(self, images: Pixels) -> Predictions:
        """Return the predictions for images uint8 (N, H, W, C). Raises UsageError when they are of another shape."""
        if images.shape[1:] != self.shape:
            raise UsageError(f"the classifier expects images of shape {self.shape}, these are {images.shape[1:]}")
        outputs = [self.network(to_network(images[start : start + BATCH])) for start in range(0, len(images), BATCH)]
        raw = torch.cat(outputs).cpu() if outputs else torch.zeros(0, len(self.heads))
        result: Predictions = {}
        for index, head in enumerate(self.heads.values()):
            column = raw[:, index]
            values = torch.sigmoid(column) if head.kind == "bool" else column * head.deviation + head.mean
            result[head.name] = values.numpy()
        return result

    def head(self, name: str) -> Head:
        """Return the head of an attribute. Raises UsageError that lists the attributes when there is none."""
        if name not in self.heads:
            raise UsageError(
                f"attribute {name!r}: the classifier does not predict it; it predicts {', '.join(self.heads)}"
            )
        return self.heads[name]

    def features(self, images: Pixels) -> NDArray[np.float32]:
        """Return the trunk's features (N, F) of images uint8 (N, H, W, C)."""
        starts = range(0, len(images), BATCH)
        parts = [self.network.trunk(to_network(images[start : start + BATCH])) for start in starts]
        return np.asarray(torch.cat(parts).cpu().numpy(), np.float32)

    def save(self, path: Path) -> None:
        """Write the weights, with everything that `load_classifier` needs, into one file."""
        state = {name: tensor.cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        heads = [asdict(head) for head in self.heads.values()]
        card = {"kind": KIND, "heads": heads, "shape": self.shape, "data": self.data}
        write_atomic(path, save(state, {METADATA_KEY: json.dumps(card)}))


class _Card(BaseModel):
    """What a classifier's file says of it."""

    shape: tuple[int, int, Channels]
    heads: list[Head] = Field(max_length=4096)
    data: str


def load_classifier(reference: str) -> Classifier:
    """Return the classifier in a file (path or URL). Raises DataError when the file is something else."""
    store, name = locate(reference)
    return parse_classifier(store.read(name), reference)


def parse_classifier(data: bytes, where: str) -> Classifier:
    """Return the classifier in the file `where`, whose content is `data`. Raises DataError as `load_classifier`."""
    tensors, content = deserialize(data, where)
    if content.get("kind") != KIND:
        raise DataError(f"{where}: not an attribute classifier; make one with `dcgan-eval classifier`")
    try:
        card = _Card.model_validate(content)
        network = AttributeNet(card.shape[2], min(card.shape[:2]), len(card.heads))
        network.load_state_dict(tensors)
    except (ValidationError, RuntimeError):
        raise DataError(f"{where}: of another version; make it again with `dcgan-eval classifier`") from None
    return Classifier(network, card.heads, card.shape, card.data)
