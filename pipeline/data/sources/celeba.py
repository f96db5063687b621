"""CelebA: the aligned faces with their forty attributes and official split, from the authors or from Kaggle."""

import csv
import io
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline.common.errors import DataError, UsageError
from pipeline.common.storage import Store
from pipeline.data.sources.folder import Folder, path_of, read_file
from pipeline.data.sources.interface import Item, Listing

SPLITS = ("train", "val", "test")
ATTRIBUTES = ("list_attr_celeba.txt", "list_attr_celeba.csv")
PARTITION = ("list_eval_partition.txt", "list_eval_partition.csv")
IMAGES = "img_align_celeba"
LIST_FOLDERS = ("", "Anno/", "Eval/")
"""Where the lists lie: beside the pictures, or as in the authors' drive, which has the pictures in Img/."""


@dataclass(frozen=True)
class CelebA:
    """A folder with img_align_celeba/, list_attr_celeba and (for `split`) list_eval_partition, or one with Img/, Anno/
    and Eval/ that hold these.
    """

    location: str
    split: str | None = None

    def listing(self) -> Listing:
        """Return the pictures with their attributes as true and false, in lower case: `male`, `eyeglasses` …"""
        store = Store(self.location)
        names, attributes = _table(store, ATTRIBUTES)
        chosen = self._chosen(store)
        here = store.names()
        prefix = f"Img/{IMAGES}" if "Img" in here and IMAGES not in here else IMAGES
        if IMAGES in store.names(prefix):  # Kaggle's archive holds the folder twice
            prefix = f"{prefix}/{IMAGES}"
        folder = f"{self.location}/{prefix}"
        listing = Listing({name.lower(): "bool" for name in names})
        without = 0
        for item in sorted(Folder(folder, "none").listing().items, key=lambda item: item.key):
            if chosen is not None and PurePosixPath(item.key).stem not in chosen:
                continue
            values = attributes.get(PurePosixPath(item.key).stem)
            if values is None:
                without += 1
                listing.refused.add(item.key, "no row in list_attr_celeba")
                continue
            # The key is the picture's own number, whichever archive it comes from.
            listing.items.append(Item(item.key, tuple(value == "1" for value in values), f"{prefix}/{path_of(item)}"))
        if not listing.items:
            raise DataError(f"{self.location}: no picture of {IMAGES} has a row in list_attr_celeba")
        missing = (len(attributes) if chosen is None else len(chosen)) - len(listing.items) - without
        if missing > 0:
            listing.notes.append(f"{missing:,} pictures that the lists name are not in {folder}")
        return listing

    def _chosen(self, store: Store) -> set[str] | None:
        if self.split is None:
            return None
        if self.split not in SPLITS:
            raise UsageError(f"--split {self.split}: CelebA has {', '.join(SPLITS)}")
        _, rows = _table(store, PARTITION)
        return {name for name, (part, *_) in rows.items() if part == str(SPLITS.index(self.split))}

    def read(self, item: Item) -> bytes:
        """Return the JPEG."""
        return read_file(self.location, item.where)


def _table(store: Store, files: tuple[str, ...]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the columns and the rows by the picture's stem, from either form of a list. Raises DataError."""
    places = [folder + file for folder in LIST_FOLDERS for file in files]
    name = next((place for place in places if store.exists(place)), None)
    if name is None:
        raise DataError(
            f"{store.location}: neither {files[0]} nor {files[1]} is here or in Anno or Eval; CelebA comes with one"
        )
    try:
        text = store.read(name).decode("utf-8-sig")
        is_csv = name.endswith(".csv")
        lines = list(csv.reader(io.StringIO(text))) if is_csv else [line.split() for line in text.splitlines()]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{store.path(name)}: not a list in UTF-8: {error}") from None
    lines = [line for line in lines if line]
    if not lines:
        raise DataError(f"{store.path(name)}: empty; expected a row for each picture")
    if is_csv:
        columns, rows = lines[0][1:], lines[1:]
    else:
        has_header = len(lines) > 1 and len(lines[0]) == 1  # a count, then the names
        columns, rows = (lines[1], lines[2:]) if has_header else (["partition"], lines)
    for number, row in enumerate(rows, 1):
        if len(row) != len(columns) + 1:
            raise DataError(f"{store.path(name)}: row {number} has {len(row) - 1} values for {len(columns)} columns")
    return columns, {PurePosixPath(row[0]).stem: row[1:] for row in rows}
