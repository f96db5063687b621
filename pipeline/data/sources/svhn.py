"""SVHN, cropped digits: MATLAB v5 files, unpacked in blocks to save memory."""

import struct
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from pipeline.common.errors import DataError, UsageError, first_line
from pipeline.common.imaging import Pixels
from pipeline.common.storage import Store, is_url
from pipeline.data.sources.interface import Item, Listing

SPLITS = ("train", "test", "extra")
IMAGE_BYTES = 32 * 32 * 3
BLOCK = 1 << 20
_COMPRESSED, _MATRIX, _UINT8 = 15, 14, 2
_UINT8_CLASS = 9


@dataclass
class Svhn:
    """A folder with train_32x32.mat and its like, or one such file. Split: train (default), test, extra, or all."""

    location: str
    split: str | None = None
    _unpacked: dict[str, str] = field(default_factory=dict)
    _folder: "tempfile.TemporaryDirectory[str] | None" = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, object]:
        """Keep the temporary folder in the process that made it: workers only read from it."""
        return {**self.__dict__, "_folder": None}

    def listing(self) -> Listing:
        """Unpack the images into a temporary file and return them: `label` is the digit (10 in the file means 0)."""
        self._folder = tempfile.TemporaryDirectory(prefix="dcgan-svhn-")  # lives as long as this object
        try:
            return self._unpack(Path(self._folder.name))
        except BaseException:
            self._folder.cleanup()
            raise

    def _unpack(self, folder: Path) -> Listing:
        from scipy.io import loadmat

        listing = Listing({"label": "int"})
        for name, path in self._files().items():
            unpacked = folder / f"{name}.raw"
            try:
                with path.open("rb") as file, unpacked.open("wb") as target:
                    images = unpack_images(file, target)
                digits = loadmat(path, variable_names=["y"])["y"].ravel() % 10
            except OSError:
                raise
            except Exception as error:  # scipy meets hostile bytes here and raises whatever it likes
                raise DataError(f"{path}: not an SVHN file (MATLAB v5 with X and y): {first_line(error)}") from None
            if len(digits) != images:
                raise DataError(f"{path}: {images} images but {len(digits)} labels")
            self._unpacked[name] = str(unpacked)
            listing.items.extend(Item(f"{name}/{i:06d}", (int(d),), (name, i)) for i, d in enumerate(digits))
        return listing

    def read(self, item: Item) -> Pixels:
        """Return the pixels (32, 32, 3)."""
        name, index = item.where
        with Path(self._unpacked[name]).open("rb") as file:
            file.seek(index * IMAGE_BYTES)
            image = np.frombuffer(file.read(IMAGE_BYTES), np.uint8)
        return np.ascontiguousarray(image.reshape(3, 32, 32).transpose(2, 1, 0))  # MATLAB counts rows fastest

    def _files(self) -> dict[str, Path]:
        """Return {split: file} of what was asked for, fetched first if it is remote."""
        if self.location.endswith(".mat"):
            folder, _, name = self.location.rpartition("/")
            if self.split is not None:
                raise UsageError(f"--split {self.split}: SRC is the one file {name}; leave it out, or give its folder")
            wanted = {name.removesuffix(".mat").removesuffix("_32x32"): name}
        else:
            folder, split = self.location, self.split or "train"
            if split not in (*SPLITS, "all"):
                raise UsageError(f"--split {split}: SVHN has {', '.join(SPLITS)}, all")
            wanted = {s: f"{s}_32x32.mat" for s in (SPLITS if split == "all" else (split,))}
        if is_url(self.location) and self._folder is not None:
            for name in wanted.values():
                Store(folder).fetch(name, Path(self._folder.name) / name)
            folder = self._folder.name
        paths = {split: Path(folder) / name for split, name in wanted.items()}
        for path in paths.values():
            if not path.is_file():
                raise UsageError(f"{path}: no such file; expected the cropped digits of SVHN, such as train_32x32.mat")
        return paths


def unpack_images(file: IO[bytes], target: IO[bytes]) -> int:
    """Write the images of the array X (32, 32, 3, N) one after the other, as the file holds them; return N."""
    if not file.read(128).startswith(b"MATLAB 5.0"):
        raise ValueError("no MATLAB 5.0 header")
    while tag := file.read(8):
        kind, size = struct.unpack("<II", tag)
        end = file.tell() + size
        stream = _Stream(_inflate(file, size) if kind == _COMPRESSED else _plain(file, size))
        if kind == _COMPRESSED:
            kind = struct.unpack("<II", stream.read(8))[0]
        if kind == _MATRIX:
            shape, name, is_uint8 = _matrix_header(stream)
            if name == "X":
                if not is_uint8 or len(shape) != 4 or shape[:3] != (32, 32, 3):
                    raise ValueError(f"X is {shape}, expected uint8 (32, 32, 3, N)")
                return _copy_pixels(stream, target, shape[3])
        file.seek(end)
    raise ValueError("it has no array X")


def _matrix_header(stream: "_Stream") -> tuple[tuple[int, ...], str, bool]:
    """Return shape, name and whether the values are uint8, of the array whose elements follow."""
    flags, dimensions, name = stream.element(), stream.element(), stream.element()
    shape = struct.unpack(f"<{len(dimensions) // 4}i", dimensions)
    return shape, name.decode("ascii", "replace"), flags[0] == _UINT8_CLASS


def _copy_pixels(stream: "_Stream", target: IO[bytes], images: int) -> int:
    kind, size = struct.unpack("<II", stream.read(8))
    if kind != _UINT8 or size != images * IMAGE_BYTES:
        raise ValueError("X does not hold what its shape says")
    left = size
    while left:
        block = stream.read(min(left, BLOCK))
        target.write(block)
        left -= len(block)
    return images


def _inflate(file: IO[bytes], size: int) -> Iterator[bytes]:
    """Yield what `size` compressed bytes hold, a bounded piece at a time."""
    decoder = zlib.decompressobj()
    while size:
        data = file.read(min(size, BLOCK))
        if not data:
            raise ValueError("the file is cut off")
        size -= len(data)
        while data:
            yield decoder.decompress(data, BLOCK)
            data = decoder.unconsumed_tail


def _plain(file: IO[bytes], size: int) -> Iterator[bytes]:
    while size:
        data = file.read(min(size, BLOCK))
        if not data:
            raise ValueError("the file is cut off")
        size -= len(data)
        yield data


class _Stream:
    """Pieces of bytes as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._ahead = pieces, bytearray()

    def read(self, size: int) -> bytes:
        """Return exactly `size` bytes."""
        while len(self._ahead) < size:
            piece = next(self._pieces, None)
            if piece is None:
                raise ValueError("the file is cut off")
            self._ahead += piece
        data = bytes(self._ahead[:size])
        del self._ahead[:size]
        return data

    def element(self) -> bytes:
        """Return a small data element: MATLAB packs up to four bytes into its tag."""
        tag = self.read(8)
        kind, size = struct.unpack("<II", tag)
        if kind >> 16:
            return tag[4 : 4 + (kind >> 16)]
        return self.read(size + -size % 8)[:size]
