"""ImageNet: class folders, tars of classes, or the one tar of those tars; `class` is the WordNet name."""

import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.common.errors import DataError, UsageError
from pipeline.common.storage import Store, is_url, locate
from pipeline.data.sources.folder import SUFFIXES, Folder
from pipeline.data.sources.interface import Item, Items, Listing
from pipeline.data.sources.tars import open_members, tar_members
from pipeline.data.specification import short_names


@dataclass(frozen=True)
class ImageNet:
    """A folder of class folders or of class tars (n01440764.tar), or ILSVRC2012_img_train.tar."""

    location: str

    def listing(self) -> Listing:
        """Return the pictures with `class` and `label`, the number of the class in alphabetical order."""
        tars = self._tars()
        listing = self._from_tars(tars) if tars else self._from_folders()
        classes = {name: number for number, name in enumerate(sorted({item.labels[0] for item in listing.items}))}
        listing.labels = {"class": "str", "label": "int"}
        listing.items = Items(
            Item(item.key, (item.labels[0], classes[item.labels[0]]), item.where) for item in listing.items
        )
        return listing

    def read(self, item: Item) -> bytes:
        """Return the JPEG."""
        if not isinstance(item.where, tuple):
            return Folder(self.location).read(item)
        tar, offset, size = item.where
        store, name = locate(tar)
        return store.read_range(name, offset, size)

    def _tars(self) -> list[str]:
        """Return the paths or URLs of the tars to read."""
        if self.location.endswith(".tar"):
            return [self.location]
        if not is_url(self.location) and not Path(self.location).is_dir():
            raise UsageError(f"{self.location}: no such folder or tar")
        store = Store(self.location)
        return [store.path(name) for name in store.names() if name.endswith(".tar")]

    def _from_folders(self) -> Listing:
        listing = Folder(self.location).listing()
        if "class" not in listing.labels:
            raise DataError(f"{self.location}: expected a folder or a tar for each class, such as n01440764")
        flat = [item.key for item in listing.items if item.labels[0] is None]
        if flat:
            raise DataError(f"{self.location}: {min(flat)} lies in no class folder")
        return listing

    def _from_tars(self, tars: list[str]) -> Listing:
        listing = Listing({})
        for tar, shown in zip(tars, short_names(tars), strict=True):
            for member, offset, size, file in tar_members(tar, listing):
                if member.endswith(".tar"):
                    inner = open_members(_Window(file, offset, size), f"{tar}: {member}", listing)
                    wnid = PurePosixPath(member).stem
                    listing.items += [
                        _item(wnid, picture, tar, offset + at, length)
                        for picture, at, length in inner
                        if _is_image(picture)
                    ]
                elif _is_image(member):
                    listing.items.append(_item(PurePosixPath(shown).stem, member, tar, offset, size))
        if not listing.items:
            raise DataError(f"{self.location}: its tars hold no images")
        return listing


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def _item(wnid: str, member: str, tar: str, offset: int, size: int) -> Item:
    """Return a picture under the key that it has in class folders, so that both forms build the same data set."""
    return Item(f"{wnid}/{PurePosixPath(member).name}", (wnid,), (tar, offset, size))


class _Window(io.RawIOBase):
    """A part of an open file, as a file of its own."""

    def __init__(self, file: Any, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = 0) -> int:
        self._at = position + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        self._file.seek(self._offset + self._at)
        data: bytes = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data
