"""Images to bytes and back: safe decoding of anything users have, encoding, grids and captioned sheets.

Everywhere an image is a uint8 array (height, width, channels); a batch is NHWC. Channels are 1 gray, 3 RGB, or 4 RGBA
with the color multiplied by the alpha; encoded images have straight alpha.
"""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from pipeline.common.pictures import color
from pipeline.common.pictures.color import is_srgb, to_srgb
from pipeline.common.pictures.dicom import INVERTED, STATED, BadDicom, open_dicom
from pipeline.common.pictures.formats import HEAD_BYTES, USUAL, advice, enable, kind_of
from pipeline.common.pictures.window import apply_window
from pipeline.common.shapes.crop import parse_crop
from pipeline.common.shapes.frame import MODES, Frame, over_checkerboard, place, premultiply, sound, straight
from pipeline.common.storage import write_atomic

Pixels = NDArray[np.uint8]
Picture = bytes | NDArray[Any]
"""A picture of a source: an encoded file, or numbers (height, width, channels); those of 8 bits are pixels."""

PIXEL_SCALE, PIXEL_OFFSET = 127.5, 128.0
"""An image value x in [-1, 1] is the pixel x * scale + offset, clamped and truncated; a pixel p is p / scale - 1."""

Format = Literal["jpg", "webp", "png"]

MAX_PIXELS = 1 << 27
"""Larger images are refused before they are decoded: a small file can unfold to terabytes."""
PROFILE_MARKS, PROFILE_WITHIN = (b"ICC_PROFILE\0", b"iCCP", b"ICCP", b"acsp"), 1 << 16
"""One of these is among the first bytes of a picture with a color profile: of JPEG, PNG, WebP, any other."""
# 16-bit gray images scale to 8 bits; Pillow's own conversion would clip them.
_SIXTEEN_BIT = {"I;16", "I;16L", "I;16B", "I;16N", "I"}

# The bound above is checked here, with an error that names the size; Pillow's warning would only add noise. So would
# those of broken metadata: a picture is decoded, or refused by name.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


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
        if kind == "DICOM":
            return open_dicom(data, MAX_PIXELS)
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        raise BadImage("not an image") from None
    except Image.DecompressionBombError:
        raise BadImage("too many pixels") from None
    except BadDicom as error:
        raise BadImage(str(error)) from None
    except Exception as error:
        raise BadImage(f"undecodable ({type(error).__name__})") from None
    if image.width * image.height > MAX_PIXELS:
        raise BadImage("too many pixels")
    return image


def upright(image: Image.Image, channels: int, window: str = "") -> Image.Image:
    """Decode the first frame, apply its EXIF orientation, and return it as mode L, RGB or RGBA. Raises BadImage.

    Colors become sRGB by an embedded profile; transparency is composited on white, except in RGBA; 16-bit gray is
    scaled to 8 bits, and so are floating-point pixels from 0 to 1, while others are refused. With `window` that part of
    the values becomes the grays.
    """
    mode = MODES[channels]
    try:
        image.load()
        image = to_srgb(ImageOps.exif_transpose(image))
        info = image.info
        if window and (image.mode in _SIXTEEN_BIT or image.mode == "F"):
            try:
                image = Image.fromarray(apply_window(np.asarray(image), window, info.get(STATED)))
            except ValueError as error:
                raise BadImage(str(error)) from None
        elif image.mode in _SIXTEEN_BIT:
            values = np.clip(np.asarray(image, np.float32) * (255 / 65535) + 0.5, 0, 255)
            image = Image.fromarray(values.astype(np.uint8))
        elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            picture = image.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            image = picture if channels == 4 else Image.alpha_composite(white, picture)
        elif image.mode == "F":
            image = Image.fromarray(_grays(np.asarray(image)[..., None], "")[..., 0])
        if info.get(INVERTED):
            image = ImageOps.invert(image)
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


def load_image(data: bytes, frame: Frame) -> Pixels:
    """Decode an encoded image, put it upright and into its frame: (height, width, channels). Raises BadImage.

    JPEGs much larger than needed are decoded at a fraction of their size, never below twice the target.
    """
    image = _plain_jpeg(data, frame)
    if image is None:
        image = open_image(data)
        if min(image.size) < frame.min_side:
            raise BadImage(f"smaller than {frame.min_side} pixels")
        image.draft(None, _twice(image, frame))
        image = upright(image, frame.channels, frame.window)
    return in_frame(image, frame)


