"""ImageNet: class folders, tars of classes, or the one tar of those tars; `class` is the WordNet name."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.common.errors import DataError, UsageError
from pipeline.common.pictures.formats import picture_suffixes
from pipeline.common.storage import Store, is_url, open_ranges
from pipeline.data.sources.archives.files import Window
from pipeline.data.sources.archives.members import Member
from pipeline.data.sources.folder import Folder
from pipeline.data.sources.interface import Item, Items, Listing
from pipeline.data.sources.tars import open_members, plain_tar, tar_members
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
        if isinstance(item.where, Member | int | str):
            return Folder(self.location).read(item)
        tar, offset, size = item.where
        return open_ranges(tar)(offset, size)

    def _tars(self) -> list[str]:
        """Return the paths or URLs of the tars to read."""
        if self.location.endswith(".tar"):
            return [self.location]
        if not is_url(self.location) and not Path(self.location).exists():
            raise UsageError(f"{self.location}: no such folder, tar or zip")
        if self.location.endswith(".zip") or Path(self.location).is_file():
            return []
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
        for name, shown in zip(tars, short_names(tars), strict=True):
            tar = plain_tar(name, listing)
            for member, offset, size, file in tar_members(tar, listing):
                if member.endswith(".tar"):
                    inner = open_members(Window(file, offset, size), f"{tar}: {member}", listing)
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
    return PurePosixPath(name).suffix.lower() in picture_suffixes()


def _item(wnid: str, member: str, tar: str, offset: int, size: int) -> Item:
    """Return a picture under the key that it has in class folders, so that both forms build the same data set."""
    return Item(f"{wnid}/{PurePosixPath(member).name}", (wnid,), (tar, offset, size))
