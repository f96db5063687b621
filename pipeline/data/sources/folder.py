"""Image folders, nested or flat, on a disk or in an object store. The first folder of a path is the class."""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.common.errors import DataError, UsageError
from pipeline.common.imaging import BadImage
from pipeline.common.storage import Store, is_url
from pipeline.data.dataset import LabelType
from pipeline.data.sources.interface import Item, Listing
from pipeline.data.sources.label_table import read_table

SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".pnm", ".tif", ".tiff"}


@dataclass(frozen=True)
class Folder:
    """All pictures below a folder. Labels: `folders` (the default), `none`, or a CSV file."""

    location: str
    labels: str = "folders"

    def listing(self) -> Listing:
        """Return the pictures in the order of their paths. Raises UserError for a missing or empty folder."""
        files, notes = _find(self.location)
        if not files:
            raise DataError(f"{self.location}: no images here; expected files such as .jpg, .png or .webp")
        if self.labels not in ("folders", "none"):
            return self._with_table(files, notes)
        classes = [path.partition("/")[0] if "/" in path else None for path, _ in files]
        if self.labels == "none" or not any(classes):
            return Listing({}, [Item(path, (), where) for path, where in files], notes=notes)
        items = [Item(path, (name,), where) for (path, where), name in zip(files, classes, strict=True)]
        return Listing({"class": "str"}, items, notes=notes)

    def _with_table(self, files: "list[File]", notes: list[str]) -> Listing:
        table = read_table(self.labels)
        types: dict[str, LabelType] = dict(table.types)
        listing = Listing(types, [], notes=notes)
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
            notes.append(f"{unused:,} rows of {self.labels} name no image here")
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


def _find(location: str) -> tuple[list[File], list[str]]:
    """Return the pictures below `location`, sorted, and notes about files that were skipped."""
    found: Sequence[File]
    if is_url(location):
        store = Store(location)
        listed = ((store.shown(path), path, size) for path, size in store.find())
        found = [(shown, size if shown == path else path) for shown, path, size in listed]
    else:
        if not Path(location).is_dir():
            raise UsageError(f"{location}: no such folder; SRC is the folder that holds the images")
        found, loops = _walk(Path(location))
    files = [(path, where) for path, where in found if PurePosixPath(path).suffix.lower() in SUFFIXES]
    notes = []
    if others := len(found) - len(files):
        notes.append(f"{others:,} files that are not images were skipped")
    if not is_url(location) and loops:
        notes.append(f"{loops:,} links that lead back to a folder above them were skipped")
    return sorted(files, key=lambda file: file[0]), notes


def _walk(root: Path) -> tuple[list[tuple[str, int]], int]:
    """Return (path below root, bytes) of all files that are not hidden, through links, and the number of loops."""
    files: list[tuple[str, int]] = []
    loops = 0
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
                    files.append((prefix + entry.name, 0))
                    continue
                if stat.S_ISREG(status.st_mode):
                    files.append((prefix + entry.name, status.st_size))
                elif stat.S_ISDIR(status.st_mode):
                    identity = (status.st_dev, status.st_ino)
                    if identity in above:
                        loops += 1
                    else:
                        pending.append((entry.path, f"{prefix}{entry.name}/", above | {identity}))
    return files, loops
