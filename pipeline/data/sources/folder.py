"""Image folders, nested or flat, on a disk or in an object store. The first folder of a path is the class."""

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.common.errors import DataError, UsageError
from pipeline.common.imaging import BadImage
from pipeline.common.storage import Store, is_url
from pipeline.data.dataset import LabelType
from pipeline.data.sources.interface import Item, Items, Listing
from pipeline.data.sources.label_table import read_table

SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".pnm", ".tif", ".tiff"}
OTHERS, LOOPS = "files that are not images", "links that lead back to a folder above them"
"""What is skipped in a folder."""


@dataclass(frozen=True)
class Folder:
    """All pictures below a folder. Labels: `folders` (the default), `none`, or a CSV file."""

    location: str
    labels: str = "folders"

    def listing(self) -> Listing:
        """Return the pictures in any order. Raises UserError for a missing or empty folder."""
        skipped = Counter[str]()
        files = _find(self.location, skipped)
        if self.labels not in ("folders", "none"):
            listing = self._with_table(files)
        elif self.labels == "none":
            listing = Listing({}, Items(Item(path, (), where) for path, where in files))
        else:
            listing = Listing({"class": "str"}, Items(Item(path, (_class(path),), where) for path, where in files))
            if not any(item.labels[0] for item in listing.items):
                listing = Listing({}, Items(Item(item.key, (), item.where) for item in listing.items))
        if not listing.items:
            raise DataError(f"{self.location}: no images here; expected files such as .jpg, .png or .webp")
        listing.notes[:0] = [f"{skipped[what]:,} {what} were skipped" for what in (OTHERS, LOOPS) if skipped[what]]
        return listing

    def _with_table(self, found: "Iterator[File]") -> Listing:
        if not (files := sorted(found, key=lambda file: file[0])):  # refusals are named in this order
            return Listing({})
        table = read_table(self.labels)
        types: dict[str, LabelType] = dict(table.types)
        listing = Listing(types)
        for path, where in files:
            labels: tuple[Any, ...] | None = table.find(path)
            if labels is None:
                listing.refused.add(path, "no row in the label file")
            else:
                listing.items.append(Item(path, labels, where))
        if not listing.items:
            raise DataError(
                f"--labels {self.labels}: none of its {len(table):,} rows names an image in {self.location}"
            )
        if unused := len(table) - len(listing.items):
            listing.notes.append(f"{unused:,} rows of {self.labels} name no image here")
        return listing

    def read(self, item: Item) -> bytes:
        """Return the file's bytes."""
        return read_file(self.location, path_of(item))


File = tuple[str, int | str]
"""A picture's path and its size in bytes. An http server states no size; then the path as the server spells it."""


def path_of(item: Item) -> str:
    """Return the path by which a picture of a folder is read."""
    return item.where if isinstance(item.where, str) else item.key


def read_file(location: str, path: str) -> bytes:
    """Return a file below `location`. Raises BadImage when only this file cannot be read."""
    try:
        return Store(location).read(path) if is_url(location) else (Path(location) / path).read_bytes()
    except PermissionError:
        raise BadImage("no permission to read it") from None
    except FileNotFoundError:
        raise BadImage("a link to nothing, or removed meanwhile") from None


def _class(path: str) -> str | None:
    return path.partition("/")[0] if "/" in path else None


def _find(location: str, skipped: Counter[str]) -> Iterator[File]:
    """Yield the pictures below `location`, in any order, and count in `skipped` what else is there."""
    found: Iterable[File]
    if is_url(location):
        store = Store(location)
        listed = ((store.shown(path), path, size) for path, size in store.find())
        found = ((shown, size if shown == path else path) for shown, path, size in listed)
    elif not Path(location).is_dir():
        raise UsageError(f"{location}: no such folder; SRC is the folder that holds the images")
    else:
        found = _walk(Path(location), skipped)
    for path, where in found:
        if PurePosixPath(path).suffix.lower() in SUFFIXES:
            yield path, where
        else:
            skipped[OTHERS] += 1


def _walk(root: Path, skipped: Counter[str]) -> Iterator[tuple[str, int]]:
    """Yield (path below root, bytes) of all files that are not hidden, through links; count the links in a circle."""
    top = root.stat()
    # Each entry: the folder, its path below the root, and the folders above it, by which loops are known.
    pending = [(str(root), "", frozenset([(top.st_dev, top.st_ino)]))]
    while pending:
        folder, prefix, above = pending.pop()
        with os.scandir(folder) as entries:  # a folder without permission is an error: its images would be missed
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                try:
                    status = entry.stat()
                except OSError:  # a link to nothing: reported with its name when it is read
                    yield prefix + entry.name, 0
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield prefix + entry.name, status.st_size
                elif stat.S_ISDIR(status.st_mode):
                    identity = (status.st_dev, status.st_ino)
                    if identity in above:
                        skipped[LOOPS] += 1
                    else:
                        pending.append((entry.path, f"{prefix}{entry.name}/", above | {identity}))
