"""Reads shards: their members, images and labels, checked against dataset.json."""

from collections.abc import Iterator
from mmap import mmap
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import DataError
from pipeline.common.imaging import BadImage, Pixels, decode
from pipeline.common.records import parse_json
from pipeline.common.storage import Store, sha256_bytes
from pipeline.data.dataset import Dataset, LabelType, Shard
from pipeline.data.loading.tar_files import Tars
from pipeline.data.shard_writer import RECORD

LARGEST_LABEL = (1 << 63) - 1
_TYPES: dict[LabelType, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}

Columns = dict[str, list[Any]]
"""Labels by name, each in the images' order; the images' names are under `key`."""


class DamagedTar(DataError):
    """A tar of ours whose structure is broken at `offset`."""

    def __init__(self, where: str, what: str, offset: int) -> None:
        super().__init__(f"{where}: {what} at offset {offset}; build or copy the shard again")
        self.what, self.offset = what, offset


def members(data: bytes | memoryview | mmap, where: str) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset of the data, size) of the files in a tar of ours. Raises DamagedTar."""
    position = 0
    while position + RECORD <= len(data):
        header = bytes(data[position : position + RECORD])
        if header == bytes(RECORD):
            return
        try:
            stated = int(header[148:154], 8)
            size = int(header[124:135], 8)
        except ValueError:
            stated = size = -1
        if size < 0 or stated != sum(header) - sum(header[148:156]) + 8 * 32 or header[156:157] != b"0":
            raise DamagedTar(where, "damaged tar header", position)
        name = header[:100].rstrip(b"\0").decode("ascii", "replace")
        if position + RECORD + size > len(data):
            raise DamagedTar(where, f"ends inside {name}", position)
        yield name, position + RECORD, size
        position += RECORD + size + -size % RECORD
    raise DamagedTar(where, "ends without an end mark", len(data))


def read_shard(store: Store, shard: Shard) -> bytes:
    """Return a shard's file, checked against its size and SHA-256. Raises DataError."""
    data = store.read(store.inside(shard.name))
    where = store.path(shard.name)
    if len(data) != shard.bytes:
        raise DataError(
            f"{where}: {len(data)} bytes, but dataset.json states {shard.bytes}; build or copy the shard again"
        )
    if sha256_bytes(data) != shard.sha256:
        raise DataError(f"{where}: its SHA-256 is not the one in dataset.json; build or copy the shard again")
    return data


def shard_images(dataset: Dataset, index: int, data: bytes) -> Iterator[Pixels]:
    """Yield the images of shard number `index`, whose file is `data`, in order.

    They come as blocks (n, height, width, channels) if packed, else one by one (n = 1). Raises DataError.
    """
    shape = dataset.image_shape
    shard = dataset.shards[index]
    view = memoryview(data)
    offsets, sizes = dataset.members(index)
    for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
        piece = view[offset : offset + size]
        if dataset.encoding == "packed":
            yield np.frombuffer(piece, np.uint8).reshape(-1, *shape)
            continue
        where = f"{dataset.store.path(shard.name)}: the image at offset {offset}"
        try:
            image = decode(piece, shape[2])
        except BadImage as error:
            raise DataError(f"{where}: {error}") from None
        if image.shape != shape:
            raise DataError(f"{where} is {image.shape}, not {shape}")
        yield image[None]


def tar_images(dataset: Dataset, tars: Tars, index: int, rows: list[int]) -> Iterator[Pixels]:
    """Yield the images at `rows` of tar number `index` of an indexed data set, each (1, height, width, channels).

    The tar may be large, and is read image by image. Raises DataError.
    """
    with tars.open(index) as file:
        for row in rows:
            image = np.empty((1, *dataset.image_shape), np.uint8)
            tars.decode(index, row, file.fileno(), image[0])
            yield image


def tar_columns(dataset: Dataset, rows: NDArray[np.int64]) -> Columns:
    """Return names and labels of the images at `rows` of an indexed data set. Raises DataError."""
    labels = zip(dataset.labels, dataset.columns.labels, strict=True)
    return {"key": dataset.columns.key.take(rows), **{name: label.take(rows) for name, label in labels}}


