"""Labels from a CSV, JSON lines or parquet: typed columns, matched to pictures by path, name or stem."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from pipeline.common.errors import DataError, UnavailableError, first_line
from pipeline.common.storage import Store
from pipeline.data.dataset import LabelType
from pipeline.data.sources.interface import as_type, infer_type

FILE_COLUMNS = ("file_name", "image", "file", "path")
"""Columns that name the picture; a CSV without the first of them does so in its first column."""
_TRUE_FALSE = {"true": True, "false": False}


def read_table(location: str) -> "LabelTable":
    """Read a table of labels from a path or URL; see `parse_table`. Raises DataError."""
    folder, _, name = location.rpartition("/")
    data = Store(folder or ".").read(name) if folder or os.path.exists(location) else None
    if data is None:
        raise DataError(f"--labels {location}: no such file")
    return parse_table(data, name, f"--labels {location}")


def parse_table(data: bytes, name: str, shown: str) -> "LabelTable":
    """Return the table in a file, by its suffix: JSON lines, parquet, or else a CSV. `shown` begins messages.

    JSON lines and parquet name the pictures in the column `file_name` (or `image`, `file`, `path`); of a CSV without
    such a column, in the first. Raises DataError.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _from_json(data, shown)
    if suffix == ".parquet":
        return _from_parquet(data, shown)
    return _from_csv(data, shown)


def parse_stylegan(data: bytes, shown: str) -> "LabelTable | None":
    """Return the labels that StyleGAN's dataset_tool writes, {"labels": [["00000/img00000000.png", 6], …]} or null.

    None if it is another JSON file. Labels that are lists of numbers are passed over by name.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or "labels" not in content:
        return None
    rows = content["labels"] if content["labels"] is not None else []
    if not isinstance(rows, list):
        return None
    for number, row in enumerate(rows, 1):
        if not (isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) and PurePosixPath(row[0]).name):
            raise DataError(f"{shown}: label {number} is no [file name, label]")
    return _from_columns({"file_name": [name for name, _ in rows], "label": [label for _, label in rows]}, shown, {})


def _from_csv(data: bytes, shown: str) -> "LabelTable":
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{shown}: not a CSV file in UTF-8: {error}") from None
    rows = [row for row in rows if row]
    if len(rows) < 2 or len(rows[0]) < 2:
        raise DataError(f"{shown}: expected a header and rows, file names in the first column")
    names = [column.strip() for column in rows[0]]
    at = next((names.index(column) for column in FILE_COLUMNS[:1] if column in names), 0)
    for number, row in enumerate(rows, 1):
        if len(row) != len(names):
            raise DataError(f"{shown}: row {number} has {len(row)} columns, the header has {len(names)}")
        if number > 1 and not PurePosixPath(row[at]).name:
            column = "first column" if at == 0 else f"column {names[at]}"
            raise DataError(f"{shown}: row {number} names no file ({row[at]!r}) in its {column}")
    if twice := [name for name, count in Counter(names[:at] + names[at + 1 :]).items() if count > 1]:
        raise DataError(f"{shown}: the header names the column {twice[0]!r} more than once; rename one")
    columns = {
        name: type_column([row[position] for row in rows[1:]]) for position, name in enumerate(names) if position != at
    }
    return LabelTable([row[at] for row in rows[1:]], columns, shown)


def _from_json(data: bytes, shown: str) -> "LabelTable":
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{shown}: line {number} is not JSON ({first_line(error)}); expected an object a line"
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{shown}: line {number} is no object; expected one a line, with a file_name")
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return _from_columns({name: [row.get(name) for row in rows] for name in names}, shown)


def _from_parquet(data: bytes, shown: str) -> "LabelTable":
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UnavailableError(f"{shown}: parquet needs pyarrow: pip install 'dcgan-pipeline[parquet]'") from None
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{shown}: not a parquet file: {first_line(error)}") from None
    return _from_columns(table.to_pydict(), shown)


def _from_columns(columns: dict[str, list[Any]], shown: str, when_empty: dict[str, Any] | None = None) -> "LabelTable":
    """Return the table of columns of Python values; those with lists or objects are passed over by name."""
    if when_empty is not None and not any(columns.values()):
        return LabelTable([], when_empty, shown)
    found = next((name for name in FILE_COLUMNS if name in columns), None)
    if found is None or not columns[found]:
        raise DataError(f"{shown}: no rows with a column file_name; it has {', '.join(columns) or 'nothing'}")
    files: list[str] = []
    for number, value in enumerate(columns[found], 1):
        file = value.get("path") if isinstance(value, dict) else value
        if not isinstance(file, str) or not PurePosixPath(file).name:
            raise DataError(f"{shown}: row {number} names no file ({file!r}) in its column {found}")
        files.append(file)
    typed: dict[str, tuple[LabelType, list[Any]]] = {}
    passed = []
    for name, values in columns.items():
        if name == found:
            continue
        if all(value is None or (isinstance(value, bool | int | float | str) and _fits(value)) for value in values):
            kind = infer_type(values)
            typed[name] = kind, [as_type(value, kind) for value in values]
        else:
            passed.append(name)
    table = LabelTable(files, typed, shown)
    if passed:
        table.notes.append(f"{shown}: the columns {', '.join(passed)} hold no single values and were passed over")
    return table


def _fits(value: Any) -> bool:
    """Whether an array can hold a value, and a file its text."""
    if isinstance(value, str):
        return not any("\ud800" <= char <= "\udfff" for char in value)
    return isinstance(value, float) or abs(value) < 1 << 63


def merged_types(tables: list[dict[str, LabelType]]) -> dict[str, LabelType]:
    """Return the columns of several tables, each of the narrowest type that holds its values in all of them."""
    order: list[LabelType] = ["bool", "int", "float", "str"]
    merged: dict[str, LabelType] = {}
    for types in tables:
        for name, kind in types.items():
            before = merged.get(name, kind)
            merged[name] = (
                kind if kind == before else "str" if "str" in (kind, before) else max(kind, before, key=order.index)
            )
    return merged


class LabelTable:
    """Rows of labels by file name."""

    def __init__(self, files: list[str], columns: dict[str, tuple[LabelType, list[Any]]], shown: str) -> None:
        self.types: dict[str, LabelType] = {name: kind for name, (kind, _) in columns.items()}
        self.notes: list[str] = []
        """What was passed over, one line each."""
        self._rows: dict[str, tuple[Any, ...]] = {}
        values = [column for _, column in columns.values()]
        for file, *labels in zip(files, *values, strict=True):
            if self._rows.setdefault(file, tuple(labels)) != tuple(labels):
                raise DataError(f"{shown}: {file} appears twice, with different labels")
        stems = (str(PurePosixPath(name).with_suffix("")) for name in self._rows)
        self._stems = dict(zip(stems, self._rows.values(), strict=True))

    def exact(self, path: str) -> tuple[Any, ...] | None:
        """Return the labels of a picture by its path, as the table writes it."""
        return self._rows.get(path, self._rows.get(f"./{path}"))

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
