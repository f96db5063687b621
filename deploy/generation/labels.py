"""The label of each image of a generation: a pure function of the plan and the image's index."""

import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from export.format.rows import named
from pipeline.common.randomness import Purpose
from pipeline.common.records import LARGEST, Record
from pipeline.config import LARGEST_CLASSES, NetworkConfig
from pipeline.data.dataset import LabelType
from pipeline.model.labels import draw_classes, names_in

LabelValue = bool | int | str


class LabelPlan(Record):
    """Which labels a conditional model makes its images with."""

    label: tuple[str, ...] = Field(min_length=1)
    """Names of the labels."""
    draw: Literal["as-trained", "balanced", "chosen"]
    """As often as the training set has each class; each class equally often, in turn; or `chosen`, in turn."""
    chosen: tuple[str, ...] = Field((), max_length=LARGEST_CLASSES)
    """Written as `classes`; of several labels also combinations that the training set lacks."""
    classes: tuple[str, ...] = Field(min_length=1, max_length=LARGEST_CLASSES)
    """The model's classes, in the order of their numbers, as `network.classes` of its card."""
    class_images: tuple[int, ...]
    """Images of the training set in each class."""

    def columns(self, seed: int, start: int, count: int) -> NDArray[np.float32]:
        """Return what the rows of images `start` to `start + count` hold behind z: (count, columns of a label)."""
        written, places = self._of_images(seed, start, count)
        if len(self.label) > 1:
            rows = [[float(bit) for bit in bits] for bits in written]
        else:
            number = {name: float(index) for index, name in enumerate(self.classes)}
            rows = [[number[value]] for value in written]
        columns: NDArray[np.float32] = np.array(rows, np.float32)[places]
        return columns

    def values(self, seed: int, start: int, count: int) -> list[tuple[LabelValue, ...]]:
        """Return the values of the labels of images `start` to `start + count`, as a data set stores them."""
        written, places = self._of_images(seed, start, count)
        if len(self.label) > 1:
            rows: list[tuple[LabelValue, ...]] = [tuple(bit == "1" for bit in bits) for bits in written]
        else:
            kind = self.types[self.label[0]]
            rows = [
                (value == "true" if kind == "bool" else int(value) if kind == "int" else value,) for value in written
            ]
        return [rows[place] for place in places]

    @property
    def largest_bytes(self) -> int:
        """Bytes that the labels of an image take in a shard, at most."""
        written = (*self.classes, *self.chosen)
        return sum(len(json.dumps(name)) + 8 for name in self.label) + max(len(json.dumps(text)) for text in written)

    @property
    def types(self) -> dict[str, LabelType]:
        """The type of each label: as its data set had it, except that texts which are all integers become integers."""
        if len(self.label) > 1 or {*self.classes} <= {"false", "true"}:
            return dict.fromkeys(self.label, "bool")
        return {self.label[0]: "int" if all(map(_is_integer, self.classes)) else "str"}

    def _of_images(self, seed: int, start: int, count: int) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        """Return labels as they are written, and which of them each image has."""
        if self.draw == "as-trained":
            network = NetworkConfig(label=self.label, classes=self.classes, class_images=self.class_images)
            return self.classes, draw_classes(network, seed, Purpose.SAMPLE, start, count)
        written = self.chosen if self.draw == "chosen" else self.classes
        return written, np.arange(start, start + count, dtype=np.int64) % len(written)


def plan_labels(network: NetworkConfig, chosen: str | None, draw: str | None) -> LabelPlan:
    """Return the plan of `--label NAME[,NAME…]` (`chosen`) or `--labels` (`draw`); without either, as trained.

    Raises UsageError for a class that the model does not have.
    """
    names = [] if chosen is None else names_in(network, chosen)
    return LabelPlan.model_validate(
        {
            "label": network.label,
            "draw": "chosen" if names else draw or "as-trained",
            "chosen": [_written(network, named(network, name, "--label")[0]) for name in names],
            "classes": network.classes,
            "class_images": network.class_images,
        }
    )


def _written(network: NetworkConfig, columns: Sequence[Any] | NDArray[np.float32]) -> str:
    if len(network.label) > 1:
        return "".join("01"[int(bit)] for bit in columns)
    return network.classes[int(columns[0])]


def _is_integer(value: str) -> bool:
    digits = value.removeprefix("-")
    return digits.isascii() and digits.isdigit() and str(int(value)) == value and abs(int(value)) <= LARGEST
