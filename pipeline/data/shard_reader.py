"""Reads shards: their members, images and labels, checked against dataset.json."""

import json
from collections.abc import Iterator
from typing import Any, Literal, overload

import numpy as np

from pipeline.common.errors import DataError
from pipeline.common.imaging import BadImage, Pixels, decode
from pipeline.common.storage import Store, sha256_bytes
from pipeline.data.dataset import Dataset, Shard
from pipeline.data.shard_writer import RECORD

Columns = dict[str, list[Any]]
"""Labels by name, each in the images' order; the images' names are under `key`."""


class DamagedTar(DataError):
    """A tar of ours whose structure is broken at `offset`."""

    def __init__(self, where: str, what: str, offset: int) -> None:
        super().__init__(f"{where}: {what} at offset {offset}; build or copy the shard again")
        self.what, self.offset = what, offset


def members(data: bytes | memoryview, where: str) -> Iterator[tuple[str, int, int]]:
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
        if stated != sum(header) - sum(header[148:156]) + 8 * 32 or header[156:157] != b"0":
            raise DamagedTar(where, "damaged tar header", position)
        name = header[:100].rstrip(b"\0").decode("ascii", "replace")
        if position + RECORD + size > len(data):
            raise DamagedTar(where, f"ends inside {name}", position)
        yield name, position + RECORD, size
        position += RECORD + size + -size % RECORD
    raise DamagedTar(where, "ends without an end mark", len(data))


def read_shard(store: Store, shard: Shard) -> bytes:
    """Return a shard's file, checked against its size and SHA-256. Raises DataError."""
    data = store.read(shard.name)
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

    They come as blocks (n, size, size, channels) if packed, else one by one (n = 1). Raises DataError.
    """
    side, channels = dataset.image_size, dataset.channels
    shard = dataset.shards[index]
    view = memoryview(data)
    offsets, sizes = dataset.members(index)
    for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
        piece = view[offset : offset + size]
        if dataset.encoding == "packed":
            yield np.frombuffer(piece, np.uint8).reshape(-1, side, side, channels)
            continue
        where = f"{dataset.store.path(shard.name)}: the image at offset {offset}"
        try:
            image = decode(piece, channels)
        except BadImage as error:
            raise DataError(f"{where}: {error}") from None
        if image.shape != (side, side, channels):
            raise DataError(f"{where} is {image.shape}, not {(side, side, channels)}")
        yield image[None]


def shard_columns(dataset: Dataset, shard: Shard, data: bytes) -> Columns:
    """Return the labels in a shard's file `data`, in the images' order, and the images' names. Raises DataError."""
    where = dataset.store.path(shard.name)
    columns: Columns = {name: [] for name in ["key", *dataset.labels]}
    for name, offset, size in members(data, where):
        if not name.endswith(".json"):
            continue
        try:
            content = json.loads(data[offset : offset + size])
            values = {"key": content["key"], **{label: content["labels"][label] for label in dataset.labels}}
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{where}: {name} at offset {offset} lacks the labels that dataset.json states") from None
        for label, value in values.items():
            columns[label].extend(value if isinstance(value, list) else [value])
    return columns


@overload
def iterate(dataset: Dataset, *, batch: int = ..., labels: Literal[False] = ...) -> Iterator[Pixels]: ...
@overload
def iterate(dataset: Dataset, *, batch: int = ..., labels: Literal[True]) -> Iterator[tuple[Pixels, Columns]]: ...
def iterate(
    dataset: Dataset, *, batch: int = 256, labels: bool = False
) -> Iterator[Pixels] | Iterator[tuple[Pixels, Columns]]:
    """Yield all images in the data set's own order as uint8 batches (n, size, size, channels); the last is smaller.

    With `labels`, yield (images, columns): columns hold every label and `key`, the name in the source.
    Shards are checked against their SHA-256. Raises DataError that names the shard.
    """
    with_labels = _iterate(dataset, batch, labels)
    return with_labels if labels else (images for images, _ in with_labels)


def _iterate(dataset: Dataset, batch: int, labels: bool) -> Iterator[tuple[Pixels, Columns]]:
    names = ["key", *dataset.labels] if labels else []
    waiting: list[Pixels] = []
    columns: Columns = {name: [] for name in names}
    ready = 0
    for index, shard in enumerate(dataset.shards):
        data = read_shard(dataset.store, shard)
        if labels:
            for name, values in shard_columns(dataset, shard, data).items():
                columns[name].extend(values)
        for images in shard_images(dataset, index, data):
            waiting.append(images)
            ready += len(images)
            while ready >= batch:
                joined = np.concatenate(waiting) if len(waiting) > 1 else waiting[0]
                yield joined[:batch], {name: values[:batch] for name, values in columns.items()}
                columns = {name: values[batch:] for name, values in columns.items()}
                waiting, ready = [joined[batch:]], ready - batch
    if ready:
        yield np.concatenate(waiting), columns
