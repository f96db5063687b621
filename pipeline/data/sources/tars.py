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
from typing import Any

import numpy as np

from pipeline.common.errors import DataError
from pipeline.common.imaging import Pixels
from pipeline.common.storage import Store, is_url
from pipeline.data.dataset import DATASET_FILE, Dataset, open_dataset
from pipeline.data.shard_reader import read_shard, shard_columns
from pipeline.data.shard_writer import RECORD
from pipeline.data.sources.interface import KEY, Item, Listing, as_type, infer_type

IMAGES = {"jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp", "gif", "tif", "tiff"}
LABEL_BYTES = 64 << 20
"""Largest .json or .cls member; a larger one gives no labels."""
PICTURES = (*(f".{suffix}" for suffix in sorted(IMAGES)), ".npy")
REPLACED = "replaced by a later file of the same name in the tar"
_SAMPLE = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)")  # webdataset's rule: a sample's name ends at the first dot


@dataclass(frozen=True)
class Tars:
    """A folder of tars, with our dataset.json or without, or one tar."""

    location: str

    def listing(self) -> Listing:
        """Return all images. Members that are neither images nor labels are never opened."""
        folder, names = _tars(self.location)
        if names is None:
            return list_dataset(open_dataset(folder))
        listing = Listing({}, [])
        samples: list[tuple[str, dict[str, Any], Any]] = []
        for name in names:
            samples += _samples(folder, name, listing)
        columns = sorted({label for _, labels, _ in samples for label in labels})
        if KEY in columns:  # img2dataset writes it into every .json
            columns.remove(KEY)
            listing.notes.append(f"the label {KEY!r} was skipped: `key` is the image's own name")
        listing.labels = {name: infer_type(labels.get(name) for _, labels, _ in samples) for name in columns}
        listing.items = [
            Item(key, tuple(as_type(labels.get(name), kind) for name, kind in listing.labels.items()), where)
            for key, labels, where in samples
        ]
        if not listing.items:
            raise DataError(f"{self.location}: its tars hold no images (.jpg, .png, .webp … or uint8 blocks .npy)")
        return listing

    def read(self, item: Item) -> bytes | Pixels:
        """Return the image's bytes, or its pixels when it lies in a block."""
        name, offset, size, shape = item.where
        data = Store(folder_of(self.location)).read_range(name, offset, size)
        return data if shape is None else np.frombuffer(data, np.uint8).reshape(shape)


def list_dataset(dataset: Dataset) -> Listing:
    """Return the images of one of our own data sets, checked, by the names that they had in its source."""
    listing = Listing(dict(dataset.labels), [])
    side, channels = dataset.image_size, dataset.channels
    for shard in dataset.shards:
        columns = shard_columns(dataset, shard, read_shard(dataset.store, shard))
        places: list[tuple[str, int, int, Any]] = []
        for offset, size in zip(shard.offsets, shard.sizes, strict=True):
            if dataset.encoding != "packed":
                places.append((shard.name, offset, size, None))
                continue
            for start in range(0, size, dataset.image_bytes):
                places.append((shard.name, offset + start, dataset.image_bytes, (side, side, channels)))
        rows = zip(*(columns[label] for label in dataset.labels), strict=True) if dataset.labels else [()] * len(places)
        for key, labels, where in zip(columns["key"], rows, places, strict=True):
            listing.items.append(Item(key, tuple(labels), where))
    return listing


def _tars(location: str) -> tuple[str, list[str] | None]:
    """Return the folder and the names of the tars in it, or None for the names if it is one of our data sets."""
    if location.endswith(".tar"):
        return folder_of(location), [location.rpartition("/")[2]]
    if not is_url(location) and not Path(location).is_dir():
        raise DataError(f"{location}: no such folder; SRC is a folder of tars, or one .tar")
    present = Store(location).names()
    if DATASET_FILE in present:
        return location, None
    names = [name for name in present if name.endswith(".tar")]
    if not names:
        raise DataError(f"{location}: no .tar files here")
    return location, names


def folder_of(location: str) -> str:
    """Return the folder of the tars: `location` itself, or where it lies if it is a single tar."""
    return location.rpartition("/")[0] or "." if location.endswith(".tar") else location


