"""MNIST and the sets in its format (Fashion-MNIST, KMNIST, EMNIST): IDX files, plain or gz.

Images of 28 pixels get a black border of 2.
"""

import functools
import re
import zlib
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import DataError, UsageError
from pipeline.common.imaging import Pixels
from pipeline.common.storage import Store, locate
from pipeline.data.sources.interface import Item, Listing

SPLITS = {"train": "train", "test": "t10k|test"}
LARGEST_BYTES = 1 << 30
"""Largest IDX file, unpacked; EMNIST's largest has 547 MB."""
PADDED = 32
"""What 28 pixels are padded to: a size that the networks have."""
_IMAGES = r"(?P<prefix>.*)(?P<split>{splits})-images(?P<kind>[-.]idx3-ubyte)(?P<packed>\.gz)?"


@dataclass(frozen=True)
class Mnist:
    """A folder of IDX files, or one images file with its labels beside it. Split: train (default), test or all."""

    location: str
    split: str | None = None

    def listing(self) -> Listing:
        """Return the images: `label` is the number in the labels' file."""
        listing = Listing({"label": "int"})
        for split, images, labels in self._files():
            numbers, count = _load(labels, 1), len(_load(images, 3))
            if len(numbers) != count:
                raise DataError(f"{labels}: {len(numbers)} labels, but {images} has {count} images")
            items = enumerate(numbers.tolist())
            listing.items.extend(Item(f"{split}/{index:06d}", (label,), (images, index)) for index, label in items)
        return listing

    def read(self, item: Item) -> Pixels:
        """Return the pixels (32, 32, 1), or (height, width, 1) of images that do not have 28 pixels."""
        file, index = item.where
        image: Pixels = _load(file, 3)[index]
        if file.rpartition("/")[2].startswith("emnist-"):
            image = image.T  # EMNIST's files hold columns where MNIST's hold rows
        border = (PADDED - 28) // 2 if image.shape == (28, 28) else 0
        return np.pad(image, border)[:, :, None]

    def _files(self) -> list[tuple[str, str, str]]:
        """Return (split, path of the images, path of the labels) of what was asked for."""
        splits = "|".join(SPLITS.values())
        if match := re.fullmatch(_IMAGES.format(splits=splits), self.location.rpartition("/")[2]):
            if self.split is not None:
                raise UsageError(f"--split {self.split}: SRC is the one file {match[0]}; leave it out")
            split = "train" if match["split"] == "train" else "test"
            return [(split, self.location, _labels_of(self.location))]
        wanted = self.split or "train"
        if wanted not in (*SPLITS, "all"):
            raise UsageError(f"--split {wanted}: MNIST has train, test, all")
        store = Store(self.location)
        names = sorted(store.names())
        files = []
        for split in SPLITS if wanted == "all" else (wanted,):
            pattern = re.compile(_IMAGES.format(splits=SPLITS[split]))
            found = {m["prefix"]: m[0] for m in map(pattern.fullmatch, reversed(names)) if m}  # plain before gz
            if len(found) != 1:
                what = f"several sets here ({', '.join(sorted(found.values()))}); name the images file of one as SRC"
                missing = f"no images of the split {split}; expected such as train-images-idx3-ubyte.gz"
                raise UsageError(f"{self.location}: {what if found else missing}")
            images = store.path(*found.values())
            files.append((split, images, _labels_of(images)))
        return files


def _labels_of(images: str) -> str:
    """Return the path of the labels of a file of images, plain or gz."""
    folder, slash, name = images.rpartition("/")
    name = name.replace("-images", "-labels").replace("idx3", "idx1")
    path = f"{folder}{slash}{name}"
    store, inside = locate(path)
    if not store.exists(inside):
        other = path.removesuffix(".gz") if path.endswith(".gz") else f"{path}.gz"
        if not store.exists(locate(other)[1]):
            raise UsageError(f"{path}: no such file; it holds the labels of {images}")
        return other
    return path


@functools.lru_cache(maxsize=4)
def _load(path: str, dimensions: int) -> NDArray[Any]:
    """Return the uint8 array in an IDX file. Raises DataError when it is none of that many dimensions."""
    store, name = locate(path)
    data = store.read(name)
    if data[:2] == b"\x1f\x8b":
        decoder = zlib.decompressobj(wbits=31)
        try:
            data = decoder.decompress(data, LARGEST_BYTES)
        except zlib.error as error:
            raise DataError(f"{path}: damaged gz: {error}") from None
        if not decoder.eof:
            raise DataError(f"{path}: cut off, or more than {LARGEST_BYTES:,} bytes when unpacked")
    header = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(data[4:header].ljust(header - 4, b"\0"), ">u4").tolist())
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) != header + prod(shape):
        raise DataError(
            f"{path}: expected an IDX file of {dimensions} dimensions of unsigned bytes, "
            f"found {len(data):,} bytes that begin with {data[:4].hex() or 'nothing'}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
