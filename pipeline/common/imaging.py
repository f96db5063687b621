"""Images to bytes and back: safe decoding of anything users have, encoding, grids and captioned sheets.

Everywhere an image is a uint8 array (height, width, channels), channels 1 or 3; a batch is NHWC.
"""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from pipeline.common.storage import write_atomic

Pixels = NDArray[np.uint8]

PIXEL_SCALE, PIXEL_OFFSET = 127.5, 128.0
"""An image value x in [-1, 1] is the pixel x * scale + offset, clamped and truncated; a pixel p is p / scale - 1."""

Format = Literal["jpg", "webp", "png"]

MAX_PIXELS = 1 << 27
"""Larger images are refused before they are decoded: a small file can unfold to terabytes."""
# Only these decoders ever see a file. Others run programs (EPS) or are rarely used and rarely tested.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
# 16-bit gray images scale to 8 bits; Pillow's own conversion would clip them.
_SIXTEEN_BIT = {"I;16", "I;16L", "I;16B", "I;16N", "I"}

# The bound above is checked here, with an error that names the size; Pillow's warning would only add noise.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(ValueError):
    """An image that cannot be used; the message is the reason, short enough to be counted by."""


def open_image(data: bytes) -> Image.Image:
    """Open an encoded image without decoding its pixels yet. Raises BadImage."""
    if not data:
        raise BadImage("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadImage("not an image") from None
    except Image.DecompressionBombError:
        raise BadImage("too many pixels") from None
    except Exception as error:
        raise BadImage(f"undecodable ({type(error).__name__})") from None
    if image.width * image.height > MAX_PIXELS:
        raise BadImage("too many pixels")
    return image


def upright(image: Image.Image, channels: int) -> Image.Image:
    """Decode the first frame, apply its EXIF orientation, and return it as mode RGB or L. Raises BadImage.

    Transparency is composited on white; 16-bit gray is scaled to 8 bits.
    """
    mode = "L" if channels == 1 else "RGB"
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in _SIXTEEN_BIT:
            values = np.clip(np.asarray(image, np.float32) * (255 / 65535) + 0.5, 0, 255)
            image = Image.fromarray(values.astype(np.uint8))
        elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            picture = image.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            image = Image.alpha_composite(white, picture)
        elif image.mode == "F":
            raise BadImage("floating-point pixels")
        return image if image.mode == mode else image.convert(mode)
    except BadImage:
        raise
    except Exception as error:  # decoders meet hostile bytes here and raise whatever they like
        reason = "truncated" if "truncated" in str(error) else f"undecodable ({type(error).__name__})"
        raise BadImage(reason) from None


def to_pixels(images: NDArray[np.float32]) -> Pixels:
    """Images (N, C, H, W) float in [-1, 1] -> (N, H, W, C) uint8, as `pipeline.model.sampling.to_uint8` makes them."""
    scaled = images.transpose(0, 2, 3, 1) * np.float32(PIXEL_SCALE) + np.float32(PIXEL_OFFSET)
    pixels: Pixels = np.clip(scaled, 0.0, 255.0).astype(np.uint8)
    return pixels


def square(image: Image.Image, size: int) -> Pixels:
    """Return the central square of an RGB or L image, resized to `size` with antialiasing: (size, size, C)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    image = image.crop(box) if side == size else image.resize((size, size), Image.Resampling.LANCZOS, box)
    return np.asarray(image).reshape(size, size, -1)


def load_square(data: bytes, size: int, channels: int, *, min_side: int = 1) -> Pixels:
    """Decode, put upright, crop and resize an encoded image: (size, size, channels). Raises BadImage.

    JPEGs much larger than needed are decoded at a fraction of their size, never below twice the target.
    """
    image = _plain_jpeg(data, size, min_side)
    if image is None:
        image = open_image(data)
        if min(image.size) < min_side:
            raise BadImage(f"smaller than {min_side} pixels")
        image.draft(None, (2 * size, 2 * size))
        image = upright(image, channels)
    mode = "L" if channels == 1 else "RGB"
    return square(image if image.mode == mode else image.convert(mode), size)


def _plain_jpeg(data: bytes, size: int, min_side: int) -> Image.Image | None:
    """Decode a JPEG that nothing is special about, to the very pixels of Pillow's `draft`, in RGB or L.

    None where Pillow must look at it: EXIF or XMP that may turn it, CMYK, anything that libjpeg warns of, no JPEG.
    simplejpeg needs neither Python's lock nor Pillow's parsing of headers.
    """
    if data[:2] != b"\xff\xd8" or _may_be_turned(data):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        if min(height, width) < min_side or height * width > MAX_PIXELS or colors not in ("YCbCr", "RGB", "Gray"):
            return None
        scale = next((s for s in (8, 4, 2) if min(height, width) // (2 * size) >= s), 1)
        low_height, low_width = -(-height // scale), -(-width // scale)
        pixels = simplejpeg.decode_jpeg(
            data, "GRAY" if colors == "Gray" else "RGB", min_height=low_height, min_width=low_width
        )
    except ValueError:
        return None
    if pixels.shape[:2] != (low_height, low_width):
        return None
    return Image.fromarray(pixels[..., 0] if colors == "Gray" else pixels)


def _may_be_turned(jpeg: bytes) -> bool:
    """Whether a JPEG has EXIF or XMP before its pixels, where Pillow looks for an orientation, or a broken header."""
    position = 2
    while jpeg[position : position + 1] == b"\xff" and (marker := jpeg[position + 1 : position + 2]):
        if marker == b"\xda":  # the pixels
            return False
        if marker == b"\xe1":
            return True
        position += 2 + int.from_bytes(jpeg[position + 2 : position + 4])
    return True


def is_ready(data: bytes, format: Format, size: int, channels: int) -> bool:
    """Whether an encoded image can be kept as it is: right format, size and mode, upright, opaque, one frame.

    A JPEG that `decode` refuses is not: Pillow reads some that libjpeg warns of, and encoded anew they are sound.
    Raises BadImage when a PNG or WebP looks right but its pixels cannot be decoded.
    """
    image = open_image(data)
    wanted = {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}[format]
    if image.format != wanted or image.size != (size, size) or image.mode != ("L" if channels == 1 else "RGB"):
        return False
    if format != "jpg":
        upright(image, channels)  # before anything asks for EXIF, which reads a PNG to its end
    if getattr(image, "n_frames", 1) > 1 or "transparency" in image.info or image.getexif().get(0x0112, 1) != 1:
        return False
    if format == "png" and data[24] != 8:  # bits per sample: Pillow shows 16-bit RGB as 8-bit RGB
        return False
    if format == "jpg":
        try:
            decode(data, channels)
        except BadImage:
            return False
    return True


def decode(data: bytes | memoryview, channels: int = 3) -> Pixels:
    """Decode an encoded image of one of our shards at its own size: (height, width, channels). Raises BadImage."""
    if bytes(data[:2]) == b"\xff\xd8":
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            if height * width > MAX_PIXELS:
                raise BadImage("too many pixels")
            pixels: Pixels = simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB")
        except BadImage:
            raise
        except ValueError as error:
            raise BadImage(f"undecodable ({error})") from None
        return pixels
    picture = np.asarray(upright(open_image(bytes(data)), channels))
    return picture.reshape(*picture.shape[:2], channels)


def encode(image: Pixels, format: Format, quality: int = 95) -> bytes:
    """Encode (height, width, 1 or 3) as jpg (full color resolution), webp (lossless at quality 100) or png."""
    gray = image.shape[-1] == 1
    if format == "jpg":
        data: bytes = simplejpeg.encode_jpeg(
            np.ascontiguousarray(image), quality, "GRAY" if gray else "RGB", "Gray" if gray else "444"
        )
        return data
    buffer = io.BytesIO()
    picture = Image.fromarray(image[..., 0] if gray else image)
    if format == "webp":
        picture.save(buffer, "WEBP", quality=quality, lossless=quality == 100, method=4)
    else:
        picture.save(buffer, "PNG")
    return buffer.getvalue()


def grid(images: Pixels, columns: int, *, gap: int = 0, background: int = 255) -> Pixels:
    """Lay out a batch (N, H, W, C) row by row as one image (height, width, C)."""
    num, height, width, channels = images.shape
    columns = max(1, min(columns, num))
    rows = -(-num // columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, channels)
    canvas = np.full(shape, background, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def labeled_sheet(
    rows: Sequence[tuple[str, Pixels]], columns: int = 12, *, gap: int = 2, text_size: int = 13
) -> Pixels:
    """Stack captioned groups of images, each (caption, (N, H, W, C)), as one RGB image on white."""
    font = ImageFont.load_default(text_size)
    blocks = []
    for caption, images in rows:
        block = np.repeat(grid(images, columns, gap=gap), 4 - images.shape[-1], 2)[..., :3]
        blocks.append((caption, block))
    width = max([int(font.getlength(caption)) for caption, _ in blocks] + [block.shape[1] for _, block in blocks])
    line = text_size + 7
    height = sum(block.shape[0] + line * bool(caption) + gap for caption, block in blocks)
    sheet = Image.new("RGB", (width + 2 * gap, height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    top = gap
    for caption, block in blocks:
        if caption:
            draw.text((gap, top + 1), caption, "black", font)
            top += line
        sheet.paste(Image.fromarray(block), (gap, top))
        top += block.shape[0] + gap
    return np.asarray(sheet)


def save_png(path: Path, image: Pixels) -> None:
    """Write (height, width, 1 or 3) as a PNG, whole or not at all."""
    write_atomic(path, encode(image, "png"))
