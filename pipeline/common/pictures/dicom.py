"""DICOM files as pictures, read through pydicom. Only pixels and what they mean is looked at, nothing of a patient."""

import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

STATED = "dicom_window"
"""Where the `info` of a picture holds the window that its file states, as (low, high)."""
INVERTED = "dicom_inverted"
"""Where the `info` says that larger values are darker."""
HEADER_BYTES = 132
"""A preamble, and DICM."""
DEFLATED = "1.2.840.10008.1.2.1.99"
"""The transfer syntax that is compressed as a whole; it could unfold to any size before anything can be checked."""


COMPRESSED = "DICOM of a compression that pydicom alone does not read; pip install pylibjpeg"


class BadDicom(ValueError):
    """A DICOM file that gives no picture; the message is the reason."""


def open_dicom(data: bytes, most_pixels: int) -> Image.Image:
    """Return the first frame of a DICOM file: RGB, L where it has 8 bits, else F in the units that it states.

    Raises BadDicom, and whatever pydicom raises for damaged files.
    """
    file = _read(data, most_pixels)
    from pydicom.pixels.utils import pixel_array

    try:
        pixels: NDArray[Any] = pixel_array(file, index=0)
    except (RuntimeError, NotImplementedError):
        raise BadDicom(COMPRESSED) from None
    return _image(file, pixels)


def open_frames(data: bytes, most_pixels: int) -> Iterator[Image.Image]:
    """Yield all frames of a DICOM file that holds more than one, as `open_dicom` returns the first."""
    file = _read(data, most_pixels)
    if int(file.get("NumberOfFrames", 1) or 1) <= 1:
        return
    from pydicom.pixels.utils import iter_pixels

    try:
        for pixels in iter_pixels(file):
            yield _image(file, pixels)
    except (RuntimeError, NotImplementedError):
        raise BadDicom(COMPRESSED) from None


def _read(data: bytes, most_pixels: int) -> Any:
    """Return a DICOM file whose pixels are not yet decoded, and are not too many."""
    warnings.filterwarnings("ignore", module="pydicom")  # they quote values, and may name a patient
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    import pydicom

    beginning = io.BytesIO(data)
    beginning.seek(HEADER_BYTES)
    meta = pydicom.filereader.read_dataset(beginning, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    if str(meta.get("TransferSyntaxUID", "")) == DEFLATED:
        raise BadDicom("DICOM that is deflated as a whole; save it uncompressed")
    file = pydicom.dcmread(io.BytesIO(data))
    if "PixelData" not in file:
        raise BadDicom("DICOM without pixels")
    if int(file.Rows) * int(file.Columns) > most_pixels:
        raise BadDicom("too many pixels")
    return file


def _image(file: Any, pixels: NDArray[Any]) -> Image.Image:
    """Return a frame of a DICOM file with what the file says of it."""
    kind = str(file.PhotometricInterpretation)
    if pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8:
        return Image.fromarray(pixels)
    if pixels.ndim != 2 or not kind.startswith("MONOCHROME"):
        raise BadDicom(f"DICOM of {kind[:20]} pixels; expected grays, or RGB of 8 bits")
    slope, intercept = float(file.get("RescaleSlope", 1) or 1), float(file.get("RescaleIntercept", 0) or 0)
    inverted = kind == "MONOCHROME1"
    if pixels.dtype == np.uint8 and (slope, intercept) == (1, 0) and int(file.get("BitsStored", 8)) == 8:
        image = Image.fromarray(pixels)
    else:
        image = Image.fromarray(pixels.astype(np.float32) * np.float32(slope) + np.float32(intercept))
    image.info.update({STATED: _window(file), INVERTED: inverted})
    return image


def _window(file: Any) -> tuple[float, float] | None:
    """Return the first window that a file states, as its ends (DICOM PS3.3, C.11.2.1)."""
    center, width = (_first(file.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if center is None or width is None or width < 1:
        return None
    if str(file.get("VOILUTFunction", "LINEAR")) == "LINEAR_EXACT":
        return center - width / 2, center + width / 2
    return center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    return float(value if isinstance(value, int | float | str) else value[0])
