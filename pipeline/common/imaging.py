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

from pipeline.common.pictures.color import is_srgb, to_srgb
from pipeline.common.pictures.formats import HEAD_BYTES, USUAL, advice, enable, kind_of
from pipeline.common.storage import write_atomic

Pixels = NDArray[np.uint8]

PIXEL_SCALE, PIXEL_OFFSET = 127.5, 128.0
"""An image value x in [-1, 1] is the pixel x * scale + offset, clamped and truncated; a pixel p is p / scale - 1."""

Format = Literal["jpg", "webp", "png"]

MAX_PIXELS = 1 << 27
"""Larger images are refused before they are decoded: a small file can unfold to terabytes."""
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
    formats: tuple[str, ...] = USUAL
    if (kind := kind_of(data[:HEAD_BYTES])) is not None and kind not in USUAL:
        if not enable(kind):
            raise BadImage(f"{kind} pictures: {advice(kind)}")
        formats = (kind,)
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
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

    Colors become sRGB by an embedded profile; transparency is composited on white; 16-bit gray is scaled to 8 bits,
    and so are floating-point pixels from 0 to 1, while others are refused.
    """
    mode = "L" if channels == 1 else "RGB"
    try:
        image.load()
        image = to_srgb(ImageOps.exif_transpose(image))
        if image.mode in _SIXTEEN_BIT:
            values = np.clip(np.asarray(image, np.float32) * (255 / 65535) + 0.5, 0, 255)
            image = Image.fromarray(values.astype(np.uint8))
        elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            picture = image.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            image = Image.alpha_composite(white, picture)
        elif image.mode == "F":
            image = _from_unit(np.asarray(image))
        return image if image.mode == mode else image.convert(mode)
    except BadImage:
        raise
    except Exception as error:  # decoders meet hostile bytes here and raise whatever they like
        reason = "truncated" if "truncated" in str(error) else f"undecodable ({type(error).__name__})"
        raise BadImage(reason) from None


def _from_unit(values: NDArray[np.float32]) -> Image.Image:
    """Return floating-point pixels (H, W) from 0 to 1 as gray. Raises BadImage for other ranges."""
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= 1:  # also where one is not a number
        raise BadImage(f"floating-point pixels from {low:.0e} to {high:.0e}, expected 0 to 1")
    return Image.fromarray((values * 255 + 0.5).astype(np.uint8))


def to_pixels(images: NDArray[np.float32]) -> Pixels:
    """Images (N, C, H, W) float in [-1, 1] -> (N, H, W, C) uint8, as `pipeline.model.sampling.to_uint8` makes them."""
    scaled = images.transpose(0, 2, 3, 1) * np.float32(PIXEL_SCALE) + np.float32(PIXEL_OFFSET)
    pixels: Pixels = np.clip(scaled, 0.0, 255.0).astype(np.uint8)
    return pixels


def square(image: Image.Image, size: int) -> Pixels:
    """Return the central square of an RGB, RGBX or L image, resized to `size` with antialiasing: (size, size, C)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    image = image.crop(box) if side == size else image.resize((size, size), Image.Resampling.LANCZOS, box)
    pixels: Pixels = np.asarray(image).reshape(size, size, -1)
    return np.ascontiguousarray(pixels[..., :3]) if image.mode == "RGBX" else pixels


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
    if channels == 1 and image.mode != "L":
        image = image.convert("RGB").convert("L")
    elif channels == 3 and image.mode == "L":
        image = image.convert("RGB")
    return square(image, size)


def _plain_jpeg(data: bytes, size: int, min_side: int) -> Image.Image | None:
    """Decode a JPEG that nothing is special about, to the very pixels of Pillow's `draft`, in RGBX or L.

    None where Pillow must look at it: EXIF or XMP that may turn it, colors that are not sRGB, CMYK, anything that
    libjpeg warns of, no JPEG.
    simplejpeg needs neither Python's lock nor Pillow's parsing of headers.
    """
    if data[:2] != b"\xff\xd8" or _needs_pillow(data):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        if min(height, width) < min_side or height * width > MAX_PIXELS or colors not in ("YCbCr", "RGB", "Gray"):
            return None
        scale = next((s for s in (8, 4, 2) if min(height, width) // (2 * size) >= s), 1)
        low_height, low_width = -(-height // scale), -(-width // scale)
        # Pillow takes pixels of four bytes without a copy, and resizes them a third quicker than those of three.
        order = "GRAY" if colors == "Gray" else "RGBX"
        pixels = simplejpeg.decode_jpeg(data, order, min_height=low_height, min_width=low_width)
    except ValueError:
        return None
    if pixels.shape[:2] != (low_height, low_width):
        return None
    mode = "L" if colors == "Gray" else "RGBX"
    return Image.frombuffer(mode, (low_width, low_height), pixels, "raw", mode, 0, 1)


def _needs_pillow(jpeg: bytes) -> bool:
    """Whether a JPEG has, before its pixels, EXIF or XMP, in which Pillow looks for an orientation, a profile of other
    colors than sRGB, or a broken header.
    """
    position = 2
    profile: dict[int, bytes] = {}
    while jpeg[position : position + 1] == b"\xff" and (marker := jpeg[position + 1 : position + 2]):
        if marker == b"\xda":  # the pixels
            return bool(profile) and not is_srgb(b"".join(profile[number] for number in sorted(profile)))
        if marker == b"\xe1":
            return True
        end = position + 2 + int.from_bytes(jpeg[position + 2 : position + 4])
        if marker == b"\xe2" and jpeg[position + 4 : position + 16] == b"ICC_PROFILE\0":
            profile[int.from_bytes(jpeg[position + 16 : position + 17])] = jpeg[position + 18 : end]
        position = end
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
    if isinstance(profile := image.info.get("icc_profile"), bytes) and not is_srgb(profile):
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
