"""The sources `parquet` and `huggingface`: a picture a row, the other columns its labels."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pipeline.common.errors import DataError
from pipeline.common.imaging import BadImage
from pipeline.common.storage import Store, is_url
from pipeline.data.sources.interface import KEY, Item, Listing
from pipeline.data.sources.tables.columns import Label, find_labels, find_pictures
from pipeline.data.sources.tables.files import Table, faults, is_parquet, mapped, open_table, pyarrow, read_columns
from pipeline.data.sources.tables.gather import Row, copied_name, gather, picture_arrays
from pipeline.data.sources.tables.layout import find_tables, hub_location, joined, select
from pipeline.data.specification import short_names

READERS = 16
"""Files whose beginnings and labels are read at the same time."""


@dataclass(frozen=True)
class Parquet:
    """Parquet and arrow files: one, a folder of them and of its folders, or a glob.

    The pictures are bytes, Hugging Face's {bytes, path}, or paths beside the file; `column` names theirs. Columns of
    single values are labels: of a ClassLabel its names.
    """

    location: str
    column: str | None = None
    copied: str = ""
    """The folder that `gathered` has copied pictures into."""

    def listing(self) -> Listing:
        """Return a picture for each row. Raises UserError for files that are missing, damaged, or have no pictures."""
        listing = Listing({})
        split_of = self._files(listing)
        files = list(split_of)
        with ThreadPoolExecutor(READERS if any(map(is_url, files)) else 1) as pool:
            tables = list(pool.map(open_table, files))
            pictures, notes = find_pictures(tables, self.column, self.location)
            listing.notes += notes
            labels, passed = find_labels(tables, pictures)
            if passed:
                words = f"the columns {', '.join(passed)} were passed over: they hold no single values"
                listing.notes.append(words + (f", or take the name {KEY!r} of ours" if KEY in passed else ""))
            if len(set(split_of.values())) > 1 and "split" not in labels:
                listing.labels["split"] = "str"
            listing.labels |= {name: label.kind for name, label in labels.items()}
        for table, shown in zip(tables, short_names(files), strict=True):
            first = (split_of[table.path],) if "split" in listing.labels and "split" not in labels else ()
            listing.items.extend(
                Item(f"{shown}/{number:07d}", first + values, Row(table.path, piece, row, size, pictures))
                for number, (values, piece, row, size) in enumerate(_rows(table, labels))
            )
        if not listing.items:
            raise DataError(f"{self.location}: its tables hold no rows")
        listing.files = [file for file in files if not is_url(file)]
        return listing

    def _files(self, listing: Listing) -> dict[str, str]:
        """Return the split of each file by its path or URL. Notes go to `listing`."""
        root, paths = find_tables(self.location)
        return {joined(root, path): "all" for path in paths}

    @contextmanager
    def gathered(self, items: Iterator[Item], workers: int) -> Iterator["Parquet"]:
        """Yield this source with the pictures of `items` copied to where they are read one by one.

        A row group can only be unpacked from its beginning. So each that holds some of the pictures is read once, and
        these go to a temporary folder in $TMPDIR. Arrow files on a disk need no copy.
        """
        with gather((item.where for item in items), workers) as folder:
            yield replace(self, copied=folder)

    def read(self, item: Item) -> bytes:
        """Return the encoded picture of a row."""
        row: Row = item.where
        data, path = self._values(row)
        if data:
            return data
        if not path:
            raise BadImage("no picture in its row")
        folder = row.file.rpartition("/")[0]
        store = Store(folder or ".")
        try:
            return store.read(store.inside(path))
        except DataError:
            raise BadImage("a path to no file beside its table") from None

    def _values(self, row: Row) -> tuple[bytes | None, str | None]:
        """Return the bytes and the path that a row holds."""
        pa = pyarrow(row.file)
        try:
            if self.copied and (is_url(row.file) or is_parquet(row.file)):
                table = mapped(f"{self.copied}/{copied_name(row.file, row.piece)}")
                if row.row >= table.num_rows:
                    raise BadImage("damaged parquet or arrow file")
                data, path = table.column(0), table.column(1)
            elif is_parquet(row.file) or is_url(row.file):
                raise AssertionError("pictures of row groups are gathered before they are read")
            else:
                data, path = picture_arrays(pa, mapped(row.file), row.pictures)
            return data[row.row].as_py(), path[row.row].as_py()
        except faults(pa) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise BadImage("damaged parquet or arrow file") from None


@dataclass(frozen=True)
class HuggingFace(Parquet):
    """A data set of Hugging Face: a repository of the Hub by name, a copy of one, or what `save_to_disk` wrote.

    `config` and `split` choose among its files. Without `split` it is `train`, where there is one.
    """

    config: str | None = None
    split: str | None = None

    def _files(self, listing: Listing) -> dict[str, str]:
        location = hub_location(self.location)
        try:
            root, paths = find_tables(location)
        except DataError as error:
            if not location.startswith("hf://"):
                raise
            raise DataError(
                f"{error}. Pictures, zips and tars of the Hub: dcgan-data build folder {location}; "
                f"what the Hub has made a parquet of: {location}@~parquet"
            ) from None
        chosen, note = select(self.location, paths, self.config, self.split)
        if note:
            listing.notes.append(note)
        return {joined(root, path): split for path, split in chosen.items()}


def _rows(table: Table, labels: dict[str, Label]) -> Iterator[tuple[tuple[Any, ...], int, int, int]]:
    """Yield the labels, the piece, the row in it and its bytes of every row."""
    places = ((number, row, piece.bytes) for number, piece in enumerate(table.pieces) for row in range(piece.rows))
    present = [name for name in labels if name in table.schema.names]
    if not present:
        yield from (((None,) * len(labels), *place) for place in places)
        return
    for columns in read_columns(table.path, present):
        rows = len(columns[present[0]])
        values = [
            list(map(label.convert, columns[name])) if name in columns else [None] * rows
            for name, label in labels.items()
        ]
        for row in zip(*values, strict=True):
            if (place := next(places, None)) is None:
                raise DataError(f"{table.path}: damaged: its row groups hold more rows than it states")
            yield (row, *place)
    if next(places, None) is not None:
        raise DataError(f"{table.path}: damaged: its row groups hold fewer rows than it states")
