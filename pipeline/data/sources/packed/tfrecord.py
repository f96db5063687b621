"""TFRecord files of images, without TensorFlow: records of a length, two CRCs, and a tf.train.Example each.

The format is that of TensorFlow's record_writer.cc and example.proto.
"""

import mmap
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from pipeline.common.errors import DataError, UsageError
from pipeline.common.imaging import Picture
from pipeline.common.pictures.formats import HEAD_BYTES, kind_of
from pipeline.common.storage import locate
from pipeline.data.sources.archives.files import compression_of, open_archive
from pipeline.data.sources.interface import KEY, Item, Listing, as_type, narrowest
from pipeline.data.sources.packed.places import Span, crc32c, masked, read_span
from pipeline.data.sources.tables.layout import find_named, joined
from pipeline.data.specification import short_names
from pipeline.data.spool import Spool

USUAL = ("image/encoded", "image_raw", "image", "encoded", "img", "data", "jpg", "jpeg", "png", "image/image", "x")
"""Features that hold pictures, in the order in which they are looked for."""
SIZES = (
    ("height", "width", "depth"),
    ("height", "width", "channels"),
    ("image/height", "image/width", "image/channels"),
)
LABEL_BYTES = 4096
"""A longer text is no label."""
_HEADER = struct.Struct("<QI")
_RESOLUTION = re.compile(r".*-r(\d\d)\.tfrecords")


class Feature(NamedTuple):
    """A feature of an example."""

    kind: type
    """bytes, float or int."""
    values: list[Any]
    """Numbers; of bytes, (offset, size) in the file."""


@dataclass(frozen=True)
class TfRecords:
    """TFRecord files: one, a folder of them, or a glob. `column` names the feature of the pictures."""

    location: str
    column: str | None = None

    def listing(self) -> Listing:
        """Return the pictures; features of single values are their labels."""
        listing = Listing({})
        root, paths = find_named(self.location, is_tfrecord, "TFRecord files (.tfrecord, or name-00000-of-00010)")
        levels = [match[1] for match in map(_RESOLUTION.fullmatch, paths) if match is not None]
        if len(levels) == len(paths) > len(set(levels)) - 1 > 0:  # ProGAN's: the same images in every size
            largest = f"-r{max(levels)}.tfrecords"
            paths = [path for path in paths if path.endswith(largest)]
            listing.notes.append(f"of the resolutions only the largest is read: {largest[1:4]}")
        files = [joined(root, path) for path in paths]
        samples: Spool[tuple[str, dict[str, Any], Span]] = Spool()
        kinds: dict[str, set[type]] = {}
        unfit: set[str] = set()
        for file, shown in zip(files, short_names(files), strict=True):
            for number, (example, data, place) in enumerate(_examples(file, listing)):
                key = f"{shown}/{number:07d}"
                picture = self._picture(example, data, place)
                if picture is None:
                    listing.refused.add(key, "no picture in its record")
                    continue
                name, span = picture
                labels = _labels(example, data, name, unfit)
                for label, value in labels.items():
                    kinds.setdefault(label, set()).add(type(value))
                samples.append((key, labels, span))
        if not samples:
            raise DataError(
                f"{self.location}: its records hold no pictures; expected tf.train.Example with a feature such as "
                f"{', '.join(USUAL[:3])}, or name it with --column"
            )
        columns = sorted(set(kinds) - unfit - {KEY})
        listing.labels = {name: narrowest(kinds[name]) for name in columns}
        if passed := sorted(unfit):
            listing.notes.append(f"the features {', '.join(passed)} were passed over: they hold no single values")
        listing.items.extend(
            Item(key, tuple(as_type(labels.get(name), kind) for name, kind in listing.labels.items()), span)
            for key, labels, span in samples
        )
        return listing

    def _picture(self, example: dict[str, Feature], data: Any, place: tuple[str, int, int]) -> tuple[str, Span] | None:
        """Return the feature that holds the picture of an example, and where the picture lies."""
        file, start, size = place
        single = {name for name, feature in example.items() if feature.kind is bytes and len(feature.values) == 1}
        if self.column is not None:
            names = [self.column] if self.column in single else []
        else:
            names = [name for name in USUAL if name in single] + sorted(single - set(USUAL))
        for name in names:
            offset, length = example[name].values[0]
            if kind_of(bytes(data[offset : offset + min(length, HEAD_BYTES)])) is not None:
                return name, Span(file, offset, length, record=(start, size))
            if (raw := _raw(example, length)) is not None:
                return name, Span(file, offset, length, *raw, record=(start, size))
        return None

    def read(self, item: Item) -> Picture:
        """Return the encoded picture, or its pixels. The record's checksum is compared where google-crc32c is."""
        return read_span(item.where)


def is_tfrecord(path: str) -> bool:
    """Whether a file is a TFRecord, by its name; ImageNet's have no suffix."""
    name = path.rpartition("/")[2].lower()
    return ".tfrecord" in name or name.endswith(".tfrec") or re.fullmatch(r"[^.]+-\d{5}-of-\d{5}", name) is not None


def _raw(example: dict[str, Feature], length: int) -> tuple[str, tuple[int, ...]] | None:
    """Return the form and shape of raw pixels: by a feature `shape` as ProGAN has it, or by height and width."""
    shape = example.get("shape")
    if shape is not None and shape.kind is int and len(shape.values) == 3 and prod(shape.values) == length:
        values = tuple(shape.values)
        return ("CHW", values) if values[0] in (1, 3) else ("HWC", values) if values[2] in (1, 3, 4) else None
    for names in SIZES:
        found = [example[name].values for name in names if name in example and example[name].kind is int]
        if len(found) >= 2 and all(len(values) == 1 for values in found):
            values = tuple(value[0] for value in found)
            values = values if len(values) == 3 else (*values, 1)
            if prod(values) == length and values[2] in (1, 3, 4) and min(values) > 0:
                return "HWC", values
    return None


