"""`dcgan-data verify`: checks every byte of a data set, and names shard, key and offset of each damage."""

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import DataError, one_line
from pipeline.common.imaging import BadImage, decode, load_image
from pipeline.common.machine import available_cores
from pipeline.common.progress import Progress
from pipeline.common.records import parse_json
from pipeline.common.storage import Store, sha256_bytes
from pipeline.data.build.process_pool import run_tasks
from pipeline.data.dataset import DATASET_FILE, Dataset, Shard
from pipeline.data.index.scan import verify_headers
from pipeline.data.shard_reader import DamagedTar, members
from pipeline.data.shard_writer import checksum

SHOWN = 50
"""Damages that are printed; the error counts all of them."""
TASK_SHARDS = 8
"""Shards that a process receives at once; those of a store it reads at the same time, and holds in memory."""


@dataclass(frozen=True)
class Damage:
    """Something wrong in a shard."""

    shard: str
    what: str
    key: str | None = None
    offset: int | None = None

    def __str__(self) -> str:
        key = "" if self.key is None else f" key {self.key!r}"
        offset = "" if self.offset is None else f" offset {self.offset}"
        return f"{self.shard}:{key}{offset}{':' if key or offset else ''} {self.what}"


@dataclass(frozen=True)
class Checker:
    """Checks shards in the worker processes, which get all of dataset.json but the list of shards."""

    dataset: Dataset

    def check(self, shards: list[Shard]) -> tuple[int, list[Damage]]:
        """Return the images of some shards and what is wrong with these. All are read at the same time from a store."""
        store = self.dataset.store
        with ThreadPoolExecutor(len(shards) if store.remote else 1) as readers:
            contents = readers.map(_read, repeat(store), shards) if store.remote else map(_read, repeat(store), shards)
            found = [
                damage
                for shard, content in zip(shards, contents, strict=True)
                for damage in _check_content(self.dataset, shard, content)
            ]
        return sum(shard.images for shard in shards), found


@dataclass(frozen=True)
class IndexedShard:
    """A tar of an indexed data set with its rows of the sidecar: what a worker process receives."""

    shard: Shard
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    keys: list[str]


@dataclass(frozen=True)
class TarChecker:
    """Checks tars of an indexed data set in the worker processes, which get dataset.json without the list of shards."""

    dataset: Dataset

    def check(self, indexed: IndexedShard) -> tuple[int, list[Damage]]:
        """Return the tar's images and what is wrong with it."""
        return indexed.shard.images, list(check_tar(self.dataset, indexed))


