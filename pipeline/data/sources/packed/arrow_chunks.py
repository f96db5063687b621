"""Chunks of litdata whose samples are an Arrow table, as newer versions write bytes and single values with pyarrow.

Such a chunk has the usual header without samples, then an Arrow file, its size (uint32) and a mark.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.common.errors import DataError
from pipeline.data.sources.packed.places import Span
from pipeline.data.sources.tables.files import faults, pyarrow

MARK = b"LDARW01\0"
_TAIL = 12


def is_arrow(data: Any) -> bool:
    """Whether a chunk ends with an Arrow table."""
    return bytes(data[-len(MARK) :]) == MARK


def arrow_samples(
    where: str, file: str, data: Any, count: int, picture: str, labels: list[str]
) -> Iterator[tuple[tuple[Any, ...], Span]]:
    """Yield the labels of each sample, and where its picture lies in `file`, whose bytes `data` are.

    Raises DataError for a damaged table, and for one whose columns are compressed: pictures lie nowhere then.
    """
    pa = pyarrow(where)
    size = int.from_bytes(data[-_TAIL : -len(MARK)], "little")
    start = len(data) - _TAIL - size
    damaged = DataError(f"{where}: damaged, or cut off: its {count:,} samples do not lie in its {len(data):,} bytes")
    if start < 0 or not size:
        raise damaged
    table = pa.py_buffer(data[start : start + size])
    found = 0
    broken: tuple[type[Exception], ...] = (*faults(pa), KeyError, IndexError, ValueError)
    try:
        reader = pa.ipc.open_file(table)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            batch.validate(full=True)
            column = batch.column(picture)
            wide = pa.types.is_large_binary(column.type)
            if not (wide or pa.types.is_binary(column.type)):
                raise DataError(f"{where}: the column {picture} holds {column.type}, expected bytes")
            _, offsets, content = column.buffers()
            first = content.address - table.address if content is not None else 0
            if not 0 <= first <= size:
                raise DataError(f"{where}: a compressed Arrow table, which is not read; write it without compression")
            ends = np.frombuffer(offsets, "<i8" if wide else "<i4")[column.offset :][: len(column) + 1].tolist()
            rows = [batch.column(name).to_pylist() for name in labels]
            for row, begin in enumerate(ends[:-1]):
                values = (one[row] for one in rows)
                known = tuple(None if isinstance(value, float) and value - value != 0 else value for value in values)
                yield known, Span(file, start + first + begin, ends[row + 1] - begin)
            found += len(column)
    except broken as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise damaged from None
    if found != count:
        raise damaged
