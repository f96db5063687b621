"""WebDataset tars, of this project and of others: images by their offset in the tar, labels from .json and .cls."""

import contextlib
import json
import math
import re
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from pipeline.common.errors import DataError
from pipeline.common.imaging import Picture
from pipeline.common.pictures.formats import SUFFIXES
from pipeline.common.storage import is_url, locate, open_ranges
from pipeline.data.dataset import Dataset, open_dataset
from pipeline.data.shard_reader import read_shard, shard_columns
from pipeline.data.shard_writer import RECORD
from pipeline.data.sources.archives.files import compression_of, open_archive
from pipeline.data.sources.interface import KEY, Item, Listing, as_type, narrowest
from pipeline.data.specification import expand, is_dataset, short_names
from pipeline.data.spool import Spool

IMAGES = {suffix[1:] for suffixes in SUFFIXES.values() for suffix in suffixes}
"""Extensions of images. One whose format needs another package is refused by name when it is read."""
LABEL_BYTES = 64 << 20
"""Largest .json or .cls member; a larger one gives no labels."""
_SAMPLE = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)")  # webdataset's rule: a sample's name ends at the first dot
_META = re.compile(r"__[^/]*__/")  # in such a folder are notes on the tar, says webdataset
_BROKEN = (tarfile.TarError, ValueError, ArithmeticError, LookupError)
"""What `tarfile` raises in damaged tars."""


@dataclass(frozen=True)
class Tars:
    """What a shard specification or an index names, or one of our data sets."""

    location: str

    def listing(self) -> Listing:
        """Return all images. Members that are neither images nor labels are never opened."""
        if is_dataset(self.location):
            dataset = open_dataset(self.location)
            if dataset.index is None:
                return list_dataset(dataset)
            tars = [store.path(name) for store, name in map(dataset.place, dataset.shards)]
        else:
            tars = expand(self.location)
        listing = Listing({}, files=tars)
        samples: Spool[tuple[str, dict[str, Any], Any]] = Spool()
        kinds: dict[str, set[type]] = {}
        for tar, shown in zip(tars, short_names(tars), strict=True):
            for sample in _samples(plain_tar(tar, listing), shown, listing):
                samples.append(sample)
                for name, value in sample[1].items():
                    kinds.setdefault(name, set()).add(type(value))
        columns = sorted(kinds)
        if KEY in columns:  # img2dataset writes it into every .json
            columns.remove(KEY)
            listing.notes.append(f"the label {KEY!r} was skipped: `key` is the image's own name")
        listing.labels = {name: narrowest(kinds[name]) for name in columns}
        listing.items.extend(
            Item(key, tuple(as_type(labels.get(name), kind) for name, kind in listing.labels.items()), where)
            for key, labels, where in samples
        )
        if not listing.items:
            raise DataError(f"{self.location}: its tars hold no images (.jpg, .png, .webp … or uint8 blocks .npy)")
        return listing

    def read(self, item: Item) -> Picture:
        """Return the image's bytes, or its pixels when it lies in a block."""
        tar, offset, size, shape = item.where
        data = open_ranges(tar)(offset, size)
        return data if shape is None else np.frombuffer(data, np.uint8).reshape(shape)


def list_dataset(dataset: Dataset) -> Listing:
    """Return the images of one of our own data sets, checked, by the names that they had in its source."""
    listing = Listing(dict(dataset.labels))
    for index, shard in enumerate(dataset.shards):
        columns = shard_columns(dataset, shard, read_shard(dataset.store, shard))
        tar = dataset.store.path(shard.name)
        places: list[tuple[str, int, int, Any]] = []
        offsets, sizes = dataset.members(index)
        for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
            if dataset.encoding != "packed":
                places.append((tar, offset, size, None))
                continue
            for start in range(0, size, dataset.image_bytes):
                places.append((tar, offset + start, dataset.image_bytes, dataset.image_shape))
        rows = zip(*(columns[label] for label in dataset.labels), strict=True) if dataset.labels else [()] * len(places)
        for key, labels, where in zip(columns["key"], rows, places, strict=True):
            listing.items.append(Item(key, tuple(labels), where))
    return listing


def plain_tar(location: str, listing: Listing) -> str:
    """Return a tar's path or URL, or if it is compressed, the path of a temporary copy that is not.

    On a disk its first bytes tell, in a store its name. `listing` owns the copy.
    """
    if is_url(location):
        compressed = not location.partition("?")[0].endswith(".tar")
    else:
        with Path(location).open("rb") as file:
            compressed = compression_of(file.read(4)) is not None
    if not compressed:
        return location
    opened = open_archive(location, listing)
    opened.file.close()
    return opened.path


def tar_members(location: str, listing: Listing) -> Iterator[tuple[str, int, int, Any]]:
    """Yield (name, offset, size, open file) of the plain files in a tar. Raises DataError where the tar breaks.

    A tar without an end mark marks `listing` as damaged.
    """
    store, name = locate(location)
    with contextlib.ExitStack() as stack:
        if store.remote:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dcgan-tar-"))) / "copy.tar"
            store.fetch(name, path)
        else:
            path = Path(location)
        source = stack.enter_context(path.open("rb"))
        for member, offset, size in open_members(source, location, listing):
            yield member, offset, size, source


