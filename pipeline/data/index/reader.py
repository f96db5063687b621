"""Tars to be scanned, on a disk or in a store: pieces of them by offset, and how large the pieces should be."""

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

from pipeline.common.errors import DataError, describe_os_error
from pipeline.common.storage import Store


@dataclass(frozen=True)
class Pace:
    """How a tar is read: the time of one request against that of the bytes in between."""

    block: int
    """Bytes read at once where members are small."""
    window: int
    """Bytes read at each header where members are large: the header and the beginning of an image."""
    sparse: int
    """Bytes from one header to the next, on average, above which windows are quicker than blocks."""


DISK = Pace(block=4 << 20, window=9 * 512, sparse=48 << 10)
# A request takes some 50 ms, in which a connection brings 2 MB or more.
REMOTE = Pace(block=8 << 20, window=128 << 10, sparse=4 << 20)


class OpenTar(Protocol):
    """A tar that can be read at any offset."""

    where: str
    """Its path or URL, for messages."""
    length: int
    """Its bytes."""
    etag: str | None
    """Its ETag, where the store has one."""
    pace: Pace

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, or fewer where the file ends. Raises UserError."""
        ...


class DiskTar:
    """A tar on a disk, open already."""

    pace = DISK

    def __init__(self, file: FileIO, where: str, etag: str | None = None) -> None:
        """`where` is its name in messages. Raises DataError when it is no plain file."""
        self._file, self.where, self.etag = file, where, etag
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{where}: is no plain file; expected a tar")
        self.length = found.st_size

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, or fewer where the file ends. Raises UserError."""
        handle, size = self._file.fileno(), max(0, min(size, self.length - offset))
        try:
            data = os.pread(handle, size, offset)
            while len(data) < size and (more := os.pread(handle, size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            error.filename = self.where
            raise describe_os_error(error) from None
        return data


class StoreTar:
    """A tar in a store that answers range requests."""

    pace = REMOTE

    def __init__(self, store: Store, name: str, size: int, etag: str | None) -> None:
        self._store, self._name = store, name
        self.where, self.length, self.etag = store.path(name), size, etag

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, or fewer where the file ends."""
        size = min(size, self.length - offset)
        return self._store.read_range(self._name, offset, size) if size > 0 else b""


@contextmanager
def opened(store: Store, name: str) -> Iterator[OpenTar]:
    """Yield a tar, ready to be read. From a store without range requests it is first fetched to a temporary file.

    Raises DataError when it is not there, TryAgainError when the store does not answer.
    """
    if not store.remote:
        with _open(store.path(name)) as file:
            yield DiskTar(file, store.path(name))
        return
    facts = store.facts(name)
    if facts.ranges and facts.bytes is not None:
        yield StoreTar(store, name, facts.bytes, facts.etag)
        return
    with tempfile.TemporaryDirectory(prefix="dcgan-index-") as folder:
        copy = Path(folder) / "copy.tar"
        store.fetch(name, copy)
        with _open(str(copy)) as file:
            yield DiskTar(file, store.path(name), facts.etag)


def _open(path: str) -> FileIO:
    try:
        # Otherwise a named pipe would wait for somebody to write into it.
        return FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise describe_os_error(error) from None