def _labels(example: dict[str, Feature], data: Any, picture: str, unfit: set[str]) -> dict[str, Any]:
    """Return the features with one value. The names of those with several, or with bytes, go into `unfit`."""
    labels: dict[str, Any] = {}
    for name, feature in example.items():
        if name == picture or not feature.values:
            continue
        if len(feature.values) > 1:
            unfit.add(name)
            continue
        value = feature.values[0]
        if feature.kind is bytes:
            offset, size = value
            try:
                value = bytes(data[offset : offset + min(size, LABEL_BYTES + 1)]).decode()
            except UnicodeDecodeError:
                value = None
            if value is None or size > LABEL_BYTES:
                unfit.add(name)
                continue
        elif value - value != 0:  # not a number, or infinite
            continue
        labels[name] = value
    return labels


def _examples(file: str, listing: Listing) -> Iterator[tuple[dict[str, Feature], Any, tuple[str, int, int]]]:
    """Yield the features of each record, the mapped file, and where the record lies.

    Where a file breaks, what precedes is kept, and `listing` is marked as damaged.
    """
    with _local(file, listing) as (path, shown):
        if path.stat().st_size == 0:
            return
        with path.open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as data:
            position, end, number = 0, len(data), 0
            while position < end:
                start = position + _HEADER.size
                fault = "cut off"
                if start + 4 <= end:
                    size, crc = _HEADER.unpack_from(data, position)
                    sound = masked(crc32c(data[position : position + 8])) == crc
                    if sound and start + size + 4 <= end:
                        try:
                            yield _example(data, start, start + size), data, (shown, start, size)
                        except (ValueError, struct.error):
                            listing.refused.add(f"{shown}: record {number}", "no tf.train.Example")
                        position, number = start + size + 4, number + 1
                        continue
                    fault = "cut off" if sound else "damaged"
                if number == 0 and fault == "damaged":
                    raise DataError(f"{file}: no TFRecord: the checksum of its first length is wrong")
                listing.refused.unnamed[f"lost in a file that is {fault} at offset {position}: {file}"] = 1
                listing.damaged = True
                return


@contextmanager
def _local(file: str, listing: Listing) -> Iterator[tuple[Path, str]]:
    """Yield the path of a file, and what records of it name as their file: a temporary copy if it was compressed."""
    store, name = locate(file)
    with TemporaryDirectory(prefix="dcgan-tfrecord-") as folder:
        if store.remote:
            path = Path(folder) / "copy"
            store.fetch(name, path)
        elif not Path(file).is_file():
            raise UsageError(f"{file}: no such file; expected a TFRecord")
        else:
            path = Path(file)
        with path.open("rb") as opened:
            head = opened.read(_HEADER.size)
        sound = len(head) == _HEADER.size and masked(crc32c(head[:8])) == _HEADER.unpack(head)[1]
        if not sound and compression_of(head) is not None:
            unpacked = open_archive(str(path), listing)
            unpacked.file.close()
            yield Path(unpacked.path), unpacked.path
        else:
            yield path, file


def _example(data: Any, start: int, end: int) -> dict[str, Feature]:
    """Return the features of a tf.train.Example. Raises ValueError when the bytes are none."""
    features: dict[str, Feature] = {}
    for field, begin, stop in _fields(data, start, end):
        if field != 1:
            continue
        for entry, first, last in _fields(data, begin, stop):
            if entry != 1:
                continue
            name, feature = "", None
            for part, at, until in _fields(data, first, last):
                if part == 1:
                    name = bytes(data[at:until]).decode()
                elif part == 2:
                    feature = _feature(data, at, until)
            if feature is not None:
                features[name] = feature
    return features


def _feature(data: Any, start: int, end: int) -> Feature | None:
    for kind, begin, stop in _fields(data, start, end):
        if kind == 1:
            return Feature(bytes, [(at, until - at) for field, at, until in _fields(data, begin, stop) if field == 1])
        if kind == 2:
            floats = b"".join(bytes(data[at:until]) for field, at, until in _fields(data, begin, stop) if field == 1)
            return Feature(float, [value for (value,) in struct.iter_unpack("<f", floats)])
        if kind == 3:
            return Feature(int, list(_integers(data, begin, stop)))
    return None


def _integers(data: Any, start: int, end: int) -> Iterator[int]:
    """Yield the values of an Int64List, packed or not."""
    position = start
    while position < end:
        tag, position = _varint(data, position, end)
        if tag & 7 == 0:
            value, position = _varint(data, position, end)
            yield _signed(value)
            continue
        if tag & 7 != 2:
            raise ValueError("a list of integers with something else in it")
        size, position = _varint(data, position, end)
        stop = position + size
        if stop > end:
            raise ValueError("a length beyond its end")
        while position < stop:
            value, position = _varint(data, position, stop)
            yield _signed(value)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _fields(data: Any, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (number, begin, end) of the content of each field of a protobuf message, of whatever type."""
    position = start
    while position < end:
        tag, position = _varint(data, position, end)
        begin = position
        match tag & 7:
            case 0:
                _, position = _varint(data, position, end)
            case 1:
                position += 8
            case 2:
                size, begin = _varint(data, position, end)
                position = begin + size
            case 5:
                position += 4
            case _:
                raise ValueError("a field of no known type")
        if position > end:
            raise ValueError("a length beyond its end")
        yield tag >> 3, begin, position


def _varint(data: Any, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & ((1 << 64) - 1), position
        shift += 7
    raise ValueError("a number without an end")
