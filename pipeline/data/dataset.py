"""The data set: what its dataset.json says, checked, and the store of its shards (docs/architecture.md, contract 2)."""

import json
import operator
import os
from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr

from pipeline.common.errors import DataError
from pipeline.common.records import LARGEST, PlainName, Record, read_record
from pipeline.common.storage import Store, sha256_bytes

DATASET_FILE = "dataset.json"
VERSION = 1

Encoding = Literal["packed", "jpg", "webp", "png"]
LabelType = Literal["bool", "int", "float", "str"]
LARGEST_IMAGE = 4096
"""Height and width in pixels of the largest images that a data set holds."""

Place = Annotated[int, Field(ge=0, le=LARGEST)]


class Shard(Record):
    """One tar: an ordinary WebDataset shard whose members can also be reached by their offsets."""

    name: PlainName = Field(pattern=r"\.tar$")
    """File name beside dataset.json."""
    images: int = Field(ge=1, le=LARGEST)
    """Images in it."""
    bytes: int = Field(ge=1, le=LARGEST)
    """Size of the file."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the file."""
    offsets: list[Place]
    """Where each image's data begins in the file: the encoded bytes, or a packed block's first pixel."""
    sizes: list[Place]
    """Bytes of data at each offset. A packed block holds sizes[i] / (image_size^2 * channels) images."""


class Refusals(Record):
    """Images of the source that are not in the shards."""

    count: int = Field(0, ge=0)
    """Number of them."""
    reasons: dict[str, int] = Field(default_factory=dict)
    """Their number by reason."""
    examples: list[str] = Field(default_factory=list)
    """The first of them, as `key: reason`."""


class Dataset(Record):
    """The content of dataset.json, and the store that holds it and its shards.

    The store is no part of the JSON: data sets with equal dataset.json are equal, wherever they are.
    """

    version: int = VERSION
    image_size: int = Field(ge=1, le=LARGEST_IMAGE)
    """Height and width of every image in pixels."""
    channels: Literal[1, 3]
    encoding: Encoding
    """`packed`: members are uint8 .npy blocks (n, size, size, channels); else one encoded image a member."""
    labels: dict[str, LabelType] = Field(default_factory=dict)
    """Name and type of every label."""
    source: dict[str, Any]
    """The source's kind and options, the seed of the order, filters, split."""
    images: int = Field(ge=1)
    """Images over all shards."""
    bytes: int = Field(ge=1)
    """Bytes over all shards."""
    shards: list[Shard]
    refused: Refusals = Refusals()

    _store: Store | None = PrivateAttr(None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dataset) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def at(self, store: Store) -> "Dataset":
        """Return this data set with its shards in `store`."""
        placed = self.model_copy()
        placed._store = store
        return placed

    @property
    def store(self) -> Store:
        """The folder or URL of dataset.json and the shards. A data set made by hand has one after `at`."""
        assert self._store is not None, "a data set without a store: use open_dataset(), or at(store)"
        return self._store

    @property
    def location(self) -> str:
        """The store's path or URL, for messages and records."""
        return self.store.location

    @property
    def image_bytes(self) -> int:
        """Bytes of one decoded image."""
        return self.image_size * self.image_size * self.channels

    @property
    def shard_starts(self) -> list[int]:
        """Index of each shard's first image in the data set's own order, and at the end the total."""
        return list(accumulate((shard.images for shard in self.shards), initial=0))

    def fingerprint(self) -> str:
        """Return a SHA-256 that two data sets share exactly when their shards are the same bytes in the same order."""
        return sha256_bytes("\n".join(shard.sha256 for shard in self.shards).encode())


def open_dataset(location: str | os.PathLike[str] | Store) -> Dataset:
    """Read and check the dataset.json in `location`, a path, a URL or a store; the result can read its shards.

    Raises DataError when dataset.json is missing, is not ours, or contradicts itself.
    """
    store = location if isinstance(location, Store) else Store(location)
    where = store.path(DATASET_FILE)
    try:
        content = store.read(DATASET_FILE)
    except DataError as error:
        raise DataError(
            f"{where}: {str(error).rpartition(': ')[2]}: a data set is a folder that `dcgan-data build` finished"
        ) from None
    dataset = read_record(Dataset, content, where, version=VERSION).at(store)
    _check_counts(dataset, where)
    return dataset


def dump_dataset(dataset: Dataset) -> bytes:
    """Return the content of dataset.json, readable by people: one line a shard."""
    values = dataset.model_dump(mode="json")
    lines = [f' "{key}": {json.dumps(value)}' for key, value in values.items() if key != "shards"]
    shards = ",\n".join(f"  {json.dumps(shard, separators=(',', ':'))}" for shard in values["shards"])
    lines.append(f' "shards": [\n{shards}\n ]')
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _check_counts(dataset: Dataset, where: str) -> None:
    """Raise DataError when the numbers in dataset.json contradict each other."""
    for name in ("images", "bytes"):
        total, stated = sum(getattr(shard, name) for shard in dataset.shards), getattr(dataset, name)
        if total != stated:
            raise DataError(f"{where}: states {stated} {name}, but its shards hold {total}; build the data set again")
    for shard in dataset.shards:
        if dataset.encoding == "packed":
            members = sum(size // dataset.image_bytes for size in shard.sizes)
        else:
            members = len(shard.sizes)
        if members != shard.images or len(shard.offsets) != len(shard.sizes):
            raise DataError(
                f"{where}: states {shard.images} images in {shard.name}, but lists {members}; build the data set again"
            )
        if dataset.encoding == "packed" and any(size % dataset.image_bytes for size in shard.sizes):
            raise DataError(f"{where}: lists a part of an image in {shard.name}; build the data set again")
        check_places(shard, where)


def check_places(shard: Shard, where: str) -> None:
    """Raise DataError unless the members lie in the file one after another."""
    ends = list(map(operator.add, shard.offsets, shard.sizes))
    inside = all(map(operator.le, ends, [*shard.offsets[1:], shard.bytes]))
    if not inside or min(shard.offsets[:1] + shard.sizes, default=0) < 0:
        raise DataError(
            f"{where}: lists members of {shard.name} that overlap or lie outside its {shard.bytes} bytes; "
            "build the data set again"
        )
