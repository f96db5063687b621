"""Finds the files in a tar by its headers alone: quickly where they are of the usual kinds, else with `tarfile`.

The headers are followed one by one; all else happens to many of them at once. What is unusual (sparse files, links,
sizes in other notations, attributes that change a size) is left to `tarfile`, which is some twenty times slower.
"""

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import DataError
from pipeline.data.dataset import Shard
from pipeline.data.index.reader import DiskTar, OpenTar

RECORD = 512
"""Bytes of a tar record: headers and contents begin at multiples of it."""
BATCH_HEADERS = 1024
"""Headers that are looked at together where each is read by itself."""
LARGEST_ATTRIBUTES = 1 << 20
"""Most bytes of attributes (PAX) or of a long name (GNU) before a file that are believed."""
SEARCHED_BYTES = 1 << 16
"""Least bytes in which all headers are looked for at once."""
TRACED_BYTES = 1 << 16
"""Bytes that `tarfile` is given at once."""

Offsets = NDArray[np.int64]

_ZEROS = bytes(RECORD)
_OLD_FILE, _FILE, _FOLDER, _LONG_NAME, _PAX_ALL, _PAX = b"\x0005Lgx"
_DECIDING = (b"path=", b"size=", b"GNU.sparse", b"hdrcharset=")
_OTHERS = {
    b"\x1f\x8b": "compressed with gzip: gunzip it first",
    b"BZh": "compressed with bzip2: bunzip2 it first",
    b"\xfd7zXZ": "compressed with xz: unxz it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unzstd it first",
    b"PK\x03\x04": "a zip archive, no tar",
    b"<": "a page of HTML or XML, no tar",
}


@dataclass(frozen=True)
class Batch:
    """Consecutive files of a tar."""

    names: list[bytes]
    """Their names, as they are in the tar."""
    offsets: Offsets
    """Where each begins in the tar, int64."""
    sizes: Offsets
    """Their bytes, int64."""
    data: bytes
    """What has been read of the tar."""
    starts: Offsets
    """Where each would begin in `data`, int64."""
    limits: Offsets
    """Up to where `data` holds the bytes of the tar that follow this, int64; it may be less than the start."""
    sparse: frozenset[int] = frozenset()
    """Those that are stored without their zeros: offset and size do not give their content."""


class Collector(Protocol):
    """What a scan gives its files to."""

    def add(self, batch: Batch) -> None:
        """Take some files, in the order of the tar."""
        ...


@dataclass(frozen=True)
class Ending:
    """What a scan knows at its end."""

    sha256: str
    """SHA-256 of the names, sizes, times and attributes of all files in the tar, and of its own size."""
    damage: str | None
    """What is wrong with the tar; what was found before that is intact. None: the tar is sound."""


C = TypeVar("C", bound=Collector)


def scan(file: OpenTar, collector: Callable[[], C]) -> tuple[C, Ending]:
    """Pass over a tar's headers, and return a collector that has all its plain files, and how the tar ended.

    Reads only headers, unless files are so small that all of the tar is read quicker. Raises UserError when the file
    cannot be read; a damaged tar raises nothing: see `Ending.damage`.
    """
    try:
        found = collector()
        return found, _Quick(file).scan(found)
    except _Unusual:
        found = collector()
        return found, _with_tarfile(file, found)


class _Nothing:
    def add(self, batch: Batch) -> None:
        """Drop the files: only the headers' hash is wanted."""


def verify_headers(file: FileIO, shard: Shard, where: str) -> None:
    """Check an open tar, or the local copy of one, against its index. Raises DataError that names `where`.

    Pixels are not read: a change of them that leaves all names, sizes and times in the tar as they were is not seen.
    """
    tar = DiskTar(file, where)
    found = f"{tar.length:,} bytes, not {shard.bytes:,}"
    if tar.length == shard.bytes:
        if scan(tar, _Nothing)[1].sha256 == shard.sha256:
            return
        found = "other files, or other times of them"
    raise DataError(f"{where}: changed since it was indexed: it has {found}; index the tars again")


class _Unusual(Exception):
    """Something that is left to `tarfile`."""


