"""The data set: what its dataset.json says, checked, and the store of its shards (docs/architecture.md, contract 2)."""

import json
import operator
import os
from itertools import accumulate
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr, SerializerFunctionWrapHandler, model_serializer

from pipeline.common.errors import DataError
from pipeline.common.records import LARGEST, PlainName, Record, read_record
from pipeline.common.storage import Store, is_url, locate, sha256_bytes
from pipeline.data.index.sidecar import MemberColumns, Sidecar, read_sidecar

DATASET_FILE = "dataset.json"
VERSION = 1

Encoding = Literal["packed", "jpg", "webp", "png"]
"""How a build stores images."""
LabelType = Literal["bool", "int", "float", "str"]
LARGEST_IMAGE = 4096
"""Height and width in pixels of the largest images that a data set holds."""

Place = Annotated[int, Field(ge=0, le=LARGEST)]


class _Terse(Record):
    """A record whose fields that may be None are written only when they are set."""

    @model_serializer(mode="wrap")
    def _without_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        return {name: value for name, value in values.items() if value is not None}


class Shard(_Terse):
    """One tar: an ordinary WebDataset shard whose members can also be reached by their offsets."""

    name: PlainName = Field(pattern=r"\.tar$")
    """File name beside dataset.json, or of the tar at `location`."""
    images: int = Field(ge=1, le=LARGEST)
    """Images in it."""
    bytes: int = Field(ge=1, le=LARGEST)
    """Size of the file."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the file. Of an indexed tar: of all that is not a file's content, and of the tar's size."""
    offsets: list[Place]
    """Where each image's data begins in the file: the encoded bytes, or a packed block's first pixel."""
    sizes: list[Place]
    """Bytes of data at each offset. A packed block holds sizes[i] / (image_size^2 * channels) images."""
    location: str | None = None
    """Of an indexed tar: its path or URL; a path that is not absolute is relative to dataset.json."""
    etag: str | None = None
    """Of an indexed tar in a store that has them: the ETag when it was indexed."""


class Refusals(Record):
    """Images of the source that are not in the shards."""

    count: int = Field(0, ge=0)
    """Number of them."""
    reasons: dict[str, int] = Field(default_factory=dict)
    """Their number by reason."""
    examples: list[str] = Field(default_factory=list)
    """The first of them, as `key: reason`."""


class Dataset(_Terse):
    """The content of dataset.json, and the store that holds it and its shards.

    The store is no part of the JSON: data sets with equal dataset.json are equal, wherever they are.

    An indexed data set (`encoding` is `tar`) leaves the tars of others where they are: its images have any size and
    format, and become square ones when they are read. Its members are listed in a sidecar, not in dataset.json.
    """

    version: int = VERSION
    image_size: int = Field(ge=1, le=LARGEST_IMAGE)
    """Height and width of every image in pixels."""
    channels: Literal[1, 3]
    encoding: Encoding | Literal["tar"]
    """`packed`: members are uint8 .npy blocks (n, size, size, channels); else one encoded image a member.

    `tar`: image files as others made them, cropped and resized when they are read."""
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
    index: Sidecar | None = None
    """Of an indexed data set: the file that lists its members."""

    _store: Store | None = PrivateAttr(None)
    _columns: MemberColumns | None = PrivateAttr(None)
    _starts: list[int] = PrivateAttr(default_factory=list)

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
    def min_side(self) -> int:
        """Shorter side in pixels below which an image was refused; with size and channels, it decides the pixels."""
        return int(self.source.get("min_side", 1))

    @property
    def image_bytes(self) -> int:
        """Bytes of one decoded image."""
        return self.image_size * self.image_size * self.channels

    @property
    def shard_starts(self) -> list[int]:
        """Index of each shard's first image in the data set's own order, and at the end the total."""
        return list(accumulate((shard.images for shard in self.shards), initial=0))

    def fingerprint(self) -> str:
        """Return a SHA-256 that two data sets share exactly when their shards are the same bytes in the same order.

        Of an indexed data set, the list of its members and the options that decide its pixels count as well.
        """
        hashes = [shard.sha256 for shard in self.shards]
        if self.index is not None:
            hashes += [self.index.sha256, f"{self.image_size}x{self.channels}"]
        return sha256_bytes("\n".join(hashes).encode())

    def place(self, shard: Shard) -> tuple[Store, str]:
        """Return the store and the name in it of a shard's tar. Raises UsageError for a URL that is not allowed."""
        if shard.location is None:
            return self.store, shard.name
        if is_url(shard.location) or os.path.isabs(shard.location):
            return locate(shard.location)
        scheme, separator, path = self.store.path(shard.location).rpartition("://")
        return locate(scheme + separator + os.path.normpath(path))

    def members(self, shard_index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where the images of a shard begin in its tar and their bytes, both int64, in order.

        Of a packed shard these are blocks of images. Raises DataError when the sidecar is missing or damaged.
        """
        if self.index is None:
            shard = self.shards[shard_index]
            return np.asarray(shard.offsets, np.int64), np.asarray(shard.sizes, np.int64)
        rows = self.rows(shard_index)
        return self.columns.offset[rows], self.columns.size[rows]

    def rows(self, shard_index: int) -> slice:
        """Return the indices of a shard's images in the data set's own order."""
        if len(self._starts) != len(self.shards) + 1:
            self._starts = self.shard_starts
        return slice(self._starts[shard_index], self._starts[shard_index + 1])

    @property
    def columns(self) -> MemberColumns:
        """The sidecar of an indexed data set, read at the first use. Raises DataError when it is missing or damaged."""
        assert self.index is not None
        if self._columns is None:
            columns = read_sidecar(self.store, self.index, self.images, len(self.labels))
            ends = np.repeat([shard.bytes for shard in self.shards], [shard.images for shard in self.shards])
            if ((columns.offset < 0) | (columns.size < 0) | (columns.size > ends - columns.offset)).any():
                where = self.store.path(self.index.name)
                raise DataError(f"{where}: places images outside their tars; index the tars again")
            self._columns = columns
        return self._columns

    def __getstate__(self) -> dict[Any, Any]:
        """Travel to other processes without the sidecar, which may be large: each reads its own."""
        state = super().__getstate__()
        private = state["__pydantic_private__"] or {}
        return {**state, "__pydantic_private__": {**private, "_columns": None}}


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
    if (dataset.encoding == "tar") != (dataset.index is not None):
        raise DataError(f"{where}: an index needs encoding 'tar' and a sidecar, and has one of them; index again")
    for shard in dataset.shards:
        if dataset.index is not None:
            members = len(shard.sizes) or shard.images  # the sidecar lists them, and is checked when it is read
        elif dataset.encoding == "packed":
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
