"""Copies the wanted pictures of row groups into a temporary folder, from where they are read in any order."""

import hashlib
import tempfile
import threading
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.common.progress import Progress
from pipeline.common.storage import is_url
from pipeline.data.sources.tables.columns import Pictures
from pipeline.data.sources.tables.files import faults, is_parquet, pyarrow, read_piece


class Row(NamedTuple):
    """Where a picture is: in a row group of a parquet, or in an arrow file."""

    file: str
    piece: int
    row: int
    """Within the piece."""
    bytes: int
    """Of the piece, by which a file that changed is known."""
    pictures: Pictures


@contextmanager
def gather(rows: Iterable[Row], workers: int) -> Iterator[str]:
    """Yield a folder that holds the pictures of `rows`, one arrow file for each row group that has some of them.

    Row groups are read in parallel, each from its beginning and in little memory. One that is damaged is copied up to
    there. Local arrow files are left out. The folder is removed afterwards.
    """
    wanted: dict[tuple[str, int], array[int]] = {}
    pictures = None
    for row in rows:
        if is_parquet(row.file) or is_url(row.file):
            pictures = row.pictures
            wanted.setdefault((row.file, row.piece), array("q")).append(row.row)
    with tempfile.TemporaryDirectory(prefix="dcgan-table-") as folder:
        if pictures is not None:
            _copy_all(folder, wanted, pictures, workers)
        yield folder


def _copy_all(folder: str, wanted: "dict[tuple[str, int], array[int]]", pictures: Pictures, workers: int) -> None:
    stop = threading.Event()
    total = sum(map(len, wanted.values()))

    def copy(place: tuple[str, int]) -> int:
        _copy(Path(folder) / copied_name(*place), place, wanted[place], pictures, stop)
        return len(wanted[place])

    pool = ThreadPoolExecutor(workers)
    try:
        with Progress("reading tables", total, "pictures") as progress:
            for done in pool.map(copy, sorted(wanted)):
                progress.advance(done)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _copy(target: Path, place: tuple[str, int], rows: "array[int]", pictures: Pictures, stop: threading.Event) -> None:
    """Write the pictures of some rows of a row group; the other rows are there as well, and empty."""
    pa = pyarrow(place[0])
    chosen, done, last = set(rows), 0, max(rows)
    schema = pa.schema([("bytes", pa.large_binary()), ("path", pa.large_string())])
    with target.open("wb") as file, pa.ipc.new_stream(file, schema) as writer:
        try:
            for batch in read_piece(*place, pictures.leaves if is_parquet(place[0]) else [pictures.name]):
                if stop.is_set() or done > last:
                    return
                kept = [done + index in chosen for index in range(batch.num_rows)]
                columns = [
                    column.cast(field.type)
                    for column, field in zip(picture_arrays(pa, batch, pictures), schema, strict=True)
                ]
                if not all(kept):
                    columns = [
                        pa.compute.if_else(pa.array(kept), column, pa.scalar(None, column.type)) for column in columns
                    ]
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
                done += batch.num_rows
        except faults(pa) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk or the store
                error.filename = error.filename or tempfile.gettempdir()
                raise


def picture_arrays(pa: Any, table: Any, pictures: Pictures) -> tuple[Any, Any]:
    """Return the bytes and the paths of the pictures in a table or batch; nulls where it has none."""
    import pyarrow.compute

    column = table.column(pictures.name)

    def leaf(name: str | None, kind: Any) -> Any:
        if name is None:
            return pa.nulls(table.num_rows, kind)
        return column if name == pictures.name else pyarrow.compute.struct_field(column, name.rpartition(".")[2])

    return leaf(pictures.bytes, pa.binary()), leaf(pictures.path, pa.string())


def copied_name(file: str, piece: int) -> str:
    """Return the name of the copy of a row group."""
    return f"{hashlib.blake2b(f'{piece} {file}'.encode('utf-8', 'surrogateescape'), digest_size=16).hexdigest()}.arrow"
