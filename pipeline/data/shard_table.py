"""The shards of a data set as columns: 400,000 of them take 70 MB, and open in a second."""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, GetCoreSchemaHandler, SerializerFunctionWrapHandler, model_serializer
from pydantic_core import core_schema

from pipeline.common.errors import DataError
from pipeline.common.records import LARGEST, PlainName, Record
from pipeline.common.storage import Store
from pipeline.data.index.sidecar import Arrays, Sidecar, Texts, open_arrays

TABLE_FILE = "shards.npz"
"""The shards of a large data set, beside its dataset.json."""
ADVICE = "copy or build the data set again"
CHECKED_MEMBERS = 1 << 20
"""Members whose places are checked at a time: of all, the intermediate arrays would be larger than the table."""
HASHED_SHARDS = 1 << 14
_TEXTS = ("name#text", "name#ends")
_NUMBERS = ("images", "bytes", "sha256", "ends", "offset", "size")

Place = Annotated[int, Field(ge=0, le=LARGEST)]


class Terse(Record):
    """A record whose fields that may be None are written only when they are set."""

    @model_serializer(mode="wrap")
    def _without_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        return {name: value for name, value in values.items() if value is not None}


class Shard(Terse):
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


@dataclass(frozen=True, eq=False)
class ShardTable(Sequence[Shard]):
    """The shards in their order, a row each. A `Shard` is made when it is asked for."""

    name: Texts
    images: NDArray[np.integer[Any]]
    """int64, or uint32 where all values fit, as all columns of numbers."""
    bytes: NDArray[np.integer[Any]]
    sha256: NDArray[np.uint8]
    """(shards, 32)."""
    ends: NDArray[np.integer[Any]]
    """Where each shard's rows end in `offset` and `size`."""
    offset: NDArray[np.integer[Any]]
    """Of the members of all shards, one shard after another."""
    size: NDArray[np.integer[Any]]
    location: Texts | None = None
    """Of indexed tars, which have all a location; an etag that is missing is empty."""
    etag: Texts | None = None

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> "ShardTable":
        """Return the table of some shards, which are taken one by one. Raises ValueError."""
        if isinstance(shards, cls):
            return shards
        names: list[bytes] = []
        placed: list[tuple[bytes, bytes]] = []
        digests = bytearray()
        numbers = {name: array("q") for name in ("images", "bytes", "ends", "offset", "size")}
        for shard in shards:
            if len(shard.offsets) != len(shard.sizes):
                raise ValueError(f"{shard.name}: {len(shard.offsets)} offsets, but {len(shard.sizes)} sizes")
            names.append(shard.name.encode())
            digests += bytes.fromhex(shard.sha256)
            placed.append(((shard.location or "").encode(), (shard.etag or "").encode()))
            numbers["images"].append(shard.images)
            numbers["bytes"].append(shard.bytes)
            numbers["offset"].extend(shard.offsets)
            numbers["size"].extend(shard.sizes)
            numbers["ends"].append(len(numbers["size"]))
        locations, etags = zip(*placed, strict=True) if placed else ((), ())
        return cls(
            name=Texts.of(names),
            sha256=np.frombuffer(bytes(digests), np.uint8).reshape(-1, 32),
            **{name: _narrow(np.array(values, np.int64)) for name, values in numbers.items()},
            location=Texts.of(list(locations)) if any(locations) else None,
            etag=Texts.of(list(etags)) if any(etags) else None,
        )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Take a list of shards, and write one."""

        def read(value: Any, inner: Callable[[Any], list[Shard]]) -> ShardTable:
            return value if isinstance(value, cls) else cls.of(inner(value))

        return core_schema.no_info_wrap_validator_function(read, handler.generate_schema(list[Shard]))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> list[Shard]: ...
    def __getitem__(self, index: int | slice) -> Shard | list[Shard]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        members = self.members(row)
        return Shard.model_construct(
            name=_text(self.name, row),
            images=int(self.images[row]),
            bytes=int(self.bytes[row]),
            sha256=self.sha256[row].tobytes().hex(),
            offsets=self.offset[members].tolist(),
            sizes=self.size[members].tolist(),
            location=None if self.location is None else _text(self.location, row) or None,
            etag=None if self.etag is None else _text(self.etag, row) or None,
        )

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[Shard]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardTable) and all(
            _equal(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)
        )

    @property
    def starts(self) -> NDArray[np.int64]:
        """Index of each shard's first image in the data set's own order, and at the end the total."""
        return np.concatenate([[0], np.cumsum(self.images, dtype=np.int64)])

    @property
    def member_starts(self) -> NDArray[np.int64]:
        """Index of each shard's first row in `offset` and `size`, and at the end the total."""
        return np.concatenate([[0], self.ends]).astype(np.int64)

    def members(self, shard: int) -> slice:
        """Return the rows of a shard in `offset` and `size`."""
        return slice(int(self.ends[shard - 1]) if shard else 0, int(self.ends[shard]))

    def names(self) -> list[str]:
        """Return the names of all shards."""
        return self.name.slice(0, len(self))

    def joined_hashes(self) -> "hashlib._Hash":
        """Return the SHA-256, to be added to, over the hexadecimal hashes of the shards, a line each."""
        digest = hashlib.sha256()
        for start in range(0, len(self), HASHED_SHARDS):
            some = self.sha256[start : start + HASHED_SHARDS].tobytes()
            digest.update(b"\n" * (start > 0) + some.hex("\n", 32).encode())
        return digest

    def first_unsound(self, image_bytes: int | None, *, listed: bool = True) -> int | None:
        """Return the first shard that holds more or fewer images than it states, or members that are not in order.

        `image_bytes` is that of a packed data set, whose members are blocks of images. Where the members are not
        `listed`, a shard may have none.
        """
        starts = self.member_starts
        cuts = np.searchsorted(starts, np.arange(0, int(starts[-1]), CHECKED_MEMBERS))
        bounds = np.unique([0, *cuts.tolist(), len(self)]).tolist()
        for first, last in zip(bounds, bounds[1:], strict=False):
            unsound = np.flatnonzero(self._unsound(starts[first : last + 1], first, last, image_bytes, listed))
            if len(unsound):
                return int(first + unsound[0])
        return None

    def _unsound(
        self, starts: NDArray[np.int64], first: int, last: int, image_bytes: int | None, listed: bool
    ) -> NDArray[np.bool_]:
        """Return which of the shards `first` to `last` are unsound; `starts` are those of their members."""
        offset = self.offset[starts[0] : starts[-1]].astype(np.int64)
        size = self.size[starts[0] : starts[-1]].astype(np.int64)
        counts, images = np.diff(starts), self.images[first:last].astype(np.int64)
        filled = counts > 0
        begins = (starts[:-1] - starts[0])[filled]
        limits = np.roll(offset, -1)
        limits[(starts[1:] - 1 - starts[0])[filled]] = self.bytes[first:last][filled]
        wrong = (size < 0) | (size > LARGEST) | (offset > LARGEST) | (offset + size > limits)
        wrong[begins] |= offset[begins] < 0
        held = counts if listed else np.where(filled, counts, images)
        if image_bytes is not None and len(begins):
            wrong |= size % image_bytes != 0
            held[filled] = np.add.reduceat(size // image_bytes, begins)
        unsound: NDArray[np.bool_] = held != images
        if len(begins):
            unsound[filled] |= np.logical_or.reduceat(wrong, begins)
        return unsound

    def arrays(self) -> Arrays:
        """Return what the file `TABLE_FILE` holds."""
        assert self.location is None
        texts = zip(_TEXTS, (self.name.text, self.name.ends), strict=True)
        return {**dict(texts), **{name: getattr(self, name) for name in _NUMBERS}}


def read_table(store: Store, sidecar: Sidecar) -> ShardTable:
    """Return the shards in a file beside dataset.json, which is mapped on a disk. Raises DataError."""
    where = store.path(sidecar.name)
    arrays = open_arrays(store, sidecar, ADVICE)
    if set(arrays) != {*_TEXTS, *_NUMBERS}:
        raise DataError(f"{where}: lacks a column, or has another; {ADVICE}")
    numbers: dict[str, Any] = {name: arrays[name] for name in _NUMBERS}
    table = ShardTable(name=Texts(*(arrays[name] for name in _TEXTS)), **numbers)
    if bad := _damaged(table):
        raise DataError(f"{where}: is damaged: {bad!r}; {ADVICE}")
    return table


def _damaged(table: ShardTable) -> str | None:
    """Return the first column that cannot be that of a data set, or None."""
    rows, members = table.ends.shape[:1], table.size.shape
    shapes = {"images": rows, "bytes": rows, "ends": rows, "offset": members, "size": members}
    for name, shape in shapes.items():
        column = getattr(table, name)
        if column.dtype not in (np.uint32, np.int64) or column.shape != shape or len(shape) != 1:
            return name
    if not len(table) or table.sha256.dtype != np.uint8 or table.sha256.shape != (len(table), 32):
        return "sha256"
    for name in ("images", "bytes"):
        column = getattr(table, name)
        if column.min() < 1 or column.max() > LARGEST:
            return name
    if (table.ends[1:] < table.ends[:-1]).any() or table.ends[0] < 0 or table.ends[-1] != len(table.size):
        return "ends"
    return None if table.name.sound(len(table)) and _plain_tars(table.name) else "name"


def _plain_tars(names: Texts) -> bool:
    """Whether all names are plain, and end in `.tar`."""
    lengths = np.diff(names.ends, prepend=0)
    if lengths.min() < 5 or lengths.max() > 255:
        return False
    plain = np.zeros(256, np.bool_)
    plain[list(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-")] = True
    tails = names.text[names.ends[:, None] + np.arange(-4, 0)]
    return bool(plain[names.text].all()) and bool((tails == np.frombuffer(b".tar", np.uint8)).all())


def _narrow(values: NDArray[np.int64]) -> NDArray[np.integer[Any]]:
    """Return numbers in four bytes each where they fit."""
    fits = not len(values) or (values.min() >= 0 and values.max() < 1 << 32)
    return values.astype(np.uint32) if fits else values


def _text(texts: Texts, row: int) -> str:
    return texts.slice(row, row + 1)[0]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Texts) and isinstance(b, Texts):
        return np.array_equal(a.text, b.text) and np.array_equal(a.ends, b.ends)
    return a is b if a is None or b is None else np.array_equal(a, b)
