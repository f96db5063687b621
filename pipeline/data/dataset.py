"""The data set: what its dataset.json says, checked, and the store of its shards (docs/architecture.md, contract 2)."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr, field_serializer

from pipeline.common.errors import DataError
from pipeline.common.records import Record, read_record
from pipeline.common.shapes.frame import Frame
from pipeline.common.shapes.size import Channels, between, in_words, parse_size
from pipeline.common.storage import Store, is_url, locate, sha256_bytes
from pipeline.data.index.sidecar import MemberColumns, Sidecar, read_sidecar, write_arrays
from pipeline.data.shard_table import ADVICE, TABLE_FILE, Shard, ShardTable, Terse, read_table

__all__ = [
    "DATASET_FILE",
    "Dataset",
    "Encoding",
    "LabelType",
    "Refusals",
    "Shard",
    "dump_dataset",
    "open_dataset",
    "write_dataset",
]

DATASET_FILE = "dataset.json"
VERSION = 1

Encoding = Literal["packed", "jpg", "webp", "png"]
"""How a build stores images."""
LabelType = Literal["bool", "int", "float", "str"]
LISTED_MEMBERS = 100_000
"""Shards and members that dataset.json lists itself, in some 2 MB; more are in a file of columns beside it."""
LARGEST_IMAGE = 4096
"""Height and width in pixels of the largest images that a data set holds."""


class Refusals(Record):
    """Images of the source that are not in the shards."""

    count: int = Field(0, ge=0)
    """Number of them."""
    reasons: dict[str, int] = Field(default_factory=dict)
    """Their number by reason."""
    examples: list[str] = Field(default_factory=list)
    """The first of them, as `key: reason`."""


class Dataset(Terse):
    """The content of dataset.json, and the store that holds it and its shards.

    The store is no part of the JSON: data sets with equal dataset.json are equal, wherever they are.

    An indexed data set (`encoding` is `tar`) leaves the tars of others where they are: its images have any size and
    format, and become square ones when they are read. Its members are listed in a sidecar, not in dataset.json.
    """

    version: int = VERSION
    image_size: between(1, LARGEST_IMAGE)  # type: ignore[valid-type]
    """Size of every image in pixels: 64 is a square, "96x64" is width x height."""
    channels: Channels
    """1 gray, 3 RGB, 4 RGBA: packed with the color multiplied by the alpha, encoded with straight alpha."""
    encoding: Encoding | Literal["tar"]
    """`packed`: members are uint8 .npy blocks (n, height, width, channels); else one encoded image a member.

    `tar`: image files as others made them, cropped and resized when they are read."""
    labels: dict[str, LabelType] = Field(default_factory=dict)
    """Name and type of every label."""
    source: dict[str, Any]
    """The source's kind and options, the seed of the order, filters, split."""
    images: int = Field(ge=1)
    """Images over all shards."""
    bytes: int = Field(ge=1)
    """Bytes over all shards."""
    shards: ShardTable
    """The shards; dataset.json lists none when they are in `table`."""
    refused: Refusals = Refusals()
    index: Sidecar | None = None
    """Of an indexed data set: the file that lists its members."""
    table: Sidecar | None = None
    """Of a large data set: the file that lists its shards."""

    _store: Store | None = PrivateAttr(None)
    _columns: MemberColumns | None = PrivateAttr(None)
    _places: dict[str, Store] = PrivateAttr(default_factory=dict)
    """Where indexed tars lie; each is opened once."""
    _starts: NDArray[np.int64] | None = PrivateAttr(None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dataset) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    @field_serializer("shards")
    def _list_shards(self, shards: ShardTable) -> list[dict[str, Any]]:
        return [] if self.table is not None else [shard.model_dump() for shard in shards]

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> "Dataset":
        """Return a copy with some fields changed. Other `shards`, in any collection, are not those of `table`."""
        if update is not None and "shards" in update:
            update = {"table": None, **update, "shards": ShardTable.of(update["shards"])}
        copied = super().model_copy(update=update, deep=deep)
        copied._starts = None
        return copied

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
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        width, height = parse_size(self.image_size)
        return height, width, self.channels

    @property
    def frame(self) -> Frame:
        """What decides the pixels that an image of an indexed data set has when it is read."""
        source = self.source
        fitted = {name: source[name] for name in ("min_side", "fit", "fill") if name in source}
        return Frame(self.image_size, self.channels, **fitted)

    @property
    def aspect(self) -> float | None:
        """Width over height of the pictures, where they were stretched to `image_size`."""
        found = self.source.get("aspect")
        return float(found) if isinstance(found, int | float) and 0 < found < LARGEST_IMAGE else None

    @property
    def in_words(self) -> str:
        """Width, height and channels for messages: 96x64x3."""
        height, width, channels = self.image_shape
        return f"{in_words(width, height)}x{channels}"

    @property
    def image_bytes(self) -> int:
        """Bytes of one decoded image."""
        return math.prod(self.image_shape)

    @property
    def shard_starts(self) -> list[int]:
        """Index of each shard's first image in the data set's own order, and at the end the total."""
        starts: list[int] = self.shards.starts.tolist()
        return starts

    def fingerprint(self) -> str:
        """Return a SHA-256 that two data sets share exactly when their shards are the same bytes in the same order.

        Of an indexed data set, the list of its members and the options that decide its pixels count as well.
        """
        digest = self.shards.joined_hashes()
        if self.index is not None:
            digest.update(f"\n{self.index.sha256}\n{self.image_size}x{self.channels}".encode())
            if self.frame.fit != "crop":
                digest.update(f"\n{self.frame.fit} {self.frame.fill}".encode())
        return digest.hexdigest()

    def place(self, shard: Shard) -> tuple[Store, str]:
        """Return the store and the name in it of a shard's tar. Raises UsageError for a URL that is not allowed."""
        if shard.location is None:
            return self.store, shard.name
        location = shard.location
        if not (is_url(location) or os.path.isabs(location)):
            scheme, separator, path = self.store.path(location).rpartition("://")
            location = scheme + separator + os.path.normpath(path)
        folder = location.rpartition("/")[0]
        if folder not in self._places:
            self._places[folder] = locate(location)[0]
        return self._places[folder], location.rpartition("/")[2]

    def members(self, shard_index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where the images of a shard begin in its tar and their bytes, both int64, in order.

        Of a packed shard these are blocks of images. Raises DataError when the sidecar is missing or damaged.
        """
        if self.index is None:
            members = self.shards.members(shard_index)
            return self.shards.offset[members].astype(np.int64), self.shards.size[members].astype(np.int64)
        rows = self.rows(shard_index)
        return self.columns.offset[rows], self.columns.size[rows]

    def rows(self, shard_index: int) -> slice:
        """Return the indices of a shard's images in the data set's own order."""
        if self._starts is None:
            self._starts = self.shards.starts
        return slice(int(self._starts[shard_index]), int(self._starts[shard_index + 1]))

    @property
    def columns(self) -> MemberColumns:
        """The sidecar of an indexed data set, read at the first use. Raises DataError when it is missing or damaged."""
        assert self.index is not None
        if self._columns is None:
            columns = read_sidecar(self.store, self.index, self.images, len(self.labels))
            ends = np.repeat(self.shards.bytes.astype(np.int64), self.shards.images)
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
    if dataset.table is not None:
        if len(dataset.shards):
            raise DataError(f"{where}: lists shards, and names a file that does; {ADVICE}")
        dataset = dataset.model_copy(update={"shards": read_table(store, dataset.table), "table": dataset.table})
    _check_counts(dataset, where)
    return dataset


def write_dataset(dataset: Dataset) -> Dataset:
    """Commit a data set in its store: write dataset.json, after the file of its shards if there are many.

    Returns what `open_dataset` would. The same shards make the same files, always.
    """
    shards, store, table = dataset.shards, dataset.store, None
    if len(shards) + len(shards.size) > LISTED_MEMBERS and dataset.index is None:
        content = write_arrays(shards.arrays())
        store.write(TABLE_FILE, content)
        table = Sidecar(name=TABLE_FILE, bytes=len(content), sha256=sha256_bytes(content))
    dataset = dataset.model_copy(update={"table": table})
    store.write(DATASET_FILE, dump_dataset(dataset))
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
    shards = dataset.shards
    for name in ("images", "bytes"):
        total, stated = sum(getattr(shards, name).tolist()), getattr(dataset, name)
        if total != stated:
            raise DataError(f"{where}: states {stated} {name}, but its shards hold {total}; build the data set again")
    if (dataset.encoding == "tar") != (dataset.index is not None):
        raise DataError(f"{where}: an index needs encoding 'tar' and a sidecar, and has one of them; index again")
    check_members(dataset, where)


def check_members(dataset: Dataset, where: str) -> None:
    """Raise DataError unless every shard lists its images, one after another within its file."""
    each = dataset.image_bytes if dataset.encoding == "packed" else None
    row = dataset.shards.first_unsound(each, listed=dataset.index is None)  # an index is checked when it is read
    if row is None:
        return
    shard = dataset.shards[row]
    held = len(shard.sizes) if each is None else sum(size // each for size in shard.sizes)
    if held != shard.images:
        raise DataError(
            f"{where}: states {shard.images} images in {shard.name}, but lists {held}; build the data set again"
        )
    if each is not None and any(size % each for size in shard.sizes):
        raise DataError(f"{where}: lists a part of an image in {shard.name}; build the data set again")
    raise DataError(
        f"{where}: lists members of {shard.name} that overlap or lie outside its {shard.bytes} bytes; "
        "build the data set again"
    )
