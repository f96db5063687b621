"""All images in a file that holds several: the pages of a TIFF, the frames of an animation or of a DICOM file."""

from collections.abc import Iterator
from itertools import count

from PIL import Image

from pipeline.common.imaging import MAX_PIXELS, BadImage, Pixels, in_frame, open_image, upright
from pipeline.common.pictures.dicom import BadDicom, open_frames
from pipeline.common.pictures.formats import HEAD_BYTES, is_enabled, kind_of
from pipeline.common.shapes.frame import Frame

HOLD_SEVERAL = ("GIF", "PNG", "WEBP", "TIFF", "AVIF")
"""Formats whose further images are pictures. In a phone's JPEG and HEIC they are depths, gains and thumbnails."""
MOST_PIXELS = 1 << 32
"""Of all images in a file together."""
MOST_BYTES = 1 << 29
"""Of the images that a file gives: they are in memory until all are known to be sound."""


def read_pages(data: bytes, frame: Frame) -> list[Pixels]:
    """Return all images in a file, each in its frame; [] when it holds only one. Raises BadImage.

    Frames of an animation are as they are seen: drawn over those before them.
    """
    made: list[Pixels] = []
    pixels = 0
    try:
        for image in _images(data):
            if min(image.size) < frame.min_side:
                raise BadImage(f"smaller than {frame.min_side} pixels")
            pixels += image.width * image.height
            if pixels > MOST_PIXELS or image.width * image.height > MAX_PIXELS:
                raise BadImage("too many pixels")
            made.append(in_frame(upright(image, frame.channels, frame.window), frame))
            if len(made) * made[0].nbytes > MOST_BYTES:
                raise BadImage(f"more images than {MOST_BYTES >> 20} MB hold")
    except BadImage:
        raise
    except BadDicom as error:
        raise BadImage(str(error)) from None
    except Exception as error:  # decoders meet hostile bytes here and raise whatever they like
        raise BadImage(f"undecodable ({type(error).__name__})") from None
    return made


def _images(data: bytes) -> Iterator[Image.Image]:
    """Yield the images of a file that holds more than one."""
    if kind_of(data[:HEAD_BYTES]) == "DICOM" and is_enabled("DICOM"):
        yield from open_frames(data, MAX_PIXELS)
        return
    image = open_image(data)
    if image.format not in HOLD_SEVERAL:
        return
    try:
        image.seek(1)  # not `n_frames`, which looks at all of them at once
    except EOFError:
        return
    for number in count():
        try:
            image.seek(number)
        except EOFError:
            return
        yield image
