"""Arrays as columns of MDS and litdata hold them: their type and shape, stated by the column or before the values."""

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.imaging import BadImage

_NUMBERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64")
MDS_KINDS = {
    8: "uint8",
    9: "int8",
    16: "uint16",
    17: "int16",
    18: "float16",
    32: "uint32",
    33: "int32",
    34: "float32",
    64: "uint64",
    65: "int64",
    66: "float64",
}
"""Types of values by the byte that MDS writes."""
NUMPY_KINDS = dict(enumerate(_NUMBERS)) | {13: "bool"}
"""Types by the number that litdata writes of a numpy array."""
TENSOR_KINDS = {
    **dict.fromkeys((0, 1), "float32"),
    **dict.fromkeys((2, 3), "float64"),
    **dict.fromkeys((8, 9), "float16"),
    11: "uint8",
    12: "int8",
    **dict.fromkeys((13, 14), "int16"),
    **dict.fromkeys((15, 16), "int32"),
    **dict.fromkeys((17, 18), "int64"),
    19: "bool",
    20: "uint16",
}
"""Types by the number that litdata writes of a tensor."""
ARRAYS = ("ndarray", "numpy", "tensor")
"""Encodings of columns of arrays: of MDS, and two of litdata."""


def read_array(data: bytes, encoding: str) -> tuple[NDArray[Any], str]:
    """Return the array that a column's bytes hold, and how an image lies in it: HW, HWC or CHW.

    Of MDS the encoding may state the type and the shape: `ndarray:uint8:32,32,3`. Raises BadImage.
    """
    name, _, stated = encoding.partition(":")
    try:
        kind, shape, start = _mds(data, stated) if name == "ndarray" else _litdata(data, name)
    except (IndexError, KeyError, ValueError, TypeError):
        raise BadImage("an array of no known type") from None
    size = prod(shape) * np.dtype(kind).itemsize
    if size != len(data) - start or not size:
        raise BadImage("an array that is cut off")
    form = form_of(shape)
    if form is None:
        raise BadImage("an array that is no image (H, W, C)")
    return np.frombuffer(data, kind, offset=start).reshape(shape), form


def form_of(shape: tuple[int, ...]) -> str | None:
    """Return how an image lies in an array of its own, or None if it holds no image."""
    if len(shape) == 2:
        return "HW"
    if len(shape) != 3:
        return None
    return "HWC" if shape[2] in (1, 3, 4) else "CHW" if shape[0] in (1, 3, 4) else None


def _mds(data: bytes, stated: str) -> tuple[str, tuple[int, ...], int]:
    """Return the type, the shape, and where the values begin."""
    kind, _, sides = stated.partition(":")
    start = 0
    if not kind:
        kind, start = MDS_KINDS[data[0]], 1
    elif kind not in MDS_KINDS.values():
        raise ValueError(kind)
    if sides:
        return kind, tuple(map(int, sides.split(","))), start
    count, width = data[start] >> 2, 1 << (data[start] & 3)
    end = start + 1 + count * width
    shape = np.frombuffer(data[start + 1 : end], f"<u{width}")
    if len(shape) != count:
        raise ValueError("cut off")
    return kind, tuple(shape.tolist()), end


def _litdata(data: bytes, name: str) -> tuple[str, tuple[int, ...], int]:
    """Return the type, the shape, and where the values begin.

    Newer versions write the numbers before the values of a tensor in big-endian order. The number of dimensions, which
    is small, tells which it is.
    """
    order = "<" if name == "numpy" or data[4:5] != b"\0" else ">"
    number, count = np.frombuffer(data[:8], f"{order}u4").tolist()
    kind = (NUMPY_KINDS if name == "numpy" else TENSOR_KINDS)[number]
    shape = np.frombuffer(data[8 : 8 + 4 * min(count, 64)], f"{order}u4")
    if len(shape) != count:
        raise ValueError("cut off")
    return kind, tuple(shape.tolist()), 8 + 4 * count