def verify(dataset: Dataset) -> None:
    """Check all shards and print what is damaged. Raises DataError when anything is."""
    if dataset.index is not None:
        _report(dataset, _check_tars(dataset))
        return
    present, names = set(dataset.store.names()), dataset.shards.names()
    damages = [Damage(name, "missing") for name in names if name not in present]
    for name in sorted(name for name in present.difference(names) if name.endswith(".tar")):
        print(one_line(f"note: {dataset.store.path(name)} is not part of the data set"))
    there = np.flatnonzero([name in present for name in names])
    cores = available_cores()
    each = TASK_SHARDS if dataset.store.remote else min(TASK_SHARDS, 1 + len(there) // (4 * cores))
    tasks = (
        [dataset.shards[row] for row in there[start : start + each].tolist()] for start in range(0, len(there), each)
    )
    checker = Checker(dataset.model_copy(update={"shards": []}))
    with Progress("verifying", sum(dataset.shards.images[there].tolist())) as progress:
        for images, found in run_tasks(checker.check, tasks, cores):
            progress.advance(images)
            damages += found
    _report(dataset, damages)


def _check_tars(dataset: Dataset) -> list[Damage]:
    """Return what is wrong with the tars of an indexed data set."""
    damages: list[Damage] = []
    checker = TarChecker(dataset.model_copy(update={"shards": []}))
    tars = (_indexed(dataset, number) for number in range(len(dataset.shards)))
    with Progress("verifying", dataset.images) as progress:
        for images, found in run_tasks(checker.check, tars, available_cores()):
            progress.advance(images)
            damages += found
    return damages


def _indexed(dataset: Dataset, number: int) -> IndexedShard:
    rows = dataset.rows(number)
    keys = dataset.columns.key.slice(rows.start, rows.stop)
    return IndexedShard(dataset.shards[number], *dataset.members(number), keys)


def _report(dataset: Dataset, damages: list[Damage]) -> None:
    """Print damages; raise DataError when there are any."""
    for damage in sorted(damages, key=lambda damage: (damage.shard, damage.offset or 0))[:SHOWN]:
        print(one_line(str(damage)))
    if damages:
        shards = len({damage.shard for damage in damages})
        again = "build" if dataset.index is None else "index"
        raise DataError(
            f"{dataset.location}: {len(damages):,} damages in {shards:,} of {len(dataset.shards):,} shards; "
            f"copy those shards again, or {again} again with --overwrite"
        )
    print(
        f"{dataset.location}: {dataset.images:,} images in {len(dataset.shards):,} shards, all as {DATASET_FILE} says"
    )


def check_tar(dataset: Dataset, indexed: IndexedShard) -> Iterator[Damage]:
    """Yield everything that is wrong with one tar of an indexed data set."""
    store, name = dataset.place(indexed.shard)
    where = store.path(name)
    with tempfile.TemporaryDirectory(prefix="dcgan-verify-") as folder:
        path = Path(folder) / "copy.tar" if store.remote else Path(where)
        try:
            if store.remote:
                store.fetch(name, path)
            with FileIO(path) as file:
                verify_headers(file, indexed.shard, where)
                yield from _check_members(dataset, indexed, file, where)
        except FileNotFoundError:
            yield Damage(where, "missing")
        except DataError as error:
            yield Damage(where, str(error).removeprefix(f"{where}: "))


def _check_members(dataset: Dataset, indexed: IndexedShard, file: FileIO, where: str) -> Iterator[Damage]:
    """Yield the images of a tar that cannot be decoded."""
    for key, offset, size in zip(indexed.keys, indexed.offsets.tolist(), indexed.sizes.tolist(), strict=True):
        try:
            data = os.pread(file.fileno(), size, offset)
            load_image(data, dataset.frame)
        except BadImage as error:
            yield Damage(where, str(error), key, offset)


def check_shard(dataset: Dataset, shard: Shard) -> Iterator[Damage]:
    """Yield everything that is wrong with one shard."""
    yield from _check_content(dataset, shard, _read(dataset.store, shard))


def _read(store: Store, shard: Shard) -> bytes | DataError:
    """Return a shard's file, or why there is none."""
    try:
        return store.read(store.inside(shard.name))
    except DataError as error:
        return error


def _check_content(dataset: Dataset, shard: Shard, data: bytes | DataError) -> Iterator[Damage]:
    """Yield everything that is wrong with a shard's file."""
    if isinstance(data, DataError):
        yield Damage(shard.name, str(data))
        return
    if len(data) != shard.bytes:
        yield Damage(shard.name, f"{len(data):,} bytes, but {DATASET_FILE} states {shard.bytes:,}")
    elif sha256_bytes(data) == shard.sha256:
        yield from _check_images(data, dataset, shard)
        return
    found = False
    for damage in _check_images(data, dataset, shard):
        found = True
        yield damage
    if not found and len(data) == shard.bytes:
        yield Damage(shard.name, "its SHA-256 is not the stated one, though all its images and labels are intact")


def _check_images(data: bytes, dataset: Dataset, shard: Shard) -> Iterator[Damage]:
    """Yield what is wrong with the members of a shard."""
    places = iter(zip(shard.offsets, shard.sizes, strict=True))
    image: tuple[int, int] | None = None
    images = 0
    try:
        for name, offset, size in members(data, shard.name):
            if not name.endswith(".json"):
                image = next(places, None)
                if image is None or not offset <= image[0] or image[0] + image[1] != offset + size:
                    yield Damage(shard.name, f"{name} is not where {DATASET_FILE} places an image", offset=offset)
                    return
                continue
            if image is None:
                yield Damage(shard.name, f"{name} stands before its images", offset=offset)
                return
            entry = _entry(data[offset : offset + size], dataset)
            if entry is None:
                yield Damage(shard.name, f"{name}: the labels are damaged", offset=offset)
            else:
                images += len(entry)
                yield from _check_entry(data, dataset, shard.name, image, entry)
            image = None
    except DamagedTar as damage:
        yield Damage(shard.name, damage.what, offset=damage.offset)
        return
    if images != shard.images:
        yield Damage(shard.name, f"{images:,} intact entries, but {DATASET_FILE} states {shard.images:,} images")


def _entry(content: bytes, dataset: Dataset) -> list[tuple[str, list[Any], int]] | None:
    """Return (key, labels, checksum) of each image that a .json member describes, or None if it is damaged."""
    try:
        values = parse_json(content, "", nan=True)
        columns = [values["key"], *(values["labels"][name] for name in dataset.labels), values["crc32"]]
        if dataset.encoding != "packed":
            columns = [[value] for value in columns]
        entries = [(key, labels, crc) for key, *labels, crc in zip(*columns, strict=True)]
        return entries if all(isinstance(key, str) for key, _, _ in entries) else None
    except (DataError, ValueError, KeyError, TypeError):
        return None


def _check_entry(
    data: bytes, dataset: Dataset, shard: str, image: tuple[int, int], entry: list[tuple[str, list[Any], int]]
) -> Iterator[Damage]:
    """Yield what is wrong with the images that one .json member describes."""
    start, size = image
    each = size // max(1, len(entry))
    if dataset.encoding == "packed" and each != dataset.image_bytes:
        yield Damage(shard, f"{len(entry)} labels for {size // dataset.image_bytes} images", offset=start)
        return
    for index, (key, labels, crc) in enumerate(entry):
        offset = start + index * each
        piece = memoryview(data)[offset : offset + each]
        if checksum(piece, key, labels) != crc:
            yield Damage(shard, "the image, its name or its labels are damaged (CRC-32)", key, offset)
        elif dataset.encoding != "packed":
            try:
                shape = decode(piece, dataset.channels).shape
            except BadImage as error:
                yield Damage(shard, str(error), key, offset)
                continue
            if shape != dataset.image_shape:
                yield Damage(shard, f"an image of {shape}", key, offset)
