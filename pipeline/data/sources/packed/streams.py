"""Folders that MosaicML's streaming (MDS) and Lightning's litdata wrote: an index.json, and files of samples.

Both begin a file with the number of its samples and their offsets (uint32). A sample is the sizes (uint32) of those
of its columns that have no fixed one, and then the columns.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pipeline.common.errors import DataError, UsageError, first_line
from pipeline.common.imaging import Picture
from pipeline.common.storage import Store, locate
from pipeline.data.dataset import LabelType
from pipeline.data.sources.archives.files import compression_of, open_archive
from pipeline.data.sources.interface import KEY, Item, Listing
from pipeline.data.sources.packed.arrow_chunks import arrow_samples, is_arrow
from pipeline.data.sources.packed.columns import ARRAYS
from pipeline.data.sources.packed.places import Span, read_span

INDEX = "index.json"
PICTURES = (("jpeg", "jpg", "png", "webp", "pil", "image", "tifffile"), ARRAYS, ("bytes", "file"))
"""Encodings of columns that hold pictures, in three degrees of certainty."""


def _number(kind: str) -> Callable[[bytes], Any]:
    return lambda data: np.frombuffer(data, kind)[0].item()


def _text(data: bytes) -> str:
    return data.decode()


LABELS: dict[str, tuple[LabelType, Callable[[bytes], Any]]] = {
    "str": ("str", _text),
    "text": ("str", _text),
    "str_int": ("int", lambda data: int(data.decode())),
    "str_float": ("float", lambda data: float(data.decode())),
    "bool": ("bool", lambda data: data != b"\0"),
    "int": ("int", _number("<i8")),
    "float": ("float", _number("<f8")),
    **{f"int{bits}": ("int", _number(f"<i{bits // 8}")) for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": ("int", _number(f"<u{bits // 8}")) for bits in (8, 16, 32)},
    **{f"float{bits}": ("float", _number(f"<f{bits // 8}")) for bits in (16, 32, 64)},
}
"""Encodings of columns that are labels. Pickles and lists are never read."""


class Column(NamedTuple):
    """A column of the samples."""

    name: str
    encoding: str
    size: int | None
    """Its bytes, if all are the same."""


class Part(NamedTuple):
    """One file of samples."""

    name: str
    samples: int
    columns: list[Column]


@dataclass(frozen=True)
class Streams:
    """A folder with an index.json of MDS or litdata, or with one in each of its folders: the splits."""

    location: str
    split: str | None = None
    column: str | None = None

    def listing(self) -> Listing:
        """Return a picture for each sample; columns of single values are its labels."""
        listing = Listing({})
        for split in self._splits():
            location = f"{self.location}/{split}" if split else self.location
            parts = _read_index(Store(location), location)
            columns = parts[0].columns
            picture = self._picture(columns, location)
            kinds = {
                column.name: LABELS[column.encoding][0]
                for column in columns
                if column.encoding in LABELS and column.name not in (picture, KEY)
            }
            passed = [column.name for column in columns if column.name not in (picture, *kinds)]
            if listing.items and kinds != listing.labels:
                raise DataError(f"{location}: has other labels than the other splits; choose one with --split")
            listing.labels = dict(kinds)
            if passed:
                words = f"the columns {', '.join(passed)} were passed over: they hold no single values"
                listing.notes += [words] if words not in listing.notes else []
            for part in parts:
                if part.columns != columns:
                    raise DataError(f"{location}/{part.name}: has other columns than {parts[0].name}")
                prefix = f"{split}/{part.name}" if split else part.name
                for number, (labels, span) in enumerate(_samples(location, part, picture, list(kinds), listing)):
                    listing.items.append(Item(f"{prefix}/{number:07d}", labels, span))
        if not listing.items:
            raise DataError(f"{self.location}: its files hold no samples")
        return listing

    def _splits(self) -> list[str]:
        store = Store(self.location)
        if store.exists(INDEX):
            if self.split is not None:
                raise UsageError(f"--split {self.split}: {self.location} has an index of its own, and no splits")
            return [""]
        splits = [name for name in store.names() if store.exists(f"{name}/{INDEX}")]
        if not splits:
            raise UsageError(
                f"{self.location}: no {INDEX} here or one folder down; expected a folder of MDS or litdata"
            )
        if self.split == "all":
            return splits
        wanted = self.split or ("train" if "train" in splits else splits[0] if len(splits) == 1 else None)
        if wanted not in splits:
            raise UsageError(f"--split {self.split or 'NAME'}: {self.location} has {', '.join(splits)}, all")
        return [wanted]

    def _picture(self, columns: list[Column], location: str) -> str:
        degrees = [
            [column.name for column in columns if column.encoding.partition(":")[0] in some] for some in PICTURES
        ]
        names = [name for some in degrees for name in some]
        if self.column is not None:
            if self.column not in names:
                raise UsageError(f"--column {self.column}: the columns of pictures are: {', '.join(names) or 'none'}")
            return self.column
        sure = next(filter(None, degrees), [])
        if len(sure) != 1:
            known = ", ".join(f"{column.name} ({column.encoding})" for column in columns)
            what = "several columns of pictures; choose with --column" if sure else "no column of pictures"
            raise UsageError(f"{location}: {what}: {known}")
        return sure[0]

    def read(self, item: Item) -> Picture:
        """Return the encoded picture, or its pixels."""
        return read_span(item.where)


def _read_index(store: Store, location: str) -> list[Part]:
    """Return the files of samples that an index.json lists. Raises DataError."""
    try:
        content = json.loads(store.read(INDEX))
        parts = _mds(content) if "shards" in content else _litdata(content, location)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"{location}/{INDEX}: no index of MDS or litdata ({what[:100]})") from None
    if not parts:
        raise DataError(f"{location}/{INDEX}: lists no files")
    return parts


def _mds(content: dict[str, Any]) -> list[Part]:
    parts = []
    for shard in content["shards"]:
        if shard["format"] != "mds":
            raise ValueError(f"format {shard['format']!r}, expected mds")
        columns = [
            Column(str(name), str(encoding), size if size is None else int(size))
            for name, encoding, size in zip(
                shard["column_names"], shard["column_encodings"], shard["column_sizes"], strict=True
            )
        ]
        name = shard["raw_data"]["basename"]
        if shard.get("zip_data"):
            name = shard["zip_data"]["basename"]
        parts.append(Part(str(name), int(shard["samples"]), columns))
    return parts


def _litdata(content: dict[str, Any], location: str) -> list[Part]:
    config = content["config"]
    loader = config.get("item_loader") or "PyTreeLoader"
    if config.get("encryption") or config.get("compression_level") or loader != "PyTreeLoader":
        raise DataError(f"{location}: encrypted, compressed by sample, or of tokens: only whole samples are read")
    encodings = [str(encoding) for encoding in config["data_format"]]
    columns = [Column(name, encoding, None) for name, encoding in zip(_leaves(config), encodings, strict=True)]
    return [Part(str(chunk["filename"]), int(chunk["chunk_size"]), columns) for chunk in content["chunks"]]


def _leaves(config: dict[str, Any]) -> list[str]:
    """Return the names of the leaves of a sample, as torch writes the form of a tree: keys of a dict, else numbers."""
    count = len(config["data_format"])
    spec = json.loads(config["data_spec"])[1] if config.get("data_spec") else {}
    names = json.loads(spec["context"]) if str(spec.get("type", "")).endswith(("dict", "OrderedDict")) else None
    if isinstance(names, list) and len(names) == count and len(set(map(str, names))) == count:
        return list(map(str, names))
    return [str(number) for number in range(count)]


def _samples(
    location: str, part: Part, picture: str, labels: list[str], listing: Listing
) -> Iterator[tuple[tuple[Any, ...], Span]]:
    """Yield the labels of each sample of a file, and where its picture lies. Raises DataError for a damaged file."""
    store = Store(location)
    where = f"{location}/{part.name}"
    path = store.path(store.inside(part.name))
    data, file = _content(path, part.samples, listing)
    count = int.from_bytes(data[:4], "little")
    header = 4 * (count + 2)
    offsets = np.frombuffer(data[4:header], "<u4").astype(np.int64) if header <= len(data) else np.zeros(0, np.int64)
    damaged = DataError(
        f"{where}: damaged, or cut off: its {part.samples:,} samples do not lie in its {len(data):,} bytes"
    )
    if count != part.samples or len(offsets) != count + 1 or offsets[0] < header or offsets[-1] > len(data):
        raise damaged
    if (np.diff(offsets) < 0).any():
        raise damaged
    if count and offsets[-1] == header and is_arrow(data):
        yield from arrow_samples(where, file, data, count, picture, labels)
        return
    variable = [column for column in part.columns if not column.size]
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        body = start + 4 * len(variable)
        if body > end:
            raise damaged
        sizes = dict(
            zip((column.name for column in variable), np.frombuffer(data[start:body], "<u4").tolist(), strict=True)
        )
        values: dict[str, Any] = {}
        span = None
        for column in part.columns:
            size = column.size or sizes[column.name]
            if body + size > end:
                raise damaged
            if column.name == picture:
                form = column.encoding if column.encoding.partition(":")[0] in ("pil", *ARRAYS) else ""
                span = Span(file, body, size, form)
            elif column.name in labels:
                try:
                    value = LABELS[column.encoding][1](bytes(data[body : body + size]))
                except (ValueError, IndexError):
                    raise damaged from None
                values[column.name] = None if isinstance(value, float) and value - value != 0 else value
            body += size
        assert span is not None
        yield tuple(values[name] for name in labels), span


def _content(path: str, samples: int, listing: Listing) -> tuple[Any, str]:
    """Return the bytes of a file, and the path of where they lie: in a temporary copy if it was compressed."""
    store, name = locate(path)
    if not store.exists(name):
        raise DataError(f"{path}: no such file, but {INDEX} lists it; copy the folder again")
    head = store.read_range(name, 0, 4)
    if path.rpartition(".")[2] in ("br", "snappy", "sz"):
        raise DataError(f"{path}: its compression is not read; write it again with zstd, gz or none")
    if int.from_bytes(head, "little") != samples and compression_of(head) is not None:
        opened = open_archive(path, listing)
        opened.file.close()
        path = opened.path
        store, name = locate(path)
    if store.remote:
        return memoryview(store.read(name)), path
    return np.memmap(path, np.uint8, "r").data, path
