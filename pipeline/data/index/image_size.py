"""Width and height of images from their first bytes, many at once; what is not plain is left to Pillow."""

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index.reader import OpenTar

HEAD_BYTES = 1 << 16
"""Bytes of an image that are read when the first ones do not tell its size."""
HEADER = 33
"""Bytes that tell the size of a PNG or WebP: signature and IHDR of the one; the other needs fewer."""
LARGEST_IMAGE = 1 << 30
"""Bytes of the largest file that is read as a whole in search of a size: more than MAX_PIXELS need."""
MOST_SEGMENTS = 64
"""Segments of a JPEG that are passed over in search of its size."""

Sizes = NDArray[np.int64]

_JPEG_SIZES = np.zeros(256, bool)
_JPEG_SIZES[[0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF]] = True
"""Markers of the segments that state a size."""
_JPEG_OTHERS = np.zeros(256, bool)
_JPEG_OTHERS[[0xC4, 0xCC, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)]] = True
"""Markers of the segments that may come before."""


def image_sizes(data: bytes, starts: Sizes, limits: Sizes) -> tuple[Sizes, Sizes]:
    """Return widths and heights (n) of the images that begin in `data` at `starts`, each up to its limit.

    Both are 0 where the bytes up to the limit do not tell, or where the image is not a plain JPEG, PNG or WebP.
    """
    widths, heights = np.zeros(len(starts), np.int64), np.zeros(len(starts), np.int64)
    content = np.frombuffer(data, np.uint8)
    long = np.flatnonzero(limits - starts >= HEADER)
    if not len(long):
        return widths, heights
    here, marks = starts[long], limits[long]
    first, second = content[here], content[here + 1]
    jpeg = (first == 0xFF) & (second == 0xD8)
    _jpeg_sizes(content, here[jpeg], marks[jpeg], long[jpeg], widths, heights)
    for row, start in zip(long[~jpeg].tolist(), here[~jpeg].tolist(), strict=True):
        widths[row], heights[row] = _png_or_webp(data[start : start + HEADER])
    return widths, heights


def _jpeg_sizes(
    content: NDArray[np.uint8], at: Sizes, limits: Sizes, rows: Sizes, widths: Sizes, heights: Sizes
) -> None:
    """Fill in the sizes of JPEGs: go from segment to segment in all of them at once."""
    at = at + 2
    for _ in range(MOST_SEGMENTS):
        within = at + 9 <= limits
        at, limits, rows = at[within], limits[within], rows[within]
        if not len(rows):
            return
        marker = content[at + 1]
        segment = content[at] == 0xFF
        found = segment & _JPEG_SIZES[marker]
        if found.any():
            there = at[found]
            heights[rows[found]] = content[there + 5].astype(np.int64) << 8 | content[there + 6]
            widths[rows[found]] = content[there + 7].astype(np.int64) << 8 | content[there + 8]
        on = segment & _JPEG_OTHERS[marker]
        at, limits, rows = at[on], limits[on], rows[on]
        at = at + 2 + (content[at + 2].astype(np.int64) << 8 | content[at + 3])


def _png_or_webp(head: bytes) -> tuple[int, int]:
    """Return width and height from the first bytes of a PNG or WebP, or zeros."""
    if head[:8] == b"\x89PNG\r\n\x1a\n" and head[8:16] == b"\0\0\0\rIHDR":
        width, height, crc = struct.unpack(">II5xI", head[16:33])
        return (width, height) if crc == zlib.crc32(head[12:29]) else (0, 0)
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return 0, 0
    kind = head[12:16]
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", head[26:30])
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    return 0, 0


def size_of(file: OpenTar, offset: int, size: int) -> tuple[int, int]:
    """Return width and height of the image of `size` bytes at `offset` of a tar. Raises BadImage, UserError."""
    head = file.read(offset, min(size, HEAD_BYTES))
    widths, heights = image_sizes(head, np.zeros(1, np.int64), np.full(1, len(head), np.int64))
    if widths[0] and heights[0]:
        return int(widths[0]), int(heights[0])
    from pipeline.common.imaging import BadImage, open_image

    try:
        return open_image(head).size
    except BadImage:
        if len(head) == size:
            raise
    if size > LARGEST_IMAGE:
        raise BadImage("too large a file")
    return open_image(file.read(offset, size)).size
