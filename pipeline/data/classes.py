"""The class of every image of a data set: one label with its values, or several true-or-false labels together."""

import mmap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import ConfigConflict, DataError, UsageError
from pipeline.config import LARGEST_CLASSES
from pipeline.data.dataset import Dataset, Shard
from pipeline.data.loading.shard_cache import open_cache
from pipeline.data.shard_reader import shard_columns, tar_columns


@dataclass(frozen=True)
class Classes:
    """The classes that occur, and which one each image has."""

    label: tuple[str, ...]
    """Names of the labels that make a class."""
    names: tuple[str, ...]
    """Each class as `network.classes` writes it: a value; of several labels, a 0 or 1 for each of them."""
    of_image: NDArray[np.int32]
    """Class of each image (N,), in the data set's own order."""

    @property
    def images(self) -> tuple[int, ...]:
        """Images of each class."""
        return tuple(np.bincount(self.of_image, minlength=len(self.names)).tolist())

    def in_order(self, names: tuple[str, ...], origin: str) -> "Classes":
        """Return the same with the classes in the order of `names`. Raises ConfigConflict unless they are the same."""
        if sorted(names) != sorted(self.names):
            missing, extra = sorted({*self.names} - {*names}), sorted({*names} - {*self.names})
            what = "one stands there twice"
            if missing or extra:
                what = f"the data has {missing[0]!r}" if missing else f"the data has no {extra[0]!r}"
            raise ConfigConflict(f"{origin}: the classes of {', '.join(self.label)} are others: {what}; leave them out")
        places = np.array([names.index(name) for name in self.names], np.int32)
        return Classes(self.label, names, places[self.of_image])


def read_classes(dataset: Dataset, label: Sequence[str], option: str = "network.label") -> Classes:
    """Return the class of every image. Numbers are in ascending order, texts in that of their code points.

    Raises UsageError for a label that is not there or is no class, DataError for values that are missing and for more
    than LARGEST_CLASSES; both name `option`, the label and the data set.
    """
    for name in label:
        kind = dataset.labels.get(name)
        if kind is None:
            known = ", ".join(dataset.labels) or "none"
            raise UsageError(f"{option} {name}: {dataset.location} has no such label; it has: {known}")
        if kind == "float":
            raise UsageError(f"{option} {name}: its values are of type float; expected integers, texts or booleans")
        if len(label) > 1 and kind != "bool":
            raise UsageError(f"{option} {','.join(label)}: {name} is of type {kind}; of several, all must be booleans")
    columns = label_columns(dataset, label)
    for name in label:
        if empty := sum(value is None for value in columns[name]):
            raise DataError(
                f"{option} {name}: {empty:,} of the {dataset.images:,} images of {dataset.location} have no value; "
                "leave them out when the data set is built (--where)"
            )
    values: list[Any] = columns[label[0]]
    if len(label) > 1:
        values = list(zip(*(columns[name] for name in label), strict=True))
    occurring = sorted(Counter(values))
    if len(occurring) > LARGEST_CLASSES:
        raise DataError(
            f"{option} {','.join(label)}: {len(occurring):,} classes in {dataset.location}; "
            f"expected at most {LARGEST_CLASSES:,}"
        )
    number = {value: index for index, value in enumerate(occurring)}
    of_image = np.fromiter((number[value] for value in values), np.int32, len(values))
    return Classes(tuple(label), tuple(map(written, occurring)), of_image)


def written(value: Any) -> str:
    """Return a value, or a tuple of several that are true or false, as `network.classes` writes it."""
    if isinstance(value, tuple):
        return "".join("01"[bit] for bit in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def label_columns(dataset: Dataset, label: Sequence[str]) -> dict[str, list[Any]]:
    """Return the values of some labels for all images, in the data set's own order.

    Of a shard only the labels are read, unless it is remote: then all of it, through the shard cache. Raises DataError.
    """
    if dataset.index is not None:
        return tar_columns(dataset, np.arange(dataset.images))
    wanted = dataset.model_copy(update={"labels": {name: dataset.labels[name] for name in label}})
    columns: dict[str, list[Any]] = {name: [] for name in label}
    cache = open_cache(None) if dataset.store.remote else None
    for shard in dataset.shards:
        with _open(wanted, shard) if cache is None else cache.open(wanted, shard) as file:
            try:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:
                raise DataError(f"{dataset.store.path(shard.name)}: empty; build the data set again") from None
            with content:
                found = shard_columns(wanted, shard, content)
        for name in label:
            columns[name] += found[name]
    return columns


def _open(dataset: Dataset, shard: Shard) -> FileIO:
    path = dataset.store.path(dataset.store.inside(shard.name))
    try:
        return FileIO(path)
    except FileNotFoundError:
        raise DataError(f"{path}: this shard of the data set is missing; build the data set again") from None
