"""CelebA: the aligned faces with their forty attributes and official split, from the authors or from Kaggle."""

import csv
import io
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline.common.errors import DataError, UsageError
from pipeline.common.pictures.formats import picture_suffixes
from pipeline.common.storage import locate
from pipeline.data.sources.archives.members import is_archive
from pipeline.data.sources.interface import Item, Listing
from pipeline.data.sources.places import Place, find_files, read_place

SPLITS = ("train", "val", "test")
ATTRIBUTES = ("list_attr_celeba.txt", "list_attr_celeba.csv")
PARTITION = ("list_eval_partition.txt", "list_eval_partition.csv")
IMAGES = "img_align_celeba"


@dataclass(frozen=True)
class CelebA:
    """A folder or archive with img_align_celeba and its lists list_attr_celeba and (for `split`) list_eval_partition.

    They lie anywhere in it, as in the authors' drive and in Kaggle's archive; the pictures may be img_align_celeba.zip.
    With that as SRC, the lists lie beside it.
    """

    location: str
    split: str | None = None

    def listing(self) -> Listing:
        """Return the pictures with their attributes as true and false, in lower case: `male`, `eyeglasses` …"""
        listing = Listing({})
        files = dict(find_files(self.location, listing))
        names, attributes = self._table(files, ATTRIBUTES)
        chosen = self._chosen(files)
        inside = [path for path in files if IMAGES in path.split("/")[:-1]]
        without = 0
        listing.labels = {name.lower(): "bool" for name in names}
        for path in sorted(
            path for path in inside or files if PurePosixPath(path).suffix.lower() in picture_suffixes()
        ):
            # The key is the picture's own number, whichever archive it comes from.
            key, stem = PurePosixPath(path).name, PurePosixPath(path).stem
            if chosen is not None and stem not in chosen:
                continue
            if (values := attributes.get(stem)) is None:
                without += 1
                listing.refused.add(key, "no row in list_attr_celeba")
                continue
            place = files[path]
            where = path if isinstance(place, int) else place
            listing.items.append(Item(key, tuple(value == "1" for value in values), where))
        if not listing.items:
            raise DataError(f"{self.location}: no picture of {IMAGES} has a row in list_attr_celeba")
        missing = (len(attributes) if chosen is None else len(chosen)) - len(listing.items) - without
        if missing > 0:
            listing.notes.append(f"{missing:,} pictures that the lists name are not in {self.location}")
        return listing

    def _chosen(self, files: dict[str, Place]) -> set[str] | None:
        if self.split is None:
            return None
        if self.split not in SPLITS:
            raise UsageError(f"--split {self.split}: CelebA has {', '.join(SPLITS)}")
        _, rows = self._table(files, PARTITION)
        return {name for name, (part, *_) in rows.items() if part == str(SPLITS.index(self.split))}

    def read(self, item: Item) -> bytes:
        """Return the JPEG."""
        where: Place = item.where
        return read_place(self.location, item.key, where)

    def _table(self, files: dict[str, Place], names: tuple[str, ...]) -> tuple[list[str], dict[str, list[str]]]:
        """Return a list in either of its forms, from among `files` or beside an archive. Raises DataError."""
        found = {PurePosixPath(path).name: path for path in sorted(files, reverse=True)}
        if name := next((name for name in names if name in found), None):
            path = found[name]
            return _parse(read_place(self.location, path, files[path]), f"{self.location}/{path}")
        if is_archive(self.location):
            store, _ = locate(self.location)
            if name := next((name for name in names if store.exists(name)), None):
                return _parse(store.read(name), store.path(name))
        raise DataError(
            f"{self.location}: neither {names[0]} nor {names[1]} is in it, nor beside an archive; CelebA comes with one"
        )


def _parse(data: bytes, shown: str) -> tuple[list[str], dict[str, list[str]]]:
    """Return the columns and the rows by the picture's stem, from either form of a list. Raises DataError."""
    is_csv = shown.endswith(".csv")
    try:
        text = data.decode("utf-8-sig")
        lines = list(csv.reader(io.StringIO(text))) if is_csv else [line.split() for line in text.splitlines()]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{shown}: not a list in UTF-8: {error}") from None
    lines = [line for line in lines if line]
    if not lines:
        raise DataError(f"{shown}: empty; expected a row for each picture")
    if is_csv:
        columns, rows = lines[0][1:], lines[1:]
    else:
        has_header = len(lines) > 1 and len(lines[0]) == 1  # a count, then the names
        columns, rows = (lines[1], lines[2:]) if has_header else (["partition"], lines)
    for number, row in enumerate(rows, 1):
        if len(row) != len(columns) + 1:
            raise DataError(f"{shown}: row {number} has {len(row) - 1} values for {len(columns)} columns")
    return columns, {PurePosixPath(row[0]).stem: row[1:] for row in rows}