def in_frame(image: Image.Image, frame: Frame) -> Pixels:
    """Return an upright L, RGB or RGBA picture in its frame: (height, width, channels). Raises BadImage."""
    mode = MODES[frame.channels]
    try:
        return place(image if image.mode == mode else image.convert(mode), frame)
    except ValueError as error:
        raise BadImage(str(error)) from None


def _twice(image: Image.Image, frame: Frame) -> tuple[int, int]:
    """Return the width and height below which a picture, as it is stored, is not to be decoded."""
    if frame.crop:
        return image.size
    turned = frame.width != frame.height and _turned(image)
    width, height = (frame.height, frame.width) if turned else (frame.width, frame.height)
    return 2 * width, 2 * height


def _turned(image: Image.Image) -> bool:
    """Whether EXIF puts an image on its side. What is broken there, `upright` reports."""
    try:
        return int(image.getexif().get(0x0112, 1)) >= 5
    except Exception:  # decoders meet hostile bytes here and raise whatever they like
        return False


def reframe(values: NDArray[Any], frame: Frame) -> Pixels:
    """Return an image of ours, or any numbers (height, width, channels), in another frame. Raises BadImage."""
    pixels = values if values.dtype == np.uint8 else _grays(values, frame.window)
    height, width, channels = pixels.shape
    if min(height, width) < frame.min_side:
        raise BadImage(f"smaller than {frame.min_side} pixels")
    if pixels.shape == (frame.height, frame.width, frame.channels) and not frame.crop:
        return pixels
    image = _picture(pixels)
    if channels == 4 and frame.channels != 4:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return in_frame(image, frame)


def _grays(values: NDArray[Any], window: str) -> Pixels:
    """Return numbers (height, width, channels) that are not of 8 bits as an image.

    Without a window 16 bits are scaled to 8, and floating-point numbers must lie within 0 and 1. Raises BadImage for
    others.
    """
    if window:
        try:
            pixels = apply_window(values, window, None)
        except ValueError as error:
            raise BadImage(str(error)) from None
    elif values.dtype == np.uint16:
        pixels = (values.astype(np.float32) * (255 / 65535) + 0.5).astype(np.uint8)
    elif values.dtype.kind == "f":
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= 1:  # also where one is not a number
            raise BadImage(f"floating-point pixels from {low:.0e} to {high:.0e}, expected 0 to 1, or --window")
        pixels = (values.astype(np.float32) * 255 + 0.5).astype(np.uint8)
    else:
        if int(values.min()) < 0 or int(values.max()) > 255:
            raise BadImage("pixels that are no 8 bits, expected 0 to 255, or --window")
        pixels = values.astype(np.uint8)
    return premultiply(pixels) if pixels.shape[2] == 4 else pixels


def has_window(picture: Picture) -> bool:
    """Whether a window changes a picture: whether it is gray of more than 8 bits. Raises BadImage."""
    if not isinstance(picture, bytes):
        return picture.dtype != np.uint8
    mode = open_image(picture).mode
    return mode in _SIXTEEN_BIT or mode == "F"


def aspect_of(picture: Picture, frame: Frame) -> float:
    """Return width over height of what is seen of a picture, upright. Raises BadImage."""
    if frame.crop:
        box = parse_crop(frame.crop)
        return box.width / box.height
    if not isinstance(picture, bytes):
        return float(picture.shape[1] / picture.shape[0])
    image = open_image(picture)
    return image.height / image.width if _turned(image) else image.width / image.height


def size_of(picture: Picture) -> tuple[int, int]:
    """Return the width and height of a picture as it is stored, by its header. Raises BadImage."""
    if not isinstance(picture, bytes):
        return picture.shape[1], picture.shape[0]
    if picture[:2] == b"\xff\xd8":
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(picture)
        except ValueError:
            pass
        else:
            return width, height
    return open_image(picture).size


def keeps_other_colors(picture: Picture) -> bool:
    """Whether a picture has a color profile that cannot be used: its colors are taken as sRGB."""
    if not isinstance(picture, bytes) or not any(mark in picture[:PROFILE_WITHIN] for mark in PROFILE_MARKS):
        return False
    try:
        return color.keeps_other_colors(open_image(picture))
    except BadImage:  # libjpeg reads some that Pillow does not: a count is no reason to lose them
        return False


