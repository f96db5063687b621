"""FFHQ thumbnails: thumbnails128x128/01000/01000.png; the first 60,000 are the training set."""

from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline.common.errors import DataError, UsageError
from pipeline.data.sources.folder import Folder
from pipeline.data.sources.interface import Item, Items, Listing

TRAIN_IMAGES = 60_000


@dataclass(frozen=True)
class Ffhq:
    """The folder thumbnails128x128 (or images1024x1024, or one above). Split: train, val, or both if not given."""

    location: str
    split: str | None = None

    def listing(self) -> Listing:
        """Return the pictures. Their folders of a thousand are not classes."""
        if self.split not in (None, "train", "val"):
            raise UsageError(f"--split {self.split}: FFHQ has train, val")
        listing = Folder(self.location, "none").listing()
        unnumbered = [item.key for item in listing.items if not PurePosixPath(item.key).stem.isdecimal()]
        if unnumbered:
            raise DataError(f"{self.location}: {min(unnumbered)}: FFHQ's files are named by number, such as 01000.png")
        if self.split is not None:
            listing.items = Items(item for item in listing.items if _is_train(item) is (self.split == "train"))
        if not listing.items:
            raise DataError(f"{self.location}: has no picture of the split {self.split}")
        return listing

    def read(self, item: Item) -> bytes:
        """Return the PNG."""
        return Folder(self.location).read(item)


def _is_train(item: Item) -> bool:
    return int(PurePosixPath(item.key).stem) < TRAIN_IMAGES
