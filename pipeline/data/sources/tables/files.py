"""Files of tables, read piece by piece: parquet by its row groups, arrow streams and files as one piece each."""

import functools
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.common.errors import DataError, UnavailableError, UsageError, first_line
from pipeline.common.storage import locate
from pipeline.data.sources.archives.files import PIECE, RangeFile

SUFFIXES = (".parquet", ".arrow", ".feather")
BATCH_ROWS = 64
"""Pictures of a parquet that are unpacked at once; a row group may hold gigabytes of them."""


class Piece(NamedTuple):
    """A row group, or all of an arrow file."""

    rows: int
    bytes: int
    """What it takes when it is unpacked, as the file states; of an arrow file, its size."""


class Table(NamedTuple):
    """What a file says of itself."""

    path: str
    schema: Any
    """The pyarrow.Schema."""
    features: dict[str, Any]
    """Of each column, what Hugging Face calls its feature, if the file says that."""
    pieces: list[Piece]


def pyarrow(shown: str) -> Any:
    """Return the module. Raises UnavailableError where it is not installed."""
    try:
        import pyarrow as pa
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UnavailableError(f"{shown}: needs pyarrow: pip install 'dcgan-pipeline[parquet]'") from None
    return pa


def broken(path: str, error: Exception) -> DataError:
    """Return what to raise for an error of pyarrow. Raises `error` itself if it is of the disk or the store."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return DataError(f"{path}: not a sound parquet or arrow file: {first_line(error)[:200]}")


def faults(pa: Any) -> tuple[type[Exception], ...]:
    """Return what pyarrow raises for files that are damaged."""
    return (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError)


def open_table(path: str) -> Table:
    """Return what a file says of itself. Raises DataError."""
    pa = pyarrow(path)
    try:
        if not is_parquet(path):
            reader, size = _arrow(pa, path)
            schema, rows = _named(reader.schema), sum(batch.num_rows for batch in _batches(reader))
            return Table(path, schema, _features(schema), [Piece(rows, size)])
        file = _parquet(pa, path)
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        pieces = [Piece(group.num_rows, group.total_byte_size) for group in groups]
        return Table(path, _named(file.schema_arrow), _features(file.schema_arrow), pieces)
    except faults(pa) as error:
        raise broken(path, error) from None


def read_piece(path: str, number: int, columns: list[str]) -> Iterator[Any]:
    """Yield the pyarrow.RecordBatches of a piece of a file, with `columns` only. Raises what pyarrow raises."""
    pa = pyarrow(path)
    if is_parquet(path):
        yield from _parquet(pa, path).iter_batches(BATCH_ROWS, row_groups=[number], columns=columns)
    else:
        yield from (batch.select(columns) for batch in _batches(_arrow(pa, path)[0]))


def read_columns(path: str, columns: list[str]) -> Iterator[dict[str, list[Any]]]:
    """Yield some columns of a file as Python values, some thousand rows at once. Raises DataError."""
    pa = pyarrow(path)
    try:
        if is_parquet(path):
            batches = _parquet(pa, path).iter_batches(8192, columns=columns)
        else:
            batches = (batch.select(columns) for batch in _batches(_arrow(pa, path)[0]))
        for batch in batches:
            yield batch.to_pydict()
    except faults(pa) as error:
        raise broken(path, error) from None


@functools.lru_cache(maxsize=256)
def mapped(path: str) -> Any:
    """Return all of a local arrow file as a pyarrow.Table in mapped memory: only what is looked at is read."""
    pa = pyarrow(path)
    return pa.Table.from_batches(list(_batches(reader := _arrow(pa, path)[0])), reader.schema)


def is_parquet(path: str) -> bool:
    """Whether a file is a parquet rather than an arrow file, by its name."""
    return path.partition("?")[0].lower().endswith(".parquet")


def _parquet(pa: Any, path: str) -> Any:
    return pa.parquet.ParquetFile(_open(pa, path)[0], buffer_size=PIECE, pre_buffer=False)


def _arrow(pa: Any, path: str) -> tuple[Any, int]:
    """Return the reader of an arrow stream or file, and the file's bytes."""
    file, size = _open(pa, path)
    start = file.read(6)
    file.seek(0)
    return (pa.ipc.open_file(file) if start == b"ARROW1" else pa.ipc.open_stream(file)), size


def _batches(reader: Any) -> Iterator[Any]:
    """Yield the batches of an arrow stream or file, checked: offsets of a damaged one lead anywhere in memory."""
    file = hasattr(reader, "num_record_batches")
    for batch in map(reader.get_batch, range(reader.num_record_batches)) if file else reader:
        batch.validate(full=True)
        yield batch


def _open(pa: Any, path: str) -> tuple[Any, int]:
    """Return a file as pyarrow reads it, and its bytes."""
    store, name = locate(path)
    if not store.remote:
        if not Path(path).is_file():
            raise UsageError(f"{path}: no such file; expected a parquet or arrow file")
        size = Path(path).stat().st_size
        if size < 8:
            raise DataError(f"{path}: {size} bytes, which is no parquet or arrow file")
        return (pa.OSFile(path) if is_parquet(path) else pa.memory_map(path)), size
    facts = store.facts(name)
    if not facts.ranges or facts.bytes is None:
        raise DataError(f"{path}: its server sends whole files only, and tables are read by pieces; download it first")
    return pa.PythonFile(io.BufferedReader(RangeFile(store, name, facts.bytes), PIECE), "r"), facts.bytes


def _named(schema: Any) -> Any:
    """Return a schema whose names are texts; those of a damaged one raise UnicodeDecodeError."""
    list(schema.names)
    return schema


def _features(schema: Any) -> dict[str, Any]:
    """Return the features that Hugging Face's `datasets` writes into the metadata of a schema."""
    try:
        content = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except (ValueError, RecursionError):
        return {}
    info = content.get("info") if isinstance(content, dict) else None
    features = info.get("features") if isinstance(info, dict) else None
    return features if isinstance(features, dict) else {}
