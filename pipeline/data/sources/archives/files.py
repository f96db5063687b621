"""Archives as open files that can seek: on a disk, in a store, inside another archive, or unpacked into $TMPDIR."""

import bz2
import gzip
import io
import lzma
import tempfile
import zlib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NamedTuple

from pipeline.common.errors import DataError, UnavailableError, UsageError
from pipeline.common.storage import Store, locate
from pipeline.data.sources.interface import Listing

PIECE = 1 << 20
"""Bytes that are unpacked, or asked of a store, at once."""
FREE_BYTES = 1 << 30
"""Up to this size nothing is taken for a bomb."""
LARGEST_RATIO = 200
"""What is unpacked may be this many times as large as what it is unpacked from: ten times what pictures reach."""
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}


class OpenArchive(NamedTuple):
    """An archive, open."""

    file: Any
    """Reads from its own first byte on, and can seek."""
    path: str
    """Path or URL of the file that holds it."""
    start: int
    """Where in that file it begins."""
    size: int
    """Its bytes."""


def compression_of(head: bytes) -> str | None:
    """Return how a file that begins with `head` is compressed, or None if it is not."""
    return _COMPRESSIONS.get(head[:2])


def open_archive(location: str, listing: Listing) -> OpenArchive:
    """Return an archive at a path or URL, unpacked first if it is a compressed tar. `listing` owns what is unpacked."""
    store, name = locate(location)
    if not store.remote and not Path(location).is_file():
        raise UsageError(f"{location}: no such file; expected a zip or a tar of pictures")
    facts = store.facts(name)
    if not store.remote:
        opened = OpenArchive(Path(location).open("rb"), location, 0, facts.bytes or 0)  # noqa: SIM115
    elif facts.ranges and facts.bytes is not None:
        file = io.BufferedReader(RangeFile(store, name, facts.bytes), PIECE)
        opened = OpenArchive(file, location, 0, facts.bytes)
    else:  # sent once and whole
        path = scratch(listing) / "archive"
        store.fetch(name, path)
        opened = OpenArchive(path.open("rb"), str(path), 0, path.stat().st_size)
    return plain(opened, location, listing)


def plain(opened: OpenArchive, shown: str, listing: Listing) -> OpenArchive:
    """Return an archive as it is, or unpacked into a temporary file if it is compressed as a whole."""
    opened.file.seek(0)
    compression = compression_of(opened.file.read(4))
    opened.file.seek(0)
    if compression is None:
        return opened
    with opened.file:
        return unpack(_decoder(compression, shown)(opened.file), opened.size, f"{shown} ({compression})", listing)


def unpack(source: IO[bytes], packed_bytes: int, shown: str, listing: Listing) -> OpenArchive:
    """Copy what `source` unpacks from `packed_bytes` into a temporary file. Raises DataError for a bomb, or damage."""
    path, size = scratch(listing) / "unpacked", 0
    limit = max(FREE_BYTES, LARGEST_RATIO * packed_bytes)
    with path.open("wb") as target:
        while piece := _read(source, shown):
            if (size := size + len(piece)) > limit:
                raise DataError(f"{shown}: unpacks to more than {LARGEST_RATIO} times its size, as no pictures do")
            try:
                target.write(piece)
            except OSError as error:
                error.filename = tempfile.gettempdir()
                raise
    return OpenArchive(path.open("rb"), str(path), 0, size)


def _read(source: IO[bytes], shown: str) -> bytes:
    try:
        return source.read(PIECE)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{shown}: damaged, or cut off: {error}") from None
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk or the store
            raise
        raise DataError(f"{shown}: damaged: {error}") from None
    except Exception as error:
        if type(error).__name__ not in ("ZstdError", "BadZipFile"):
            raise
        raise DataError(f"{shown}: damaged: {error}") from None


def _decoder(compression: str, shown: str) -> Callable[[Any], Any]:
    """Return what makes of an open compressed file an open plain one."""
    if compression == "gzip":
        return lambda file: gzip.GzipFile(fileobj=file)
    if compression != "zstd":
        return bz2.BZ2File if compression == "bzip2" else lzma.LZMAFile
    for module in ("compression.zstd", "backports.zstd"):  # the former since Python 3.14
        try:
            opener: Callable[[Any], Any] = import_module(module).ZstdFile
        except ImportError:
            continue
        return opener
    raise UnavailableError(f"{shown}: zstd needs a package: pip install 'dcgan-pipeline[zstd]'")


def scratch(listing: Listing) -> Path:
    """Return a new temporary folder that lives as long as `listing`."""
    folder = tempfile.TemporaryDirectory(prefix="dcgan-archive-")
    listing.unpacked.append(folder)
    return Path(folder.name)


class _Part(io.RawIOBase):
    """A file to be read, of `size` bytes, whose position is kept here; subclasses read."""

    def __init__(self, size: int) -> None:
        self._size, self._at = size, 0

    def readable(self) -> bool:
        """Say that it is read."""
        return True

    def seekable(self) -> bool:
        """Say that it can seek."""
        return True

    def seek(self, position: int, whence: int = 0) -> int:
        """Move to a position."""
        self._at = position + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        """Return the position."""
        return self._at


class RangeFile(_Part):
    """A file of a store, read by ranges. Every read is repeated after passing faults, as `Store` does."""

    def __init__(self, store: Store, name: str, size: int) -> None:
        super().__init__(size)
        self._store, self._name = store, name

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the position on."""
        size = max(0, min(len(buffer), self._size - self._at))
        if size:
            buffer[:size] = self._store.read_range(self._name, self._at, size)
        self._at += size
        return size


class Window(_Part):
    """A part of an open file, as a file of its own."""

    def __init__(self, file: Any, offset: int, size: int) -> None:
        super().__init__(size)
        self._file, self._offset = file, offset

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        left = max(0, self._size - self._at)
        self._file.seek(self._offset + self._at)
        data: bytes = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data
