"""Image folders and archives of images, nested or flat. The first folder of a path is the class."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pipeline.common.errors import DataError
from pipeline.data.dataset import LabelType
from pipeline.data.sources.interface import KEY, Item, Items, Listing
from pipeline.data.sources.label_table import LabelTable, merged_types, parse_stylegan, parse_table, read_table
from pipeline.data.sources.places import File, Place, find_pictures, read_place, refuse_missing_formats

STYLEGAN = "dataset.json"
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet", STYLEGAN)
"""Labels beside pictures, as the imagefolder of Hugging Face has them, and StyleGAN's dataset_tool."""


@dataclass(frozen=True)
class Folder:
    """All pictures in a folder or an archive.

    Labels: `folders`, `none`, or a table (CSV, JSON lines, parquet). By default the folders, and the metadata files
    that lie beside the pictures.
    """

    location: str
    labels: str | None = None
    all_files: bool = False

    def listing(self) -> Listing:
        """Return the pictures in any order. Raises UserError for a missing or empty folder."""
        listing = Listing({})
        tables: list[File] = []
        files = self._pictures(listing, tables)
        if self.labels not in (None, "folders", "none"):
            self._with_table(listing, files)
        elif self.labels == "none":
            listing.items.extend(Item(path, (), where) for path, where in files)
        else:
            listing.labels = {"class": "str"}
            listing.items.extend(Item(path, (_class(path),), where) for path, where in files)
            if not any(item.labels[0] for item in listing.items):
                listing.labels = {}
                listing.items = Items(Item(item.key, (), item.where) for item in listing.items)
            if tables and self.labels is None:
                self._with_metadata(listing, tables)
        if not listing.items:
            refuse_missing_formats(self.location, listing)
            raise DataError(f"{self.location}: no images here; expected files such as .jpg, .png or .webp")
        listing.note_passed()
        return listing

    def _pictures(self, listing: Listing, tables: list[File]) -> Iterator[File]:
        """Yield the pictures, and put the tables of labels among the other files into `tables`."""
        return find_pictures(self.location, listing, all_files=self.all_files, others=tables.append, named=METADATA)

    def _with_metadata(self, listing: Listing, tables: list[File]) -> None:
        """Add the labels of metadata files, each of which names pictures in its folder and below."""
        found: dict[str, LabelTable] = {}
        read: list[str] = []
        for path, where in sorted(tables, key=lambda file: file[0]):
            folder, _, name = path.rpartition("/")
            data, shown = read_place(self.location, path, where), f"{self.location}/{path}"
            table = parse_stylegan(data, shown) if name == STYLEGAN else parse_table(data, name, shown)
            if table is None:
                listing.passed[".json"] += 1
                continue
            found[folder] = table
            read.append(path)
            listing.notes += table.notes
            if path == STYLEGAN:  # whose folders, 00000 and so on, mean nothing
                listing.labels.pop("class", None)
                listing.items = Items(Item(item.key, (), item.where) for item in listing.items)
        if not found:
            return
        types = merged_types([table.types for table in found.values()])
        if types.pop(KEY, None):
            listing.notes.append(f"the label {KEY!r} was skipped: `key` is the image's own name")
        first = [name for name in listing.labels if name not in types]
        rows: set[tuple[str, str]] = set()
        items = Items()
        for item in listing.items:
            values: dict[str, Any] = {}
            for above in map(str, reversed(PurePosixPath(item.key).parents)):  # the nearest table decides
                folder = "" if above == "." else above
                if (table := found.get(folder)) is None:
                    continue
                inside = item.key[len(folder) + 1 :] if folder else item.key
                if (row := table.exact(inside)) is not None:
                    values = dict(zip(table.types, row, strict=True))
                    rows.add((folder, inside))
            labels = [*item.labels[: len(first)], *(_cast(values.get(name), kind) for name, kind in types.items())]
            items.append(Item(item.key, tuple(labels), item.where))
        listing.items = items
        listing.labels = {**{name: listing.labels[name] for name in first}, **types}
        if not types:
            return
        names = ", ".join(read[:3])
        listing.notes.append(f"labels of {len(rows):,} pictures from {names}; --labels folders leaves them out")
        if unused := sum(map(len, found.values())) - len(rows):
            listing.notes.append(f"{unused:,} rows of {names} name no image here")

    def _with_table(self, listing: Listing, found: Iterator[File]) -> None:
        assert self.labels is not None
        if not (files := sorted(found, key=lambda file: file[0])):  # refusals are named in this order
            return
        table = read_table(self.labels)
        listing.labels = dict(table.types)
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
        listing.notes += table.notes
        if unused := len(table) - len(listing.items):
            listing.notes.append(f"{unused:,} rows of {self.labels} name no image here")

    def read(self, item: Item) -> bytes:
        """Return the file's bytes."""
        where: Place = item.where
        return read_place(self.location, item.key, where)


def _cast(value: Any, kind: LabelType) -> Any:
    return None if value is None else str(value) if kind == "str" else float(value) if kind == "float" else value


def _class(path: str) -> str | None:
    return path.partition("/")[0] if "/" in path else None
