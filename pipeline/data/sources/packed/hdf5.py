"""The arrays in an HDF5 file, read through h5py. What refers to other files is refused."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.common.errors import DataError, UnavailableError, first_line
from pipeline.data.sources.interface import Listing
from pipeline.data.sources.packed.numpy_files import Found, local_copy

CACHE_BYTES = 64 << 20
"""Chunks of a data set that are kept unpacked: pictures are read in random order."""


def find_arrays(location: str, listing: Listing) -> Iterator[Found]:
    """Yield the name, shape and kind of each data set in a file, and what opens it. Raises UserError."""
    path = str(local_copy(location, listing))
    h5py = _h5py(location)
    try:
        pending = [("", _file(path))]
        while pending:
            prefix, group = pending.pop()
            for name in sorted(group):
                if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                    listing.passed["links of HDF5"] += 1
                    continue
                member, inside = group[name], f"{prefix}{name}"
                if isinstance(member, h5py.Group):
                    if len(inside) < 200:  # a group may hold itself
                        pending.append((f"{inside}/", member))
                elif isinstance(member, h5py.Dataset):
                    yield _array(h5py, location, path, inside, member)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename:
            raise
        raise DataError(f"{location}: not a sound HDF5 file: {first_line(error)[:200]}") from None


def _array(h5py: Any, location: str, path: str, name: str, found: Any) -> Found:
    if found.external or found.is_virtual:
        raise DataError(f"{location}: {name} lies in other files, which are not opened; copy it with h5repack")
    kind = found.dtype.kind
    if kind == "O" and h5py.check_string_dtype(found.dtype) is None:
        kind = "E" if h5py.check_vlen_dtype(found.dtype) == np.dtype(np.uint8) else "?"
    return name, tuple(found.shape or ()), kind, dataset, (path, name)


@functools.lru_cache(maxsize=16)
def dataset(path: str, name: str) -> Any:
    """Return a data set in a file, open for the life of the process."""
    return _file(path)[name]


@functools.lru_cache(maxsize=4)
def _file(path: str) -> Any:
    return _h5py(path).File(path, "r", rdcc_nbytes=CACHE_BYTES, locking=False)


def _h5py(shown: str) -> Any:
    try:
        import h5py
    except ImportError:
        raise UnavailableError(f"{shown}: needs h5py: pip install 'dcgan-pipeline[hdf5]'") from None
    return h5py
