"""The arrays in .npy and .npz files, mapped into memory: nothing is read before it is looked at, nothing unpickled."""

import functools
import io
import zipfile
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import DataError, UsageError
from pipeline.common.storage import locate
from pipeline.data.sources.archives.files import scratch, unpack
from pipeline.data.sources.archives.members import LOCAL
from pipeline.data.sources.interface import Listing

MAGIC = b"\x93NUMPY"
HEADER_BYTES = 1 << 16
Found = tuple[str, tuple[int, ...], str, Callable[..., Any], tuple[Any, ...]]


def find_arrays(location: str, listing: Listing) -> Iterator[Found]:
    """Yield the name, shape and kind of each array in a file, and what opens it. Raises UsageError, DataError.

    Compressed arrays are unpacked into a temporary folder of `listing`.
    """
    path = local_copy(location, listing)
    with path.open("rb") as file:
        head = file.read(len(MAGIC))
        if head == MAGIC:
            yield _array("arr_0", location, path, 0, path.stat().st_size)
            return
        if head[:2] != b"PK":
            raise DataError(f"{location}: no file of arrays; expected .npy, .npz or HDF5")
        try:
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    if not info.filename.endswith(".npy"):
                        continue
                    shown = f"{location}: {info.filename}"
                    name = info.filename.removesuffix(".npy")
                    if info.compress_type == zipfile.ZIP_STORED:
                        file.seek(info.header_offset)
                        fields = LOCAL.unpack(file.read(LOCAL.size).ljust(LOCAL.size, b"\0"))
                        start = info.header_offset + LOCAL.size + fields[-2] + fields[-1]
                        yield _array(name, shown, path, start, start + info.file_size)
                        continue
                    with archive.open(info) as source:
                        unpacked = unpack(source, info.compress_size, shown, listing)
                    unpacked.file.close()
                    yield _array(name, shown, Path(unpacked.path), 0, unpacked.size)
        except (zipfile.BadZipFile, ValueError, NotImplementedError, ArithmeticError, LookupError) as error:
            raise DataError(f"{location}: damaged npz: {error}") from None


def local_copy(location: str, listing: Listing) -> Path:
    """Return the path of a file, of one in a store that of a temporary copy. Raises UsageError when it is missing."""
    store, name = locate(location)
    if not store.remote:
        if not Path(location).is_file():
            raise UsageError(f"{location}: no such file; expected a file of arrays: .npz, .npy or HDF5")
        return Path(location)
    path = scratch(listing) / (name.partition("?")[0].rpartition("/")[2] or "arrays")
    store.fetch(name, path)
    return path


def _array(name: str, shown: str, path: Path, start: int, end: int) -> Found:
    """Return an array whose .npy begins at `start` of a file and ends at `end`."""
    with path.open("rb") as file:
        file.seek(start)
        head = io.BytesIO(file.read(min(HEADER_BYTES, max(0, end - start))))
    try:
        version = np.lib.format.read_magic(head)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(head)
    except (ValueError, KeyError, RecursionError, MemoryError, TypeError, SyntaxError, TokenError, EOFError):
        raise DataError(f"{shown}: damaged .npy header") from None  # numpy reads it as Python
    if dtype.hasobject:
        raise DataError(f"{shown}: an array of Python objects, which would be unpickled; save it as numbers")
    if min(shape, default=0) < 0 or start + head.tell() + prod(shape) * dtype.itemsize > end:
        raise DataError(f"{shown}: cut off: its header states {shape} of {dtype}")
    place = (str(path), start + head.tell(), dtype.str, tuple(shape), fortran)
    return name, tuple(shape), dtype.kind, mapped, place


@functools.lru_cache(maxsize=16)
def mapped(path: str, offset: int, dtype: str, shape: tuple[int, ...], fortran: bool) -> NDArray[Any]:
    """Return an array in a file as mapped memory."""
    if 0 in shape:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")
