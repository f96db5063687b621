"""The sidecar of an indexed data set: columns of its members, one row an image, in one numpy archive without pickles.

The archive holds `offset`, `size`, `width`, `height` and `key`, and of label number i of dataset.json `label/i`, and
`missing/i` where some images lack it. Texts are two arrays: UTF-8 in one piece, and where each text ends in it.
"""

import io
import math
import mmap
import struct
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.common.errors import DataError
from pipeline.common.records import LARGEST, PlainName, Record
from pipeline.common.storage import Store, sha256_bytes

SIDECAR_FILE = "index.npz"
ADVICE = "index the tars again"
LOCAL_HEADER = 30
"""Bytes of a zip member's own header, before its name; the last four are the lengths of two texts that follow."""
_TEXT, _ENDS = "#text", "#ends"

Arrays = dict[str, NDArray[Any]]


class Sidecar(Record):
    """The sidecar as dataset.json states it."""

    name: PlainName = Field(pattern=r"\.npz$")
    """File name beside dataset.json."""
    bytes: int = Field(ge=1, le=LARGEST)
    """Size of the file."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the file."""


@dataclass(frozen=True)
class Texts:
    """A column of texts."""

    text: NDArray[np.uint8]
    """All of them in UTF-8."""
    ends: NDArray[np.int64]
    """Where each ends in `text`."""

    @classmethod
    def of(cls, texts: list[bytes], prefix: bytes = b"") -> "Texts":
        """Return the column of some texts in UTF-8, each after `prefix`."""
        lengths = np.fromiter(map(len, texts), np.int64, len(texts)) + len(prefix)
        text = prefix.join([b"", *texts]) if texts else b""
        return cls(np.frombuffer(text, np.uint8), np.cumsum(lengths))

    @classmethod
    def join(cls, parts: "list[Texts]") -> "Texts":
        """Return the texts of several columns in one."""
        starts = np.cumsum([0, *(len(part.text) for part in parts)])[:-1].tolist()
        ends = [part.ends + start for part, start in zip(parts, starts, strict=True)]
        return cls(np.concatenate([part.text for part in parts]), np.concatenate(ends))

    def __len__(self) -> int:
        return len(self.ends)

    def sound(self, rows: int) -> bool:
        """Whether these are `rows` texts, all within the piece."""
        shaped = self.text.dtype == np.uint8 and self.ends.dtype == np.int64 and self.ends.shape == (rows,)
        return (
            shaped and self.ends[-1] <= len(self.text) and self.ends[0] >= 0 and bool((np.diff(self.ends) >= 0).all())
        )

    def encoded(self, start: int, stop: int) -> list[bytes]:
        """Return the texts of the rows `start` to `stop` in UTF-8."""
        ends = self.ends[start:stop].tolist()
        first = int(self.ends[start - 1]) if start else 0
        data = self.text[first : ends[-1] if ends else first].tobytes()
        return [data[a - first : b - first] for a, b in zip([first, *ends], ends, strict=False)]

    def slice(self, start: int, stop: int) -> list[str]:
        """Return the texts of the rows `start` to `stop`; what is no UTF-8 becomes escapes."""
        return [text.decode("utf-8", "backslashreplace") for text in self.encoded(start, stop)]

    def take(self, rows: NDArray[np.int64]) -> list[str]:
        """Return the texts of some rows."""
        return [text for row in rows.tolist() for text in self.slice(row, row + 1)]


@dataclass(frozen=True)
class LabelColumn:
    """One label's values: bool, int64, float64 or texts."""

    values: "NDArray[Any] | Texts"
    missing: NDArray[np.bool_] | None
    """Which images lack it; their values mean nothing. None: every image has it."""

    def take(self, rows: NDArray[np.int64]) -> list[Any]:
        """Return the values of some rows; None where there is none."""
        some = self.values.take(rows) if isinstance(self.values, Texts) else self.values[rows].tolist()
        if self.missing is None:
            return some
        return [None if gap else value for value, gap in zip(some, self.missing[rows].tolist(), strict=True)]


@dataclass(frozen=True)
class MemberColumns:
    """What is known of every image of an indexed data set, in its own order."""

    offset: NDArray[np.int64]
    """Where the image's file begins in its tar."""
    size: NDArray[np.int64]
    """Its bytes."""
    width: NDArray[np.int32]
    """In pixels, as stored: before it is turned upright."""
    height: NDArray[np.int32]
    key: Texts
    """Its name: that of its tar, a slash, that in the tar."""
    labels: list[LabelColumn]
    """In the order of dataset.json."""

    def spread(self, count: int) -> NDArray[np.int64]:
        """Return `count` rows at equal distances, or all: a fair draw from an order that may be sorted."""
        count = min(count, len(self))
        return np.arange(count, dtype=np.int64) * len(self) // max(1, count)

    def __len__(self) -> int:
        return len(self.offset)

    def arrays(self) -> Arrays:
        """Return what the archive holds."""
        arrays: Arrays = {"offset": self.offset, "size": self.size, "width": self.width, "height": self.height}
        _add_texts(arrays, "key", self.key)
        for number, label in enumerate(self.labels):
            if isinstance(label.values, Texts):
                _add_texts(arrays, f"label/{number}", label.values)
            else:
                arrays[f"label/{number}"] = label.values
            if label.missing is not None:
                arrays[f"missing/{number}"] = label.missing
        return arrays

    @classmethod
    def unpack(cls, arrays: Arrays, labels: int) -> "MemberColumns":
        """Return the columns in an archive. Raises KeyError when one is missing."""
        found = []
        for number in range(labels):
            name = f"label/{number}"
            values: NDArray[Any] | Texts = _texts(arrays, name) if name + _ENDS in arrays else arrays[name]
            found.append(LabelColumn(values, arrays.get(f"missing/{number}")))
        return cls(
            offset=arrays["offset"],
            size=arrays["size"],
            width=arrays["width"],
            height=arrays["height"],
            key=_texts(arrays, "key"),
            labels=found,
        )


