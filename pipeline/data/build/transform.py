"""The recipe: how a picture of a source becomes an image of a data set, and so which bytes it has."""

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field

from pipeline.common.imaging import Picture, Pixels, encode, is_ready, load_image, reframe
from pipeline.common.pictures.pages import read_pages
from pipeline.common.pictures.window import check_window
from pipeline.common.records import Record
from pipeline.common.shapes.crop import check_crop
from pipeline.common.shapes.frame import Fit, Frame, Resize, check_fill
from pipeline.common.shapes.size import Channels, between
from pipeline.data.dataset import LARGEST_IMAGE, Encoding, LabelType
from pipeline.data.sources.interface import Item, printable

Made = tuple[str, bytes | Pixels, tuple[Any, ...]]
"""An image of the data set: key, encoded bytes or pixels (height, width, channels), labels."""


class Skipped(Exception):
    """A good picture that gives no image; the message says why."""


class Recipe(Record):
    """What decides the bytes of the images; the same for all of them."""

    size: between(4, LARGEST_IMAGE)  # type: ignore[valid-type]
    """Pixels: 64 is a square, "96x64" is width x height."""
    channels: Channels
    """1 gray, 3 RGB, 4 RGBA."""
    encoding: Encoding
    quality: int = Field(ge=1, le=100)
    """Of jpg and webp; webp at 100 is lossless."""
    min_side: int = Field(ge=1)
    """Pictures whose shorter side has fewer pixels are refused."""
    fit: Fit = Field("crop", exclude_if=lambda fit: fit == "crop")
    """How a picture of another proportion becomes an image."""
    fill: Annotated[str, AfterValidator(check_fill)] = Field("", exclude_if=lambda fill: not fill)
    """The margins of `pad`."""
    window: Annotated[str, AfterValidator(check_window)] = Field("", exclude_if=lambda window: not window)
    """The part of 16-bit and floating-point values that becomes grays."""

    crop: Annotated[str, AfterValidator(check_crop)] = Field("", exclude_if=lambda crop: not crop)
    """The part of a picture that is taken before anything else."""
    resize: Resize = Field("lanczos", exclude_if=lambda resize: resize == "lanczos")
    """How pixels are added and removed."""
    all_frames: bool = Field(False, exclude_if=lambda every: not every)
    """Whether a file that holds several images gives all of them, not the first only."""

    extra_labels: ClassVar[dict[str, LabelType]] = {}
    """Labels that `make` adds to those of the picture."""

    @property
    def frame(self) -> Frame:
        """The form that every picture is brought to."""
        return Frame(self.size, self.channels, self.min_side, self.fit, self.fill, self.window, self.crop, self.resize)

    def make(self, item: Item, picture: Picture) -> list[Made]:
        """Return the images that a picture becomes, as (key, image, labels). Raises BadImage.

        With `all_frames` the images of a file that holds several have their number behind its key: all, or none.
        """
        key = printable(item.key)
        if self.all_frames and isinstance(picture, bytes) and (pages := read_pages(picture, self.frame)):
            return [(f"{key}#{number}", self._stored(page), item.labels) for number, page in enumerate(pages)]
        return [(key, self.convert(picture), item.labels)]

    def convert(self, picture: Picture) -> bytes | Pixels:
        """Return the stored form of an image: pixels if packed, else encoded bytes. Raises BadImage.

        A picture that already has the size, mode and format is passed through byte for byte.
        """
        if isinstance(picture, bytes):
            if self.encoding != "packed" and is_ready(picture, self.encoding, self.frame):
                return picture
            pixels = load_image(picture, self.frame)
        else:
            pixels = reframe(picture, self.frame)
        return self._stored(pixels)

    def _stored(self, pixels: Pixels) -> bytes | Pixels:
        return pixels if self.encoding == "packed" else encode(pixels, self.encoding, self.quality)
