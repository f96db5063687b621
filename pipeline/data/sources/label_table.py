"""Labels from a CSV file: typed columns, matched to pictures by path, name or stem."""

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from pipeline.common.errors import DataError
from pipeline.common.storage import Store
from pipeline.data.dataset import LabelType
from pipeline.data.sources.interface import as_type, infer_type

_TRUE_FALSE = {"true": True, "false": False}


def read_table(location: str) -> "LabelTable":
    """Read a CSV from a path or URL: a header, the file names in the first column. Raises DataError."""
    folder, _, name = location.rpartition("/")
    data = Store(folder or ".").read(name) if folder or os.path.exists(location) else None
    if data is None:
        raise DataError(f"--labels {location}: no such file")
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"--labels {location}: not a CSV file in UTF-8: {error}") from None
    rows = [row for row in rows if row]
    if len(rows) < 2 or len(rows[0]) < 2:
        raise DataError(f"--labels {location}: expected a header and rows, file names in the first column")
    width = len(rows[0])
    for number, row in enumerate(rows, 1):
        if len(row) != width:
            raise DataError(f"--labels {location}: row {number} has {len(row)} columns, the header has {width}")
        if number > 1 and not PurePosixPath(row[0]).name:
            raise DataError(f"--labels {location}: row {number} names no file ({row[0]!r}) in its first column")
    columns = [column.strip() for column in rows[0][1:]]
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise DataError(f"--labels {location}: the header names the column {twice[0]!r} more than once; rename one")
    return LabelTable(columns, rows[1:], location)


class LabelTable:
    """Rows of labels by file name."""

    def __init__(self, columns: list[str], rows: list[list[str]], location: str) -> None:
        self.location = location
        self.types: dict[str, LabelType] = {}
        self._rows: dict[str, tuple[Any, ...]] = {}
        typed = []
        for position, column in enumerate(columns, 1):
            self.types[column], values = type_column([row[position] for row in rows])
            typed.append(values)
        for row, labels in zip(rows, zip(*typed, strict=True), strict=True):
            if self._rows.setdefault(row[0], labels) != labels:
                raise DataError(f"{location}: {row[0]} appears twice, with different labels")
        stems = (str(PurePosixPath(name).with_suffix("")) for name in self._rows)
        self._stems = dict(zip(stems, self._rows.values(), strict=True))

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, path: str) -> tuple[Any, ...] | None:
        """Return the labels of a picture: by its path, else its file name, else either without the extension."""
        name = PurePosixPath(path)
        for table, key in (
            (self._rows, path),
            (self._rows, name.name),
            (self._stems, str(name.with_suffix(""))),
            (self._stems, name.stem),
        ):
            if key in table:
                return table[key]
        return None


def type_column(cells: Iterable[str]) -> tuple[LabelType, list[Any]]:
    """Return the narrowest type of a column of texts, and its values: 0/1 only is bool, an empty cell None."""
    values = [_parse(cell.strip()) for cell in cells]
    kind = infer_type(values)
    if kind == "str":
        return kind, [cell.strip() or None for cell in cells]
    if kind == "int" and {value for value in values if value is not None} <= {0, 1}:
        kind = "bool"
    return kind, [as_type(value, kind) for value in values]


def _parse(cell: str) -> Any:
    """Return a cell as None, bool, int, float or str. Numbers with leading zeros are names, not numbers."""
    if not cell:
        return None
    if cell.lower() in _TRUE_FALSE:
        return _TRUE_FALSE[cell.lower()]
    digits = cell.lstrip("+-")
    whole = digits.isdecimal() and digits.isascii() and (digits == "0" or not digits.startswith("0"))
    try:
        if whole and len(digits) <= 19 and abs(number := int(cell)) < 1 << 63:  # else it is larger than arrays hold
            return number
        value = float(cell)
    except ValueError:
        return cell
    return value if value - value == 0 and not digits.isdecimal() else cell
