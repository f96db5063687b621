"""Windows: which part of the values of 16-bit and floating-point pictures becomes the 256 grays of an image."""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILE = "file"
"""The window that the picture itself states, as DICOM does."""
_PERCENTILE = "percentile:"
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_PAIR = re.compile(rf"({_NUMBER}),({_NUMBER})")


def check_window(window: str) -> str:
    """Return a window: `LO,HI`, `percentile:LO,HI`, `file` or '' for none. Raises ValueError."""
    if window in ("", FILE):
        return window
    match = _PAIR.fullmatch(window.removeprefix(_PERCENTILE))
    if match is None or not float(match[1]) < float(match[2]):
        raise ValueError("expected LO,HI with LO < HI, percentile:1,99 or file")
    if window.startswith(_PERCENTILE) and not 0 <= float(match[1]) < float(match[2]) <= 100:
        raise ValueError("percentiles lie within 0 and 100")
    return window


def apply_window(values: NDArray[Any], window: str, stated: tuple[float, float] | None) -> NDArray[np.uint8]:
    """Return values of any shape as gray: the window's lower end and below is 0, its upper end and above 255.

    `stated` is the window that the picture states. Percentiles are those of the picture. Raises ValueError with the
    reason why there is no window, or no values.
    """
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("pixels that are no numbers")
    if window == FILE:
        if stated is None:
            raise ValueError("states no window")
        low, high = stated
    else:
        low, high = (float(number) for number in window.removeprefix(_PERCENTILE).split(","))
        if window.startswith(_PERCENTILE):
            low, high = (float(value) for value in np.percentile(values, [low, high]))
    if not low < high:
        raise ValueError("one gray only within the window")
    return (np.clip((values - low) / np.float32(high - low), 0, 1) * 255 + np.float32(0.5)).astype(np.uint8)