def shard_columns(dataset: Dataset, shard: Shard, data: bytes | mmap) -> Columns:
    """Return the labels in a shard's file `data`, in the images' order, and the images' names. Raises DataError."""
    where = dataset.store.path(shard.name)
    columns: Columns = {name: [] for name in ["key", *dataset.labels]}
    for name, offset, size in members(data, where):
        if not name.endswith(".json"):
            continue
        try:
            content = parse_json(data[offset : offset + size], where, nan=True)
            rows = [content["key"], *(content["labels"][label] for label in dataset.labels)]
            rows = [value if isinstance(value, list) else [value] for value in rows]
            if len({len(row) for row in rows}) != 1 or not all(map(_fits, rows, ["str", *dataset.labels.values()])):
                raise ValueError
        except (DataError, ValueError, KeyError, TypeError):
            raise DataError(f"{where}: {name} at offset {offset} lacks the labels that dataset.json states") from None
        for label, row in zip(columns, rows, strict=True):
            columns[label].extend(row)
    if len(columns["key"]) != shard.images:
        raise DataError(
            f"{where}: names {len(columns['key'])} images, but dataset.json states {shard.images}; build it again"
        )
    return columns


def _fits(row: list[Any], kind: LabelType) -> bool:
    """Whether all values of a label are of its type, or None, and no larger than an array holds."""
    return all(
        value is None
        or (isinstance(value, _TYPES[kind]) and (not isinstance(value, int) or abs(value) <= LARGEST_LABEL))
        for value in row
    )


@overload
def iterate(
    dataset: Dataset, *, batch: int = ..., labels: Literal[False] = ..., limit: int | None = ...
) -> Iterator[Pixels]: ...
@overload
def iterate(
    dataset: Dataset, *, batch: int = ..., labels: Literal[True], limit: int | None = ...
) -> Iterator[tuple[Pixels, Columns]]: ...
def iterate(
    dataset: Dataset, *, batch: int = 256, labels: bool = False, limit: int | None = None
) -> Iterator[Pixels] | Iterator[tuple[Pixels, Columns]]:
    """Yield all images in the data set's own order as uint8 batches (n, height, width, channels); the last is smaller.

    With `labels`, yield (images, columns): columns hold every label and `key`, the name in the source.

    With `limit`, yield that many images at most: the first, which are a random draw, because a build stores images
    in random order. An indexed data set has the order of its tars, which may be sorted: then they are images at
    equal distances.

    Shards are checked against their SHA-256. Raises DataError that names the shard.
    """
    with_labels = _iterate(dataset, batch, labels, dataset.images if limit is None else min(limit, dataset.images))
    return with_labels if labels else (images for images, _ in with_labels)


def _iterate(dataset: Dataset, batch: int, labels: bool, limit: int) -> Iterator[tuple[Pixels, Columns]]:
    names = ["key", *dataset.labels] if labels else []
    waiting: list[Pixels] = []
    columns: Columns = {name: [] for name in names}
    ready = 0
    for images, values in (_from_shards if dataset.index is None else _from_tars)(dataset, labels, limit):
        for name in names:
            columns[name].extend(values.get(name, ()))
        waiting.append(images)
        ready += len(images)
        while ready >= batch:
            joined = np.concatenate(waiting) if len(waiting) > 1 else waiting[0]
            yield joined[:batch], {name: column[:batch] for name, column in columns.items()}
            columns = {name: column[batch:] for name, column in columns.items()}
            waiting, ready = [joined[batch:]], ready - batch
    if ready:
        yield np.concatenate(waiting), {name: column[:ready] for name, column in columns.items()}


def _from_shards(dataset: Dataset, labels: bool, limit: int) -> Iterator[tuple[Pixels, Columns]]:
    """Yield the first `limit` images, the labels of a shard with its first images."""
    for index, shard in enumerate(dataset.shards):
        if limit <= 0:
            return
        data = read_shard(dataset.store, shard)
        columns = shard_columns(dataset, shard, data) if labels else {}
        for images in shard_images(dataset, index, data):
            yield images[:limit], columns
            limit, columns = limit - len(images), {}
            if limit <= 0:
                return


def _from_tars(dataset: Dataset, labels: bool, limit: int) -> Iterator[tuple[Pixels, Columns]]:
    """Yield `limit` images at equal distances, the labels of a tar with its first image."""
    tars = Tars(dataset, None)
    wanted, starts = dataset.columns.spread(limit), dataset.shard_starts
    bounds = np.searchsorted(wanted, starts)
    for index, start in enumerate(starts[:-1]):
        rows = wanted[bounds[index] : bounds[index + 1]]
        if not len(rows):
            continue
        columns = tar_columns(dataset, rows) if labels else {}
        for image in tar_images(dataset, tars, index, (rows - start).tolist()):
            yield image, columns
            columns = {}