class _Quick:
    """The scan of a tar whose headers are of the usual kinds. Raises _Unusual for others."""

    def __init__(self, file: OpenTar) -> None:
        self._file = file
        # Each of one kind of fact, so that the size of batches does not matter.
        self._digests = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        self._name: bytes | None = None  # of the next file, if a record before it gives one
        self._record_last = False

    def scan(self, found: Collector) -> Ending:
        damage = _no_tar(self._file)
        position = headers = 0
        ended = damage is not None
        while not ended:
            gathered, position, ended = self._gather(position, headers)
            headers += len(gathered.starts)
            damage = self._examine(gathered, found)
            ended = ended or damage is not None
        damage = damage or self._ending(position)
        digest = hashlib.sha256(b"".join(digest.digest() for digest in self._digests))
        return Ending(_finish(digest, self._file), damage)

    def _gather(self, position: int, headers: int) -> tuple["_Gathered", int, bool]:
        """Read on at `position`; return some headers, where the next one is, and whether there is none."""
        file, pace = self._file, self._file.pace
        apart = headers >= 16 and position > headers * pace.sparse
        gathered = _Gathered()
        ended = False
        while not ended and (not gathered.pieces or (apart and gathered.length < pace.block)):
            data = file.read(position, pace.window if apart else pace.block)
            starts, sizes, length = _follow(data)
            gathered.add(data, position, starts, sizes)
            ended = length + RECORD <= len(data) or position + length + RECORD > file.length
            position += length
        return gathered, position, ended

    def _examine(self, gathered: "_Gathered", found: Collector) -> str | None:
        """Check the headers, and pass on their files. Returns what is wrong, if anything is."""
        if not gathered.starts:
            return None
        rows = gathered.rows()
        damage = None
        whole = _first_bad(rows.headers)
        if whole < len(rows.starts):
            damage = _unreadable(int(rows.offsets[whole]) - RECORD)
        beyond = np.flatnonzero(rows.offsets[:whole] + rows.sizes[:whole] > self._file.length)
        if len(beyond):
            whole = int(beyond[0])
            damage = f"ends inside {_names(rows.headers[whole : whole + 1])[0].decode('utf-8', 'backslashreplace')}"
        if whole:
            self._pass_on(rows.take(slice(whole)), found)
        return damage

    def _pass_on(self, rows: "_Rows", found: Collector) -> None:
        """Pass on the files of some sound headers."""
        if (rows.headers[:, 135] & 0xDF).any():  # neither zero nor blank: a size of twelve digits
            raise _Unusual
        self._digests[0].update(rows.headers[:, 124:157].tobytes())  # sizes, times, checksums, kinds
        kinds = rows.headers[:, 156]
        plain = (kinds == _FILE) | (kinds == _OLD_FILE)
        special = np.flatnonzero(~plain)
        named: dict[int, bytes] = {}
        if len(special) or self._name is not None:
            if not self._tell_little(rows, special):
                named = self._names_from_records(rows, special.tolist())
            place = np.cumsum(plain) - 1
            named = {int(place[row]): name for row, name in named.items()}
            rows = rows.take(plain)
            if not len(rows.starts):
                return
        else:
            self._record_last = False
        names = _names(rows.headers)
        old = np.flatnonzero(rows.headers[:, 156] == _OLD_FILE).tolist()
        if any(names[row].endswith(b"/") for row in old):  # a folder in the oldest notation
            raise _Unusual
        self._digests[1].update(b"\0".join(names) + b"\0")
        for row, name in named.items():
            names[row] = name
        found.add(Batch(names, rows.offsets, rows.sizes, rows.data, rows.starts + RECORD, rows.limits))

    def _tell_little(self, rows: "_Rows", special: Offsets) -> bool:
        """Whether the special headers are short attributes that change no name and no size; if so, hash them.

        So they are where webdataset's own writer made the tar: before every file, with the time in fractions.
        """
        kinds, sizes = rows.headers[special, 156], rows.sizes[special]
        begin = rows.starts[special] + RECORD
        short = (sizes <= RECORD) & (begin + RECORD <= rows.limits[special])
        if self._name is not None or not (((kinds == _PAX) | (kinds == _PAX_ALL)) & short).all():
            return False
        contents = np.frombuffer(rows.data, np.uint8).reshape(-1, RECORD)[begin // RECORD]
        content = contents[np.arange(RECORD) < sizes[:, None]].tobytes()
        if any(word in content for word in _DECIDING):
            return False
        self._digests[2].update(content)
        self._record_last = bool(special[-1] == len(rows.starts) - 1)
        return True

    def _names_from_records(self, rows: "_Rows", special: list[int]) -> dict[int, bytes]:
        """Read the records among the headers, hash them, and return the names that they give to files."""
        named: dict[int, bytes] = {}
        last = -1
        name, following = self._name, 0
        for row in special:
            if name is not None and row != following:
                named[following], name = name, None
            following = row + 1
            kind = int(rows.headers[row, 156])
            if kind == _FOLDER and not rows.sizes[row]:
                name = None
                continue
            if kind not in (_PAX, _PAX_ALL, _LONG_NAME):
                raise _Unusual
            content = self._content(rows, row)
            self._digests[2].update(content[: int(rows.sizes[row])])
            last = row
            given = _name_in(content, kind)
            if given is not None and name is not None:
                raise _Unusual
            name = given if name is None else name
        if name is not None and following < len(rows.starts):
            named[following], name = name, None
        self._name = name
        self._record_last = last == len(rows.starts) - 1
        return named

    def _content(self, rows: "_Rows", row: int) -> bytes:
        """Return the content of a record, with its padding."""
        size = int(rows.sizes[row])
        if size > LARGEST_ATTRIBUTES:
            raise _Unusual
        begin, padded = int(rows.starts[row]) + RECORD, size + -size % RECORD
        if begin + padded <= rows.limits[row]:
            return rows.data[begin : begin + padded]
        return self._file.read(int(rows.offsets[row]), padded)

    def _ending(self, position: int) -> str | None:
        """Return what is wrong at the end of the headers, if anything is. Raises _Unusual for an unusual header."""
        if self._record_last:
            return f"ends at offset {position}, before the file that a record announces"
        return _check_end(self._file, position, unusual=True)


class _Gathered:
    """Pieces of a tar that were read, and the headers in them."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.starts: list[int] = []
        self.sizes: list[int] = []
        self._spans: list[tuple[int, int, int]] = []  # headers of a piece, its end, its offset in the tar less its own
        self.length = 0
        """Bytes that were read."""

    def add(self, data: bytes, offset: int, starts: list[int], sizes: list[int]) -> None:
        """Append what was read at `offset` of the tar."""
        base = self.length
        self.starts += [base + start for start in starts] if base else starts
        self.sizes += sizes
        self._spans.append((len(starts), base + len(data), offset - base))
        padding = bytes(-len(data) % RECORD)
        self.pieces.append(data + padding if padding else data)
        self.length += len(data) + len(padding)

    def rows(self) -> "_Rows":
        """Return the headers with what is known of each."""
        data = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
        spans = np.array(self._spans, np.int64)
        starts, sizes = np.array(self.starts, np.int64), np.array(self.sizes, np.int64)
        limits, moved = np.repeat(spans[:, 1], spans[:, 0]), np.repeat(spans[:, 2], spans[:, 0])
        headers = np.frombuffer(data, np.uint8).reshape(-1, RECORD)[starts // RECORD]
        return _Rows(data, headers, starts, sizes, limits, starts + moved + RECORD)


@dataclass(frozen=True)
class _Rows:
    """Some headers in `data`: themselves (n, 512), their starts there, their files' bytes, limits and offsets."""

    data: bytes
    headers: NDArray[np.uint8]
    starts: Offsets
    sizes: Offsets
    limits: Offsets
    offsets: Offsets

    def take(self, some: slice | NDArray[np.bool_]) -> "_Rows":
        """Return some of them."""
        return _Rows(
            self.data, self.headers[some], self.starts[some], self.sizes[some], self.limits[some], self.offsets[some]
        )


def _follow(data: bytes) -> tuple[list[int], list[int], int]:
    """Go from header to header in `data`; return where they are, the sizes of their files, and where the next is.

    That is beyond `data`, or in it at something whose size cannot be read.
    """
    if len(data) >= SEARCHED_BYTES and (found := _search(data)) is not None:
        return found
    starts, sizes = [], []
    position, last = 0, len(data) - RECORD
    try:
        while position <= last:
            size = int(data[position + 124 : position + 135], 8)
            if size < 0:
                break
            starts.append(position)
            sizes.append(size)
            position += (size + 1023) & -RECORD
    except ValueError:
        pass
    return starts, sizes, position


def _search(data: bytes) -> tuple[list[int], list[int], int] | None:
    """Return what `_follow` does, found by looking at all records at once; None where that leads to nothing.

    It does when the records that look like headers are a chain: each begins where the file before it ends.
    """
    count = len(data) // RECORD
    records = np.frombuffer(data, np.uint8, count * RECORD).reshape(-1, RECORD)
    # As one number of each record, which is four times as quick as to compare bytes.
    places = np.flatnonzero(np.ndarray(count, "<u4", data, 257, RECORD) == int.from_bytes(b"usta", "little"))
    places = places[records[places, 261] == ord("r")]
    if not len(places) or places[0] != 0:
        return None
    digits = records[places, 124:135]
    if not ((digits >= 48) & (digits <= 55)).all():
        return None
    sizes = (digits & 7) @ _SIZE_WEIGHTS
    following = places + 1 + (sizes + RECORD - 1) // RECORD
    if (following[:-1] != places[1:]).any():
        return None
    end = int(following[-1])
    if end < len(records) and data[end * RECORD : (end + 1) * RECORD] != _ZEROS:
        return None
    return (places * RECORD).tolist(), sizes.tolist(), end * RECORD


_SIZE_WEIGHTS = 8 ** np.arange(10, -1, -1, dtype=np.int64)
_WEIGHTS = _SIZE_WEIGHTS[-6:]


def _first_bad(headers: NDArray[np.uint8]) -> int:
    """Return the number of headers (n, 512) before the first whose checksum is wrong."""
    stated = headers[:, 148:156]
    digits = stated[:, :6]
    usual = (((digits >= 48) & (digits <= 55)) | (digits == 32)).all(1) & ((stated[:, 6:] & 0xDF) == 0).all(1)
    # Modulo 2^16, which is twice as quick, and enough: 257 flipped bits would not be noticed.
    sums = headers.sum(1, dtype=np.uint16) - stated.sum(1, dtype=np.uint16) + np.uint16(8 * 32)
    right = usual & (((digits & 7) @ _WEIGHTS).astype(np.uint16) == sums)
    for row in np.flatnonzero(~right).tolist():
        if not _sound(headers[row].tobytes()):
            return int(row)
    return len(headers)


def _sound(header: bytes) -> bool:
    """Whether a header's checksum is right, in any notation."""
    try:
        tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return False
    return True


def _names(headers: NDArray[np.uint8]) -> list[bytes]:
    """Return the names in headers (n, 512), with their prefixes."""
    text = np.ascontiguousarray(headers[:, :100])
    names: list[bytes] = text.view("S100").ravel().tolist()
    if ((text[:, 1:] != 0) & (text[:, :-1] == 0)).any():  # something follows the end of a name
        names = [name.partition(b"\0")[0] for name in names]
    for row in np.flatnonzero(headers[:, 345]).tolist():
        names[row] = headers[row, 345:500].tobytes().partition(b"\0")[0] + b"/" + names[row]
    return names


def _name_in(content: bytes, kind: int) -> bytes | None:
    """Return the name that a record gives to the next file, or None. Raises _Unusual when it says more than that."""
    if kind == _LONG_NAME:
        return content.partition(b"\0")[0]
    if not any(word in content for word in _DECIDING):
        return None
    name: bytes | None = None
    while content.strip(b"\0"):
        length, blank, _ = content.partition(b" ")
        if not blank or not length.isdigit() or not len(length) + 3 < int(length) <= len(content):
            raise _Unusual
        record, content = content[len(length) + 1 : int(length)], content[int(length) :]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise _Unusual
        if key in (b"size", b"hdrcharset") or key.startswith(b"GNU.sparse") or (key == b"path" and kind == _PAX_ALL):
            raise _Unusual
        if key == b"path":
            name = value[:-1].rstrip(b"/")
    return name


def _no_tar(file: OpenTar) -> str | None:
    """Return what a file is, if its first bytes say that it is no tar."""
    head = file.read(0, RECORD)
    if not head:
        return "empty"
    return next((what for magic, what in _OTHERS.items() if head.startswith(magic) and not _sound(head)), None)


def _check_end(file: OpenTar, position: int, *, unusual: bool) -> str | None:
    """Return what is wrong at `position`, where the headers end; None if the tar ends there as it should."""
    if position > file.length:
        return "ends inside its last file: it was cut off"
    if position == file.length:  # some writers omit the mark, but a cut-off copy looks the same
        return "has no end mark, perhaps it was cut off"
    mark = file.read(position, RECORD)
    if mark.strip(b"\0"):
        if unusual and len(mark) == RECORD and _sound(mark):
            raise _Unusual
        return _unreadable(position)
    at = position
    while rest := file.read(at, file.pace.block):
        if rest.strip(b"\0"):
            return _unreadable(position)
        at += len(rest)
    return None


def _unreadable(position: int) -> str:
    return f"at offset {position} is neither a header nor the end of the tar, and the rest would be lost"


def _finish(digest: "hashlib._Hash", file: OpenTar) -> str:
    digest.update(str(file.length).encode())
    return digest.hexdigest()


class _Stream:
    """A tar as `tarfile` wants it: a file to be read and sought."""

    def __init__(self, file: OpenTar) -> None:
        self._file = file
        self._position = self._begin = 0
        self._held = b""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LARGEST_ATTRIBUTES:  # only headers and attributes are read
            raise tarfile.ReadError(f"a record of {size} bytes")
        start = self._position - self._begin
        if start < 0 or start + size > len(self._held):
            self._begin, start = self._position, 0
            self._held = self._file.read(self._position, max(size, TRACED_BYTES))
        data = self._held[start : start + size]
        self._position += len(data)
        return data

    def seek(self, position: int, whence: int = 0) -> int:
        self._position = position if whence == 0 else self._position + position
        if self._position < 0:
            raise tarfile.ReadError("an offset before the beginning")
        return self._position

    def tell(self) -> int:
        return self._position


def _with_tarfile(file: OpenTar, found: Collector) -> Ending:
    """Scan a tar with `tarfile`: the same result, slowly."""
    digest = hashlib.sha256()
    stream = _Stream(file)
    damage: str | None = None
    hashed = end = 0
    members: list[tarfile.TarInfo] = []

    def pass_on() -> None:
        if members:
            found.add(_batch(members))
            members.clear()

    try:
        with tarfile.open(fileobj=stream, mode="r:", errorlevel=2) as tar:  # type: ignore[call-overload]
            while (member := tar.next()) is not None:
                tar.members.clear()  # they would pile up
                if tar.offset <= end:  # after a negative size, tarfile would go round in circles
                    raise tarfile.ReadError("a negative size")
                for piece in _pieces(file, hashed, member.offset_data):
                    digest.update(piece)
                hashed = end = tar.offset
                if member.isreg():
                    members.append(member)
                if len(members) == BATCH_HEADERS:
                    pass_on()
            end = tar.offset
    except (tarfile.TarError, ValueError, ArithmeticError, RecursionError, LookupError) as error:
        damage = f"damaged near offset {end}: {error}"
    pass_on()
    return Ending(_finish(digest, file), damage or _check_end(file, end, unusual=False))


def _pieces(file: OpenTar, start: int, stop: int) -> Iterator[bytes]:
    while start < stop and (piece := file.read(start, min(stop - start, LARGEST_ATTRIBUTES))):
        yield piece
        start += len(piece)


def _batch(members: list[tarfile.TarInfo]) -> Batch:
    offsets = np.array([member.offset_data for member in members], np.int64)
    return Batch(
        names=[member.name.encode("utf-8", "surrogateescape") for member in members],
        offsets=offsets,
        sizes=np.array([member.size for member in members], np.int64),
        data=b"",
        starts=np.zeros(len(offsets), np.int64),
        limits=np.full(len(offsets), -1, np.int64),
        sparse=frozenset(row for row, member in enumerate(members) if member.issparse()),
    )
