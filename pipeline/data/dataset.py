"""dataset.json: what a folder of shards holds, and whether it can be believed (DESIGN contract 2)."""

import json
import os
from itertools import accumulate
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.common.errors import DataError
from pipeline.common.storage import Store, sha256_bytes

FILE_NAME = "dataset.json"
VERSION = 1

Encoding = Literal["packed", "jpg", "webp", "png"]
LabelType = Literal["bool", "int", "float", "str"]


class Record(BaseModel):
    """A part of dataset.json. Unknown keys are refused: they come from a newer version or another tool."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(Record):
    """One tar: an ordinary WebDataset shard whose members can also be reached by their offsets."""

    name: str = Field(pattern=r"^[^/\\]+\.tar$")
    """File name beside dataset.json."""
    images: int = Field(ge=1)
    """Images in it."""
    bytes: int = Field(ge=1)
    """Size of the file."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the file."""
    offsets: list[int]
    """Where each image's data begins in the file: the encoded bytes, or a packed block's first pixel."""
    sizes: list[int]
    """Bytes of data at each offset. A packed block holds sizes[i] / (image_size^2 * channels) images."""


class Refusals(Record):
    """Images of the source that are not in the shards."""

    count: int = Field(0, ge=0)
    """How many."""
    reasons: dict[str, int] = {}
    """How many for each reason."""
    examples: list[str] = []
    """The first of them, as `key: reason`."""


class Dataset(Record):
    """The content of dataset.json: shards in their order, and all that a reader must know about them."""

    version: int = VERSION
    image_size: int = Field(ge=1)
    """Height and width of every image in pixels."""
    channels: Literal[1, 3]
    encoding: Encoding
    """`packed`: members are uint8 .npy blocks (n, size, size, channels); else one encoded image a member."""
    labels: dict[str, LabelType] = {}
    """Name and type of every label."""
    source: dict[str, Any]
    """The source's kind and options, the seed of the order, filters, split."""
    images: int = Field(ge=1)
    """Images over all shards."""
    bytes: int = Field(ge=1)
    """Bytes over all shards."""
    shards: list[Shard]
    refused: Refusals = Refusals()

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


def load_dataset(location: str | os.PathLike[str]) -> Dataset:
    """Read and check LOCATION/dataset.json; a path or a URL.

    Raises DataError when it is missing, is not ours, or contradicts itself.
    """
    store = Store(location)
    where = store.path(FILE_NAME)
    try:
        content = store.read(FILE_NAME)
    except DataError as error:
        raise DataError(
            f"{where}: {str(error).rpartition(': ')[2]}: a data set is a folder that `dcgan-data build` finished"
        ) from None
    try:
        values = json.loads(content)
        version = values.get("version") if isinstance(values, dict) else None
        if version != VERSION:
            raise DataError(f"{where}: version {version!r}; this program reads version {VERSION}")
        dataset = Dataset.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from None
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
