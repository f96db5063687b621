"""Tars that the tests make, and what Python's own reader finds in them."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from picture_files import as_bytes, make_picture
from PIL import Image

from pipeline.data.index.reader import Pace
from pipeline.data.index.scan import Batch

PACES = {
    "one block": Pace(block=1 << 22, window=4608, sparse=1 << 20),
    "small blocks": Pace(block=1536, window=1024, sparse=1 << 20),
    "windows": Pace(block=2048, window=1536, sparse=0),
}
"""Ways to read a tar, which must not matter."""

PICTURES = [
    as_bytes(Image.fromarray(make_picture(seed, 20 + seed, 17)), kind) for seed in range(4) for kind in ("JPEG", "PNG")
]

Member = tuple[str, bytes]
Found = list[tuple[str, int, int]]


class MemoryTar:
    """A tar in memory, which counts how it is read."""

    etag: str | None = None
    where = "memory.tar"

    def __init__(self, data: bytes, pace: Pace) -> None:
        self.data, self.pace, self.length = data, pace, len(data)
        self.reads: list[int] = []

    def read(self, offset: int, size: int) -> bytes:
        assert offset >= 0
        assert size >= 0
        self.reads.append(size)
        return self.data[offset : offset + size]


class Files:
    """Collects (name, offset, size) of all files."""

    def __init__(self) -> None:
        self.found: Found = []
        self.sparse: list[str] = []

    def add(self, batch: Batch) -> None:
        names = [name.decode("utf-8", "surrogateescape") for name in batch.names]
        self.found += zip(names, batch.offsets.tolist(), batch.sizes.tolist(), strict=True)
        self.sparse += [names[row] for row in batch.sparse]


def make_tar(members: Sequence[Member], format: int = tarfile.PAX_FORMAT, **attributes: Any) -> bytes:
    """Return a tar of some files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for attribute, value in attributes.items():
                setattr(info, attribute, value)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def suffix_of(picture: bytes) -> str:
    """Return the suffix that fits a picture."""
    return "jpg" if picture[:2] == b"\xff\xd8" else "png"


def samples(count: int, *, start: int = 0, classes: int = 3) -> list[Member]:
    """Return the files of some samples: a picture and a label each."""
    found = []
    for number in range(start, start + count):
        data = PICTURES[number % len(PICTURES)]
        found += [(f"{number:06d}.{suffix_of(data)}", data), (f"{number:06d}.cls", str(number % classes).encode())]
    return found


def write_tars(folder: Path, tars: int, count: int, **options: Any) -> list[str]:
    """Write tars of `count` samples each, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05d}.tar" for number in range(tars)]
    for number, path in enumerate(paths):
        path.write_bytes(make_tar(samples(count, start=number * count, **options)))
    return [str(path) for path in paths]


def by_tarfile(data: bytes) -> Found | None:
    """Return (name, offset, size) of all plain files as `tarfile` reads them, or None where it fails or goes round."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:", errorlevel=2) as tar:
            found = []
            before = -1
            while (member := tar.next()) is not None:
                if tar.offset <= before:
                    return None
                before = tar.offset
                if member.isreg():
                    found.append((member.name, member.offset_data, member.size))
        rest = data[tar.offset :]
    except (tarfile.TarError, ValueError, OverflowError, RecursionError):
        return None
    return found if rest and not rest.strip(b"\0") else None
