"""Writes shards: tars that stock webdataset reads and whose images can be reached by offset.

A `packed` shard holds blocks `NAME.npy` (uint8 (n, height, width, channels)) beside `NAME.json` with one column a
label; any other holds `NAME.webp` (or jpg, png) beside `NAME.json`. Both JSONs are
{"key": …, "labels": {…}, "crc32": …}, with lists in place of values for a block.
"""

import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.imaging import Pixels
from pipeline.common.storage import Store
from pipeline.data.dataset import Encoding, Shard

BLOCK_IMAGES = 256
"""Images in a packed block."""
RECORD = 512
"""Bytes in a tar record; every header and every file begins at a multiple of it."""

JOINED_MEMBERS = 64
"""Members whose headers and small contents become one piece."""

Pieces = Sequence[bytes | memoryview]
"""A file's content, to be written one piece after another."""


@dataclass(frozen=True)
class Members:
    """Consecutive members of a shard, laid out as in the file."""

    pieces: Pieces
    length: int
    """Bytes of all pieces."""
    offsets: list[int]
    """Where each image, or block of them, begins."""
    sizes: list[int]
    images: int


class ShardWriter:
    """Collects one shard in memory. The same images and names give the same bytes, always.

    Images are added in order; `images` counts them and `nbytes` is the size that `finish` will return.
    """

    def __init__(
        self, prefix: str, encoding: Encoding, label_names: Sequence[str], limit_bytes: int | None = None
    ) -> None:
        """`limit_bytes` is the size that `add` does not exceed; None leaves it to the caller."""
        self._prefix, self._encoding, self._label_names = prefix, encoding, list(label_names)
        self._limit_bytes = limit_bytes
        # Members come in pairs: an image, or a block of them, and its .json.
        self._contents: list[Pieces] = []
        self._leads: list[int] = []  # bytes of a content that precede its pixels
        self._sizes: list[int] = []  # and those that follow
        self._entries: list[bytes] = []
        self._laid_out: list[Members] = []  # those of before
        self._length = 0  # of the file so far
        self._block: list[tuple[Pixels, Sequence[str], Sequence[Sequence[Any]], list[int]]] = []  # and the checksums
        self._open = 0  # images in it
        self._pending = 0
        self.images = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the finished shard if nothing more were added: an upper bound while a block is open."""
        return self._length + self._pending + 8 * RECORD

    def add(self, image: Pixels | bytes, key: str, labels: Sequence[Any]) -> bool:
        """Add an image: pixels (height, width, channels) if packed, else its encoded bytes.

        Returns False, and adds nothing, when the shard would become larger than its limit. The first always fits.
        """
        crc32 = checksum(image, key, labels)
        encoded = isinstance(image, bytes)
        if encoded or self._limit_bytes is not None:
            named = _json(dict(zip(self._label_names, labels, strict=True))) if labels else "{}"
            entry = _entry(key, named, crc32)
        if self._limit_bytes is not None:
            size = len(image) if isinstance(image, bytes) else image.nbytes
            grown = size + len(entry) + (4 * RECORD if encoded else 0)
            if self.images and self.nbytes + grown > self._limit_bytes:
                return False
            self._pending += 0 if encoded else grown
        if isinstance(image, bytes):
            self._pair((image,), 0, len(image), entry)
            self.images += 1
        else:
            self._extend_block(image[None], [key], [labels], [crc32])
        return True

    def add_all(
        self,
        images: Pixels | Iterable[bytes],
        keys: Sequence[str],
        labels: Sequence[Sequence[Any]] | None = None,
    ) -> None:
        """Add images, each with a row of labels or all without, however large the shard becomes.

        As `add` does one by one, but fast. Pixels (n, height, width, channels) are not copied, so they must not change
        before the shard is written.
        """
        rows = [()] * len(keys) if labels is None else labels
        if not isinstance(images, np.ndarray):
            for image, key, row in zip(images, keys, rows, strict=True):
                named = _json(dict(zip(self._label_names, row, strict=True))) if row else "{}"
                self._pair((image,), 0, len(image), _entry(key, named, checksum(image, key, row)))
            self.images += len(keys)
            return
        images = np.ascontiguousarray(images)
        content, each = images.data.cast("B"), images[0].nbytes
        checksums = [
            checksum(content[place * each : (place + 1) * each], key, row)
            for place, (key, row) in enumerate(zip(keys, rows, strict=True))
        ]
        while len(images):
            room = BLOCK_IMAGES - self._open
            self._extend_block(images[:room], keys[:room], rows[:room], checksums[:room])
            images, keys, rows, checksums = images[room:], keys[room:], rows[room:], checksums[room:]

    def add_members(self, members: "Members") -> None:
        """Append the members that another writer with this prefix made: see `members`."""
        self._lay_out()
        self._laid_out.append(members)
        self._length += members.length
        self.images += members.images

    def members(self, first: int = 0) -> "Members":
        """Return what was added, as the members of a shard from its image number `first` on.

        In a packed shard, `first` must begin a block.
        """
        assert first % self._step == 0
        self._lay_out(first)
        (only,) = self._laid_out
        return only

    def finish(self, name: str) -> tuple[Pieces, Shard]:
        """Return the file, in pieces, and its entry in dataset.json."""
        self._lay_out()
        pieces = [piece for done in self._laid_out for piece in done.pieces] + [bytes(2 * RECORD)]
        offsets: list[int] = []
        length = 0
        digest = hashlib.sha256()
        for done in self._laid_out:
            offsets += [length + offset for offset in done.offsets]
            length += done.length
        for piece in pieces:
            digest.update(piece)
        shard = Shard(
            name=name,
            images=self.images,
            bytes=length + 2 * RECORD,
            sha256=digest.hexdigest(),
            offsets=offsets,
            sizes=[size for done in self._laid_out for size in done.sizes],
        )
        return pieces, shard

    @property
    def _step(self) -> int:
        """Images a member."""
        return BLOCK_IMAGES if self._encoding == "packed" else 1

    def _lay_out(self, first: int | None = None) -> None:
        """Make `Members` of what was added since; `first` is the number of its first image."""
        self._flush()
        if not self._sizes:
            return
        if first is None:
            first = sum(len(done.sizes) for done in self._laid_out) * self._step
        stem, step = f"{self._prefix}-%06d.%s", self._step
        numbers = range(first, first + step * len(self._sizes), step)
        sizes, leads = np.array(self._sizes, np.int64), np.array(self._leads, np.int64)
        lengths = np.array([len(entry) for entry in self._entries], np.int64)
        suffix = "npy" if self._encoding == "packed" else self._encoding
        heads = tar_headers([stem % (number, suffix) for number in numbers], leads + sizes)
        entry_heads = tar_headers([stem % (number, "json") for number in numbers], lengths)
        pairs = _padded(leads + sizes) + _padded(lengths) + 2 * RECORD
        offsets = np.cumsum(pairs) - pairs + RECORD + leads

        pieces: list[bytes | memoryview] = []
        small: list[bytes | memoryview] = []  # joined, so that hashing and writing have few calls to make
        columns = zip(heads, self._contents, (leads + sizes).tolist(), entry_heads, self._entries, strict=True)
        for number, (head, content, size, entry_head, entry) in enumerate(columns, 1):
            small += (head, content[0])
            if len(content) > 1:
                pieces += (b"".join(small), *content[1:])
                small = []
            small += (_PADDING[-size % RECORD], entry_head, entry, _PADDING[-len(entry) % RECORD])
            if number % JOINED_MEMBERS == 0:
                pieces.append(b"".join(small))
                small = []
        pieces.append(b"".join(small))
        images = self.images - sum(done.images for done in self._laid_out)
        self._laid_out.append(Members(pieces, int(pairs.sum()), offsets.tolist(), self._sizes, images))
        self._contents, self._leads, self._sizes, self._entries = [], [], [], []

    def _extend_block(
        self, images: Pixels, keys: Sequence[str], labels: Sequence[Sequence[Any]], checksums: list[int]
    ) -> None:
        self._block.append((images, keys, labels, checksums))
        self._open += len(images)
        self.images += len(images)
        if self._open == BLOCK_IMAGES:
            self._flush()

    def _flush(self) -> None:
        """Make a member of the open block of packed images."""
        if not self._block:
            return
        blocks, names, rows, sums = zip(*self._block, strict=True)
        keys, checksums = list(chain(*names)), list(chain(*sums))
        columns = dict(zip(self._label_names, zip(*chain(*rows), strict=True), strict=True))
        header = io.BytesIO()
        shape = (len(keys), *blocks[0].shape[1:])
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        lead = header.getvalue()
        entry = _json({"key": keys, "labels": columns, "crc32": checksums}).encode()
        pixels = [_contiguous(block) for block in blocks]
        self._pair((lead, *pixels), len(lead), sum(map(len, pixels)), entry)
        self._block, self._open, self._pending = [], 0, 0

    def _pair(self, content: Pieces, lead: int, size: int, entry: bytes) -> None:
        self._contents.append(content)
        self._leads.append(lead)
        self._sizes.append(size)
        self._entries.append(entry)
        self._length += 2 * RECORD + _padded(lead + size) + _padded(len(entry))


def write_shard(store: Store, name: str, writer: ShardWriter) -> Shard:
    """Finish a shard and store it under `name`, whole or not at all."""
    data, shard = writer.finish(name)
    store.write(name, data)
    return shard


def _padded(size: Any) -> Any:
    """Return the bytes that a file of `size`, or an array of sizes, takes in a tar."""
    return size + -size % RECORD


def _entry(key: str, labels: str, crc32: int) -> bytes:
    """Return the .json beside one encoded image; `labels` is JSON already."""
    return f'{{"key":{_quote(key)},"labels":{labels},"crc32":{crc32}}}'.encode()


def _contiguous(image: Pixels) -> memoryview:
    """Return the bytes of an image, without a copy where possible."""
    return np.ascontiguousarray(image).data.cast("B")


def checksum(image: bytes | memoryview | Pixels, key: str, labels: Sequence[Any]) -> int:
    """Return the CRC-32 of an image (its bytes, or its pixels), its name and its labels."""
    data = _contiguous(image) if isinstance(image, np.ndarray) else image
    names = _json([key, *labels]) if labels else f"[{_quote(key)}]"
    return zlib.crc32(names.encode(), zlib.crc32(data))


def tar_headers(names: Sequence[str], sizes: NDArray[np.int64]) -> Iterator[bytes]:
    """Yield the ustar headers of plain files without owner and time: the same bytes on every machine."""
    texts = np.array([name.encode("ascii") for name in names], "S100").view(np.uint8).reshape(-1, 100)
    digits = _octal(sizes, 11)
    sums = _HEADER_SUM + texts.sum(1, np.int64) + digits.sum(1, np.int64) - 11 * ord("0")
    headers = np.tile(_HEADER, (len(names), 1))
    headers[:, :100] = texts
    headers[:, 124:135] = digits
    headers[:, 148:154] = _octal(sums, 6)
    headers[:, 154] = 0
    data = headers.tobytes()
    return (data[start : start + RECORD] for start in range(0, len(data), RECORD))


def _octal(numbers: NDArray[np.integer[Any]], digits: int) -> NDArray[np.uint8]:
    """Return the octal digits of numbers (n) as text: (n, digits)."""
    shifts = 3 * np.arange(digits - 1, -1, -1)
    return ((numbers[:, None].astype(np.int64) >> shifts & 7) + ord("0")).astype(np.uint8)


# A header without name and size: mode, user and group, size, time, its checksum (which counts as blanks), kind.
_HEADER = np.frombuffer(
    b"".join(
        (
            bytes(100),
            b"0000644\0" + b"0000000\0" * 2,
            b"0" * 11 + b"\0",
            b"0" * 11 + b"\0",
            b" " * 8,
            b"0".ljust(101, b"\0") + b"ustar\00000",
        )
    ).ljust(RECORD, b"\0"),
    np.uint8,
)
_HEADER_SUM = int(_HEADER.sum())
_PADDING = [bytes(length) for length in range(RECORD)]


_COMPACT = json.JSONEncoder(separators=(",", ":"))  # made once: json.dumps makes one a call
_quote = json.encoder.encode_basestring_ascii


def _json(value: Any) -> str:
    return _COMPACT.encode(value)
