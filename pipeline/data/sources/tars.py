"""Anyone's WebDataset tars, our own shards among them: images by their place in the tar, labels from .json and .cls."""

import contextlib
import json
import re
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.dataset import FILE_NAME, Dataset, load_dataset
from pipeline.data.shards import read_shard, shard_columns
from pipeline.data.sources.interface import Item, Listing, as_type, infer_type
from pipeline.errors import DataError
from pipeline.imaging import Pixels
from pipeline.storage import Store, is_url

IMAGES = {"jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp", "gif", "tif", "tiff"}
_SAMPLE = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)")  # webdataset's rule: a sample's name ends at the first dot


@dataclass(frozen=True)
class Tars:
    """A folder of tars (or one tar), plain or with our dataset.json."""

    location: str

    def listing(self) -> Listing:
        """Return all images. Members of other kinds are never opened, whatever their names promise."""
        folder, names = _tars(self.location)
        if names is None:
            return self._own(load_dataset(folder))
        listing = Listing({}, [])
        samples: list[tuple[str, dict[str, Any], Any]] = []
        for name in names:
            samples += _samples(folder, name, listing)
        columns = sorted({label for _, labels, _ in samples for label in labels})
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
        data = Store(_tars(self.location)[0]).read_range(name, offset, size)
        return data if shape is None else np.frombuffer(data, np.uint8).reshape(shape)

    def _own(self, dataset: Dataset) -> Listing:
        """List one of our own data sets: checked, and under the names that the images had in its source."""
        store = Store(self.location)
        listing = Listing(dict(dataset.labels), [])
        side, channels = dataset.image_size, dataset.channels
        for shard in dataset.shards:
            columns = shard_columns(read_shard(store, shard), dataset, store.path(shard.name))
            places: list[tuple[str, int, int, Any]] = []
            for offset, size in zip(shard.offsets, shard.sizes, strict=True):
                if dataset.encoding != "packed":
                    places.append((shard.name, offset, size, None))
                    continue
                for start in range(0, size, dataset.image_bytes):
                    places.append((shard.name, offset + start, dataset.image_bytes, (side, side, channels)))
            rows = (
                zip(*(columns[label] for label in dataset.labels), strict=True)
                if dataset.labels
                else [()] * len(places)
            )
            for key, labels, where in zip(columns["key"], rows, places, strict=True):
                listing.items.append(Item(key, tuple(labels), where))
        return listing


def _tars(location: str) -> tuple[str, list[str] | None]:
    """Return the folder and the names of the tars in it, or None for the names if it is one of our data sets."""
    if location.endswith(".tar"):
        folder, _, name = location.rpartition("/")
        return folder or ".", [name]
    if not is_url(location) and not Path(location).is_dir():
        raise DataError(f"{location}: no such folder; SRC is a folder of tars, or one .tar")
    present = Store(location).names()
    if FILE_NAME in present:
        return location, None
    names = [name for name in present if name.endswith(".tar")]
    if not names:
        raise DataError(f"{location}: no .tar files here")
    return location, names


def tar_members(folder: str, name: str) -> Iterator[tuple[str, int, int, Any]]:
    """Yield (name, offset, size, open file) of a tar's plain files. Raises DataError where the tar breaks."""
    with contextlib.ExitStack() as stack:
        if is_url(folder):
            copy = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dcgan-tar-"))) / "copy.tar"
            Store(folder).fetch(name, copy)
            source: Any = stack.enter_context(copy.open("rb"))
        else:
            source = stack.enter_context((Path(folder) / name).open("rb"))
        try:
            with tarfile.open(fileobj=source, mode="r:", errorlevel=2) as tar:
                for member in tar:
                    if member.isreg():
                        yield member.name, member.offset_data, member.size, source
        except tarfile.TarError as error:
            raise DataError(f"{folder}/{name}: damaged tar near offset {source.tell()}: {error}") from None


def _samples(folder: str, name: str, listing: Listing) -> list[tuple[str, dict[str, Any], Any]]:
    """Return (key, labels, where) of each image in a tar."""
    found: dict[str, list[tuple[str, Any]]] = {}
    labels: dict[str, dict[str, Any]] = {}
    passed = 0
    for member, offset, size, file in tar_members(folder, name):
        match = _SAMPLE.fullmatch(member)
        extension = match[2].lower().rpartition(".")[2] if match else ""
        if match is None or extension not in IMAGES | {"json", "cls", "npy"}:
            passed += 1
            continue
        sample = match[1]
        if extension in ("json", "cls"):
            file.seek(offset)
            labels.setdefault(sample, {}).update(_labels(file.read(size), extension))
        elif extension in IMAGES:
            found.setdefault(sample, []).append((f"{name}/{member}", (name, offset, size, None)))
        else:
            file.seek(offset)
            block = _block(file, name, offset, size)
            if block is None:
                listing.refused.add(f"{name}/{member}", "not a block of uint8 images")
            else:
                found.setdefault(sample, []).extend((f"{name}/{member}#{i}", where) for i, where in enumerate(block))
    if passed:
        listing.notes.append(f"{passed:,} members of {name} that are neither images nor labels were passed over")
    return [
        (key, _row(labels.get(sample, {}), index, len(images)), where)
        for sample, images in found.items()
        for index, (key, where) in enumerate(images)
    ]


def _labels(data: bytes, extension: str) -> dict[str, Any]:
    """Return the labels in a .json or .cls member: its scalar values, or columns of them."""
    try:
        content = json.loads(data)
    except ValueError:
        text = data.decode("utf-8", "replace").strip()
        return {"label": text} if extension == "cls" else {}
    if extension == "cls" or not isinstance(content, dict):
        return {"label": content} if isinstance(content, (int, str)) else {}
    inner = content.get("labels")
    content = inner if isinstance(inner, dict) else content
    return {name: value for name, value in content.items() if isinstance(value, (bool, int, float, str, list))}


def _row(labels: dict[str, Any], index: int, images: int) -> dict[str, Any]:
    """Return one image's labels: of columns the image's value, if they have one for each image."""
    row = {}
    for name, value in labels.items():
        if not isinstance(value, list):
            row[name] = value
        elif len(value) == images and not isinstance(value[index], (list, dict)):
            row[name] = value[index]
    return row


def _block(file: Any, name: str, offset: int, size: int) -> list[tuple[str, int, int, Any]] | None:
    """Return the places of the images in an .npy block (n, H, W, 1 or 3) of uint8, or None if it is another array."""
    try:
        version = np.lib.format.read_magic(file)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = reader(file)
    except (ValueError, KeyError):
        return None
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] not in (1, 3):
        return None
    start, each = file.tell(), int(np.prod(shape[1:]))
    if start - offset + each * shape[0] != size:
        return None
    return [(name, start + i * each, each, tuple(shape[1:])) for i in range(shape[0])]
