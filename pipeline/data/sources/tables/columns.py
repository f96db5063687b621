"""Which column of a table holds the pictures, which are labels, and what is passed over by name."""

from collections.abc import Callable
from typing import Any, NamedTuple

from pipeline.common.errors import DataError, UsageError
from pipeline.data.dataset import LabelType
from pipeline.data.sources.interface import KEY
from pipeline.data.sources.label_table import FILE_COLUMNS
from pipeline.data.sources.tables.files import Table, pyarrow

USUAL = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "bytes", "content")
"""Names of columns with pictures. Where several columns could be meant, the first of these is."""


class Pictures(NamedTuple):
    """The column of the pictures."""

    name: str
    bytes: str | None
    """What holds the encoded pictures: the column or a field of it. None where there are only paths."""
    path: str | None
    """What holds the paths of the pictures, beside the table."""

    @property
    def leaves(self) -> list[str]:
        """The columns and fields to read."""
        return [leaf for leaf in (self.bytes, self.path) if leaf is not None]


class Label(NamedTuple):
    """A column of labels."""

    kind: LabelType
    convert: Callable[[Any], Any]
    """Makes the label of a value."""


def find_pictures(tables: list[Table], wanted: str | None, shown: str) -> tuple[Pictures, list[str]]:
    """Return the column of pictures, which all tables have, and notes. Raises UsageError, DataError."""
    pa = pyarrow(shown)
    first = tables[0]
    found = {field.name: pictures for field in first.schema if (pictures := _pictures(pa, field)) is not None}
    if wanted is not None:
        if wanted not in found:
            known = ", ".join(found) or "none"
            raise UsageError(f"--column {wanted}: {first.path} has no such column of pictures; it has: {known}")
        chosen = wanted
    else:
        chosen = _choose(found, first, shown)
    for table in tables:
        if chosen not in table.schema.names or _pictures(pa, table.schema.field(chosen)) != found[chosen]:
            raise DataError(
                f"{table.path}: no column {chosen} like that of {first.path}; name the files of one data set"
            )
    others = [name for name in found if name != chosen and found[name].bytes is not None]
    notes = [f"pictures of the column {chosen}; --column takes another one: {', '.join(others)}"] if others else []
    return found[chosen], notes


def _choose(found: dict[str, Pictures], table: Table, shown: str) -> str:
    stated = [name for name in found if _is_feature(table.features.get(name), "Image")]
    fields = [name for name, pictures in found.items() if pictures.bytes not in (None, name)]
    plain = [name for name, pictures in found.items() if pictures.bytes == name]
    for names in (stated, fields, plain):
        if len(names) == 1:
            return names[0]
        if names:
            if usual := next((name for name in USUAL if name in names), None):
                return usual
            raise UsageError(f"{shown}: several columns of pictures ({', '.join(names)}); choose with --column")
    if paths := next((name for name in FILE_COLUMNS if name in found), None):
        return paths
    known = ", ".join(table.schema.names[:30]) or "nothing"
    addresses = [name for name in table.schema.names if "url" in name.lower()]
    advice = (
        f"; {addresses[0]} names pictures elsewhere: download them first, for example with img2dataset"
        if addresses
        else "; expected bytes of pictures, {bytes, path} as Hugging Face has it, or a column file_name"
    )
    raise DataError(f"{table.path}: no column of pictures among its columns ({known}){advice}")


def _pictures(pa: Any, field: Any) -> Pictures | None:
    """Return how a column holds pictures, or None if it cannot."""
    kind = field.type
    if _is_binary(pa, kind):
        return Pictures(field.name, field.name, None)
    if _is_text(pa, kind):
        return Pictures(field.name, None, field.name)
    if pa.types.is_struct(kind):
        inner = {kind.field(number).name: kind.field(number).type for number in range(kind.num_fields)}
        data = f"{field.name}.bytes" if _is_binary(pa, inner.get("bytes")) else None
        path = f"{field.name}.path" if _is_text(pa, inner.get("path")) else None
        return Pictures(field.name, data, path) if data else None
    return None


def find_labels(tables: list[Table], pictures: Pictures) -> tuple[dict[str, Label], list[str]]:
    """Return the labels by column, and the names of the columns that hold no single values."""
    pa = pyarrow(tables[0].path)
    labels: dict[str, Label] = {}
    passed: dict[str, None] = {}
    for table in tables:
        for field in table.schema:
            if field.name == pictures.name:
                continue
            label = _label(pa, field.type, table.features.get(field.name))
            if label is None or field.name == KEY:
                passed[field.name] = None
            elif field.name not in labels:
                labels[field.name] = label
            elif labels[field.name].kind != label.kind:
                raise DataError(
                    f"{table.path}: its column {field.name} holds values of the type {label.kind}, that of "
                    f"{tables[0].path} {labels[field.name].kind}; name the files of one data set"
                )
    return {name: label for name, label in labels.items() if name not in passed}, list(passed)


def _label(pa: Any, kind: Any, feature: Any) -> Label | None:
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_boolean(kind):
        return Label("bool", lambda value: value)
    if types.is_integer(kind):
        names = feature.get("names") if _is_feature(feature, "ClassLabel") else None
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return Label("str", lambda value: names[value] if value is not None and 0 <= value < len(names) else None)
        return Label("int", lambda value: value if value is not None and value < 1 << 63 else None)
    if types.is_floating(kind):
        return Label("float", lambda value: value if value is not None and value - value == 0 else None)
    return Label("str", lambda value: value) if _is_text(pa, kind) else None


def _is_feature(feature: Any, kind: str) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == kind


def _is_binary(pa: Any, kind: Any) -> bool:
    types = pa.types
    return kind is not None and (types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _is_text(pa: Any, kind: Any) -> bool:
    types = pa.types
    return kind is not None and (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))
