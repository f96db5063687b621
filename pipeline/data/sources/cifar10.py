"""CIFAR-10, the Python version: a folder or tar.gz of pickles. Reading them never runs code."""

import functools
import io
import pickle
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.common.errors import DataError, UsageError
from pipeline.common.imaging import Pixels
from pipeline.common.storage import Store, is_url
from pipeline.data.sources.interface import Item, Listing

TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
FILES = {"train": TRAIN, "test": ("test_batch",)}
FILE_BYTES = 1 << 28
"""Largest file that is taken out of an archive; CIFAR's have 31 MB."""
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class _Unpickler(pickle.Unpickler):
    """Knows numpy arrays and nothing else: a pickle can otherwise run any program."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it wants to import {module}.{name}, which no CIFAR file needs")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


@dataclass(frozen=True)
class Cifar10:
    """cifar-10-batches-py, the folder above it, or cifar-10-python.tar.gz. Split: train (default), test or all."""

    location: str
    split: str | None = None

    def listing(self) -> Listing:
        """Return the images: `label` is the number, `class` the name."""
        split = self.split or "train"
        if split not in (*FILES, "all"):
            raise UsageError(f"--split {split}: CIFAR-10 has train, test, all")
        names = load_batch(self.location, "batches.meta")
        classes = [str(name) for name in names.get("label_names", [])]
        listing = Listing({"label": "int", "class": "str"})
        for file in [*TRAIN, "test_batch"] if split == "all" else FILES[split]:
            labels = load_batch(self.location, file).get("labels")
            images = _images(self.location, file)
            if not isinstance(labels, list) or len(labels) != len(images):
                raise DataError(f"{self.location}: {file}: expected one label an image")
            for index, label in enumerate(labels):
                if not isinstance(label, int) or not 0 <= label < len(classes):
                    raise DataError(f"{self.location}: {file}: label {label!r} of image {index} is not a known class")
                listing.items.append(Item(f"{file}/{index:05d}", (label, classes[label]), (file, index)))
        return listing

    def read(self, item: Item) -> Pixels:
        """Return the pixels (32, 32, 3)."""
        file, index = item.where
        planes: Pixels = _images(self.location, file)[index].reshape(3, 32, 32)
        return np.ascontiguousarray(planes.transpose(1, 2, 0))


def _images(location: str, file: str) -> Pixels:
    data = load_batch(location, file).get("data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise DataError(f"{location}: {file}: expected `data` as uint8 (images, 3072)")
    return data


@functools.lru_cache(maxsize=7)
def load_batch(location: str, name: str) -> dict[str, Any]:
    """Return the dictionary in one of the pickles. Raises DataError when it is missing or wants to run something."""
    try:
        content = _Unpickler(io.BytesIO(_read(location, name)), encoding="latin1").load()
    except DataError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{location}: {name}: refused: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{location}: {name}: expected a dictionary, found {type(content).__name__}")
    return content


def _read(location: str, name: str) -> bytes:
    if location.endswith((".tar.gz", ".tgz", ".tar")):
        folder, _, archive = location.rpartition("/")
        source: Any = io.BytesIO(Store(folder).read(archive)) if is_url(location) else None
        try:
            with tarfile.open(location if source is None else None, fileobj=source) as tar:
                member = next((m for m in tar if m.isreg() and m.name.rpartition("/")[2] == name), None)
                file = tar.extractfile(member) if member and member.size <= FILE_BYTES else None
                if file is None:
                    raise DataError(f"{location}: no member {name}; expected cifar-10-python.tar.gz")
                return file.read()
        except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
            if isinstance(error, FileNotFoundError):
                raise UsageError(f"{location}: no such file") from None
            raise DataError(f"{location}: damaged archive: {error}") from None
    for folder in (location, f"{location}/cifar-10-batches-py"):
        if is_url(folder) or (Path(folder) / name).is_file():
            store = Store(folder)
            if store.exists(name):
                return store.read(name)
    raise DataError(f"{location}: no {name} here; expected the folder cifar-10-batches-py or its tar.gz")
