"""A labeled data set in memory, from which the probe and the attribute classifier learn."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import DataError, UsageError
from pipeline.common.imaging import Pixels
from pipeline.common.randomness import Purpose, permutation
from pipeline.common.storage import public_name
from pipeline.data.dataset import Dataset, LabelType
from pipeline.data.shard_reader import iterate


@dataclass(frozen=True)
class Labeled:
    """Images (N, H, W, C) uint8 in a random order, and a column for each label.

    A label that some images lack is None there.
    """

    images: Pixels
    columns: dict[str, NDArray[Any]]
    types: dict[str, LabelType]
    description: dict[str, Any]

    def split(self, held_out: int) -> tuple["Labeled", "Labeled"]:
        """Return all but the last `held_out` images, and those."""
        if not 0 < held_out < len(self.images):
            raise UsageError(f"{held_out} held-out images of {len(self.images)}: expected fewer, and at least one")
        return self.take(slice(0, -held_out)), self.take(slice(-held_out, None))

    def take(self, rows: slice | NDArray[Any]) -> "Labeled":
        """Return the chosen rows."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        return Labeled(self.images[rows], columns, self.types, self.description)

    def having(self, name: str) -> "Labeled":
        """Return the images that have a value for the label `name`. Raises UsageError if none has."""
        values = self.label(name)
        rows = np.flatnonzero([value is not None for value in values.tolist()])
        if len(rows) == len(values):
            return self
        if not len(rows):
            raise UsageError(f"--label {name}: none of {len(values):,} images has it")
        kept = self.take(rows)
        kept.columns[name] = np.asarray(kept.columns[name].tolist())  # of the label's own type again
        return kept

    def label(self, name: str) -> NDArray[Any]:
        """Return the column of a label. Raises UsageError, with the labels there are, for another name."""
        if name not in self.columns:
            known = ", ".join(self.columns) or "none"
            raise UsageError(f"--label {name}: the data set has no such label; it has: {known}")
        return self.columns[name]


def load_labeled(dataset: Dataset, limit: int | None = None) -> Labeled:
    """Read the first `limit` images of a data set (all, by default) and their labels.

    Raises DataError when the data set has no labels.
    """
    if not dataset.labels:
        raise DataError(f"{dataset.location}: has no labels; build it with `dcgan-data build ... --labels`")
    images: list[Pixels] = []
    columns: dict[str, list[Any]] = {name: [] for name in dataset.labels}
    have = 0
    for batch, values in iterate(dataset, labels=True, limit=limit):
        images.append(batch)
        have += len(batch)
        for name in columns:
            columns[name] += values[name]
    description = {
        "location": public_name(dataset.location),
        "fingerprint": dataset.fingerprint(),
        "images": dataset.images,
        "used": have,
    }
    whole = Labeled(
        np.concatenate(images),
        {name: np.asarray(values) for name, values in columns.items()},
        dataset.labels,
        description,
    )
    if dataset.index is None:
        return whole
    # The tars of others may be sorted by class, and `split` takes the last images.
    return whole.take(permutation(have, 0, Purpose.ANALYSIS))
