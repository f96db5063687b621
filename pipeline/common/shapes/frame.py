"""How a picture of any size becomes an image of one size: cropped, padded or stretched, and resized."""

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from pipeline.common.shapes.crop import cut
from pipeline.common.shapes.size import parse_size

Fit = Literal["crop", "pad", "stretch"]
"""crop: the largest central part. pad: the whole picture, with margins. stretch: the whole, at another proportion."""
FITS: tuple[Fit, ...] = get_args(Fit)
EDGE = "edge"
"""The fill of margins that repeats the picture's outermost pixels."""
Resize = Literal["lanczos", "area"]
"""lanczos: the sharpest that does not alias. area: the mean of the pixels that an image's pixel covers."""
FILTERS: dict[Resize, Image.Resampling] = {"lanczos": Image.Resampling.LANCZOS, "area": Image.Resampling.BOX}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode of an image with so many channels."""


class Frame(NamedTuple):
    """The form that pictures are brought to."""

    size: int | str
    """Pixels, as `written` writes them."""
    channels: int
    min_side: int = 1
    """Pictures whose shorter side has fewer pixels are refused."""
    fit: Fit = "crop"
    fill: str = ""
    """The margins of `pad`: a color, `edge`, or '' for black; in RGBA for transparent."""
    window: str = ""
    """The part of 16-bit and floating-point values that becomes grays; see `check_window`."""
    crop: str = ""
    """The part of the picture that is taken first; see `parse_crop`."""
    resize: Resize = "lanczos"
    """How pixels are added and removed."""

    @property
    def width(self) -> int:
        """In pixels."""
        return parse_size(self.size)[0]

    @property
    def height(self) -> int:
        """In pixels."""
        return parse_size(self.size)[1]


def check_fill(fill: str) -> str:
    """Return a fill that `Frame` takes. Raises ValueError."""
    if fill not in ("", EDGE):
        try:
            ImageColor.getrgb(fill)
        except ValueError:
            raise ValueError(f"expected {EDGE}, or a color such as white or #102030") from None
    return fill


def place(image: Image.Image, frame: Frame) -> NDArray[np.uint8]:
    """Return an L, RGB or RGBA picture in its frame, resized with antialiasing: uint8 (height, width, channels).

    RGBA is multiplied by its alpha first: what is transparent has no color that could bleed. Raises ValueError, with
    the reason, when the part that `crop` names does not lie in the picture.
    """
    if frame.crop:
        image = cut(image, frame.crop)
    if image.mode == "RGBA":
        image = Image.frombytes("RGBa", image.size, premultiply(np.asarray(image)).tobytes())
    width, height = frame.width, frame.height
    if frame.fit == "pad":
        pixels = _padded(image, frame)
    elif frame.fit == "stretch":
        pixels = _array(image.resize((width, height), FILTERS[frame.resize]))
    else:
        wide = image.width * height >= image.height * width
        across = image.height * width / height if wide else image.width
        down = image.height if wide else image.width * height / width
        left, top = (image.width - across) // 2, (image.height - down) // 2
        box = (left, top, left + across, top + down)
        if (across, down) == (width, height):
            pixels = _array(image.crop((int(left), int(top), int(left) + width, int(top) + height)))
        else:
            pixels = _array(image.resize((width, height), FILTERS[frame.resize], box))
    return sound(pixels) if pixels.shape[2] == 4 else pixels


def _array(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels of a picture, uint8 (height, width, channels)."""
    return np.asarray(image).reshape(image.height, image.width, -1)


def _padded(image: Image.Image, frame: Frame) -> NDArray[np.uint8]:
    """Return the whole picture in the middle of the frame."""
    width, height = frame.width, frame.height
    scale = min(width / image.width, height / image.height)
    inner = max(1, min(width, round(image.width * scale))), max(1, min(height, round(image.height * scale)))
    pixels = _array(image if image.size == inner else image.resize(inner, FILTERS[frame.resize]))
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    margins = (top, height - inner[1] - top), (left, width - inner[0] - left), (0, 0)
    if frame.fill == EDGE:
        return np.asarray(np.pad(pixels, margins, "edge"))
    canvas = np.empty((height, width, pixels.shape[2]), np.uint8)
    canvas[:] = _color(frame.fill, frame.channels)
    canvas[top : top + inner[1], left : left + inner[0]] = pixels
    return canvas


def _color(fill: str, channels: int) -> NDArray[np.uint8]:
    """Return a fill as one pixel (channels,)."""
    if not fill:
        return np.zeros(channels, np.uint8)
    color = ImageColor.getcolor(fill, MODES[channels])
    pixel = np.array(color, np.uint8).reshape(1, 1, -1)
    return np.asarray((premultiply(pixel) if channels == 4 else pixel)[0, 0])


def premultiply(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return straight RGBA (..., 4) with the colors multiplied by the alpha, rounded."""
    result = pixels.copy()
    alpha = pixels[..., 3:].astype(np.uint16)
    result[..., :3] = (pixels[..., :3] * alpha + 127) // 255
    return result


def straight(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return premultiplied RGBA (..., 4) as files hold it, the colors divided by the alpha; transparent is black.

    Of `sound` pixels `premultiply` makes the very same again.
    """
    result = pixels.copy()
    alpha = pixels[..., 3:].astype(np.uint32)
    divisor = np.maximum(alpha, 1)
    result[..., :3] = np.minimum((pixels[..., :3] * np.uint32(255) + divisor // 2) // divisor, 255) * (alpha > 0)
    return result


def sound(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return premultiplied RGBA (..., 4) in which no color is larger than the alpha, as none can be."""
    return np.concatenate([np.minimum(pixels[..., :3], pixels[..., 3:]), pixels[..., 3:]], -1)


def over(pixels: NDArray[np.uint8], background: NDArray[np.uint8] | int) -> NDArray[np.uint8]:
    """Return premultiplied RGBA (..., 4) over an opaque background, RGB: uint8 (..., 3)."""
    behind = np.asarray(background, np.uint16) * (255 - pixels[..., 3:].astype(np.uint16))
    seen = pixels[..., :3] + (behind + 127) // 255
    return np.minimum(seen, 255).astype(np.uint8)


SQUARE = 8
"""Pixels of a square of the checkerboard that transparency is shown on."""


def over_checkerboard(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return premultiplied RGBA images (N, H, W, 4) over light and dark squares: uint8 (N, H, W, 3)."""
    height, width = images.shape[1:3]
    dark = (np.arange(height)[:, None] // SQUARE + np.arange(width) // SQUARE) % 2
    return over(images, np.where(dark, 204, 255)[..., None])