def open_members(file: Any, where: str, listing: Listing) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of the plain files in an open tar, like `tar_members`."""
    try:
        with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as tar:
            for member in tar:
                if member.size < 0:  # the next header would lie before this one, for ever
                    raise tarfile.ReadError("negative size")
                if member.issparse():
                    listing.refused.add(f"{where}: {member.name}", "a sparse file, whose bytes are not all in the tar")
                elif member.isreg():
                    yield member.name, member.offset_data, member.size
    except _BROKEN as error:
        place = file.tell()
        file.seek(0)
        head = file.read(4)
        if (compression := compression_of(head) or ("zip" if head[:2] == b"PK" else None)) is not None:
            raise DataError(
                f"{where}: compressed ({compression}), and images are read from the middle of a tar; "
                "unpack it, and name the plain .tar"
            ) from None
        raise DataError(f"{where}: damaged tar near offset {place}: {error}") from None
    # tarfile silently takes an unreadable header for the end, so the end must be checked.
    file.seek(tar.offset)
    if not (mark := file.read(RECORD)):  # some writers omit the mark, but a cut-off copy looks the same
        listing.refused.unnamed[f"tar without an end mark, perhaps cut off: {where}"] = 1
        listing.damaged = True
    while mark:
        if mark.strip(b"\0"):
            raise DataError(
                f"{where}: damaged tar: at offset {tar.offset} is neither a header nor the end of the tar, and "
                "the rest would be lost; copy or make it again"
            )
        mark = file.read(1 << 20)


def _samples(tar: str, shown: str, listing: Listing) -> list[tuple[str, dict[str, Any], Any]]:
    """Return (key, labels, where) of each image in a tar. A key begins with `shown`, the tar's short name."""
    found: dict[str, list[tuple[str, Any]]] = {}
    labels: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    passed = unread = 0
    for member, offset, size, file in tar_members(tar, listing):
        match = _SAMPLE.fullmatch(member)
        extension = match[2].lower().rpartition(".")[2] if match else ""
        if match is None or extension not in IMAGES | {"json", "cls", "npy"} or _META.match(member):
            passed += 1
            continue
        sample = match[1]
        if extension in ("json", "cls"):
            file.seek(offset)
            some = labels_in(file.read(size), extension) if size <= LABEL_BYTES else None
            labels.setdefault(sample, {}).update(some or {})
            unread += some is None
        elif member in seen:
            listing.refused.add(f"{shown}/{member}", "its name is in its tar twice")
        elif extension in IMAGES:
            seen.add(member)
            found.setdefault(sample, []).append((f"{shown}/{member}", (tar, offset, size, None)))
        else:
            seen.add(member)
            file.seek(offset)
            block = _block(file, tar, offset, size)
            if block is None:
                listing.refused.add(f"{shown}/{member}", "not a block of uint8 images")
            else:
                found.setdefault(sample, []).extend((f"{shown}/{member}#{i}", where) for i, where in enumerate(block))
    if passed:
        listing.notes.append(f"{passed:,} members of {shown} that are neither images nor labels were skipped")
    if unread:
        listing.notes.append(f"{unread:,} .json members of {shown} are not JSON and give no labels")
    return [
        (key, label_row(labels.get(sample, {}), index, len(images)), where)
        for sample, images in found.items()
        for index, (key, where) in enumerate(images)
    ]


def labels_in(data: bytes, extension: str) -> dict[str, Any] | None:
    """Return the labels in a .json or .cls member: its scalar values, or columns of them. None if it is no JSON."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):  # the latter from a thousand brackets, one in the other
        text = data.decode("utf-8", "replace").strip()
        return {"label": text} if extension == "cls" else None
    if extension == "cls" or not isinstance(content, dict):
        return {"label": content} if isinstance(content, (int, str)) and _is_label(content) else {}
    inner = content.get("labels")
    content = inner if isinstance(inner, dict) else content
    return {name: value for name, value in content.items() if isinstance(value, list) or _is_label(value)}


def _is_label(value: Any) -> bool:
    """Whether a value can be a label: a text, or a number that an array holds."""
    if isinstance(value, str):
        return not any("\ud800" <= char <= "\udfff" for char in value)
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63)


def label_row(labels: dict[str, Any], index: int, images: int) -> dict[str, Any]:
    """Return one image's labels: of columns the image's value, if they have one for each image."""
    row = {}
    for name, value in labels.items():
        if not isinstance(value, list):
            row[name] = value
        elif len(value) == images and (value[index] is None or _is_label(value[index])):
            row[name] = value[index]
    return row


def _block(file: Any, tar: str, offset: int, size: int) -> list[tuple[str, int, int, Any]] | None:
    """Return the places of the images in an .npy block (n, H, W, 1 or 3) of uint8, or None if it is another array."""
    try:
        version = np.lib.format.read_magic(file)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = reader(file)
    except (ValueError, KeyError, RecursionError, MemoryError, TypeError, SyntaxError, TokenError):
        return None  # numpy reads the header as Python
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] not in (1, 3):
        return None
    start, each = file.tell(), math.prod(shape[1:])  # numpy's product would overflow
    if min(shape) < 1 or start - offset + each * shape[0] != size:
        return None
    return [(tar, start + i * each, each, tuple(shape[1:])) for i in range(shape[0])]
