"""Columns of labels: made of the values in one tar, joined over many, with the narrowest type that holds all."""

from collections import Counter
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.dataset import LabelType
from pipeline.data.index.sidecar import LabelColumn, Texts
from pipeline.data.sources.interface import infer_type

MOST_LABELS = 256
"""Labels that are kept, those that the most images have: JSON of others may have a name of its own in every image."""

_NUMBERS: dict[LabelType, type] = {"bool": np.bool_, "int": np.int64, "float": np.float64}


@dataclass(frozen=True)
class TypedColumn:
    """A label's column with its type."""

    kind: LabelType
    column: LabelColumn


Labels = dict[str, TypedColumn]


def label_columns(rows: list[dict[str, Any]]) -> Labels:
    """Return the columns of some images' labels, each the image's values by name."""
    names = list(dict.fromkeys(chain.from_iterable(rows)))
    if len(names) > MOST_LABELS:
        names = [name for name, _ in Counter(chain.from_iterable(rows)).most_common(MOST_LABELS)]
    return {name: _column([row.get(name) for row in rows]) for name in names}


def join_labels(parts: list[tuple[int, Labels]]) -> Labels:
    """Return the columns of several sets of images, each (number of images, columns), one after another."""
    counts: Counter[str] = Counter()
    for images, labels in parts:
        for name, typed in labels.items():
            counts[name] += images - _gaps(typed.column)
    return {
        name: _join([(images, labels.get(name)) for images, labels in parts])
        for name, _ in counts.most_common(MOST_LABELS)
    }


def _column(values: list[Any]) -> TypedColumn:
    """Return the column of some values, None where there is none."""
    kind = infer_type(values)
    gaps = np.array([value is None for value in values], np.bool_) if None in values else None
    if kind != "str":
        try:
            numbers: NDArray[Any] = np.array(
                values if gaps is None else [value or 0 for value in values], _NUMBERS[kind]
            )
            return TypedColumn(kind, LabelColumn(numbers, gaps))
        except OverflowError:  # integers beyond 64 bits
            kind = "str"
    texts = [b"" if value is None else _utf8(str(value)) for value in values]
    return TypedColumn(kind, LabelColumn(Texts.of(texts), gaps))


def _join(parts: list[tuple[int, TypedColumn | None]]) -> TypedColumn:
    kinds = {typed.kind for _, typed in parts if typed is not None}
    kind: LabelType = "bool"
    for wider in ("int", "float", "str"):
        if wider in kinds:
            kind = wider
    missing = np.concatenate([_missing(images, typed) for images, typed in parts])
    gaps = missing if missing.any() else None
    if kind == "str":
        return TypedColumn(kind, LabelColumn(Texts.join([_as_texts(images, typed) for images, typed in parts]), gaps))
    numbers = [_as_numbers(images, typed, kind) for images, typed in parts]
    return TypedColumn(kind, LabelColumn(np.concatenate(numbers), gaps))


def _missing(images: int, typed: TypedColumn | None) -> NDArray[np.bool_]:
    if typed is None:
        return np.ones(images, np.bool_)
    return np.zeros(images, np.bool_) if typed.column.missing is None else typed.column.missing


def _gaps(column: LabelColumn) -> int:
    return 0 if column.missing is None else int(column.missing.sum())


def _as_texts(images: int, typed: TypedColumn | None) -> Texts:
    if typed is None:
        return Texts(np.zeros(0, np.uint8), np.zeros(images, np.int64))
    if isinstance(typed.column.values, Texts):
        return typed.column.values
    return Texts.of([_utf8(str(value)) for value in typed.column.values.tolist()])


def _as_numbers(images: int, typed: TypedColumn | None, kind: LabelType) -> NDArray[Any]:
    if typed is None:
        return np.zeros(images, _NUMBERS[kind])
    assert not isinstance(typed.column.values, Texts)
    return typed.column.values.astype(_NUMBERS[kind])


def _utf8(text: str) -> bytes:
    """Return a text as UTF-8; halves of surrogate pairs, which JSON can hold, become escapes."""
    return text.encode("utf-8", "backslashreplace")
