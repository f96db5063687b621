"""The recipe: how a picture of a source becomes an image of a data set, and so which bytes it has."""

from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from pipeline.common.imaging import BadImage, Pixels, encode, is_ready, load_square, square
from pipeline.common.records import Record
from pipeline.data.dataset import Encoding, LabelType
from pipeline.data.sources.interface import Item, printable

Made = tuple[str, bytes | Pixels, tuple[Any, ...]]
"""An image of the data set: key, encoded bytes or pixels (size, size, channels), labels."""


class Skipped(Exception):
    """A good picture that gives no image; the message says why."""


class Recipe(Record):
    """What decides the bytes of the images; the same for all of them."""

    size: int = Field(ge=4, le=4096)
    """Height and width in pixels."""
    channels: Literal[1, 3]
    """1 gray, 3 RGB."""
    encoding: Encoding
    quality: int = Field(ge=1, le=100)
    """Of jpg and webp; webp at 100 is lossless."""
    min_side: int = Field(ge=1)
    """Pictures whose shorter side has fewer pixels are refused."""

    extra_labels: ClassVar[dict[str, LabelType]] = {}
    """Labels that `make` adds to those of the picture."""

    def make(self, item: Item, picture: bytes | Pixels) -> list[Made]:
        """Return the images that a picture becomes, as (key, image, labels). Raises BadImage."""
        return [(printable(item.key), self.convert(picture), item.labels)]

    def convert(self, picture: bytes | Pixels) -> bytes | Pixels:
        """Return the stored form of an image: pixels if packed, else encoded bytes. Raises BadImage.

        A picture that already has the size, mode and format is passed through byte for byte.
        """
        if isinstance(picture, bytes):
            if self.encoding != "packed" and is_ready(picture, self.encoding, self.size, self.channels):
                return picture
            pixels = load_square(picture, self.size, self.channels, min_side=self.min_side)
        else:
            pixels = self._resize(picture)
        return pixels if self.encoding == "packed" else encode(pixels, self.encoding, self.quality)

    def _resize(self, picture: Pixels) -> Pixels:
        height, width, channels = picture.shape
        if min(height, width) < self.min_side:
            raise BadImage(f"smaller than {self.min_side} pixels")
        if (height, width, channels) == (self.size, self.size, self.channels):
            return picture
        image = Image.fromarray(picture[..., 0] if channels == 1 else np.ascontiguousarray(picture))
        return square(image.convert("L" if self.channels == 1 else "RGB"), self.size)