def read_sidecar(store: Store, sidecar: Sidecar, images: int, labels: int) -> MemberColumns:
    """Return the columns of a data set of `images` images, checked against dataset.json. Raises DataError."""
    where = store.path(sidecar.name)
    try:
        columns = MemberColumns.unpack(open_arrays(store, sidecar, ADVICE), labels)
    except KeyError as error:
        raise DataError(f"{where}: lacks the column {error}; {ADVICE}") from None
    texts = {"key": columns.key}
    numbers: Arrays = {"offset": columns.offset, "size": columns.size, "width": columns.width, "height": columns.height}
    for number, label in enumerate(columns.labels):
        if isinstance(label.values, Texts):
            texts[f"label/{number}"] = label.values
        elif label.values.shape != (images,) or (label.missing is not None and label.missing.shape != (images,)):
            raise DataError(f"{where}: is damaged: 'label/{number}'; index the tars again")
    bad = [name for name, column in numbers.items() if column.shape != (images,) or column.dtype.kind != "i"]
    bad += [name for name, column in texts.items() if not column.sound(images)]
    if bad:
        raise DataError(f"{where}: is damaged: {bad[0]!r}; index the tars again")
    return columns


def open_arrays(store: Store, sidecar: Sidecar, advice: str) -> Arrays:
    """Return the arrays of a sidecar, checked against its size and SHA-256. Those of a file on a disk are mapped.

    Raises DataError, which ends with `advice`.
    """
    where = store.path(sidecar.name)
    content = _content(store, store.inside(sidecar.name))
    if len(content) != sidecar.bytes or sha256_bytes(memoryview(content)) != sidecar.sha256:
        raise DataError(f"{where}: is not the file that dataset.json states (size or SHA-256); {advice}")
    try:
        return _views(content)
    except Exception as error:  # numpy reads a header as Python, and raises whatever that does at damaged bytes
        raise DataError(f"{where}: damaged ({type(error).__name__}); {advice}") from None


def _content(store: Store, name: str) -> bytes | mmap.mmap:
    """Return a file of a store; one on a disk is mapped."""
    with suppress(OSError, ValueError):  # not there, no file, empty: `read` says what it is
        if not store.remote:
            with open(store.path(name), "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return store.read(name)


def _views(content: bytes | mmap.mmap) -> Arrays:
    """Return the arrays of an uncompressed archive as views of it: without a copy, and without checking its CRCs."""
    view, arrays = memoryview(content), Arrays()
    file: Any = io.BytesIO(content) if isinstance(content, bytes) else content  # a mapped file is read as any other
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            lengths = struct.unpack_from("<HH", view, member.header_offset + LOCAL_HEADER - 4)
            start = member.header_offset + LOCAL_HEADER + sum(lengths)
            if member.compress_type != zipfile.ZIP_STORED or start + member.file_size > len(view):
                raise ValueError(member.filename)
            arrays[member.filename.removesuffix(".npy")] = _array(view[start : start + member.file_size])
    return arrays


def _array(content: memoryview) -> NDArray[Any]:
    """Return the array in a .npy file. Raises ValueError for one of objects, and for one of another size."""
    header = io.BytesIO(content[: 1 << 14])
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = read[np.lib.format.read_magic(header)](header)
    if fortran or dtype.hasobject or math.prod(shape) * dtype.itemsize != len(content) - header.tell():
        raise ValueError("another size, or objects")
    values = np.frombuffer(content[header.tell() :], dtype) if math.prod(shape) else np.empty(0, dtype)
    return values.reshape(shape)


def write_arrays(arrays: Arrays) -> bytes:
    """Return some arrays as numpy's archive: as np.savez writes it, but without the time of day."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def read_arrays(data: bytes, where: str) -> Arrays:
    """Return the arrays in numpy's archive. Raises DataError when it is damaged; nothing is unpickled."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy reads a header as Python, and raises whatever that does at damaged bytes
        raise DataError(f"{where}: damaged ({type(error).__name__}); index the tars again") from None


def _add_texts(arrays: Arrays, name: str, texts: Texts) -> None:
    arrays[name + _TEXT], arrays[name + _ENDS] = texts.text, texts.ends


def _texts(arrays: Arrays, name: str) -> Texts:
    return Texts(arrays[name + _TEXT], arrays[name + _ENDS])