def tar_members(folder: str, name: str, listing: Listing) -> Iterator[tuple[str, int, int, Any]]:
    """Yield (name, offset, size, open file) of a tar's plain files. Raises DataError where the tar breaks.

    A tar without an end mark marks `listing` as damaged.
    """
    with contextlib.ExitStack() as stack:
        if is_url(folder):
            copy = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dcgan-tar-"))) / "copy.tar"
            Store(folder).fetch(name, copy)
            source: Any = stack.enter_context(copy.open("rb"))
        else:
            source = stack.enter_context((Path(folder) / name).open("rb"))
        for member, offset, size in open_members(source, f"{folder}/{name}", listing):
            yield member, offset, size, source


def open_members(file: Any, where: str, listing: Listing) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of the plain files in an open tar, like `tar_members`.

    Of several files with one name the last counts, as when tar unpacks them; pictures before it are refused.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as tar:
            files = []
            for member in tar:
                if member.size < 0:  # tarfile would go back by it, for ever
                    raise tarfile.ReadError(f"{member.name!r} has a negative size")
                if member.isreg() and not member.issparse():  # a sparse one is larger than its tar
                    files.append(member)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:  # of headers that are none
        raise DataError(f"{where}: damaged tar near offset {file.tell()}: {error}") from None
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
    last = {member.name: member for member in files}
    for member in files:
        if last[member.name] is member:
            yield member.name, member.offset_data, member.size
        elif member.name.lower().endswith(PICTURES):
            listing.refused.add(f"{where.rpartition('/')[2]}/{member.name}", REPLACED)


def _samples(folder: str, name: str, listing: Listing) -> list[tuple[str, dict[str, Any], Any]]:
    """Return (key, labels, where) of each image in a tar."""
    found: dict[str, list[tuple[str, Any]]] = {}
    labels: dict[str, dict[str, Any]] = {}
    shown = Store(folder).shown(name)
    passed = unread = 0
    for member, offset, size, file in tar_members(folder, name, listing):
        match = _SAMPLE.fullmatch(member)
        extension = match[2].lower().rpartition(".")[2] if match else ""
        if match is None or extension not in IMAGES | {"json", "cls", "npy"}:
            passed += 1
            continue
        sample = match[1]
        if extension in ("json", "cls"):
            file.seek(offset)
            some = _labels(file.read(size), extension) if size <= LABEL_BYTES else None
            labels.setdefault(sample, {}).update(some or {})
            unread += some is None
        elif extension in IMAGES:
            found.setdefault(sample, []).append((f"{shown}/{member}", (name, offset, size, None)))
        else:
            file.seek(offset)
            block = _block(file, name, offset, size)
            if block is None:
                listing.refused.add(f"{shown}/{member}", "not a block of uint8 images")
            else:
                found.setdefault(sample, []).extend((f"{shown}/{member}#{i}", where) for i, where in enumerate(block))
    if passed:
        listing.notes.append(f"{passed:,} members of {shown} that are neither images nor labels were skipped")
    if unread:
        listing.notes.append(f"{unread:,} .json members of {shown} are not JSON and give no labels")
    return [
        (key, _row(labels.get(sample, {}), index, len(images)), where)
        for sample, images in found.items()
        for index, (key, where) in enumerate(images)
    ]


def _labels(data: bytes, extension: str) -> dict[str, Any] | None:
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


def _row(labels: dict[str, Any], index: int, images: int) -> dict[str, Any]:
    """Return one image's labels: of columns the image's value, if they have one for each image."""
    row = {}
    for name, value in labels.items():
        if not isinstance(value, list):
            row[name] = value
        elif len(value) == images and (value[index] is None or _is_label(value[index])):
            row[name] = value[index]
    return row


def _block(file: Any, name: str, offset: int, size: int) -> list[tuple[str, int, int, Any]] | None:
    """Return the places of the images in an .npy block (n, H, W, 1 or 3) of uint8, or None if it is another array."""
    try:
        version = np.lib.format.read_magic(file)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = reader(file)
    except (ValueError, KeyError, RecursionError, MemoryError, TypeError):  # numpy reads the header as Python
        return None
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] not in (1, 3):
        return None
    start, each = file.tell(), math.prod(shape[1:])  # numpy's product would overflow
    if min(shape) < 1 or start - offset + each * shape[0] != size:
        return None
    return [(name, start + i * each, each, tuple(shape[1:])) for i in range(shape[0])]
