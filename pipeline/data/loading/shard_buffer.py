"""Shards in memory: one buffer of fixed size, cut into slots. A shard is verified as it is read into its slot."""

import hashlib
import os
from collections.abc import Callable, Iterable
from io import FileIO
from pathlib import Path
from stat import S_ISREG

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.common.errors import DataError, UnavailableError
from pipeline.common.imaging import BadImage, decode
from pipeline.data.dataset import Dataset, Shard, check_members
from pipeline.data.loading.shard_cache import open_cache
from pipeline.data.loading.slots import LOAD_THREADS, Images, SlotBuffer

Identity = tuple[int, int, int]

PIECE_BYTES = 1 << 20
"""Bytes read and hashed at once: few enough to be hashed while they are in the processor's cache."""


class ShardBuffer(SlotBuffer):
    """Shards in memory, as decoded rows or as the files' bytes, each verified when first read.

    Packed data sets, and all others when `decode` is set, are kept as rows: decoded uint8 images, one after another.
    """

    def __init__(self, dataset: Dataset, *, slots: int, decode: bool, cache_dir: Path | None) -> None:
        check_members(dataset, dataset.location)
        super().__init__(len(dataset.shards), slots)
        self.dataset = dataset
        self.rows_kept = decode or dataset.encoding == "packed"
        self._cache = open_cache(cache_dir) if dataset.store.remote else None
        # Of a set larger than the cache, only as many shards as stay in it: to evict one for another gains nothing.
        stored = np.cumsum(dataset.shards.bytes)
        self._stays = stored <= (self._cache.limit_bytes if self._cache is not None else 0)
        self._shape = dataset.image_shape
        self._decode = (_jpeg_decoder if dataset.encoding == "jpg" else _picture_decoder)(self._shape)
        self._first_member = dataset.shards.member_starts
        self._offsets, self._sizes = dataset.shards.offset, dataset.shards.size
        units = (dataset.shards.images if self.rows_kept else dataset.shards.bytes).tolist()
        # If everything fits, each shard has a slot of its size. Otherwise all slots are as large as the largest shard.
        widths = units if self.holds_all else [max(units)] * self.slots
        self._bases = np.cumsum([0, *widths])
        unit_bytes = dataset.image_bytes if self.rows_kept else 1
        self.nbytes = int(self._bases[-1]) * unit_bytes
        try:
            self._buffer = np.empty((int(self._bases[-1]), unit_bytes), np.uint8)
        except MemoryError:
            raise UnavailableError(
                f"{dataset.location}: {slots} of its shards need {self.nbytes:,} bytes of memory, more than is here; "
                "lower runtime.lookahead_mb or recipe.streams, or build it with smaller shards (--shard-bytes)"
            ) from None
        if self._cache is not None:  # what is on its way, and is not kept on the disk, is in memory twice
            self.nbytes += min(LOAD_THREADS, self.slots) * int(dataset.shards.bytes.max())
        self._verified: dict[int, Identity] = {}

    def bases(self, shards: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where the slots of held `shards` begin."""
        return self._bases[self._slot_of[shards]]

    def copy(self, shards: NDArray[np.int64], rows: NDArray[np.int64], bases: NDArray[np.int64], out: Images) -> None:
        if self.rows_kept:
            # mode="clip" because numpy gathers through a second buffer when it may have to raise.
            np.take(self._buffer, bases + rows, axis=0, out=out.reshape(len(out), -1), mode="clip")
            return
        content = self._buffer.reshape(-1).data
        members = self._first_member[shards] + rows
        starts = bases + self._offsets[members]
        ends = starts + self._sizes[members]
        done = 0
        try:
            for start, end, image in zip(starts.tolist(), ends.tolist(), out, strict=True):
                self._decode(content[start:end], image)
                done += 1
        except BadImage as error:
            raise self._unusable(int(shards[done]), int(rows[done]), error) from None

    def _load(self, shard: int, slot: int) -> None:
        entry = self.dataset.shards[shard]
        base = int(self._bases[slot])
        target = self._buffer[base : base + (entry.images if self.rows_kept else entry.bytes)]
        try:
            try:
                self._fill(shard, entry, target)
            except DataError:
                if self._cache is None:
                    raise
                self._cache.drop(entry)  # damaged in the cache or in transit: read once more from the store
                self._fill(shard, entry, target)
        except FileNotFoundError:
            raise DataError(
                f"{self.dataset.store.path(entry.name)}: this shard of the data set is missing; "
                "build the data set again"
            ) from None

    def _fill(self, shard: int, entry: Shard, target: Images) -> None:
        """Read a shard's file into `target`, and hash it unless the same file was verified before."""
        with self._open(shard, entry) as file:
            self._read(shard, entry, file, target)

    def _open(self, shard: int, entry: Shard) -> FileIO:
        if self._cache is None:
            return FileIO(self.dataset.store.path(self.dataset.store.inside(entry.name)))
        return self._cache.open(self.dataset, entry, keep=self.comes_back and bool(self._stays[shard]))

    def _read(self, shard: int, entry: Shard, file: FileIO, target: Images) -> None:
        stat = os.fstat(file.fileno())
        identity = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
        if S_ISREG(stat.st_mode) and stat.st_size != entry.bytes:  # before anything as large as stated is made
            raise DataError(
                f"{self.dataset.store.path(entry.name)}: damaged: {stat.st_size} bytes, but dataset.json says "
                f"{entry.bytes} bytes; copy or build the data set again"
            )
        if self.rows_kept and self.dataset.encoding != "packed":
            content = np.empty((entry.bytes, 1), np.uint8)
        else:
            content = target
        verify = self._verified.get(shard) != identity
        digest = hashlib.sha256()
        length = 0
        for piece in _pieces(entry, content.reshape(-1).data, self.dataset.encoding):
            got = _read_into(file, piece)
            length += got
            if verify:
                digest.update(piece[:got])
        while chunk := file.read(PIECE_BYTES):
            digest.update(chunk)
            length += len(chunk)
        if length != entry.bytes or (verify and digest.hexdigest() != entry.sha256):
            found = digest.hexdigest() if verify else "not computed"
            raise DataError(
                f"{self.dataset.store.path(entry.name)}: damaged: {length} bytes with sha256 {found}, but dataset.json "
                f"says {entry.bytes} bytes with sha256 {entry.sha256}; copy or build the data set again"
            )
        self._verified[shard] = identity
        if content is not target:
            view = content.reshape(-1).data
            for row, (offset, size) in enumerate(zip(entry.offsets, entry.sizes, strict=True)):
                try:
                    self._decode(view[offset : offset + size], target[row].reshape(self._shape))
                except BadImage as error:
                    raise self._unusable(shard, row, error) from None

    def _unusable(self, shard: int, row: int, error: BadImage) -> DataError:
        entry = self.dataset.shards[shard]
        return DataError(
            f"{self.dataset.store.path(entry.name)}: the image at offset {entry.offsets[row]} cannot be used: {error}; "
            "build the data set again"
        )


def _jpeg_decoder(shape: tuple[int, int, int]) -> Callable[[memoryview, Images], None]:
    mode = "RGB" if shape[2] == 3 else "GRAY"
    decode_jpeg = simplejpeg.decode_jpeg

    def decode_into(data: memoryview, out: Images) -> None:
        """Decode a JPEG straight into `out`: through another array it takes a third longer."""
        try:
            found = decode_jpeg(data, mode, buffer=out).shape
        except ValueError as error:  # no JPEG, or larger than `out`
            raise BadImage(f"undecodable ({error})") from None
        if found != shape:
            raise BadImage(f"its shape is {found}, expected {shape}")

    return decode_into


def _picture_decoder(shape: tuple[int, int, int]) -> Callable[[memoryview, Images], None]:
    def decode_into(data: memoryview, out: Images) -> None:
        pixels = decode(data, shape[2])
        if pixels.shape != shape:
            raise BadImage(f"its shape is {pixels.shape}, expected {shape}")
        out[:] = pixels

    return decode_into


def _pieces(entry: Shard, content: memoryview, encoding: str) -> Iterable[memoryview]:
    """Yield, in file order, a target for each piece of a shard's file: pixels go to `content`, tar headers to scrap."""
    if encoding == "packed":
        position = filled = 0
        for offset, size in zip(entry.offsets, entry.sizes, strict=True):
            yield memoryview(bytearray(offset - position))
            yield from _cut(content[filled : filled + size])
            filled += size
            position = offset + size
        yield memoryview(bytearray(entry.bytes - position))
    else:
        yield from _cut(content[: entry.bytes])


def _cut(content: memoryview) -> Iterable[memoryview]:
    return (content[start : start + PIECE_BYTES] for start in range(0, len(content), PIECE_BYTES))


def _read_into(file: FileIO, target: memoryview) -> int:
    """Fill `target` as far as the file goes; return the bytes read."""
    filled = 0
    while filled < len(target) and (got := file.readinto(target[filled:])):
        filled += got
    return filled
