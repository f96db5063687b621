"""Where a picture lies inside a file of records: read by its range, checked, and turned into pixels if it is raw."""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import numpy as np

from pipeline.common.errors import DataError
from pipeline.common.imaging import BadImage, Picture
from pipeline.common.storage import open_ranges
from pipeline.data.sources.packed.arrays import as_picture
from pipeline.data.sources.packed.columns import ARRAYS, read_array

PIL_HEADER = 12
PIL_CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}


class Span(NamedTuple):
    """Where a picture lies."""

    file: str
    offset: int
    bytes: int
    form: str = ""
    """Empty for an encoded picture; `HWC` or `CHW` for pixels of `shape`; `pil` for pixels behind their own header;
    an encoding of `read_array` for an array."""
    shape: tuple[int, ...] = ()
    record: tuple[int, int] | None = None
    """Of a TFRecord, where the record around it lies: its CRC-32C follows it."""


def read_span(span: Span) -> Picture:
    """Return a picture: its encoded bytes, or pixels (H, W, C). Raises BadImage where it is damaged."""
    if span.record is None:
        data = _range(span.file, span.offset, span.bytes)
    else:
        start, size = span.record
        whole = _range(span.file, start, size + 4)
        if (crc := _crc32c()) is not None and masked(crc(whole[:size])) != int.from_bytes(whole[size:], "little"):
            raise BadImage("damaged record (checksum)")
        data = whole[span.offset - start : span.offset - start + span.bytes]
    if not span.form:
        return data
    if span.form.partition(":")[0] in ARRAYS:
        return as_picture(*read_array(data, span.form))
    if span.form != "pil":
        return as_picture(np.frombuffer(data, np.uint8).reshape(span.shape), span.form)
    width, height, letters = (int(number) for number in np.frombuffer(data[:PIL_HEADER], "<u4"))
    mode = data[PIL_HEADER : PIL_HEADER + letters].decode("ascii", "replace")
    channels = PIL_CHANNELS.get(mode)
    pixels = data[PIL_HEADER + letters :]
    if channels is None or len(pixels) != width * height * channels or not pixels:
        raise BadImage(f"raw pixels of the mode {mode[:8]!r}, expected L, RGB or RGBA")
    return as_picture(np.frombuffer(pixels, np.uint8).reshape(height, width, channels), "HWC")


def _range(file: str, offset: int, size: int) -> bytes:
    try:
        return open_ranges(file)(offset, size)
    except DataError:
        raise BadImage("beyond the end of its file") from None


@functools.cache
def _crc32c() -> Callable[[bytes], int] | None:
    """Return the function of a package that many installations have; ours would take longer than decoding."""
    try:
        function: Callable[[bytes], int] = import_module("google_crc32c").value
    except ImportError:
        return None
    return function


@functools.cache
def _table() -> tuple[int, ...]:
    def entry(byte: int) -> int:
        for _ in range(8):
            byte = byte >> 1 ^ 0x82F63B78 * (byte & 1)
        return byte

    return tuple(map(entry, range(256)))


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of a few bytes."""
    value, table = 0xFFFFFFFF, _table()
    for byte in data:
        value = value >> 8 ^ table[(value ^ byte) & 255]
    return value ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """Return a CRC as TFRecord stores it: rotated right by 15 bits, plus a constant (TensorFlow's record_writer.cc)."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
