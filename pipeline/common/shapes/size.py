"""The size of images: how it is written, and which sizes the networks can have. Imports nothing heavy."""

import math
import re
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator

SMALLEST, LARGEST = 16, 512
"""Sides in pixels of the images that the networks make."""
BASES = range(3, 8)
"""Sides of the first map of the generator, and of the last one of the discriminator."""

Channels = Literal[1, 3, 4]
"""1 gray, 3 RGB, 4 RGBA with the color multiplied by the alpha."""

FORM = "a number of pixels, or WIDTHxHEIGHT such as 96x64"


def parse_size(value: Any) -> tuple[int, int]:
    """Return (width, height) of `64`, `"64"` or `"96x64"`: a square, or width x height. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    found = re.fullmatch(r"([0-9]{1,6})(?:[x×X]([0-9]{1,6}))?", value.strip()) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f"expected {FORM}")
    width = int(found[1])
    return width, int(found[2] or width)


def written(width: int, height: int) -> int | str:
    """Return a size as files hold it: 64 is a square, "96x64" a rectangle, width x height."""
    return width if width == height else f"{width}x{height}"


def in_words(width: int, height: int) -> str:
    """Return a size as messages show it: always width x height."""
    return f"{width}x{height}"


def with_aspect(width: int, height: int, aspect: float) -> int | str:
    """Return the size of a proportion (width over height) that comes of a size by lengthening one of its sides."""
    wide = aspect * height >= width
    return written(round(aspect * height), height) if wide else written(width, round(width / aspect))


def between(smallest: int, largest: int) -> Any:
    """Return the type of a setting that holds a size whose sides are within these bounds, as `written` writes it."""

    def check(value: Any) -> int | str:
        width, height = parse_size(value)
        if not (smallest <= min(width, height) and max(width, height) <= largest):
            raise ValueError(f"expected sides of {smallest} to {largest} pixels")
        return written(width, height)

    return Annotated[int | str, BeforeValidator(check)]


class Stages(NamedTuple):
    """How a size comes about: from a map of `height` x `width`, doubled `doublings` times."""

    doublings: int
    height: int
    width: int


def stages(width: int, height: int) -> Stages | None:
    """Return the stages of networks for images of a size, or None if there are none.

    Where a map of 3 and one of 6 a side both lead to a size, it is 6: fewer doublings have fewer weights, and it is
    what others do (Miyato et al. 2018 make 48 x 48 from 6 x 6).
    """
    if not (min(width, height) >= SMALLEST and max(width, height) <= LARGEST):
        return None
    for doublings in range(1, LARGEST.bit_length()):
        scale = 1 << doublings
        bases = height // scale, width // scale
        if all(base in BASES for base in bases) and not (width % scale or height % scale):
            return Stages(doublings, *bases)
    return None


def nearest(width: int, height: int) -> list[tuple[int, int]]:
    """Return the two sizes (width, height) nearest to one that the networks cannot have; of a square, squares."""
    scales = [1 << doublings for doublings in range(1, LARGEST.bit_length())]
    sides = {(base * scale, other * scale) for scale in scales for base in BASES for other in BASES}
    sides = {size for size in sides if stages(*size) and (width != height or size[0] == size[1])}
    width, height = max(width, 1), max(height, 1)

    def distance(size: tuple[int, int]) -> float:
        wider, higher = math.log(size[0] / width), math.log(size[1] / height)
        return wider**2 + higher**2 + 4 * (wider - higher) ** 2  # another proportion is worse than another area

    return sorted(sorted(sides, key=distance)[:2])


def refusal(width: int, height: int) -> str:
    """Return why the networks cannot have a size, and the two nearest that they can; '' if they can."""
    if stages(width, height):
        return ""
    first, second = (in_words(*size) for size in nearest(width, height))
    return (
        f"no network makes {in_words(width, height)}: each side must be 3 to 7 times the same power of two, and "
        f"{SMALLEST} to {LARGEST} pixels; the nearest that fit: {first}, {second}"
    )