def _plain_jpeg(data: bytes, frame: Frame) -> Image.Image | None:
    """Decode a JPEG that nothing is special about, to the very pixels of Pillow's `draft`, in RGB or L.

    None where Pillow must look at it: EXIF or XMP that may turn it, colors that are not sRGB, CMYK, anything that
    libjpeg warns of, no JPEG.
    simplejpeg needs neither Python's lock nor Pillow's parsing of headers.
    """
    if data[:2] != b"\xff\xd8" or _needs_pillow(data):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        if min(height, width) < frame.min_side or height * width > MAX_PIXELS or colors not in ("YCbCr", "RGB", "Gray"):
            return None
        fraction = 1 if frame.crop else min(height // (2 * frame.height), width // (2 * frame.width))
        scale = next((s for s in (8, 4, 2) if fraction >= s), 1)
        low_height, low_width = -(-height // scale), -(-width // scale)
        order = "GRAY" if colors == "Gray" else "RGB"
        pixels = simplejpeg.decode_jpeg(data, order, min_height=low_height, min_width=low_width)
    except ValueError:
        return None
    if pixels.shape[:2] != (low_height, low_width):
        return None
    return Image.fromarray(pixels[..., 0] if colors == "Gray" else pixels)


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


def is_ready(data: bytes, format: Format, frame: Frame) -> bool:
    """Whether an encoded image can be kept as it is: right format, size and mode, whole, upright, one frame.

    A JPEG that `decode` refuses is not: Pillow reads some that libjpeg warns of, and encoded anew they are sound.
    Raises BadImage when a PNG or WebP looks right but its pixels cannot be decoded.
    """
    image = open_image(data)
    wanted = {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}[format]
    whole = image.size == (frame.width, frame.height) and not frame.crop
    if image.format != wanted or image.mode != MODES[frame.channels] or not whole:
        return False
    if format != "jpg":
        upright(image, frame.channels)  # before anything asks for EXIF, which reads a PNG to its end
    if getattr(image, "n_frames", 1) > 1 or "transparency" in image.info or image.getexif().get(0x0112, 1) != 1:
        return False
    if isinstance(profile := image.info.get("icc_profile"), bytes) and not is_srgb(profile):
        return False
    if format == "png" and data[24] != 8:  # bits per sample: Pillow shows 16-bit RGB as 8-bit RGB
        return False
    if format == "jpg":
        try:
            decode(data, frame.channels)
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
            if channels == 4:
                pixels = np.concatenate([pixels, np.full((height, width, 1), 255, np.uint8)], -1)
        except BadImage:
            raise
        except ValueError as error:
            raise BadImage(f"undecodable ({error})") from None
        return pixels
    picture = np.asarray(upright(open_image(bytes(data)), channels))
    return premultiply(picture) if channels == 4 else picture.reshape(*picture.shape[:2], channels)


def encode(image: Pixels, format: Format, quality: int = 95) -> bytes:
    """Encode (height, width, channels) as jpg (full color resolution), webp (lossless at quality 100) or png.

    RGBA is written with straight alpha; jpg has none.
    """
    gray = image.shape[-1] == 1
    if format == "jpg":
        assert image.shape[-1] != 4, "refused by the option: a JPEG has no transparency"
        data: bytes = simplejpeg.encode_jpeg(
            np.ascontiguousarray(image), quality, "GRAY" if gray else "RGB", "Gray" if gray else "444"
        )
        return data
    buffer = io.BytesIO()
    picture = _picture(image)
    if format == "webp":
        picture.save(buffer, "WEBP", quality=quality, lossless=quality == 100, method=4)
    else:
        picture.save(buffer, "PNG")
    return buffer.getvalue()


def _picture(image: Pixels) -> Image.Image:
    """Return (height, width, channels) as Pillow's L, RGB or RGBA, which has straight alpha."""
    if image.shape[-1] == 1:
        return Image.fromarray(image[..., 0])
    return Image.fromarray(np.ascontiguousarray(straight(sound(image)) if image.shape[-1] == 4 else image))


def grid(images: Pixels, columns: int, *, gap: int = 0, background: int = 255) -> Pixels:
    """Lay out a batch (N, H, W, C) row by row as one image (height, width, C); RGBA as RGB over a checkerboard."""
    if images.shape[-1] == 4:
        images = over_checkerboard(images)
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
        block = grid(images, columns, gap=gap)
        block = np.repeat(block, 3, 2) if block.shape[-1] == 1 else block
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
    """Write (height, width, channels) as a PNG, whole or not at all."""
    write_atomic(path, encode(image, "png"))
